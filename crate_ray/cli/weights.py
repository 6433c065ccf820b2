"""`crate-ray weights`: what a weights file is, which settings it fits, and the same weights with their configuration.

In: a file of any known layout. Out: a description; or, with --identify, how well a CRATE autoencoder's weights work under each
lambda, step size and target; or, with --convert, a file of ours. What a state dict does not hold must be said, never guessed.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crate_ray import storage
from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table
from crate_ray.cli.progress import count_progress
from crate_ray.config import SCHEMA_VERSION, ConfigError, DataConfig, ModelConfig, apply_override

if TYPE_CHECKING:
    from crate_ray.models.weight_files import WeightsFile
    from crate_ray.training.identify import Fit, Identification

_SECTIONS = ("model", "data")
_LISTED = 5
_ISTA_HINT = (
    "the published autoencoder code has lambda 0.5 and step size 0.1 today, its first release had lambda 5.0; "
    "or see what fits: --identify --data URL"
)


def weights(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A .safetensors or .pth file, local or in an object store.")],
    preset: Annotated[str | None, typer.Option(help="The model that the weights are of.", show_default=False)] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="model.KEY=VALUE", help="Say a key of the model; may be repeated.")
    ] = [],  # noqa: B006  typer reads the default
    identify: Annotated[
        bool, typer.Option("--identify", help="Score a CRATE autoencoder under each lambda, step size and target.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(metavar="URL", help="With --identify: held-out shards.", show_default=False)
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="With --identify: pictures and identify.json.", show_default=False)
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=2, help="With --identify: how many images, 256 if not said.", show_default=False)
    ] = None,
    convert: Annotated[
        str | None, typer.Option(metavar="OUT", help="Write the weights as .safetensors of ours.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="With --convert: replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Describe a weights file, identify its lambda and step size, or convert it."""
    from crate_ray.models.weight_files import read_weights

    if identify and convert:
        raise ConfigError("--identify and --convert are two steps: identify first, then convert with what was found")
    if identify and data is None:
        raise ConfigError("--identify needs --data URL: shards of images that the weights were not trained on")
    if convert is None and not identify and (preset or overrides):
        raise ConfigError("--preset and --set are for --convert OUT and --identify; add one of them")
    unread = [name for name, value in (("--data", data), ("--out", out), ("--images", images)) if value is not None]
    if unread and not identify:
        raise ConfigError(f"{', '.join(unread)}: read with --identify only; add it, or leave them out")
    if force and convert is None:
        raise ConfigError("--force is for --convert OUT; nothing else asks before it replaces a file")
    if convert is not None and any(item.startswith("data.") for item in overrides):
        raise ConfigError("--set data.mean and data.std are read with --identify only; weights hold no pixel statistics")
    source = read_weights(file)
    if convert is not None:
        _convert(source, file, _model_config(source, preset, overrides), convert, force=force, as_json=as_json)
    elif identify:
        config, pixels = _model_config(source, preset, overrides, is_searching=True), _pixel_statistics(overrides)
        _identify(file, config, pixels, str(data), out, images, as_json=as_json)
    else:
        _describe(source, file, as_json=as_json)


