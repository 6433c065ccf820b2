"""`crate-ray compare`: is CRATE-MAE worth it at equal parameters, compute and time, and how sure is that.

In: runs, as folders or from MLflow. Out: a verdict on the screen, a report in a folder, and both in MLflow. All is read and
judged before anything is written, so a comparison that is refused leaves nothing behind.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crate_ray.cli.arguments import Json
from crate_ray.cli.compare_screen import as_document, print_comparison
from crate_ray.cli.compare_sources import FolderAnswers, Material, gather
from crate_ray.cli.output import print_json
from crate_ray.cli.progress import plural
from crate_ray.config import ConfigError

if TYPE_CHECKING:
    from crate_ray.analysis.comparison.result import Comparison
    from crate_ray.runs.rows import RunRow, Split
    from crate_ray.tracking import LoggedComparison


def compare(
    what: Annotated[
        list[str],
        typer.Argument(metavar="WHAT...", help="Run folders, folders of runs, sweep folders, or MLflow experiments."),
    ],
    by: Annotated[
        Literal["params", "flops", "time"],
        typer.Option("--by", help="What is held equal in the headline; all three are reported."),
    ] = "params",
    metric: Annotated[str, typer.Option("--metric", help="Final value to compare by: probe_top1, knn_top1, eval_loss, ...")] = (
        "probe_top1"
    ),
    test: Annotated[bool, typer.Option("--test/--validation", help="Whose judgement of the probes is compared.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the report; by default comparison/ beside what is compared.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option("--uri", help="Tracking store; by default that of the runs, else out/mlflow.db.")
    ] = None,
    experiment: Annotated[
        str | None, typer.Option("--experiment", help="Experiment to log the report to; by default that of the runs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare CRATE-MAE with MAE at equal parameters, equal FLOPs and equal time: verdicts, and a report."""
    from crate_ray.analysis.comparison.compare import compare as compare_rows
    from crate_ray.analysis.comparison.layers import read_layers
    from crate_ray.analysis.comparison.result import AXES

    if out is not None:
        _check_out(out)
    split: Split = "test" if test else "validation"
    material = gather(what, split=split, uri=uri, experiment=experiment)
    _check_read(material)
    unjudged = [row for row in material.rows if _lacks(row, metric)]
    _check_judged(material, unjudged, metric, split)
    comparison = compare_rows(
        material.rows,
        name=material.name,
        metric=metric,
        axes=(by, *(axis for axis in AXES if axis != by)),
        answers=FolderAnswers(material.rows, split),
        layers=read_layers,
        unread=material.unread,
        commands=(this_command(),),
    )
    report, files = write_report(comparison, out or material.out)
    logged = log_report(comparison, report.parent, files, material)
    advice = _advice(unjudged, split)
    if as_json:
        print_json(as_document(comparison, report=report, logged=logged, advice=advice))
    else:
        print_comparison(comparison, report=report, logged=logged, advice=advice, store=material.store)


def this_command() -> str:
    """What the user typed, as a shell takes it."""
    return shlex.join(["crate-ray", *sys.argv[1:]])


def write_report(comparison: "Comparison", out: Path) -> tuple[Path, list[str]]:
    """Writes the report.

    Returns:
        The path of report.md, and the paths of all its files in that folder.

    Raises:
        ConfigError: The folder cannot be written.
    """
    from crate_ray.analysis.comparison.write import write_comparison

    try:
        report = write_comparison(comparison, out)
    except OSError as error:
        raise ConfigError(_unwritable(out, error.strerror or str(error))) from None
    pictures = [path for path in sorted(report.parent.glob("figures/*")) if path.suffix in (".png", ".svg")]
    files = [report, report.with_suffix(".html"), *sorted(report.parent.glob("comparison.*")), *pictures]
    return report, [path.relative_to(report.parent).as_posix() for path in files]


def log_report(comparison: "Comparison", folder: Path, files: "Sequence[str]", material: Material) -> "LoggedComparison | None":
    """Puts the report into MLflow, where the runs are in one."""
    if material.store is None:
        return None
    from crate_ray.tracking import log_comparison

    return log_comparison(
        material.store.uri,
        material.store.experiment,
        name=short_name(material.name),
        folder=folder,
        files=files,
        headline=comparison.headline,
        parent_uid=material.sweep_uid,
        tags={"metric": comparison.metric, "judged_split": comparison.judged_split or "none"},
    )


def short_name(name: str) -> str:
    """Of a folder or experiment, or of several together, the last part of each: 'one + two' for 'a/one + b/two'."""
    return " + ".join(part.rsplit("/", 1)[-1] for part in name.split(" + "))


def _check_out(out: Path) -> None:
    """Refuses a folder that cannot be made, before anything is read."""
    above = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(_unwritable(out, f"{above} is no folder, or one without write access"))


def _unwritable(out: Path, reason: str) -> str:
    return f"--out {out} cannot be written ({reason}); choose another folder"


def _check_read(material: Material) -> None:
    """Refuses what holds runs none of which can be read, with the reasons."""
    if material.unread and not material.rows:
        reasons = "; ".join(sorted(set(material.unread.values())))
        raise ConfigError(f"none of the {plural(len(material.unread), 'run')} of '{material.name}' can be read: {reasons}")


def _lacks(row: "RunRow", metric: str) -> bool:
    """Whether a run that would be compared was not judged on the split, and lacks the metric for it."""
    return _is_compared(row) and row.judged_split is None and metric not in row.values


def _is_compared(row: "RunRow") -> bool:
    """Whether a run would be compared, were it judged."""
    return row.is_complete and row.kind != "control" and row.stage != "screen"


def _check_judged(material: Material, unjudged: "Sequence[RunRow]", metric: str, split: "Split") -> None:
    """Refuses runs none of which was judged on the split, with the command that judges them."""
    compared = [row for row in material.rows if _is_compared(row)]
    if not unjudged or len(unjudged) < len(compared):
        return
    flag = "--validation" if split == "test" else "--test"
    raise ConfigError(
        f"no run of '{material.name}' was judged on {split}; `{_probe_command(unjudged, split)}` judges "
        f"{plural(len(unjudged), 'run')}, and {flag} compares by the other split"
    )


def _advice(unjudged: "Sequence[RunRow]", split: "Split") -> list[str]:
    """Which runs lack a probe, and the command that makes it."""
    if not unjudged:
        return []
    return [f"{plural(len(unjudged), 'run')} without a probe on {split}: {_probe_command(unjudged, split)}"]


def _probe_command(rows: "Sequence[RunRow]", split: "Split") -> str:
    """As a shell takes it: what lies in one folder is named in braces."""
    names: dict[str, list[str]] = {}
    for row in rows:
        place, _, name = row.uri.rpartition("/")
        names.setdefault(place, []).append(name)
    groups = [
        f"{shlex.quote(place)}/{{{','.join(map(shlex.quote, found))}}}"
        if len(found) > 1
        else shlex.quote(f"{place}/{found[0]}")
        for place, found in names.items()
    ]
    return " ".join(["crate-ray probe", *(["--test"] if split == "test" else []), *groups])
