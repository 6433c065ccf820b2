"""A model in the forms that other programs read: published state dicts, torch.export, ONNX.

In: a model. Out: tensors under published names, which the published class loads with strict=True; or the encoder as a program
of its own, images (B, 3, S, S) to tokens (B, 1 + N, D), which runs without this package. Published classes hold tensors that
ours do not (a dead `decoder_embed`, a second position table); they are written too, and the notes say so.
"""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models.classifier import Classifier
from crate_ray.models.layouts import Layout, is_of_decoder, to_published
from crate_ray.models.masked_autoencoder import MaskedAutoencoder

Model = MaskedAutoencoder | Classifier

_PUBLISHED_ISTA = (0.1, 0.5, 0.1)
"""Step size, lambda of the autoencoder and lambda of the classifier that the published CRATE code fixes."""
_ONNX_LIMIT_BYTES = 2**31
_EXAMPLE_BATCH = 2


class PublishedState(NamedTuple):
    """A state dict under published names."""

    layout: Layout
    state: dict[str, Tensor]
    notes: tuple[str, ...]
    """What whoever loads it must know."""


def published_state(model: Model, format: str) -> PublishedState:
    """The model's tensors as the published class of that repository holds them.

    Args:
        model: Its tensors are not copied where names alone change.
        format: "crate" for family crate, "mae" for family vit.

    Raises:
        ConfigError: The repository has no class for such a model.
    """
    layout = _published_layout(model.config, format)
    state = {key: value.detach().cpu() for key, value in model.state_dict().items() if ".ista.log_" not in key}
    notes = _notes(model) if model.config.family == "crate" else []
    if isinstance(model, MaskedAutoencoder) and model.config.encoder_tokens == "all":
        state |= {"decoder_pos_embed": state["pos_embed"].clone(), **_dead_decoder_embed(model.config)}
        notes.append(
            "decoder_embed is in the published class, whose forward pass never reads it: written as a fresh initialisation; "
            "pos_embed and decoder_pos_embed are the same table"
        )
    return PublishedState(layout, to_published(state, layout), tuple(notes))


def _published_layout(config: ModelConfig, format: str) -> Layout:
    if config.ablation:
        raise ConfigError(
            f"--format {format} cannot hold this model: its encoder layers are an ablation ({' '.join(config.ablation)}), "
            "which no published class has; valid are safetensors, torch-export, onnx"
        )
    is_classifier = config.num_classes is not None
    if format == "mae" and config.family == "vit":
        return "mae-finetune" if is_classifier else "mae"
    if format == "crate" and config.family == "crate" and (not is_classifier or config.embedding == "normed"):
        return "crate-classifier" if is_classifier else "crate"
    kind = f"family = {config.family}" + (f", a classifier with embedding = {config.embedding}" if is_classifier else "")
    raise ConfigError(
        f"--format {format} cannot hold this model ({kind}): valid are crate for CRATE-MAE and the published CRATE classifier, "
        "mae for family vit, and safetensors, torch-export, onnx for all"
    )


def _notes(model: Model) -> list[str]:
    """What a CRATE state dict does not say, and where the published code would compute something else."""
    config, notes = model.config, []
    step_size, lambda_autoencoder, lambda_classifier = _PUBLISHED_ISTA
    lam = lambda_autoencoder if config.num_classes is None else lambda_classifier
    if config.ista_learnable == "layer":
        with torch.no_grad():
            trained = [(float(b.ista.step_size), float(b.ista.lam)) for b in model.blocks]  # type: ignore[union-attr,arg-type]
        pairs = ", ".join(f"{eta:.4g}/{lam:.4g}" for eta, lam in trained)
        notes.append(f"trained step sizes and lambdas are not in the published layout; layer by layer they are {pairs}")
    elif {*config.per_layer("ista_step_size")} != {step_size} or {*config.per_layer("ista_lambda")} != {lam}:
        notes.append(
            f"the published code fixes step size {step_size} and lambda {lam}; this model has ista_step_size = "
            f"{config.ista_step_size} and ista_lambda = {config.ista_lambda}: change the code there"
        )
    if config.num_classes is None and config.encoder_tokens == "visible":
        notes.append(
            "this model encodes visible tokens; the published class has the same names, but shows mask tokens to its encoder "
            "and never reads decoder_embed: features of whole images agree, reconstructions do not"
        )
    if config.decoder_width != config.width and config.num_classes is None:
        notes.append("the published class loads a decoder of another width than its encoder's, but cannot run it")
    return notes


def _dead_decoder_embed(config: ModelConfig) -> dict[str, Tensor]:
    """As the published class initialises it; the same numbers every time."""
    weight = torch.empty(config.decoder_width, config.width)
    nn.init.xavier_uniform_(weight, generator=torch.Generator().manual_seed(0))
    return {"decoder_embed.weight": weight, "decoder_embed.bias": torch.zeros(config.decoder_width)}


def pickle_state(state: Mapping[str, Tensor]) -> bytes:
    """A `.pth` file in the form of the published checkpoints: the state dict under "model"."""
    sink = io.BytesIO()
    torch.save({"model": dict(state)}, sink)
    return sink.getvalue()


class Encoder(nn.Module):
    """`encode` of a model as a forward pass, without the tensors that it does not read."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
        owners = {key.split(".", maxsplit=1)[0] for key in model.state_dict()}
        for name in owners:
            if is_of_decoder(name) or name in ("head", "fc_norm"):
                delattr(self.model, name)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (B, 1 + N, D) of normalised images (B, 3, S, S), class token first."""
        return self.model.encode(images)


def export_program(model: Model, metadata: Mapping[str, str]) -> bytes:
    """The encoder as a `.pt2` file: `torch.export.load(path).module()(images)`, any batch size, float32.

    Args:
        model: Its encoder is exported for a CPU.
        metadata: Stands in the file as `metadata.json` (`extra_files` of torch.export.load).
    """
    sink = io.BytesIO()
    with _quiet():
        torch.export.save(_trace(model), sink, extra_files={"metadata.json": json.dumps(dict(metadata))})
    return sink.getvalue()


def export_onnx(model: Model, metadata: Mapping[str, str]) -> bytes:
    """The encoder as an `.onnx` file: input `images`, output `tokens`, any batch size, float32.

    Args:
        model: Its encoder is exported.
        metadata: Stands in the file as its metadata properties.

    Raises:
        ConfigError: onnx or onnxscript are not installed, or the weights exceed the 2 GiB that one file may have.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch.onnx needs it and says so with a traceback
    except ImportError as error:
        raise ConfigError(
            f"--format onnx needs the package {error.name}: pip install 'crate-ray[export]', or use --format torch-export"
        ) from None
    num_bytes = sum(4 * value.numel() for value in Encoder(model).state_dict().values())
    if num_bytes >= _ONNX_LIMIT_BYTES:
        raise ConfigError(
            f"the encoder has {num_bytes / 2**30:.1f} GiB of weights and an .onnx file holds 2; use --format torch-export"
        )
    with _quiet():
        program = torch.onnx.export(_trace(model), input_names=["images"], output_names=["tokens"], verbose=False)
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, dict(metadata))
    return bytes(proto.SerializeToString())


def _trace(model: Model) -> torch.export.ExportedProgram:
    side = model.config.image_size
    example = torch.zeros(_EXAMPLE_BATCH, 3, side, side)
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(Encoder(model), (example,), dynamic_shapes=shapes, strict=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters speak of their own passes; faults are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
