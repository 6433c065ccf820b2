"""The sections of a sweep's report, as Markdown.

In: findings. Out: text. Every sentence follows from the numbers by a rule, so that a reader may believe what it says and
notice what it leaves out. Tables show the head of a long list and say how long it is.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from crate_ray.analysis.confirmed import ArmDifference, Confirmed
from crate_ray.analysis.importance import Importance
from crate_ray.analysis.markdown import bullets, table
from crate_ray.analysis.objectives import MEASURES, Measure, amount_text, count_text, key_names, value_text, values_text
from crate_ray.analysis.ranking import ArmRanking, Ranked, own_values
from crate_ray.analysis.sweep_findings import Front, SweepFindings
from crate_ray.config import Domain, SweepConfig
from crate_ray.runs import TRIAL_STATES, TrialRow

_SHOWN_TRIALS = 10  # of an arm
_SHOWN_POINTS = 30
_SHOWN_REASONS = 8  # of one kind of end
_COST_NAMES = {
    "steps": "training steps",
    "wall_hours": "wall time (hours)",
    "gpu_hours": "GPU-hours",
    "cpu_hours": "CPU-hours",
    "usd": "cost (USD)",
}


def what_was_swept(sweep: SweepConfig) -> str:
    """Keys with their values, objectives, search, scheduler and seeds."""
    entries = [("all arms", "space", sweep.space), *((arm, "space", one.space) for arm, one in sweep.arms.items())]
    entries += (
        [("all but " + sweep.match.to, f"solved for equal {sweep.match.quantity}", sweep.match.over)] if sweep.match else []
    )
    entries += [("all arms", "tuned at every point", sweep.tune)]
    lines = [
        (f"`{key}`", where, role, domain_text(domain)) for where, role, domains in entries for key, domain in domains.items()
    ]
    parts = [table(("key", "arm", "role", "values"), lines)] if lines else []
    return "\n\n".join([*parts, bullets(_settings(sweep))])


def _settings(sweep: SweepConfig) -> list[str]:
    directions = [
        f"{MEASURES[o].label} ({'higher' if MEASURES[o].is_larger_better else 'lower'} is better)" for o in sweep.objective
    ]
    lines = [f"Objective: {', '.join(directions)}.", f"Search: {sweep.search.method}. Scheduler: {_scheduler_text(sweep)}."]
    if sweep.constraints:
        lines.append("Constraints: " + "; ".join(f"`{rule}`" for rule in sweep.constraints) + ".")
    lines.append(f"Screening: one seed ({sweep.screen.seed}).")
    if sweep.confirm is not None:
        of_what = "every point of the space" if sweep.confirm.per == "point" else "every arm"
        lines[-1] += (
            f" Confirmation: the best {sweep.confirm.top_k} of {of_what}, {sweep.confirm.seeds} fresh seeds from "
            f"{sweep.confirm.first_seed}, to the end."
        )
    return lines


def _scheduler_text(sweep: SweepConfig) -> str:
    scheduler = sweep.scheduler
    if scheduler.type == "none":
        return "none, every trial runs to its end"
    brackets = f", compared within {scheduler.num_brackets} classes of size" if scheduler.bracket_by else ""
    grace = f", none before step {scheduler.grace_steps}" if scheduler.grace_steps else ""
    return f"{scheduler.type}{grace}{brackets}"


def domain_text(domain: Domain) -> str:
    """The values of a key in words."""
    listed = domain.grid or domain.choice
    if listed is not None:
        return ", ".join(value_text(value) for value in listed)
    if domain.of is not None:
        rule = f"{value_text(domain.times)} times it" if domain.times else f"by {dict(domain.map)}" if domain.map else "equal"
        return f"follows `{domain.of}`: {rule}"
    if domain.same_flops_as is not None:
        return f"as many as cost the training FLOPs at {values_text(domain.same_flops_as)}"
    if domain.quantized is not None:
        low, high, step = domain.quantized
        return f"{value_text(low)} to {value_text(high)} in steps of {value_text(step)}"
    limits, kind = (domain.loguniform, ", uniform in the logarithm") if domain.loguniform else (domain.uniform, "")
    assert limits is not None
    return f"{value_text(limits[0])} to {value_text(limits[1])}{kind}" + (f", {domain.num} values" if domain.num else "")


def counts(findings: SweepFindings, *, planned: int | None, refused: Mapping[str, int]) -> str:
    """How many trials were planned, refused, and how those that started ended."""
    lines = []
    for stage in ("screen", "confirm"):
        for arm in findings.arms:
            states = Counter(row.state for row in findings.rows if (row.stage, row.arm) == (stage, arm))
            if states:
                lines.append((arm, stage, *(str(states[state]) for state in TRIAL_STATES), str(states.total())))
    parts = [table(("arm", "stage", *(state.lower() for state in TRIAL_STATES), "all"), lines)]
    notes = [f"Planned: {planned} screening trials."] if planned is not None else []
    notes += [
        f"Refused before they cost anything: {count_text(count, 'point')}, {reason}." for reason, count in refused.items()
    ]
    notes += end_texts(findings.rows)
    return "\n\n".join([*parts, *([bullets(notes)] if notes else [])])


def end_texts(rows: Sequence[TrialRow]) -> list[str]:
    """How many trials ended without a result, and why: a sentence for each reason."""
    texts = []
    for state, verb in (("INFEASIBLE", "Infeasible"), ("FAILED", "Failed"), ("KILLED", "Killed")):
        reasons = Counter(_first_line(row.reason) for row in rows if row.state == state)
        shown = reasons.most_common(_SHOWN_REASONS)
        texts += [f"{verb}: {count_text(count, 'trial')}, {reason}." for reason, count in shown]
        if rest := reasons.total() - sum(count for _, count in shown):
            texts.append(f"{verb}: {count_text(rest, 'trial')} more, for other reasons.")
    return texts


def _first_line(reason: str | None) -> str:
    return (reason or "").strip().partition("\n")[0].rstrip(".") or "no reason recorded"


def comparison(findings: SweepFindings) -> str:
    """Confirmed means with intervals, and the paired differences between arms."""
    if findings.sweep.confirm is None:
        return "The sweep has no confirm stage: one seed a trial, so nothing here compares arms."
    if not findings.has_confirmed:
        return "No confirm run has finished yet."
    measure = MEASURES[findings.sweep.objective[0]]
    header = ("arm", "configuration", "encoder params (M)", "GFLOPs/image", f"{measure.axis}, mean [95%]", "seeds", "missing")
    parts = [table(header, [_confirmed_cells(item, measure, findings.sweep) for item in findings.confirmed])]
    if findings.differences:
        parts.append("Differences, each arm with its best configuration of the screening:")
        parts.append(bullets([line for item in findings.differences for line in _difference_lines(item)]))
    return "\n\n".join(parts)


def _confirmed_cells(item: Confirmed, measure: Measure, sweep: SweepConfig) -> list[str]:
    mean = measure.text(item.value_of(item.objective))
    if item.interval is not None:
        mean += f" [{measure.text(item.interval.low)}, {measure.text(item.interval.high)}]"
    missing = "; ".join(f"{seed}: {why}" for seed, why in item.missing.items()) or "none"
    sizes = [MEASURES[name].text(item.value_of(name)) for name in ("encoder_params_m", "gflops")]
    return [item.arm, values_text(own_values(item.values, sweep, item.arm)), *sizes, mean, str(len(item.by_seed)), missing]


def _difference_lines(item: ArmDifference) -> list[str]:
    where = f"At {values_text(item.point)}: " if item.point else ""
    dropped = "; ".join(f"seed {seed}: {why}" for seed, why in item.dropped.items())
    return [where + item.sentence() + (f" Left out of the pairs: {dropped}." if dropped else "")]


def rankings(findings: SweepFindings) -> str:
    """The head of every arm's ranking, and the best of `tune` at every point of its space."""
    parts = []
    if findings.ranking.exploratory:
        parts.append(f"**Exploratory**, {findings.ranking.exploratory}. These places rank no sizes and no families.")
    for arm in findings.ranking.arms:
        parts += [
            f"### {arm.arm}" + (f" at {values_text(arm.target)}" if arm.target else ""),
            *_arm_ranking(arm, findings.sweep),
        ]
    return "\n\n".join(parts) or "No trial has ended yet."


