"""What must not be concluded from a sweep, and why.

In: findings. Out: sentences, each made by a rule from the numbers; the report ends with them. A caution that always stands
there is one that nobody reads, so each appears only where it applies.
"""

from collections import Counter
from collections.abc import Iterator

from crate_ray.analysis.confirmed import ArmDifference
from crate_ray.analysis.objectives import MEASURES, count_text, value_text, values_text
from crate_ray.analysis.ranking import Position, same_question
from crate_ray.analysis.sweep_findings import SweepFindings

_MIN_SEEDS = 5
_EQUAL_WITHIN = 0.05
_BUDGETS = (("train_pflops", "training FLOPs"), ("encoder_params_m", "encoder parameters"))
_ON_EDGE: tuple[Position, ...] = ("lower edge", "upper edge")


def cautions(findings: SweepFindings, *, planned: int | None) -> list[str]:
    """The sentences, the gravest first."""
    return [
        *_unfinished(findings, planned),
        *_exploratory(findings),
        *_edges(findings),
        *_unequal_tuning(findings),
        *_seeds(findings),
        *_unequal_runs(findings),
        *_helped(findings),
        *_questions(findings),
        *_speed(findings),
        "Everything here was chosen and judged on validation. `crate-ray compare` judges retrained runs on test.",
    ]


def _unfinished(findings: SweepFindings, planned: int | None) -> Iterator[str]:
    failed = Counter(row.arm for row in findings.rows if row.state == "FAILED" and row.stage == "screen")
    screened = sum(row.stage == "screen" for row in findings.rows)
    if not findings.is_over(planned):
        of_planned = f", {screened} of {planned} planned screening trials have started" if planned is not None else ""
        open_trials = count_text(findings.num_open, "trial")
        yield f"The sweep is not over: {open_trials} without an end{of_planned}. The same command again goes on."
    if failed:
        yield (
            "Failed trials are missing from the ranking ("
            + ", ".join(f"{arm} {number}" for arm, number in failed.items())
            + "): the best might be among them."
        )


def _exploratory(findings: SweepFindings) -> Iterator[str]:
    if findings.ranking.exploratory:
        yield f"Exploratory, {findings.ranking.exploratory}. A point that loses here may win at a learning rate of its own."


def _edges(findings: SweepFindings) -> Iterator[str]:
    for arm in findings.ranking.arms:
        for tuned in arm.best.tuned if arm.best else ():
            if tuned.position in _ON_EDGE:
                yield (
                    f"The best `{tuned.key}` of {arm.arm} ({value_text(tuned.best)}) lies on the {tuned.position} of its grid: "
                    "a better one may lie beyond. Widen the grid before comparing."
                )
            elif tuned.position == "single value":
                yield f"`{tuned.key}` had a single value: it was not tuned."
    for key, positions in findings.ranking.positions().items():
        on_edge = sum(positions[position] for position in _ON_EDGE)
        if on_edge and positions.total() > len(findings.ranking.arms):
            yield f"The best `{key}` lies on an edge of its grid at {on_edge} of {positions.total()} points of all arms."


def _unequal_tuning(findings: SweepFindings) -> Iterator[str]:
    tried = Counter(row.arm for row in findings.rows if row.stage == "screen" and row.is_over)
    if len(set(tried.values())) > 1:
        numbers = ", ".join(f"{arm} {tried[arm]}" for arm in findings.arms)
        yield f"Unequal tuning budgets ({numbers} trials): the arm with more had more chances to be lucky."


def _seeds(findings: SweepFindings) -> Iterator[str]:
    if findings.sweep.confirm is None:
        yield "One seed a trial: differences between single trials are not differences between configurations or families."
        return
    with_interval = [item for item in findings.differences if item.interval is not None]
    for item in findings.differences:
        if (pairs := item.interval.n if item.interval else 0) < _MIN_SEEDS:
            yield f"{_names(item)}: {pairs} paired seeds, fewer than {_MIN_SEEDS}: too few for a firm statement."
    if len(with_interval) > 1:
        yield (
            f"{len(with_interval)} differences have an interval of 95% each, not corrected for their number: "
            "where there is no difference, one in twenty excludes 0 by chance."
        )
    if not findings.sweep.pair:
        yield "`pair` is off: arms did not share the order of data and masks, so the intervals are wider than they need be."


def _unequal_runs(findings: SweepFindings) -> Iterator[str]:
    """Compared runs of unequal length, cost or size."""
    for item in findings.differences:
        steps = {row.total_steps for side in (item.first, item.second) for row in side.rows}
        if len(steps) > 1:
            yield f"{_names(item)}: trained for unequal steps ({', '.join(str(step) for step in sorted(steps, key=str))})."
        ratios = [
            f"{ratio:.2f} times the {words}"
            for quantity, words in _BUDGETS
            if (ratio := _ratio(item, quantity)) is not None and not 1 / (1 + _EQUAL_WITHIN) <= ratio <= 1 + _EQUAL_WITHIN
        ]
        if ratios:
            yield f"{_names(item)}: {item.first.arm} has {' and '.join(ratios)} of {item.second.arm}."


def _helped(findings: SweepFindings) -> Iterator[str]:
    helped = [row.id for row in findings.rows if row.objectives.get("rollbacks") or row.objectives.get("skipped_steps")]
    if helped:
        yield (
            f"Steps without a finite loss were skipped, or the run rolled back, in {', '.join(helped)}: these are not "
            "the runs of their configuration alone."
        )


def _ratio(item: ArmDifference, quantity: str) -> float | None:
    a, b = item.first.value_of(quantity), item.second.value_of(quantity)
    return a / b if a and b else None


def _names(item: ArmDifference) -> str:
    return f"{item.first.arm} and {item.second.arm}" + (f" at {values_text(item.point)}" if item.point else "")


def _questions(findings: SweepFindings) -> Iterator[str]:
    questions = same_question(findings.rows, ["eval_loss"])
    if len(questions) > 1 and "eval_loss" in findings.sweep.objective:
        keys = ", ".join(questions[0][0])
        yield f"Validation losses are compared only where {keys} agree: else they answer different questions."


def _speed(findings: SweepFindings) -> Iterator[str]:
    if "images_per_s" in findings.sweep.objective:
        yield f"{MEASURES['images_per_s'].label} of trials that share a machine is no measurement of speed."
