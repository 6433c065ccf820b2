"""The end of a sweep: what is printed for people and what `--json` holds.

In: how the sweep ended, its rows and what the analysis makes of them. Out: text or one object. Nothing is computed here, so
that the screen, the report and the JSON never differ.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from crate_ray.analysis.confirmed import ArmDifference
from crate_ray.analysis.objectives import MEASURES, key_names, value_text
from crate_ray.analysis.ranking import ArmRanking, Ranking
from crate_ray.analysis.sweep_findings import Front, SweepFindings
from crate_ray.analysis.sweep_sections import end_texts
from crate_ray.cli.output import console, link_lines, print_table, print_text
from crate_ray.cli.progress import duration
from crate_ray.cli.sweep_forecast import error_text
from crate_ray.cli.sweep_screen import NAMES, objective_text
from crate_ray.cli.sweep_table import shape_of, state_word, varying_keys
from crate_ray.config import SweepConfig
from crate_ray.runs import RunFolder, TrialRow, encode_number
from crate_ray.space import Point, point_config

if TYPE_CHECKING:
    from crate_ray.launch.sweeps.driver import SweepOutcome

SHOWN = 5  # trials of an arm; the report has all


def summarise(outcome: "SweepOutcome", findings: SweepFindings, links: dict[str, Any]) -> dict[str, Any]:
    """What a program wants to know of a sweep that ended."""
    results = outcome.folder.read_json("results.json") or {}
    return {
        "sweep": findings.sweep.name,
        "folder": outcome.folder.uri,
        "state": outcome.state,
        "reason": outcome.reason,
        "was_finished": outcome.was_finished,
        "cut_short": outcome.cut_short,
        "objective": list(findings.sweep.objective),
        "exploratory": findings.ranking.exploratory,
        "trials": [_trial(findings.sweep, outcome.folder, row) for row in outcome.rows],
        "best": _best(findings),
        "differences": [_difference(item) for item in findings.differences],
        "front": [_front(item) for item in findings.fronts],
        "importance": {item.arm: dict(item.shares) for item in findings.importances},
        "forecast": results.get("forecast"),
        "spent": outcome.spent,
        "counts": outcome.counts,
        "refused": results.get("refused") or {},
        "links": links,
    }


def _trial(sweep: SweepConfig, folder: RunFolder, row: TrialRow) -> dict[str, Any]:
    """One trial: its whole configuration, and the numbers at its end or of its last report."""
    final = (RunFolder(folder.path("trials", row.id)).read_json("final.json") or {}).get("values", {})
    values = {**row.objectives, **{key.removeprefix("final/"): value for key, value in final.items()}}
    point = Point(arm=row.arm, values=row.values, seed=row.seed, stage=row.stage)
    return {
        **row.as_dict(),
        "config": point_config(sweep, point).model_dump(mode="json"),
        "final": {key: encode_number(value) if isinstance(value, float) else value for key, value in values.items()},
    }


def _best(findings: SweepFindings) -> dict[str, Any]:
    """The best of each arm by the first objective, and its mean over fresh seeds where it was confirmed."""
    best: dict[str, Any] = {}
    for arm in findings.ranking.arms:
        if arm.best is not None and arm.arm not in best:
            row = arm.best.best.row
            edges = {tuned.key: tuned.position for tuned in arm.best.tuned}
            best[arm.arm] = {"id": row.id, "values": dict(row.values), "value": arm.best.best.value, "edges": edges}
    for item in findings.confirmed:
        if item.interval is not None and item.arm in best:
            best[item.arm].setdefault("confirmed", {"values": dict(item.values), **asdict(item.interval)})
    return best


def _difference(item: ArmDifference) -> dict[str, Any]:
    interval = None if item.interval is None else asdict(item.interval)
    return {"first": item.first.arm, "second": item.second.arm, "interval": interval, "sentence": item.sentence()}


def _front(item: Front) -> dict[str, Any]:
    members = [
        {
            "trial": member.id if isinstance(member, TrialRow) else None,
            "arm": member.arm,
            "values": dict(member.values),
            "objectives": {name: member.value_of(name) for name in item.objectives},
        }
        for member in item.members
    ]
    return {"objectives": list(item.objectives), "target": item.target, "members": members}


def print_findings(findings: SweepFindings) -> None:
    """Ranking, edges, confirmed comparison, front and importance, each in a few lines."""
    for arm in findings.ranking.arms:
        _print_ranking(arm, findings)
    if findings.ranking.exploratory:
        print_text(f"exploratory, {findings.ranking.exploratory}: these places rank no sizes and no families", style="yellow")
    for line in _edge_lines(findings.ranking):
        print_text(line)
    _print_confirmed(findings)
    keys = varying_keys(findings.sweep)
    for found in findings.fronts:
        if found.objectives == findings.fronts[0].objectives:  # the sweep's own; the report has the others
            _print_front(found, keys)
    _print_importance(findings)


def _print_ranking(arm: ArmRanking, findings: SweepFindings) -> None:
    names = list(dict.fromkeys([*findings.sweep.objective, "params_m"]))
    keys = varying_keys(findings.sweep)
    rows = [
        (
            str(trial.place),
            escape(trial.row.id),
            escape(shape_of(trial.row.values, keys)),
            *(objective_text(name, trial.row.value_of(name)) for name in names),
            f"stopped at {trial.step}" if trial.step is not None else "",
        )
        for trial in arm.trials[:SHOWN]
    ]
    of = "".join(f", {key.rpartition('.')[2]} {value_text(value)}" for key, value in arm.target.items())
    title = f"{arm.arm}{of}: best {len(rows)} of {len(arm.trials)} by {MEASURES[findings.ranking.objective].label}"
    if rows:
        print_table(("#", "trial", "shape", *(NAMES[name] for name in names), ""), rows, title=escape(title))
    else:
        why = ", ".join(f"{count} {reason}" for reason, count in arm.unranked.items())
        console.print(f"[red]{escape(arm.arm)}: no trial finished[/red] ({escape(why)})", soft_wrap=True)
    console.print()


def _edge_lines(ranking: Ranking) -> list[str]:
    """The best value of each tuned key and where it lies; an edge is a reason to widen the grid."""
    positions = ranking.positions()
    names = key_names(list(positions))
    best: dict[str, list[str]] = {key: [] for key in positions}
    for arm in ranking.arms:
        for tuned in arm.best.tuned if arm.best is not None else ():
            best[tuned.key].append(f"{arm.arm} {value_text(tuned.best)} ({tuned.position})")
    lines = []
    for key, counts in positions.items():
        on_edge, points = counts["lower edge"] + counts["upper edge"], counts.total()
        edges = f"; on an edge of its grid at {on_edge} of {points} points" if on_edge else ""
        lines.append(f"best {names[key]}: {', '.join(best[key])}{edges}")
    return lines


def _print_confirmed(findings: SweepFindings) -> None:
    if not findings.confirmed:
        return
    measure = MEASURES[findings.ranking.objective]
    keys = varying_keys(findings.sweep)
    rows = [
        (
            escape(item.arm),
            escape(shape_of(item.values, keys)),
            "-" if item.interval is None else measure.text(item.interval.mean),
            "-" if item.interval is None else f"[{measure.text(item.interval.low)}, {measure.text(item.interval.high)}]",
            str(len(item.by_seed)),
        )
        for item in findings.confirmed
    ]
    print_table(("arm", "shape", measure.axis, "95% interval", "seeds"), rows, title="confirmed on fresh seeds")
    for difference in findings.differences:
        print_text(difference.sentence(), style="bold")
    for item in findings.confirmed:
        for seed, why in item.missing.items():
            print_text(f"{item.arm} seed {seed}: {why}", style="yellow")
    console.print()


def _print_front(found: Front, keys: Sequence[str]) -> None:
    rows = []
    for member in found.members:
        name = member.id if isinstance(member, TrialRow) else f"{member.arm}, {len(member.by_seed)} seeds"
        values = (objective_text(objective, member.value_of(objective)) for objective in found.objectives)
        rows.append((escape(name), escape(shape_of(member.values, keys)), *values))
    if rows:
        of = "".join(f", {key} {value_text(value)}" for key, value in found.target.items())
        title = f"Pareto front{of}: {len(rows)} of {found.num_candidates}"
        print_table(("trial", "shape", *(NAMES[name] for name in found.objectives)), rows, title=escape(title))
        console.print()


def _print_importance(findings: SweepFindings) -> None:
    for item in findings.importances:
        names = key_names(list(item.shares))
        shares = ", ".join(f"{names[key]} {share:.0%}" for key, share in item.shares.items())
        text = shares or f"nothing can be said: {item.why_not}"
        print_text(f"importance in {item.arm} ({item.num_trials} trials): {text}")


def print_end(outcome: "SweepOutcome", summary: dict[str, Any]) -> None:
    """How the sweep ended, what it used, and where everything is."""
    state = f"{summary['state']} ({summary['reason']})" if summary["reason"] else summary["state"]
    if summary["state"] == "KILLED":
        state += "; the same command goes on from there"
    if summary["was_finished"]:
        state += " before; nothing was run"
    lines = [f"{summary['sweep']}: {state}", _count_text(outcome.rows, summary["refused"])]
    lines += [f"no further trial was started: {summary['cut_short']}"] if summary["cut_short"] else []
    for line in lines:
        print_text(line)
    for line in end_texts(outcome.rows):
        print_text(line, style="yellow")
    for line in _cost_lines(summary):
        print_text(line)
    links = summary["links"]
    console.print(f"report  {escape(links['report'])}", soft_wrap=True)
    pages = {**links["views"], "This sweep": links["sweep"]} if links["sweep"] else links["views"]
    for number, line in enumerate(link_lines(links["serve"], pages)):
        console.print(f"{'MLflow' if number == 0 else '':<8}{escape(line)}", soft_wrap=True)


def _count_text(rows: Sequence[TrialRow], refused: Mapping[str, int]) -> str:
    """How the trials of each stage ended, in words."""
    parts = []
    for stage, name in (("screen", "screening"), ("confirm", "confirmation")):
        states = Counter(row.state for row in rows if row.stage == stage)
        if states:
            parts.append(f"{name}: " + ", ".join(f"{count} {state_word(state)}" for state, count in states.most_common()))
    if refused:
        parts.append(f"refused beforehand: {sum(refused.values())}")
    return "; ".join(parts) or "no trial was started"


def _cost_lines(summary: dict[str, Any]) -> list[str]:
    """What was used, and how far the forecast was from it."""
    spent, forecast = summary["spent"], summary["forecast"]
    units = [name for name in ("trial_hours", "gpu_hours", "usd") if spent.get(name)]
    used = [
        f"{duration(3600 * spent.get('hours', 0.0))} of wall time",
        *(f"{spent[u]:.3g} {u.replace('_', ' ')}" for u in units),
    ]
    lines = ["used " + ", ".join(used)]
    if forecast is not None:
        wall, off = forecast["total"]["wall_hours"], forecast["error"]["relative"]
        low, expected, high = (duration(3600 * wall[key]) for key in ("low", "expected", "high"))
        how = "" if off is None else f"; for their steps, trials took {error_text(off)}"
        lines.append(f"forecast {expected} [{low}, {high}] of wall time{how}")
    return lines
