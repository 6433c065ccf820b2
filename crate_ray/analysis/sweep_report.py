"""The report of a sweep: report.md and pictures/ in its folder.

In: the folder of a sweep, at its end or while it goes on. Out: the report. It is made from sweep.yaml, the trials' own files
and results.json, and from nothing else, so that writing it again gives the same bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from crate_ray import storage
from crate_ray.analysis import sweep_sections as sections
from crate_ray.analysis.markdown import bullets
from crate_ray.analysis.objectives import MEASURES, count_text, values_text
from crate_ray.analysis.ranking import ArmRanking, own_values, same_question
from crate_ray.analysis.sweep_cautions import cautions
from crate_ray.analysis.sweep_findings import SweepFindings, sweep_findings
from crate_ray.analysis.sweep_plots import ArmStyle, Line, arm_styles, plot_front, plot_importance, plot_keys, plot_learning
from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder, TrialRow, list_trials, objective_values, read_records, read_sweep

_MAX_CURVES = 120
_CURVES_OF = ("eval_loss", "knn_top1")


def write_report(sweep_uri: str) -> str:
    """Writes report.md and pictures/ into the folder of a sweep.

    Returns:
        URI of report.md.

    Raises:
        ConfigError: The folder is no sweep's.
    """
    folder = RunFolder(sweep_uri)
    sweep = read_sweep(folder)
    if sweep is None:
        raise ConfigError(f"{folder.uri} has no sweep.yaml: give the folder of a sweep, storage.path/<name of the sweep>")
    results = folder.read_json("results.json") or {}
    findings = sweep_findings(sweep, read_rows(folder, results))
    names = _write_pictures(folder, findings)
    report = folder.path("report.md")
    storage.write_atomic(report, report_text(findings, results, names))
    return report


def read_rows(folder: RunFolder, results: Mapping[str, Any]) -> list[TrialRow]:
    """The rows of the trials' own files, and of results.json where a trial's folder is gone."""
    kept = {body["id"]: TrialRow.of(body) for body in results.get("rows", ())}
    rows = kept | {row.id: row for row in list_trials(folder.uri)}
    return [rows[name] for name in sorted(rows)]


def report_text(findings: SweepFindings, results: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The text of report.md.

    Args:
        findings: Of the sweep.
        results: The content of results.json, or of what is there of it.
        pictures: Names of the files in pictures/.
    """
    planned, refused = results.get("planned"), results.get("refused") or {}

    def shown(stem: str) -> str:
        return "\n".join(f"![{name}](pictures/{name})" for name in pictures if name.startswith(stem))

    parts = [
        f"# Sweep {findings.sweep.name}",
        f"**Exploratory**, {findings.ranking.exploratory}." if findings.ranking.exploratory else "",
        "" if findings.is_over(planned) else "**Not over**: what follows may change.",
        headline(findings),
        "What must not be concluded stands at the end; read it with this.",
        "## What was swept",
        sections.what_was_swept(findings.sweep),
        "## Trials",
        sections.counts(findings, planned=planned, refused=refused),
        "## Confirmed comparison",
        sections.comparison(findings),
        "## Ranking of the screening",
        sections.rankings(findings),
        shown("keys"),
        "## Where the tuned values lie",
        sections.tuning(findings),
        "## Pareto fronts",
        sections.fronts(findings),
        shown("front"),
        "## Importance",
        "Share of the variance of the objective that each key explains alone (functional ANOVA), within what was tried.",
        sections.importance(findings.importances),
        shown("importance"),
        "## While training",
        shown("learning") or "No trial was evaluated twice.",
        "## Cost",
        sections.cost(findings, results.get("forecast") or {}, results.get("spent") or {}),
        "## What must not be concluded",
        bullets(cautions(findings, planned=planned)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(findings: SweepFindings) -> str:
    """The finding in a few sentences: the differences between arms, or why there are none yet."""
    measured = [item for item in findings.differences if item.interval is not None]
    if measured and findings.sweep.confirm is not None and findings.sweep.confirm.per == "arm":
        measure = MEASURES[findings.sweep.objective[0]]
        return f"Difference in {measure.label}, each arm at its best of the screening: " + " ".join(
            item.sentence() for item in measured
        )
    if measured:
        arms = dict.fromkeys((item.first.arm, item.second.arm) for item in measured)
        return " ".join(_wins(findings, first, second) for first, second in arms)
    best = [_best_text(arm, findings) for arm in findings.ranking.arms if arm.best]
    return (
        f"Not confirmed: best of the screening, one seed a trial. {'; '.join(best)}." if best else "No trial has finished yet."
    )


def _wins(findings: SweepFindings, first: str, second: str) -> str:
    """How often one arm is ahead, over the points that both were confirmed at."""
    pairs = [item for item in findings.differences if (item.first.arm, item.second.arm) == (first, second) and item.interval]
    is_larger_better = MEASURES[findings.sweep.objective[0]].is_larger_better
    clear = [item.interval.mean > 0 for item in pairs if item.interval and item.excludes_zero]
    ahead = sum(sign == is_larger_better for sign in clear)
    at = count_text(len(pairs), "point")
    return (
        f"{first} against {second} at {at}: {first} is better at {ahead}, {second} at {len(clear) - ahead}, "
        f"not told apart at {len(pairs) - len(clear)}."
    )


def _best_text(arm: ArmRanking, findings: SweepFindings) -> str:
    assert arm.best is not None
    measure = MEASURES[findings.sweep.objective[0]]
    where = f" at {values_text(arm.target)}" if arm.target else ""
    values = values_text(own_values(arm.best.best.row.values, findings.sweep, arm.arm))
    return f"{arm.arm}{where}: {values}, {measure.label} {measure.with_unit(arm.best.best.value)}"


def _write_pictures(folder: RunFolder, findings: SweepFindings) -> list[str]:
    """Draws what there is to draw; the names of the files."""
    drawn = _draw(folder, findings)
    for stale in set(storage.list_dir(folder.path("pictures"))) - drawn.keys():
        storage.delete(folder.path("pictures", stale))
    for name, content in drawn.items():
        storage.write_atomic(folder.path("pictures", name), content)
    return list(drawn)


def _draw(folder: RunFolder, findings: SweepFindings) -> dict[str, bytes]:
    sweep, styles = findings.sweep, arm_styles(_families(folder, findings))
    pictures: dict[str, bytes | None] = {}
    for number, (target, rows) in enumerate(same_question(findings.rows, sweep.objective[:1])):
        ids = {row.id for row in rows}
        configurations = [item for item in findings.confirmed if item.rows and item.rows[0].id in ids]
        title = sweep.name + (f", {values_text(target)}" if target else "")
        suffix = f"_{number + 1}" if target else ""
        pictures[f"keys{suffix}.png"] = plot_keys(rows, sweep, styles, title=title)
        pictures[f"front{suffix}.png"] = plot_front(rows, configurations, sweep, styles, title=title)
    pictures["importance.png"] = plot_importance(findings.importances, sweep.objective[0], styles, title=sweep.name)
    pictures |= _draw_learning(folder, findings, styles)
    return {name: content for name, content in pictures.items() if content is not None}


def _draw_learning(folder: RunFolder, findings: SweepFindings, styles: Mapping[str, ArmStyle]) -> dict[str, bytes | None]:
    objective = next((name for name in findings.sweep.objective if name in _CURVES_OF), _CURVES_OF[0])
    ranked = [trial for arm in findings.ranking.arms for trial in arm.trials]
    shown = sorted(ranked, key=lambda trial: (trial.place, trial.row.id))[:_MAX_CURVES]
    lines = [Line(trial.row, _curve(folder, trial.row, objective)) for trial in shown]
    pictures = {}
    for number, (target, rows) in enumerate(same_question([line.row for line in lines], [objective])):
        ids = {row.id for row in rows}
        title = findings.sweep.name + (f", {values_text(target)}" if target else "")
        title += f", the best {len(shown)} of {len(ranked)} trials" if len(ranked) > len(shown) else ""
        name = f"learning{f'_{number + 1}' if target else ''}.png"
        pictures[name] = plot_learning([line for line in lines if line.row.id in ids], objective, styles, title=title)
    return pictures


def _curve(folder: RunFolder, row: TrialRow, objective: str) -> list[tuple[int, float]]:
    """The objective's values by step, as the trial's records have them."""
    points = []
    for record in read_records(RunFolder(folder.path("trials", row.id))):
        measured = {key: value for key, value in record.values.items() if key.startswith("eval/")}
        if objective in (values := objective_values(measured)):
            points.append((record.step, values[objective]))
    return points


def _families(folder: RunFolder, findings: SweepFindings) -> dict[str, str | None]:
    """The family of each arm, from its first trial that says so."""
    families: dict[str, str | None] = {}
    for arm in findings.arms:
        metas = (RunFolder(folder.path("trials", row.id)).read_json("run_meta.json") for row in findings.rows if row.arm == arm)
        families[arm] = next((meta["family"] for meta in metas if meta is not None), None)
    return families
