"""`crate-ray quickstart`: the main job on the embedded default.

Shards of the handwritten digits; one CRATE-MAE and two MAEs through Ray Train; probes on the test split
beside each model's untrained encoder; a table, a figure, a report, and all of it in MLflow. Started
again it goes on where it stopped; finished, it prints its result.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crate_ray.cli.arguments import Json, Set
from crate_ray.cli.output import console, errors, print_json, print_table
from crate_ray.config import RunConfig

if TYPE_CHECKING:
    from crate_ray.runs import RunFolder

# recipe: what figures and tables call it
RECIPES = {"digits_crate_mae": "CRATE-MAE", "digits_mae": "MAE", "digits_mae_small": "MAE, equal parameters"}


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
                outcome = study.train(config)
            if outcome.state != "FINISHED":
                from crate_ray.cli.train import exit_code

                errors.print(f"{outcome.folder.name}: {outcome.state} ({outcome.reason}); the same command goes on from there")
                raise typer.Exit(exit_code(outcome))
            folders.append(outcome.folder)
        with stages.time("probes on the test split"):
            result = _compare(folders, out, overrides)
        with stages.time("MLflow"):
            _log(study, out, result["headline"])
    result["links"] = study.links()
    result["seconds"] = stages.seconds
    if as_json:
        print_json(result)
    else:
        _print(result, out)


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


def _compare(folders: "list[RunFolder]", out: Path, overrides: list[str]) -> dict[str, Any]:
    """Probes what was not probed yet, and writes the report."""
    import json

    from crate_ray.analysis import ReportMeta, compare_parts_of, read_row, write_report

    pixels = _probe(folders, out)
    rows = [read_row(folder, name=name, raw_pixels_top1=pixels) for folder, name in zip(folders, RECIPES.values(), strict=True)]
    command = " ".join(["crate-ray quickstart", *(f"--set {item}" for item in overrides)])
    meta = ReportMeta(
        title="CRATE-MAE and MAE on the handwritten digits",
        commands=(command,),
        fingerprints={row.name: compare_parts_of(folder) for row, folder in zip(rows, folders, strict=True)},
    )
    write_report(rows, out, meta)
    return dict(json.loads((out / "comparison.json").read_text()))


def _probe(folders: "list[RunFolder]", out: Path) -> float:
    import json

    from crate_ray.storage import write_atomic

    cache = out / "raw_pixels.json"
    names = sorted(folder.name for folder in folders)
    if cache.exists() and all(folder.read_json("probe_test.json") for folder in folders):
        held = json.loads(cache.read_text())
        if held["runs"] == names:
            return float(held["top1"])
    from crate_ray.launch.features import probe_on_cluster

    pixels = probe_on_cluster(folders, split="test")
    write_atomic(str(cache), json.dumps({"schema_version": 1, "runs": names, "top1": pixels.value}) + "\n")
    return float(pixels.value)


def _log(study: Any, out: Path, headline: str) -> None:
    from crate_ray.tracking import log_comparison

    files = ("comparison.json", "comparison.png", "report.md")
    log_comparison(study.uri, study.experiment, name="quickstart", folder=out, files=files, headline=headline)


def _print(result: dict[str, Any], out: Path) -> None:
    rows = result["rows"]
    header = ("", *(row["name"] for row in rows))
    lines = [
        ("parameters, trainable", *(f"{row['params_trainable']:,}" for row in rows)),
        ("parameters, encoder", *(f"{row['params_encoder']:,}" for row in rows)),
        ("training GFLOPs an image", *(f"{row['training_gflops_per_image']:.3f}" for row in rows)),
        ("images/s", *(_number(row["images_per_s"], ".0f") for row in rows)),
        ("training seconds", *(f"{row['train_seconds']:.0f}" for row in rows)),
        ("mask ratio", *(f"{row['mask_ratio']:g}" for row in rows)),
        ("validation loss", *(_number(row["eval_loss"], ".4f") for row in rows)),
        ("probe top-1", *(_percent(row["probe_top1"]) for row in rows)),
        ("untrained encoder", *(f"{100 * row['control_top1']:.1f}%" for row in rows)),
        ("gain, points", *(_points(row["gain"]) for row in rows)),
        ("10 labels a class", *(_number(row["fewshot10_top1"], ".1%") for row in rows)),
        ("50 labels a class", *(_number(row["fewshot50_top1"], ".1%") for row in rows)),
        ("kNN", *(f"{100 * row['knn_top1']:.1f}%" for row in rows)),
        ("cls token", *(f"{100 * row['cls_top1']:.1f}%" for row in rows)),
    ]
    print_table(header, lines)
    console.print(f"raw pixels, no model: {100 * rows[0]['raw_pixels_top1']:.1f}%")
    console.print(result["headline"], style="bold")
    console.print(f"\nreport   {out / 'report.md'}\nfigure   {out / 'comparison.png'}", soft_wrap=True)
    console.print(f"MLflow   crate-ray tracking ui {out}", soft_wrap=True)
    if result["links"]["experiment"]:
        console.print(f"         then {result['links']['experiment']}", soft_wrap=True)
    seconds = "  ".join(f"{name} {value:.0f} s" for name, value in result["seconds"].items())
    console.print(f"time     {seconds}; {sum(result['seconds'].values()):.0f} s in all", style="dim", soft_wrap=True)


def _number(value: float | str, form: str) -> str:
    """A number of comparison.json; one that was not measured is the string "NaN" there."""
    return "-" if isinstance(value, str) else format(value, form)


def _percent(estimate: dict[str, float]) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def _points(estimate: dict[str, float]) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


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
