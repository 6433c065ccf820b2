"""How a run ended, from its folder alone: what `crate-ray train` says last.

In: a run folder. Out: facts for a program, or a screen: state, time, images and speed, losses, the checkpoints that are there,
peak memory, what went wrong on the way, and what to do next. Nothing is measured here: what no record says is left out.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from crate_ray.cli.output import console, link_lines
from crate_ray.cli.progress import SKIPPED_STEPS, duration, plural
from crate_ray.runs import Intervention, RunFolder, intervention_text, read_interventions, read_records, read_status

if TYPE_CHECKING:
    from crate_ray.launch.train import RunOutcome

_LABEL = 13  # columns of the names of lines
_ACCURACIES = {"eval/top1": "top-1", "eval/knn_top1": "kNN"}


def summarise(outcome: "RunOutcome", links: Mapping[str, Any]) -> dict[str, Any]:
    """What a program wants to know of a run that ended.

    Args:
        outcome: Of the command.
        links: Of the mirror.
    """
    folder = outcome.folder
    final = folder.read_json("final.json") or {"values": {}}
    return {
        "run": folder.name,
        "folder": folder.uri,
        "state": outcome.state,
        "reason": outcome.reason,
        "was_finished": outcome.was_finished,
        "final": {key.removeprefix("final/"): value for key, value in final["values"].items()},
        **_measured(folder),
        **_checkpoints(folder),
        "interventions": [item.as_dict() for item in read_interventions(folder)],
        "link": links["runs"].get(folder.name),
        "views": dict(links["views"]),
    }


def _measured(folder: RunFolder) -> dict[str, Any]:
    """What the records say last, and at most."""
    config, status = folder.read_config(), read_status(folder)
    records = read_records(folder)
    last: dict[str, float] = {}
    for record in records:
        last.update(record.values)
    steps = max((record.step for record in records if "train/lr" in record.values), default=0)
    peaks = [record.values["memory/peak_gib"] for record in records if "memory/peak_gib" in record.values]
    return {
        "steps": steps,
        "images": steps * config.train.global_batch,
        "duration_s": round(status.ended - status.started, 1) if status and status.ended else None,
        "images_per_s": last.get("final/images_per_s", last.get("perf/images_per_s")),
        "data_wait_fraction": last.get("perf/data_wait_fraction"),
        "mfu": last.get("perf/mfu"),
        "num_workers": int(last["perf/num_workers"]) if "perf/num_workers" in last else None,
        "train_loss": last.get("train/loss"),
        "eval_loss": last.get("eval/loss"),
        **{f"eval_{key.removeprefix('eval/')}": last[key] for key in _ACCURACIES if key in last},
        "peak_gib": max(peaks, default=None),
        "skipped_steps": int(last.get(SKIPPED_STEPS, 0)),
    }


def _checkpoints(folder: RunFolder) -> dict[str, Any]:
    """Steps of the last and of the best checkpoint that is still there; None where there is none."""
    from crate_ray.training.checkpoint import best_checkpoints, list_checkpoints

    config, held = folder.read_config(), list_checkpoints(folder)
    best = best_checkpoints(held, config.best_metric)
    return {
        "last_checkpoint": held[-1].step if held else None,
        "best_checkpoint": best[0].step if best else None,
        "best_metric": config.best_metric,
        "best_value": best[0].state["evaluation"][config.best_metric] if best else None,
    }


def print_summary(summary: Mapping[str, Any]) -> None:
    """The last screen of a run."""
    console.print(f"[bold]{escape(summary['run'])}[/bold]: {escape(_state(summary))}", soft_wrap=True)
    for name, text in _lines(summary).items():
        if text:
            console.print(f"{name:<{_LABEL}}{escape(text)}", soft_wrap=True)


def _state(summary: Mapping[str, Any]) -> str:
    state = str(summary["state"])
    if summary["was_finished"]:
        return f"{state} before; nothing was run. Its result:"
    if summary["duration_s"] is not None:
        state += f" after {duration(summary['duration_s'])}"
    return f"{state} ({summary['reason']})" if summary["reason"] else state


def _lines(summary: Mapping[str, Any]) -> dict[str, str]:
    folder = str(summary["folder"])
    root = folder.removesuffix(f"/{summary['run']}")
    return {
        "trained": _trained(summary),
        "loss": _losses(summary),
        "memory": "" if summary["peak_gib"] is None else f"{summary['peak_gib']:.2f} GiB at most on a worker",
        "checkpoints": _saved(summary),
        "faults": _faults(summary),
        "folder": folder,
        "next": _next(summary),
        "MLflow": f"\n{'':<{_LABEL}}".join(link_lines(f"crate-ray tracking ui {root}", _pages(summary)))
        if summary["link"]
        else "",
    }


def _pages(summary: Mapping[str, Any]) -> dict[str, str]:
    """The run's own page first, then the views of its experiment."""
    return {"This run": summary["link"], **summary["views"]}


def _trained(summary: Mapping[str, Any]) -> str:
    parts = [plural(summary["steps"], "step"), plural(summary["images"], "image")]
    if summary["num_workers"] is not None:
        parts.append(plural(summary["num_workers"], "worker"))
    if summary["images_per_s"] is not None:
        parts.append(f"{summary['images_per_s']:,.0f} images/s")
    shares = {"data wait": summary["data_wait_fraction"], "MFU": summary["mfu"]}
    return ", ".join([*parts, *(f"{name} {value:.0%}" for name, value in shares.items() if value is not None)])


def _losses(summary: Mapping[str, Any]) -> str:
    losses = {"in training": summary["train_loss"], "on validation": summary["eval_loss"]}
    parts = [f"{value:.4f} {where}" for where, value in losses.items() if value is not None]
    accuracies = {name: summary.get(f"eval_{key.removeprefix('eval/')}") for key, name in _ACCURACIES.items()}
    return ", ".join([*parts, *(f"{name} {value:.1%}" for name, value in accuracies.items() if value is not None)])


def _saved(summary: Mapping[str, Any]) -> str:
    if summary["last_checkpoint"] is None:
        return "none"
    best = summary["best_checkpoint"]
    rated = "" if best is None else f", best of step {best:,} ({summary['best_metric']} {summary['best_value']:.4g})"
    return f"last of step {summary['last_checkpoint']:,}{rated}"


def _faults(summary: Mapping[str, Any]) -> str:
    skipped = summary["skipped_steps"]
    parts = [f"{plural(skipped, 'step')} skipped"] if skipped else []
    if summary["interventions"]:
        parts.append(intervention_text([Intervention.of(item) for item in summary["interventions"]]))
    return ", ".join(parts)


def _next(summary: Mapping[str, Any]) -> str:
    folder = summary["folder"]
    if summary["state"] == "FINISHED":
        return f"crate-ray probe {folder}\n{'':<{_LABEL}}crate-ray probe --pictures {folder}"
    return (
        "the same command goes on from the last checkpoint" if summary["last_checkpoint"] else "the same command starts again"
    )