def _arm_ranking(arm: ArmRanking, sweep: SweepConfig) -> list[str]:
    objectives = list(dict.fromkeys([*sweep.objective, "encoder_params_m", "gflops"]))
    header = ("place", "configuration", *(MEASURES[name].axis for name in objectives), "trial", "ended")
    shown = arm.trials[:_SHOWN_TRIALS]
    parts = [table(header, [_trial_cells(trial, objectives, sweep) for trial in shown])] if shown else ["No trial has a value."]
    notes = [f"{len(arm.trials) - len(shown)} more trials follow."] if len(arm.trials) > len(shown) else []
    notes += [f"Without a place: {', '.join(f'{n} {why}' for why, n in arm.unranked.items())}."] if arm.unranked else []
    parts += [" ".join(notes)] if notes else []
    if sweep.tune and len(arm.points) > 1:
        parts += ["Best of the tuned keys at every point:", _points_table(arm, sweep)]
    return parts


def _trial_cells(trial: Ranked, objectives: Sequence[str], sweep: SweepConfig) -> list[str]:
    row = trial.row
    values = [MEASURES[name].text(row.value_of(name)) for name in objectives]
    ended = (
        "at its end"
        if trial.step is None
        else f"stopped at step {trial.step}" + (f" of {row.total_steps}" if row.total_steps else "")
    )
    return [str(trial.place), values_text(own_values(row.values, sweep, row.arm)), *values, f"`{row.id}`", ended]


