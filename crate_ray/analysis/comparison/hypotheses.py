"""Which differences are looked at, declared before any outcome is, and what each of them says.

In: configurations. Out: differences of CRATE minus MAE, paired by seed, Holm-corrected over all of them. A hypothesis is chosen
by where configurations stand on an axis, or by the place that a screening gave them, never by the metric that it is judged by:
to pick the pair that differs most and then to test it would find winners where there are none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

from crate_ray.analysis.comparison.frontier import NOUNS
from crate_ray.analysis.comparison.gates import LEAST_SEEDS, flags, is_within, refusals
from crate_ray.analysis.comparison.noise import Answers, Pairs, image_noise
from crate_ray.analysis.comparison.result import Axis, Configuration, Difference
from crate_ray.analysis.comparison.wording import sentence
from crate_ray.analysis.objectives import Measure, count_text
from crate_ray.analysis.statistics import PairedTest, holm, paired_t_test
from crate_ray.runs.rows import Estimate

WITHIN = 0.05
"""How far two configurations may stand apart on an axis to be called equal there."""
ALPHA = 0.05
Where = Axis | Literal["best"]
AT: Mapping[str, str] = {
    "params": "at equal encoder parameters",
    "flops": "at equal training FLOPs",
    "time": "at equal training time",
    "best": "each as its screening chose it",
}


@dataclass(frozen=True)
class Hypothesis:
    """A pair to be tested, and why it may not be: known before any outcome is."""

    axis: Where
    first: Configuration
    second: Configuration
    refusals: tuple[str, ...]


def declare(configurations: Sequence[Configuration], metric: str, axes: Sequence[Axis]) -> list[Hypothesis]:
    """The family of hypotheses, from positions and screening places alone.

    On each axis every confirmed configuration of CRATE with the nearest of each model of MAE within 5%, those that may be
    compared first; then the choices of each arm's screening, wherever they stand: those of one sweep, else all.
    """
    crate = [item for item in configurations if item.family == "crate" and item.is_confirmed]
    vit = [item for item in configurations if item.family == "vit" and item.is_confirmed]
    baselines = sorted({item.model for item in vit})
    found = []
    for axis in axes:
        for first in crate:
            for model in baselines:
                near = _nearest(first, [item for item in vit if item.model == model], metric, axis)
                if near is not None:
                    found.append(near)
    for first in choices_of(crate):
        others = choices_of(vit)
        beside = [item for item in others if first.rows[0].sweep is not None and item.rows[0].sweep == first.rows[0].sweep]
        found += [Hypothesis("best", first, other, tuple(refusals(first, other, metric, "best"))) for other in beside or others]
    return found


def choices_of(configurations: Sequence[Configuration]) -> list[Configuration]:
    """What the screening of each arm of each sweep chose; of plain runs a model's only configuration, if it has but one."""
    confirmed = [item for item in configurations if item.is_confirmed]
    arms: dict[tuple[str, str, str], list[tuple[int, str, Configuration]]] = {}
    plain: dict[str, list[Configuration]] = {}
    for item in confirmed:
        places = [row.place for row in item.rows if row.place is not None]
        if places:
            arm = (item.model, item.rows[0].sweep or "", item.arm or "")
            arms.setdefault(arm, []).append((min(places), item.label, item))
        else:
            plain.setdefault(item.model, []).append(item)
    chosen = {
        arm: min(ranked, key=lambda entry: entry[:2])[2] for arm, ranked in sorted(arms.items(), key=lambda pair: pair[0])
    }
    swept = {model for model, _, _ in chosen}
    only = [items[0] for model, items in sorted(plain.items()) if len(items) == 1 and model not in swept]
    return [*chosen.values(), *only]


def _nearest(first: Configuration, others: Sequence[Configuration], metric: str, axis: Axis) -> Hypothesis | None:
    x = first.positions[axis]
    near = [item for item in others if is_within(x, item.positions[axis], WITHIN)]
    near.sort(key=lambda item: (_distance(x, item.positions[axis]), item.label))
    made = (Hypothesis(axis, first, item, tuple(refusals(first, item, metric, axis))) for item in near)
    nearest = next(made, None)
    if nearest is None or not nearest.refusals:
        return nearest
    return next((item for item in made if not item.refusals), nearest)


def _distance(a: float | None, b: float | None) -> float:
    return abs(math.log(a / b)) if a and b else math.inf


def judge(
    hypotheses: Sequence[Hypothesis], metric: str, measure: Measure, answers: Answers, *, larger: bool
) -> tuple[Difference, ...]:
    """What the runs say of each hypothesis."""
    noise = cache(partial(image_noise, answers=answers, metric=metric))  # of a pair on several axes but once
    drafts = [_measured(item, metric, noise) for item in hypotheses]
    pairs: dict[tuple[str, str], float] = {_pair(item): item.p_value for item in drafts if item.p_value is not None}
    corrected = dict(zip(pairs, holm(list(pairs.values())), strict=True))
    told = [replace(item, p_holm=corrected.get(_pair(item))) if item.p_value is not None else item for item in drafts]
    return tuple(replace(item, verdict=_verdict(item, measure, larger=larger)) for item in told)


