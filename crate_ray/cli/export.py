"""`crate-ray export`: a run's weights in the form that another program reads, and a name for them in the registry."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json
from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder

if TYPE_CHECKING:
    from crate_ray.tracking import Registration
    from crate_ray.training.export import ExportReport


def export(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, as `crate-ray runs` lists it.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="File to write, local or in an object store.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="safetensors: the whole model, ours. crate, mae: for the published code (.pth or .safetensors). "
            "torch-export (.pt2), onnx: the encoder as a program that runs without this package.",
        ),
    ],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="For images of this side: position tables are interpolated.", show_default=False)
    ] = None,
    ema: Annotated[
        bool | None,
        typer.Option("--ema/--no-ema", help="The average of the weights (train.ema), or not; default: as the run evaluates."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    register: Annotated[
        str | None,
        typer.Option("--register", metavar="NAME", help="Make the checkpoint a version of this model in MLflow's registry."),
    ] = None,
    alias: Annotated[
        str | None, typer.Option("--alias", help="With --register: points to this version now, e.g. best.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option("--uri", help="With --register: the tracking store; by default that of the run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the newest checkpoint's weights for other programs."""
    from crate_ray.training.export import export_run

    folder, chosen = RunFolder(run_folder), cast("Any", format)
    _check_registration(folder, register, alias, uri)
    report = export_run(folder, out, format=chosen, image_size=image_size, use_ema=ema, force=force)
    registered = None if register is None else _register(folder, register, alias, uri, report)
    if as_json:
        named = {} if registered is None else {"registered": dataclasses.asdict(registered)}
        print_json({**dataclasses.asdict(report), **named})
        return
    console.print(f"[bold]{report.out}[/bold] ({report.bytes / 1e6:.1f} MB)", soft_wrap=True)
    console.print(f"{report.run}, step {report.step:,}: {report.holds}", soft_wrap=True)
    for table in report.interpolated:
        console.print(f"{table} was interpolated for images of {report.image_size} pixels", soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if registered is not None:
        state = "new" if registered.is_new else "of this checkpoint already"
        also = f", now '{registered.alias}'" if registered.alias else ""
        console.print(f"registered: {registered.name} version {registered.version} ({state}){also}", soft_wrap=True)
        console.print(f"            {registered.link}", soft_wrap=True)


def _check_registration(folder: RunFolder, name: str | None, alias: str | None, uri: str | None) -> None:
    """Refuses what the registry would refuse, or that there is none, before a file is written."""
    if name is None:
        given = "--alias" if alias is not None else "--uri" if uri is not None else None
        if given is not None:
            raise ConfigError(f"{given} says something of a registered model; add --register NAME, or leave it out")
        return
    from crate_ray.tracking import check_names, find_registry

    check_names(name, alias)
    if folder.exists():
        find_registry(*_store(folder, uri))


def _register(folder: RunFolder, name: str, alias: str | None, uri: str | None, report: "ExportReport") -> "Registration":
    from crate_ray.tracking import register_run

    store, experiment = _store(folder, uri)
    tags = {"crate_ray.exported_to": report.out, "crate_ray.format": report.format}
    return register_run(folder, name, uri=store, experiment=experiment, alias=alias, tags=tags)


def _store(folder: RunFolder, uri: str | None) -> tuple[str, str]:
    """Tracking store and experiment of a run."""
    from crate_ray.tracking import default_uri

    config = folder.read_config()
    return uri or config.tracking.uri or default_uri(config.storage.path), config.tracking.experiment
