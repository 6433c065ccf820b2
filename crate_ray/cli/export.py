"""`crate-ray export`: a run's weights in the form that another program reads."""

import dataclasses
from typing import Annotated, Any

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json


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
    as_json: Json = False,
) -> None:
    """Write the newest checkpoint's weights for other programs."""
    from crate_ray.runs import RunFolder
    from crate_ray.training.export import export_run

    chosen: Any = format
    report = export_run(RunFolder(run_folder), out, format=chosen, image_size=image_size, use_ema=ema, force=force)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    console.print(f"[bold]{report.out}[/bold] ({report.bytes / 1e6:.1f} MB)", soft_wrap=True)
    console.print(f"{report.run}, step {report.step:,}: {report.holds}", soft_wrap=True)
    for table in report.interpolated:
        console.print(f"{table} was interpolated for images of {report.image_size} pixels", soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