def _pair(item: Difference) -> tuple[str, str]:
    return item.first.label, item.second.label


def _measured(item: Hypothesis, metric: str, noise: Callable[[Pairs], Estimate | None]) -> Difference:
    first = {row.seed: row for row in item.first.rows}
    second = {row.seed: row for row in item.second.rows}
    seeds = tuple(sorted(first.keys() & second.keys()))
    dropped = _dropped(item, seeds)
    test = _test([first[seed].values[metric] - second[seed].values[metric] for seed in seeds]) if not item.refusals else None
    pairs = tuple((first[seed].run_uid, second[seed].run_uid) for seed in seeds)
    return Difference(
        axis=item.axis,
        first=item.first,
        second=item.second,
        seeds=seeds,
        dropped=dropped,
        interval=Estimate(test.mean, test.low, test.high) if test else None,
        p_value=test.p_value if test else None,
        p_holm=None,
        test_noise=noise(pairs) if not item.refusals else None,
        why_no_verdict=_why_no_verdict(item, len(seeds)),
        verdict="",
        flags=(*flags(item.first, item.second), *_dropped_flag(dropped)),
    )


def _test(differences: Sequence[float]) -> PairedTest | None:
    return paired_t_test(differences) if len(differences) > 1 else None


def _dropped(item: Hypothesis, seeds: Sequence[int]) -> dict[int, str]:
    """Why a seed of either side has no pair."""
    reasons: dict[int, list[str]] = {}
    for own, other in ((item.first, item.second), (item.second, item.first)):
        for seed, reason in own.missing.items():
            reasons.setdefault(seed, []).append(f"{own.label}: {reason}")
        for seed in own.seeds:
            if seed not in seeds and seed not in other.missing:
                reasons.setdefault(seed, []).append(f"{other.label} has no such seed")
    return {seed: "; ".join(reasons[seed]) for seed in sorted(reasons)}


def _dropped_flag(dropped: Mapping[int, str]) -> tuple[str, ...]:
    return (f"{count_text(len(dropped), 'seed')} without a pair",) if dropped else ()


def _why_no_verdict(item: Hypothesis, num_pairs: int) -> str | None:
    if item.refusals:
        return "; ".join(item.refusals)
    if num_pairs < LEAST_SEEDS:
        return f"{count_text(num_pairs, 'paired seed')}, and a verdict needs {LEAST_SEEDS}"
    return None


def _verdict(item: Difference, measure: Measure, *, larger: bool) -> str:
    """The finding in one sentence."""
    a, b, at = item.first.label, item.second.label, at_words(item)
    if item.why_no_verdict is not None:
        measured = f" (measured: {_interval_text(item.interval, measure)})" if item.interval is not None else ""
        return f"No verdict on {a} and {b} {at}: {item.why_no_verdict}{measured}."
    assert item.interval is not None
    assert item.p_holm is not None
    tail = "; ".join([f" over {len(item.seeds)} paired seeds", *_costs(item), *item.flags])
    if is_distinguished(item):
        is_first = (item.interval.value > 0) == larger
        better, worse = (a, b) if is_first else (b, a)
        margin = item.interval if item.interval.value > 0 else Estimate(*(-item.interval[i] for i in (0, 2, 1)))
        numbers = _interval_text(margin, measure).removeprefix("+")
        return f"{sentence(at)}, {better} is better than {worse} by {numbers}, {_p_text(item.p_holm)} after Holm,{tail}."
    corrected = ", once all comparisons made are allowed for" if not item.interval.low <= 0 <= item.interval.high else ""
    return f"{sentence(at)}, {a} and {b} are not distinguishable{corrected}: {_interval_text(item.interval, measure)}{tail}."


def _costs(item: Difference) -> list[str]:
    """What the first costs beside the second, where nothing is held equal."""
    if item.axis != "best":
        return []
    axes: tuple[Axis, ...] = ("params", "flops")
    places = [(axis, item.first.positions[axis], item.second.positions[axis]) for axis in axes]
    told = [f"{first / second:.2f} times the {NOUNS[axis]}" for axis, first, second in places if first and second]
    return [f"{item.first.label} has {' and '.join(told)}"] if told else []


def at_words(item: Difference) -> str:
    """Where the two are equal; who has one configuration alone did not choose it."""
    is_chosen = any(row.place is not None for row in (*item.first.rows, *item.second.rows))
    return AT[item.axis] if item.axis != "best" or is_chosen else "with one configuration of each"


def is_distinguished(item: Difference) -> bool:
    """Whether there is a verdict and it names a winner."""
    if item.why_no_verdict is not None or item.interval is None or item.p_holm is None:
        return False
    return item.p_holm < ALPHA and not item.interval.low <= 0 <= item.interval.high


def _interval_text(interval: Estimate | None, measure: Measure) -> str:
    """'+1.2 [0.3, 2.1] points'."""
    assert interval is not None
    unit = f" {measure.difference_unit}" if measure.difference_unit else f" of {measure.label}"
    return f"{measure.difference_text(interval.value)} [{measure.text(interval.low)}, {measure.text(interval.high)}]{unit}"


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
