"""`crate-ray quickstart`: the main job on the embedded default.

Shards of the handwritten digits; one CRATE-MAE and two MAEs through Ray Train; probes on the test split
beside each model's untrained encoder; a table, a figure, a report, and all of it in MLflow. Started
again it goes on where it stopped; finished, it prints its result.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crate_ray.cli.arguments import Json, Set
from crate_ray.cli.compare import this_command, write_report
from crate_ray.cli.compare_screen import as_document
from crate_ray.cli.output import console, errors, link_lines, print_json, print_table, print_text
from crate_ray.config import RunConfig

if TYPE_CHECKING:
    from crate_ray.analysis.comparison.result import Comparison
    from crate_ray.cli.study import Study
    from crate_ray.runs import RunFolder
    from crate_ray.runs.rows import RunRow

RECIPES = ("digits_crate_mae", "digits_mae", "digits_mae_small")
_REPORT, _PIXELS = "probe_test.json", "raw_pixels_top1"


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for shards, runs, the MLflow database and the report.")] = Path(
        "out/quickstart"
    ),
    overrides: Set = [],  # noqa: B006  typer reads the default
    as_json: Json = False,
) -> None:
    """The main job on embedded data: shards, CRATE-MAE and MAE through Ray Train, probe, comparison."""
    out = out.resolve()
    stages = _Stages()
    configs = [_config(recipe, out, overrides) for recipe in RECIPES]
    with stages.time("shards of 1,797 handwritten digits"):
        from crate_ray.data import build_source

        build_source("digits", str(out / "data" / "digits"))
    from crate_ray.cli.study import Study
    from crate_ray.launch.cluster import connect

    with stages.time("Ray"):
        connect()
    with Study(configs[0]) as study:
        folders: list[RunFolder] = []
        for config in configs:
            with stages.time(f"train {config.recipe}"):
                folders.append(_train(study, config))
        with stages.time("probes on the test split"):
            _probe(folders)
            for folder in folders:
                study.release(folder)
        with stages.time("comparison"):
            comparison = _compare(folders)
            report, files = write_report(comparison, out)
        with stages.time("MLflow"):
            _log(study, report, files, comparison.headline)
    if as_json:
        found = as_document(comparison, report=report)
        print_json(
            {**found, "rows": [row.as_dict() for row in comparison.rows], "links": study.links(), "seconds": stages.seconds}
        )
    else:
        _print(comparison, report, study.links(), stages.seconds)


def _train(study: "Study", config: RunConfig) -> "RunFolder":
    """Trains one model; one that does not come to its end ends the command."""
    from crate_ray.cli.train import exit_code

    outcome = study.train(config)
    if outcome.state == "FINISHED":
        return outcome.folder
    errors.print(f"{outcome.folder.name}: {outcome.state} ({outcome.reason}); the same command goes on from there")
    raise typer.Exit(exit_code(outcome))


def _config(recipe: str, out: Path, overrides: list[str]) -> RunConfig:
    data = out / "data" / "digits"
    defaults = [
        f"data.train={data}/train",
        f"data.eval={data}/validation",
        f"data.test={data}/test",
        f"storage.path={out}",
        "scale.num_workers=2",
        "tracking.experiment=crate-mae/quickstart",
    ]
    return RunConfig.load(recipe, [*defaults, *overrides])


def _probe(folders: "list[RunFolder]") -> None:
    """Judges what was not judged yet; the accuracy of raw pixels, which belongs to the data, goes into every report."""
    if all(_PIXELS in (folder.read_json(_REPORT) or {}) for folder in folders):
        return
    from crate_ray.launch.features import probe_on_cluster

    pixels = probe_on_cluster(folders, split="test")
    for folder in folders:
        folder.write_json(_REPORT, {**(folder.read_json(_REPORT) or {}), _PIXELS: pixels.value})


def _compare(folders: "list[RunFolder]") -> "Comparison":
    from crate_ray.analysis.comparison.compare import compare
    from crate_ray.analysis.comparison.layers import read_layers
    from crate_ray.cli.compare_sources import FolderAnswers
    from crate_ray.runs.rows import read_run_rows

    read = read_run_rows(folders, split="test")
    return compare(
        read.rows,
        name="quickstart",
        answers=FolderAnswers(read.rows, "test"),
        layers=read_layers,
        unread=read.unread,
        commands=(this_command(),),
    )


def _log(study: "Study", report: Path, files: list[str], headline: str) -> None:
    from crate_ray.tracking import log_comparison

    log_comparison(study.uri, study.experiment, name="quickstart", folder=report.parent, files=files, headline=headline)


def _print(comparison: "Comparison", report: Path, links: dict[str, Any], seconds: dict[str, float]) -> None:
    rows = {item.label: item.rows[0] for item in comparison.configurations}
    print_table(("", *rows), [(name, *(cell(row) for row in rows.values())) for name, cell in _LINES.items()])
    if comparison.raw_pixels is not None:
        console.print(f"raw pixels, no model: {comparison.raw_pixels:.1%}")
    print_text(comparison.headline, style="bold")
    out = report.parent
    console.print(f"\nreport   {report}\nfigure   {out / 'figures' / 'encoder_params.png'}", soft_wrap=True)
    for number, line in enumerate(link_lines(f"crate-ray tracking ui {out}", links["views"])):
        console.print(f"{'MLflow' if number == 0 else '':<9}{line}", soft_wrap=True)
    parts = "  ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    console.print(f"time     {parts}; {sum(seconds.values()):.0f} s in all", style="dim", soft_wrap=True)


def _value(key: str, form: str) -> "Callable[[RunRow], str]":
    """A final value; "-" where it was not measured."""
    return lambda row: format(row.values[key], form) if key in row.values else "-"


def _interval(key: str, *, sign: str = "", unit: str = "%") -> "Callable[[RunRow], str]":
    """An accuracy, or a difference of two, in percent with its interval over test images."""

    def text(row: "RunRow") -> str:
        if key not in row.intervals:
            return "-"
        value, low, high = (f"{100 * number:{sign}.1f}" for number in row.intervals[key])
        return f"{value}{unit} [{low}, {high}]"

    return text


_LINES: "dict[str, Callable[[RunRow], str]]" = {
    "parameters, trainable": lambda row: f"{row.params_total:,}",
    "parameters, encoder": lambda row: f"{row.params_encoder:,}",
    "training GFLOPs an image": lambda row: f"{row.train_flops_per_image / 1e9:.3f}",
    "images/s": lambda row: "-" if row.images_per_s is None else f"{row.images_per_s:.0f}",
    "training seconds": lambda row: f"{3600 * row.train_hours:.0f}",
    "mask ratio": lambda row: "-" if row.settings.get("mask_ratio") is None else f"{row.settings['mask_ratio']:g}",
    "validation loss": _value("eval_loss", ".4f"),
    "probe top-1": _interval("probe_top1"),
    "untrained encoder": _value("control_top1", ".1%"),
    "gain, points": _interval("gain", sign="+", unit=""),
    "10 labels a class": _value("fewshot10_top1", ".1%"),
    "50 labels a class": _value("fewshot50_top1", ".1%"),
    "kNN": _value("knn_top1", ".1%"),
    "cls token": _value("cls_top1", ".1%"),
}


class _Stages:
    """Announces each stage and keeps its seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str) -> "_Stage":
        """Use with `with`."""
        return _Stage(self, name)


class _Stage:
    def __init__(self, stages: _Stages, name: str) -> None:
        self._stages, self._name = stages, name

    def __enter__(self) -> None:
        errors.print(f"[dim]{self._name} ...[/dim]")
        self._started = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._stages.seconds[self._name] = round(time.monotonic() - self._started, 1)
