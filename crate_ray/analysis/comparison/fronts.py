"""Which configurations make a front together, on which axis, and where a ratio of two fronts may be given.

In: configurations that may be compared with each other. Out: a curve a model and a ratio a pair of models, by the arithmetic of
`frontier`. A ratio is a verdict, so it is withheld where one would be: few seeds, unequal tuning, unequal images or hardware.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

from crate_ray.analysis.comparison.frontier import NOUNS, SizePoint, fit_curve, ratio_at_equal
from crate_ray.analysis.comparison.gates import IMAGES_WITHIN, LEAST_SEEDS, hardware_of, images_of, is_within
from crate_ray.analysis.comparison.result import Axis, Configuration, Curve, Ratio
from crate_ray.analysis.objectives import Measure

Place = Callable[[Configuration], float | None]
PLACES: Mapping[Axis, Place] = {
    "params": lambda item: item.positions["params"],
    "flops": lambda item: item.positions["flops"],
    "time": lambda item: item.positions["time"],
}


def curves_of(items: Sequence[Configuration], metric: str, axes: Sequence[Axis], *, larger: bool) -> tuple[Curve, ...]:
    """What each model reaches along each axis: the two baselines of MAE are two fronts."""
    curves = []
    for axis in axes:
        alike = _alike([item for item in items if item.positions[axis]], axis)
        for family, model in sorted({(item.family, item.model) for item in alike}):
            points = _points([item for item in alike if item.model == model], metric, PLACES[axis])
            curve = fit_curve(points, axis=axis, family=family, is_larger_better=larger)
            curves += [replace(curve, model=model)] if curve is not None else []
    return tuple(curves)


def total_ratios_of(
    items: Sequence[Configuration], metric: str, measure: Measure, names: Mapping[str, str], *, larger: bool
) -> tuple[Ratio, ...]:
    """The ratios of all trainable parameters, which the encoder's are a part of."""
    noun = "trainable parameters, decoder included,"
    return ratios_of(items, metric, ("params",), measure, names, larger=larger, place=_total, noun=noun)


def _total(item: Configuration) -> float:
    return float(item.params_total)


def _points(items: Sequence[Configuration], metric: str, place: Place) -> list[SizePoint]:
    return [
        SizePoint(item.label, x, {row.seed: row.values[metric] for row in item.rows}) for item in items if (x := place(item))
    ]


def ratios_of(
    items: Sequence[Configuration],
    metric: str,
    axes: Sequence[Axis],
    measure: Measure,
    names: Mapping[str, str],
    *,
    larger: bool,
    place: Place | None = None,
    noun: str | None = None,
) -> tuple[Ratio, ...]:
    """CRATE's need over that of each MAE; withheld wherever a verdict would be.

    Args:
        items: That may be compared with each other.
        metric: That is equal.
        axes: Of the ratios.
        measure: How the metric is spelled.
        names: Of the models, as the labels have them.
        larger: Whether more of the metric is better.
        place: Where a configuration stands; None for its position on the axis.
        noun: What is counted, where that is not what the axis counts.
    """
    crates = sorted({item.model for item in items if item.family == "crate"})
    baselines = sorted({item.model for item in items if item.family == "vit"})
    found = []
    for axis in axes:
        where = place or PLACES[axis]
        enough = [item for item in items if item.is_confirmed and len(item.rows) >= LEAST_SEEDS and where(item)]
        for crate, baseline in product(crates, baselines):
            pair = [item for item in enough if item.model in (crate, baseline)]
            alike = _alike(pair, axis)
            first, second = ([item for item in alike if item.model == model] for model in (crate, baseline))
            why_not = _why_not_alike(pair, alike, axis, (names[crate], names[baseline])) or _why_no_ratio(first, second)
            if why_not is not None:
                sentence = f"No ratio of {noun or NOUNS[axis]} at equal results: {why_not}."
                found.append(Ratio(axis, baseline, None, None, why_not, sentence))
                continue
            found.append(
                ratio_at_equal(
                    _points(first, metric, where),
                    _points(second, metric, where),
                    axis=axis,
                    baseline=baseline,
                    names=(names[crate], names[baseline]),
                    noun=noun,
                    spell=lambda value: f"{measure.with_unit(value)} {measure.label}",
                    is_larger_better=larger,
                    least_pairs=LEAST_SEEDS,
                )
            )
    return tuple(found)


def _alike(items: Sequence[Configuration], axis: Axis) -> list[Configuration]:
    """Those with as many images seen, on the axis of parameters; on the axis of time those of one kind of hardware."""
    if axis == "params":
        images = [images_of(item) for item in items]
        groups = [
            [item for item, own in zip(items, images, strict=True) if is_within(at, own, IMAGES_WITHIN)]
            for at in dict.fromkeys(images)
        ]
    elif axis == "time":
        hardware = [hardware_of(item) for item in items]
        groups = [[item for item, own in zip(items, hardware, strict=True) if own == at] for at in dict.fromkeys(hardware)]
    else:
        return list(items)
    return max(groups, key=lambda group: (len({item.family for item in group}), len(group)), default=[])


def _why_not_alike(
    pair: Sequence[Configuration], alike: Sequence[Configuration], axis: Axis, names: tuple[str, str]
) -> str | None:
    """Both models have configurations, and those that are alike are of one of them alone."""
    if len({item.model for item in pair}) < 2 or len({item.model for item in alike}) == 2:
        return None
    unlike = "saw as many images" if axis == "params" else "were timed on one kind of hardware"
    return f"no configurations of {names[0]} and {names[1]} {unlike}"


def _why_no_ratio(first: Sequence[Configuration], second: Sequence[Configuration]) -> str | None:
    if not first or not second:
        return f"no confirmed runs of both with {LEAST_SEEDS} seeds that may be compared there"
    return "unequal tuning budgets" if len({item.tuning_trials for item in (*first, *second)}) > 1 else None