def _points_table(arm: ArmRanking, sweep: SweepConfig) -> str:
    points = arm.points
    measure = MEASURES[sweep.objective[0]]
    names = key_names([tuned.key for tuned in points[0].tuned])
    header = ("point", *(f"{name}, where on its grid" for name in names.values()), measure.axis, "finished trials")
    lines = [
        [
            values_text(own_values(point.values, sweep, arm.arm)),
            *(f"{value_text(tuned.best)}, {tuned.position}" for tuned in point.tuned),
            measure.text(point.best.value),
            str(point.num_finished),
        ]
        for point in points[:_SHOWN_POINTS]
    ]
    more = f"\n\n{len(points) - _SHOWN_POINTS} more points follow." if len(points) > _SHOWN_POINTS else ""
    return table(header, lines) + more


def tuning(findings: SweepFindings) -> str:
    """For every tuned key the best value of each arm and where it lies, then over all points."""
    best = [(arm, arm.best) for arm in findings.ranking.arms if arm.best is not None]
    if not findings.sweep.tune or not best:
        return "Nothing was tuned." if not findings.sweep.tune else "No trial has finished yet."
    lines = [
        (
            f"`{tuned.key}`",
            arm.arm + (f" at {values_text(arm.target)}" if arm.target else ""),
            value_text(tuned.best),
            tuned.position,
        )
        for arm, point in best
        for tuned in point.tuned
    ]
    notes = [
        f"`{key}` over all {positions.total()} points: "
        + ", ".join(f"{position} at {number}" for position, number in sorted(positions.items()))
        + "."
        for key, positions in findings.ranking.positions().items()
    ]
    return "\n\n".join([table(("key", "arm", "best value", "where on its grid"), lines), bullets(notes)])


def fronts(findings: SweepFindings) -> str:
    """A table for every front."""
    of_what = (
        "means of confirmed configurations" if findings.sweep.confirm else "screening trials on one seed, which flatters them"
    )
    parts = [f"Candidates are {of_what}." if findings.fronts else "No candidate has finished yet."]
    for item in findings.fronts:
        parts += [
            f"**{_front_title(item)}**: {len(item.members)} of {item.num_candidates} are on the front.",
            _front_table(item, findings.sweep),
        ]
    return "\n\n".join(parts)