def _describe(source: "WeightsFile", file: str, *, as_json: bool) -> None:
    from crate_ray.models.matching import fitting_presets, unsaid_keys
    from crate_ray.models.weight_files import not_finite

    found, broken = source.architecture, not_finite(source.state)
    presets, unsaid = [str(fit) for fit in fitting_presets(source)], unsaid_keys(source)
    parameters = sum(value.numel() for value in source.state.values() if hasattr(value, "numel"))
    config = source.config.model_dump(mode="json") if source.config else None
    if as_json:
        body = {"layout": source.layout, "architecture": dataclasses.asdict(found), "parameters": parameters}
        print_json({"file": file, **body, "config": config, "presets": presets, "not_in_file": unsaid, "not_finite": broken})
        return
    lines = [
        ("layout", source.layout),
        ("architecture", str(found)),
        ("parameters", f"{parameters:,}, position tables included"),
        ("presets", presets[0] if presets else "none has these shapes"),
        *(("", other) for other in presets[1:]),
    ]
    if source.config is not None:
        ista = f", lambda {source.config.ista_lambda}, step size {source.config.ista_step_size}"
        lines.append(
            ("carries", f"its configuration: {source.config.num_heads} heads{ista if found.family == 'crate' else ''}")
        )
    if unsaid:
        lines.append(("not in it", f"{', '.join(f'model.{key}' for key in unsaid)}: no shape shows them; say them to use it"))
    if broken:
        more = "" if len(broken) <= _LISTED else f" and {len(broken) - _LISTED} more"
        names = ", ".join(broken[:_LISTED])
        lines.append(
            (
                "NOT FINITE",
                f"NaN or infinite values in {len(broken)} of {len(source.state)} tensors, which no model takes: {names}{more}",
            )
        )
    for label, text in lines:
        console.print(f"{label:<14}{text}", soft_wrap=True)


def _model_config(
    source: "WeightsFile", preset: str | None, overrides: list[str], *, is_searching: bool = False
) -> ModelConfig:
    """The model that is said: by the preset or the file, and by --set.

    Raises:
        ConfigError: Something is left unsaid that the file does not hold either.
    """
    from crate_ray.models.matching import fitting_presets, inferred_keys, unsaid_keys

    if preset is not None:
        values: dict[str, Any] = {"preset": preset}
    elif source.config is not None:
        values = source.config.model_dump()
    else:
        values = inferred_keys(source)
    sections = {"model": values, "data": {}}
    for item in overrides:
        if item.partition(".")[0] not in _SECTIONS:
            raise ConfigError(f"--set {item}: valid here are model.KEY, and data.mean and data.std with --identify")
        apply_override(sections, item)
    said = {item.removeprefix("model.").partition("=")[0] for item in overrides} | (
        {"num_heads", "decoder_num_heads"} if preset else set()
    )
    missing = [key for key in unsaid_keys(source) if key not in said and not (is_searching and key.startswith("ista_"))]
    if missing:
        keys = " ".join(f"--set model.{key}=..." for key in missing)
        hints = [_ISTA_HINT] if any(key.startswith("ista_") for key in missing) else []
        fits = [fit.name for fit in fitting_presets(source)]
        if fits and preset is None:
            hints.append(f"presets with the heads of these shapes: {', '.join(fits)}")
        raise ConfigError("; ".join([f"{source.where} do not hold everything: say {keys}", *hints]))
    return ModelConfig.parse(sections["model"], where="--preset and --set" if preset else source.where)


def _pixel_statistics(overrides: list[str]) -> dict[str, Any]:
    """data.mean and data.std, where they are said."""
    sections: dict[str, Any] = {"data": {}}
    for item in overrides:
        apply_override(sections, item)
    if not sections["data"].keys() <= {"mean", "std"}:
        raise ConfigError("--set data.KEY: valid here are data.mean and data.std")
    config = DataConfig.parse({"train": "", **sections["data"]}, where="--set")
    return {"mean": config.mean, "std": config.std}


def _convert(source: "WeightsFile", file: str, config: ModelConfig, out: str, *, force: bool, as_json: bool) -> None:
    from crate_ray.models import create_model, load_weights
    from crate_ray.models.weight_files import encode_safetensors
    from crate_ray.training.export import check_output

    if not out.endswith(".safetensors"):
        raise ConfigError(f"--convert '{out}': weights of this package are .safetensors; name the file so")
    check_output(out, force=force)
    model = create_model(config)
    loaded = load_weights(model, file, convert=True)
    data = encode_safetensors(model.state_dict(), config)
    storage.write_atomic(out, data)
    body = {"out": storage.absolute(out), "bytes": len(data), **dataclasses.asdict(loaded), "config": config.model_dump()}
    if as_json:
        print_json(body)
        return
    console.print(f"[bold]{body['out']}[/bold] ({len(data) / 1e6:.1f} MB), from layout {source.layout}", soft_wrap=True)
    for table in loaded.interpolated:
        console.print(f"{table} was interpolated for images of {config.image_size} pixels", soft_wrap=True)
    if loaded.untrained:
        console.print(f"without training: {', '.join(loaded.untrained)}", soft_wrap=True)


