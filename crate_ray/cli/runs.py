"""`crate-ray runs`: the run folders below a root and how each stands, without MLflow.

In: a folder of run folders, or of sweeps. Out: one row a run, from status.json and the records, trials below the name of
their sweep. The records of every run are read whole, so a root of hundreds of long runs takes seconds; in return what is
shown is what was measured.
"""

import time
from collections import Counter
from typing import Annotated, Any

import typer
from rich.markup import escape

from crate_ray import storage
from crate_ray.cli.arguments import Json
from crate_ray.cli.output import console, print_json, print_table
from crate_ray.config import ConfigError
from crate_ray.runs import (
    RunFolder,
    Status,
    intervention_text,
    list_runs,
    read_interventions,
    read_records,
    read_status,
    sweep_of,
)

Root = Annotated[str, typer.Argument(help="Folder or URL that holds run folders (storage.path).")]

_METRICS = {
    "train_loss": ("train/loss",),
    "eval_loss": ("eval/loss",),
    "knn_top1": ("final/knn_top1", "eval/knn_top1"),
    "probe_top1": ("final/probe_top1",),
}


def runs(root: Root = "out", as_json: Json = False) -> None:
    """List runs, their state and last numbers. #N beside a state: it took N attempts."""
    rows = [_row(folder) for folder in find_runs(root)]
    if as_json:
        print_json(rows)
    elif not rows:
        console.print(f"no runs in {escape(root)} yet; `crate-ray train RECIPE` makes one", soft_wrap=True)
    else:
        _print([row for row in rows if row["sweep"] is None])
        for uri in dict.fromkeys(row["sweep"] for row in rows if row["sweep"] is not None):
            _print([row for row in rows if row["sweep"] == uri], of=RunFolder(uri))


def _print(rows: list[dict[str, Any]], *, of: RunFolder | None = None) -> None:
    """A table of runs, with the sweep that they are trials of above it."""
    if not rows:
        return
    if of is not None:
        states = Counter(row["state"].lower() for row in rows)
        trials = ", ".join(f"{number} {state}" for state, number in states.most_common())
        title = f"sweep [bold]{escape(of.name)}[/bold], {_state(read_status(of)).lower()}; trials: {trials}"
        console.print(f"\n{title}", soft_wrap=True, highlight=False)
    print_table(("run", "state", "step", "train", "eval", "kNN", "probe", "time"), [_cells(row) for row in rows])
    for row in rows:
        for text in (row["reason"], row["interventions"]):
            if text:
                console.print(f"{escape(row['name'])}: {escape(text)}", soft_wrap=True)


def find_runs(root: str) -> list[RunFolder]:
    """The run folders below a root.

    Raises:
        ConfigError: There is no such folder.
    """
    if not storage.exists(root):
        raise ConfigError(f"ROOT = '{root}' does not exist; give the folder that runs are written to (storage.path)")
    return list_runs(root)


def _row(folder: RunFolder) -> dict[str, Any]:
    status = read_status(folder)
    records = read_records(folder)
    last: dict[str, float] = {}
    for record in records:
        last.update(record.values)
    row: dict[str, Any] = {
        "name": folder.name,
        "uri": folder.uri,
        "sweep": sweep.uri if (sweep := sweep_of(folder)) is not None else None,
        "state": _state(status),
        "step": records[-1].step if records else None,
        "total_steps": None,
        "reason": _reason(status),
        "interventions": intervention_text(interventions) if (interventions := read_interventions(folder)) else None,
        "attempt": status.attempt if status else None,
        "heartbeat_age_s": round(time.time() - status.heartbeat, 1) if status else None,
        "duration_s": round((status.ended or status.heartbeat) - status.started, 1) if status else None,
    }
    row |= {name: next((last[key] for key in keys if key in last), None) for name, keys in _METRICS.items()}
    try:
        row["total_steps"] = folder.read_config().train.steps
    except ConfigError as error:  # written by another release: the other runs are still worth listing
        row["reason"] = f"config.yaml cannot be read: {error}"
    return row


def _state(status: Status | None) -> str:
    if status is None:
        return "NEW"
    return "STALE" if status.is_stale else status.state


def _reason(status: Status | None) -> str | None:
    if status is not None and status.is_stale:
        return "RUNNING, but its driver no longer beats; start it again to resume, or `crate-ray tracking reap` to close it"
    return status.reason if status else None


def _cells(row: dict[str, Any]) -> list[str]:
    step = "-" if row["step"] is None else f"{row['step']}/{row['total_steps']}" if row["total_steps"] else str(row["step"])
    losses = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("train_loss", "eval_loss")]
    accuracies = ["-" if row[key] is None else f"{row[key]:.1%}" for key in ("knn_top1", "probe_top1")]
    state = f"{row['state']} #{row['attempt']}" if (row["attempt"] or 1) > 1 else row["state"]  # so that 80 columns suffice
    return [escape(row["name"]), state, step, *losses, *accuracies, _time(row)]


def _time(row: dict[str, Any]) -> str:
    """How long a run that ended took; since when one that has not was last seen."""
    if row["heartbeat_age_s"] is None:
        return "-"
    if row["state"] in ("RUNNING", "STALE"):
        return f"{_duration(row['heartbeat_age_s'])} ago"
    return _duration(row["duration_s"])


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"
