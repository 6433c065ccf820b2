"""A run's weights for others: from the newest checkpoint to one file.

In: a run folder, a path, a format. Out: the file, written whole or not at all, and a report of what it holds and what it
cannot say. Nothing of the run changes. The file's form is `models.export`'s; here are checkpoints, suffixes and refusals.
"""

import json
import uuid
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig
from crate_ray.models import Classifier, MaskedAutoencoder, create_model, load_weights
from crate_ray.models.export import export_onnx, export_program, pickle_state, published_state
from crate_ray.models.weight_files import config_metadata, encode_safetensors
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import latest_checkpoint
from crate_ray.training.ema import EMA_FILE, weights_file

Format = Literal["safetensors", "torch-export", "onnx", "crate", "mae"]
FORMATS: tuple[Format, ...] = get_args(Format)

_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "safetensors": (".safetensors",),
    "torch-export": (".pt2",),
    "onnx": (".onnx",),
    "crate": (".pth", ".safetensors"),
    "mae": (".pth", ".safetensors"),
}


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    run: str
    step: int
    format: Format
    out: str
    bytes: int
    image_size: int
    holds: str
    """What the file holds, in words."""
    interpolated: tuple[str, ...]
    """Position tables that were resized for another image size."""
    notes: tuple[str, ...]


def export_run(
    folder: RunFolder,
    out: str,
    *,
    format: Format,
    image_size: int | None = None,
    use_ema: bool | None = None,
    force: bool = False,
) -> ExportReport:
    """Writes the newest checkpoint's weights, or its encoder, to a file.

    Args:
        folder: A run with a checkpoint, finished or not.
        out: Path or URL; its suffix must belong to the format.
        format: safetensors holds the whole model with its configuration; crate and mae what the published code of that
            repository loads; torch-export and onnx the encoder as a program.
        image_size: Interpolates position tables to images of this side, pixels; None keeps the run's.
        use_ema: The average of the weights, or not; None as the run's evaluation does, `eval.use_ema`.
        force: Replaces an existing file.

    Raises:
        ConfigError: No such run, no checkpoint, no average of its weights, an unknown or wrong format, a suffix that does not
            belong to it, a file that exists or cannot be written, or a missing package.
    """
    _check_format(out, format)
    folder.check_exists()
    config, checkpoint = folder.read_config(), latest_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(f"run '{folder.name}' has no checkpoint yet; train it first (`crate-ray runs` shows its state)")
    check_output(out, force=force)
    file = weights_file(config, checkpoint, use_ema=use_ema)
    overrides = {} if image_size is None else {"image_size": image_size}
    model = create_model(config.model, **overrides)
    loaded = load_weights(model, checkpoint.read(file))
    content = _encode(model, config, out, format)
    storage.write_atomic(out, content.data)
    return ExportReport(
        run=folder.name,
        step=checkpoint.step,
        format=format,
        out=storage.absolute(out),
        bytes=len(content.data),
        image_size=model.config.image_size,
        holds=content.holds + (", averaged over training" if file == EMA_FILE else ""),
        interpolated=loaded.interpolated,
        notes=content.notes,
    )


def _check_format(out: str, format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"--format {format} is unknown; valid: {', '.join(FORMATS)}")
    if not out.endswith(_SUFFIXES[format]):
        raise ConfigError(f"OUT = '{out}': --format {format} writes {' or '.join(_SUFFIXES[format])}; name the file so")


def check_output(out: str, *, force: bool) -> None:
    """Refuses a file that could not be written, before the work that it is for.

    Raises:
        ConfigError: It is a folder; it is there, and replacing it was not asked for; or its place cannot be written.
    """
    if storage.is_dir(out):
        raise ConfigError(f"'{out}' is a folder; name a file")
    if storage.exists(out) and not force:
        raise ConfigError(f"'{out}' exists already; add --force to replace it, or choose another name")
    base, mark, query = out.partition("?") if "://" in out else (out, "", "")
    _try_writing(f"{base}.write-test-{uuid.uuid4().hex[:8]}{mark}{query}", out)


def check_output_folder(uri: str) -> None:
    """The same for files in a folder, which is created.

    Raises:
        ConfigError: It cannot be written.
    """
    _try_writing(storage.join(uri, f".write-test-{uuid.uuid4().hex[:8]}"), uri)


def _try_writing(probe: str, out: str) -> None:
    try:
        storage.write_atomic(probe, b"ok")
        storage.delete(probe)
    except OSError as error:
        raise ConfigError(f"'{out}' cannot be written ({error}); choose another place") from None


class _Content(NamedTuple):
    data: bytes
    holds: str
    notes: tuple[str, ...]


def _encode(model: MaskedAutoencoder | Classifier, config: RunConfig, out: str, format: Format) -> _Content:
    if format == "safetensors":
        state = model.state_dict()
        return _Content(encode_safetensors(state, model.config), f"{len(state)} tensors, layout crate-ray", ())
    if format in ("torch-export", "onnx"):
        return _encode_program(model, config, format)
    layout, state, notes = published_state(model, format)
    data = encode_safetensors(state, model.config) if out.endswith(".safetensors") else pickle_state(state)
    return _Content(data, f"{len(state)} tensors, layout {layout}", notes)


def _encode_program(
    model: MaskedAutoencoder | Classifier, config: RunConfig, format: Literal["torch-export", "onnx"]
) -> _Content:
    data_config, side = config.data, model.config.image_size
    metadata = config_metadata(model.config) | {"mean": json.dumps(data_config.mean), "std": json.dumps(data_config.std)}
    encode = export_onnx if format == "onnx" else export_program
    tokens = f"(B, {1 + model.config.num_patches}, {model.config.width})"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (data_config.mean, data_config.std))
    return _Content(
        encode(model, metadata),
        f"the encoder in float32: images (B, 3, {side}, {side}) to tokens {tokens}, class token first",
        (f"images are (x / 255 - mean) / std with mean ({mean}) and std ({std}), as in the file's metadata",),
    )