def _identify(
    file: str, config: ModelConfig, pixels: dict[str, Any], url: str, out: str | None, num_images: int | None, *, as_json: bool
) -> None:
    from crate_ray.training.export import check_output_folder
    from crate_ray.training.identify import DEFAULT_IMAGES, SENTENCE
    from crate_ray.training.identify import identify as score

    if out is not None:
        check_output_folder(out)
    with count_progress("images x settings") as progress:
        found = score(file, config, url, num_images=num_images or DEFAULT_IMAGES, **pixels, progress=progress)
    body = {
        "file": file,
        "data": url,
        "num_images": found.num_images,
        "mask_ratio": found.mask_ratio,
        "fits": [dataclasses.asdict(fit) for fit in found.fits],
        "conclusion": SENTENCE,
    }
    if as_json:
        print_json(body)
    else:
        _print_findings(found, SENTENCE)
    if out is None:
        return
    _write_findings(found, body, out)
    if not as_json:
        console.print(f"pictures and identify.json: {storage.absolute(out)}", soft_wrap=True)


def _write_findings(found: "Identification", body: dict[str, Any], out: str) -> None:
    for name, png in found.pictures.items():
        storage.write_atomic(storage.join(out, f"{name}.png"), png)
    storage.write_atomic(storage.join(out, "identify.json"), json.dumps({"schema_version": SCHEMA_VERSION, **body}, indent=1))


def _print_findings(found: "Identification", sentence: str) -> None:
    targets = {False: "target: pixels", True: "target: pixels normalised by patch (norm_pix_loss)"}
    header = ("lambda", "step size", "loss", "/ mean target", "behind the best (95%)")
    for norm_pix_loss, title in targets.items():
        console.print(title, style="bold")
        print_table(header, [_fit_cells(fit) for fit in found.fits if fit.norm_pix_loss == norm_pix_loss])
        console.print()
    best = found.best
    console.print(
        "Losses of the two targets are in different units; '/ mean target' divides each by the loss of predicting the mean "
        f"target, so that they can be ranked. {found.num_images} images, {found.mask_ratio:.0%} hidden, one set of masks.",
        soft_wrap=True,
    )
    if best.relative_loss >= 1:
        console.print(
            f"no usable fit: no setting predicts better than the mean target (smallest loss: {best.name}); look for other "
            "images, or data.mean and data.std of its training",
            soft_wrap=True,
        )
        return
    keys = {"ista_lambda": f"{best.ista_lambda:g}", "ista_step_size": f"{best.ista_step_size:g}"}
    keys["norm_pix_loss"] = str(best.norm_pix_loss).lower()
    console.print(f"best fit: {' '.join(f'--set model.{key}={value}' for key, value in keys.items())}", soft_wrap=True)
    equals = [fit.name for fit in found.fits[1:] if fit.is_as_good]
    if equals:
        console.print(f"as good on these images: {', '.join(equals)}", soft_wrap=True)
    console.print(sentence, soft_wrap=True)


def _fit_cells(fit: "Fit") -> list[str]:
    behind = f"{fit.behind:.2g} ± {fit.behind_margin:.2g}" if fit.behind else "best"
    return [f"{fit.ista_lambda:g}", f"{fit.ista_step_size:g}", f"{fit.loss:.4f}", f"{fit.relative_loss:.4f}", behind]
