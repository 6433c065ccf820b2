"""What a comparison found, in one sentence for each axis, and the line that stands above all.

In: differences, ratios and configurations. Out: sentences, each made by a rule from the numbers. A ratio makes the headline
only where a verdict could be given; else it says what was measured, and why that is no verdict.
"""

import math
from collections.abc import Mapping, Sequence

from crate_ray.analysis.comparison.configurations import model_names
from crate_ray.analysis.comparison.frontier import NOUNS
from crate_ray.analysis.comparison.gates import LEAST_SEEDS, is_loss, names_text, without_gain
from crate_ray.analysis.comparison.hypotheses import AT, WITHIN, at_words, is_distinguished
from crate_ray.analysis.comparison.result import Axis, Configuration, Difference, Ratio
from crate_ray.analysis.comparison.wording import has_interval, parameters_text, ratio_text, sentence
from crate_ray.analysis.objectives import Measure, amount_text, count_text

_NAMED = 6
_NO_PLACE = {"time": "no exclusive timing pass of both families on the same hardware (`crate-ray time RUN...` makes one)"}


def verdicts(
    axes: Sequence[Axis], configurations: Sequence[Configuration], differences: Sequence[Difference], *, larger: bool
) -> dict[str, str]:
    """One sentence for each axis, in their order, then one for the choices of the screening where there are such."""
    names = model_names(item.model for item in configurations)
    found: dict[str, str] = {}
    for axis in axes:
        own = [item for item in differences if item.axis == axis]
        none = f"No verdict {AT[axis]}: {_why_no_pair(axis, configurations)}." if not own else ""
        found[axis] = none or _summary(own, names, larger=larger)
    choices = [item for item in differences if item.axis == "best"]
    return found | ({"best": _summary(choices, names, larger=larger)} if choices else {})


def _summary(differences: Sequence[Difference], names: Mapping[str, str], *, larger: bool) -> str:
    """'At equal encoder parameters: CRATE-MAE is better than MAE in 5 of 8 pairs, not distinguishable in 3.'"""
    if len(differences) == 1:
        return differences[0].verdict
    parts = []
    for first, second in dict.fromkeys((item.first.model, item.second.model) for item in differences):
        own = [item for item in differences if (item.first.model, item.second.model) == (first, second)]
        judged = [item for item in own if item.why_no_verdict is None]
        if len(own) == 1:
            parts.append(own[0].verdict.removeprefix(f"{sentence(at_words(own[0]))}, ").removesuffix("."))
            continue
        if not judged:
            reasons = list(dict.fromkeys(item.why_no_verdict for item in own))
            parts.append(f"no verdict on {names[first]} against {names[second]}: {reasons[0]}")
            continue
        won = sum(is_distinguished(item) and _is_first_better(item, larger=larger) for item in judged)
        lost = sum(is_distinguished(item) for item in judged) - won
        counts = {"better": won, "worse": lost, "not distinguishable": len(judged) - won - lost}
        told = ", ".join(f"{words} in {number}" for words, number in counts.items() if number)
        unjudged = f", no verdict in {len(own) - len(judged)}" if len(own) > len(judged) else ""
        parts.append(f"{names[first]} against {names[second]} is {told}{unjudged} of {count_text(len(own), 'pair')}")
    return f"{sentence(at_words(differences[0]))}: {'; '.join(parts)}."


def _is_first_better(item: Difference, *, larger: bool) -> bool:
    assert item.interval is not None
    return (item.interval.value > 0) == larger


def _why_no_pair(axis: Axis, configurations: Sequence[Configuration]) -> str:
    if not any(item.is_confirmed for item in configurations):
        return "nothing was trained again with fresh seeds after the screening"
    places = {
        family: [(x, item.label) for item in configurations if item.family == family and (x := item.positions[axis])]
        for family in ("crate", "vit")
    }
    if not all(places.values()):
        return _NO_PLACE.get(axis, "one family has no run there")
    (x, a), (y, b) = min(
        ((first, second) for first in places["crate"] for second in places["vit"]),
        key=lambda pair: abs(math.log(pair[0][0] / pair[1][0])),
    )
    return f"no two are within {WITHIN:.0%}; the nearest are {a} and {b}, with {x / y:.2f} times the {NOUNS[axis]}"


def headline(
    axis: Axis,
    verdict: str,
    ratios: Sequence[Ratio],
    differences: Sequence[Difference],
    configurations: Sequence[Configuration],
    measure: Measure,
) -> str:
    """The first line of a report: ratios, else the verdict of the axis, else what was measured and why that is no verdict."""
    failed = without_gain(configurations)
    control = [f"Not shown to beat its own untrained control: {names_text(failed)}."] if failed else []
    sentences = [ratio_text(item) for item in ratios if item.axis == axis and item.ratio is not None]
    untold = any(item.tuning_trials is None for item in configurations)
    caution = ["How much each was tuned is not recorded."] if untold and sentences else []
    judged = [item for item in differences if item.why_no_verdict is None]
    if not sentences and any(item.axis == axis for item in judged):
        sentences = [verdict]
    elif not sentences and judged:
        sentences = [judged[0].verdict]
    elif not sentences:
        is_shown = all(item.beats_control for item in configurations)
        control = ["Each beats its own untrained control."] if is_shown else control
        sentences = [_measured(configurations, differences, measure)]
    return " ".join([*sentences, *caution, *control])


def _measured(configurations: Sequence[Configuration], differences: Sequence[Difference], measure: Measure) -> str:
    ordered = sorted(configurations, key=lambda item: item.metric.value * (1 if is_loss(measure.name) else -1))
    shown = [_line(item, measure) for item in ordered[:_NAMED]]
    more = f"; and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return f"No verdict: {_why(configurations, differences)}. Measured {measure.label}: {'; '.join(shown)}{more}."


def _why(configurations: Sequence[Configuration], differences: Sequence[Difference]) -> str:
    most = max(len(item.rows) for item in configurations)
    if not any(item.is_confirmed for item in configurations):
        return "the sweep screened and confirmed nothing with fresh seeds"
    if most < LEAST_SEEDS:
        return f"{count_text(most, 'seed')}, and it takes {LEAST_SEEDS} to tell the luck of training from the model"
    reasons = [item.why_no_verdict for item in differences if item.why_no_verdict is not None]
    return reasons[0] if reasons else "no configurations of the two families are equal in parameters, FLOPs or time"


def _line(item: Configuration, measure: Measure) -> str:
    """'CRATE-MAE 4x128 93.1% [91.9, 94.3], 0.40M encoder parameters, 12 PFLOPs'; one seed has its interval over images."""
    estimate = item.metric if len(item.rows) > 1 else item.rows[0].intervals.get(measure.name, item.metric)
    unit = "%" if measure.unit == "%" else ""
    ends = f" [{measure.text(estimate.low)}, {measure.text(estimate.high)}]" if has_interval(estimate) else ""
    encoder, flops = parameters_text(item.positions["params"] or 0), amount_text(item.positions["flops"] or 0)
    return f"{item.label} {measure.text(estimate.value)}{unit}{ends} with {encoder} encoder parameters and {flops} PFLOPs"