def _front_title(item: Front) -> str:
    ways = [f"{MEASURES[name].label} ({'up' if MEASURES[name].is_larger_better else 'down'})" for name in item.objectives]
    return " against ".join(ways) + (f", at {values_text(item.target)}" if item.target else "")


def _front_table(item: Front, sweep: SweepConfig) -> str:
    header = ("arm", "configuration", *(MEASURES[name].axis for name in item.objectives))
    last = item.objectives[-1]
    members = sorted(item.members, key=lambda member: (member.value_of(last) or 0.0, member.arm))
    return table(
        header,
        [
            [
                member.arm,
                values_text(own_values(member.values, sweep, member.arm)),
                *(MEASURES[name].text(member.value_of(name)) for name in item.objectives),
            ]
            for member in members
        ],
    )


def importance(found: Sequence[Importance]) -> str:
    """A line for every arm: shares, or why there are none."""
    return bullets([_importance_line(item) for item in found]) if found else "No trial has ended yet."


def _importance_line(item: Importance) -> str:
    if item.why_not:
        return f"{item.arm}: none, {item.why_not}."
    names = key_names(list(item.shares))
    shares = ", ".join(f"{names[key]} {100 * share:.0f}%" for key, share in item.shares.items())
    rest = max(0.0, 1 - sum(item.shares.values()))
    return f"{item.arm}: {shares}, together and unexplained {100 * rest:.0f}%, over {item.num_trials} finished trials."


def cost(findings: SweepFindings, forecast: Mapping[str, Any], spent: Mapping[str, float]) -> str:
    """The forecast beside what was spent, with its error.

    Args:
        findings: Of the sweep.
        forecast: What the forecast says as JSON: `total` holds {low, expected, high} of hours and dollars, `stages` of steps.
            and `error` how much longer trials took than forecast for the steps that they trained.
        spent: Trials, hours, trial_hours, gpu_hours, and usd where a price is known.
    """
    used = {**_devices_used(findings, spent), "steps": float(sum(row.step for row in findings.rows))}
    ranges = {**forecast.get("total", {}), "steps": _expected_steps(forecast)}
    lines = [
        _cost_cells(name, ranges[key], used[key])
        for key, name in _COST_NAMES.items()
        if isinstance(ranges.get(key), dict) and key in used
    ]
    hours = sum(row.seconds for row in findings.rows) / 3600
    held = f"The trials held their resources for {amount_text(hours)} hours together."
    if hours < 1:
        held = f"The trials held their resources for {amount_text(60 * hours)} minutes together."
    off = (forecast.get("error") or {}).get("relative")
    if off is not None:
        more = "more" if off > 0 else "less"
        held += f" For the steps that they trained, trials took {100 * abs(off):.0f}% {more} than forecast."
    header = ("", "forecast", "from low to high", "spent", "spent against forecast")
    return "\n\n".join([*([table(header, lines)] if lines else ["No forecast was recorded."]), held])


def _devices_used(findings: SweepFindings, spent: Mapping[str, float]) -> dict[str, float]:
    """What was spent, under the names of the forecast."""
    resources = findings.sweep.resources_per_trial
    used = {
        name: spent[key] for name, key in (("wall_hours", "hours"), ("gpu_hours", "gpu_hours"), ("usd", "usd")) if key in spent
    }
    if "trial_hours" in spent:
        used["cpu_hours"] = spent["trial_hours"] * resources.num_workers * resources.cpus
    return used


def _expected_steps(forecast: Mapping[str, Any]) -> dict[str, float] | None:
    stages = [stage["steps"] for stage in forecast.get("stages", {}).values()]
    return {end: sum(steps[end] for steps in stages) for end in ("low", "expected", "high")} if stages else None


def _cost_cells(name: str, forecast: Mapping[str, float], spent: float) -> list[str]:
    low, expected, high = (forecast[end] for end in ("low", "expected", "high"))
    error = f"{100 * (spent / expected - 1):+.0f}%" if expected else "-"
    where = "inside" if low <= spent <= high else "outside"
    return [
        name,
        amount_text(expected),
        f"{amount_text(low)} to {amount_text(high)}",
        amount_text(spent),
        f"{error}, {where} its range",
    ]
