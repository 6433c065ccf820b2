"""What each family reaches along an axis, and what one needs of it for what the other reaches.

In: configurations with their place on an axis (encoder parameters, PFLOPs, hours) and a metric for every seed. Out: a Curve a
family and a Ratio of the two, both inside what was measured. The place on the axis is taken as exact; all noise is that of the
seeds. The ratio asks less than the curves: lines between neighbours instead of a law, and pairs of seeds instead of one
variance for all sizes. That costs some width, and its interval holds where the law would not.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import numpy as np

from crate_ray.analysis.comparison.power_law import fit_power_law
from crate_ray.analysis.comparison.result import Axis, Curve, Ratio
from crate_ray.analysis.pareto import front_of_two
from crate_ray.analysis.statistics import t_quantile
from crate_ray.runs.rows import Estimate

LEAST_SIZES = 5
LEAST_SEEDS = 3
"""Of each size; with fewer sizes or seeds no power law is fitted."""
LEAST_RANGE = 2.0
"""Largest over smallest size of a power law."""
SAME_SIZE = 1.01
"""Sizes within this factor are one."""
REFUSED_BELOW = 0.05
"""Of the p values of a fit's misfit and of its unequal spread."""
STEEPEST = 0.5
"""Largest exponent of a law that the ends of a ratio allow for between two sizes; those published are smaller."""
CURVE_PLACES = 101
NOUNS: Mapping[Axis, str] = {"params": "encoder parameters", "flops": "training FLOPs", "time": "training time"}


@dataclass(frozen=True)
class SizePoint:
    """A configuration on an axis.

    Attributes:
        label: Configuration.label.
        x: Where it stands on the axis; above 0.
        by_seed: Its metric; finite.
    """

    label: str
    x: float
    by_seed: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Of the metric over its seeds."""
        return fmean(self.by_seed.values())


def pareto_front(points: Sequence[SizePoint], *, is_larger_better: bool = True) -> list[SizePoint]:
    """The points whose mean no other one reaches with less, by rising x.

    Args:
        points: Of one family.
        is_larger_better: Of the metric.

    Raises:
        ValueError: An x that is not above 0, or a point without seeds or with values that are not finite.
    """
    for point in points:
        if not (math.isfinite(point.x) and point.x > 0):
            raise ValueError(f"{point.label} stands at {point.x}; a place on an axis is above 0")
        if not point.by_seed or not all(map(math.isfinite, point.by_seed.values())):
            raise ValueError(f"{point.label} has no seeds, or values that are not finite: {dict(point.by_seed)}")
    sign = -1 if is_larger_better else 1
    costs = np.array([(point.x, sign * point.mean) for point in points]).reshape(len(points), 2)
    return [points[index] for index in front_of_two(costs)]


def fit_curve(points: Sequence[SizePoint], *, axis: Axis, family: str, is_larger_better: bool = True) -> Curve | None:
    """What a family reaches along an axis: a saturating power law where there is enough of it, else lines between its front.

    The law is y = a - b x^-c (a + b x^-c for a loss). It needs LEAST_SIZES sizes of LEAST_SEEDS seeds, over a range of
    LEAST_RANGE; sizes that do not lie on it, or whose seeds vary by plainly different amounts, get lines, because its intervals
    would not hold. All points given take part, not the front alone: a fit of the lucky ones flatters. An end of an interval
    that the data leave open is infinite. The lines run through the front, over log x, without a band.

    Args:
        points: Of one family.
        axis: Of their x.
        family: crate or vit.
        is_larger_better: Of the metric.

    Returns:
        The curve, between the smallest and the largest x measured; `parameters` are asymptote a, scale b and exponent c. None
        where the front is a single place.

    Raises:
        ValueError: An x that is not above 0, or a point without seeds or with values that are not finite.
    """
    front = pareto_front(points, is_larger_better=is_larger_better)
    labels = tuple(point.label for point in front)
    if _has_law(points):
        law = fit_power_law([point.x for point in points], [list(point.by_seed.values()) for point in points])
        if min(law.misfit_p, law.spread_p) >= REFUSED_BELOW:
            log_x = np.log(np.geomspace(min(p.x for p in points), max(p.x for p in points), CURVE_PLACES))
            y, low, high = (tuple(side.tolist()) for side in law.at(log_x))
            parameters = law.parameters(is_rising=is_larger_better)
            return Curve(family, axis, "power_law", labels, tuple(np.exp(log_x).tolist()), y, low, high, parameters)
    if len({point.x for point in front}) < 2:
        return None
    x, means = [point.x for point in front], [point.mean for point in front]
    return Curve(family, axis, "log_linear", labels, tuple(x), tuple(means))


def _has_law(points: Sequence[SizePoint]) -> bool:
    """Whether there is enough for a fit."""
    ordered = sorted(point.x for point in points)
    num_sizes = 1 + sum(after > SAME_SIZE * before for before, after in pairwise(ordered))
    has_seeds = all(len(point.by_seed) >= LEAST_SEEDS for point in points)
    return num_sizes >= LEAST_SIZES and has_seeds and ordered[-1] >= LEAST_RANGE * ordered[0]


def ratio_at_equal(
    first: Sequence[SizePoint],
    second: Sequence[SizePoint],
    *,
    axis: Axis,
    baseline: str,
    names: tuple[str, str] = ("CRATE-MAE", "MAE"),
    noun: str | None = None,
    spell: Callable[[float], str] = "{:.1%} probe accuracy".format,
    is_larger_better: bool = True,
    least_pairs: int = 2,
) -> Ratio:
    """What `first` needs of an axis over what `second` needs, where both reach the same metric.

    One side is a configuration of a front, the anchor: its place is known. The other side's place is where its front, in lines
    over log x, reaches the anchor's mean. Taken is the best anchor that the other front reaches and that its second-best
    configuration reaches too, so that there is a size beyond to close the interval; without one, the best that it reaches at
    all. So the metric follows from means alone. To take the best anchor whose interval closes would take those whose seeds
    happened to agree, and cover less than it says.

    The interval holds every place at which a paired t test over the seeds (front minus anchor) finds no difference, which is
    exact for normal noise whatever the spread of each size and however the seeds of both families are related. Between two
    configurations a saturating front is above the line over log x, and with an exponent up to STEEPEST below the line over
    x^-STEEPEST. So the lower end is read off the latter, the upper end off the former. Where the test cannot tell the anchor
    from an end of the front, the interval is open: its end is 0 or infinite, never a place beyond those measured.

    Args:
        first: Configurations of CRATE.
        second: Configurations of MAE.
        axis: Of their x.
        baseline: Model of MAE that `second` is of.
        names: What the sentence calls the two.
        noun: What it calls that which is counted; None for the axis's own, NOUNS.
        spell: The metric in words: "90.1% probe accuracy".
        is_larger_better: Of the metric.
        least_pairs: Seeds that an anchor and both its neighbours on the other front must share.

    Returns:
        `ratio` with `why_not` None, or `ratio` None with the reason.

    Raises:
        ValueError: As `pareto_front`.
    """
    counted = noun or NOUNS[axis]
    fronts = [pareto_front(points, is_larger_better=is_larger_better) for points in (first, second)]
    found = list(_crossings(fronts[0], fronts[1], is_larger_better=is_larger_better, least_pairs=least_pairs))
    chosen = next((crossing for crossing in found if crossing.has_size_beyond), found[0] if found else None)
    if chosen is None:
        why_not = _why_not(fronts, names, spell, is_larger_better=is_larger_better, least_pairs=least_pairs)
        return Ratio(axis, baseline, None, None, why_not, f"No ratio of {counted} at equal results: {why_not}.")
    ratio, at = chosen.ratio, spell(chosen.metric_value)
    text = f"{names[0]} needs {_times(ratio)} of the {counted} of {names[1]} at {at}"
    return Ratio(axis, baseline, chosen.metric_value, ratio, None, f"{text}{_open_end(ratio)}.")


@dataclass(frozen=True)
class _Crossing:
    """Where a front reaches an anchor, and whether its second-best configuration does."""

    metric_value: float
    ratio: Estimate
    has_size_beyond: bool


def _crossings(
    first: Sequence[SizePoint], second: Sequence[SizePoint], *, is_larger_better: bool, least_pairs: int
) -> Iterator[_Crossing]:
    """Every anchor that the other front reaches, the best mean first."""
    sign = 1 if is_larger_better else -1
    anchors = [(point, second, False) for point in first] + [(point, first, True) for point in second]
    for anchor, front, is_direct in sorted(anchors, key=lambda item: -sign * item[0].mean):
        place = _place_of(anchor, front, least_pairs)
        if place is not None:
            ratio = Estimate(*(end / anchor.x for end in place))
            has_size_beyond = sign * front[-2].mean >= sign * anchor.mean
            yield _Crossing(anchor.mean, ratio if is_direct else _inverse(ratio), has_size_beyond)


def _inverse(ratio: Estimate) -> Estimate:
    return Estimate(1 / ratio.value, 1 / ratio.high, 1 / ratio.low if ratio.low > 0 else math.inf)


def _place_of(anchor: SizePoint, front: Sequence[SizePoint], least_pairs: int) -> Estimate | None:
    """The place at which the front reaches the anchor's mean, with its interval; None where it does not, or without pairs."""
    best, lows, highs = None, [], []
    for below, above in pairwise(front):
        shares = _allowed_shares(anchor, below, above, least_pairs)
        if above.x == below.x or shares is None:
            continue
        share = (anchor.mean - below.mean) / (above.mean - below.mean)
        if best is None and 0 <= share <= 1:
            best = _along_log(below, above, share)
            shares.append(share)
        lows += [_along_power(below, above, share) for share in shares]
        highs += [_along_log(below, above, share) for share in shares]
    if best is None:
        return None
    low, high = min(lows), max(highs)
    return Estimate(best, low if low > front[0].x else 0.0, high if high < front[-1].x else math.inf)


def _along_log(below: SizePoint, above: SizePoint, share: float) -> float:
    """Where a line over log x has that share of its rise."""
    return float(below.x ** (1 - share) * above.x**share)


def _along_power(below: SizePoint, above: SizePoint, share: float) -> float:
    """The same of a line over x^-STEEPEST."""
    return float(((1 - share) * below.x**-STEEPEST + share * above.x**-STEEPEST) ** (-1 / STEEPEST))


def _allowed_shares(anchor: SizePoint, below: SizePoint, above: SizePoint, least_pairs: int) -> list[float] | None:
    """Ends of the shares of the way between two neighbours at which a paired t test finds their line equal to the anchor.

    With d_s(t) = (1 - t) below_s + t above_s - anchor_s over n seeds, the test accepts where n mean(d)^2 <= q^2 var(d), a
    quadratic inequality in t (Fieller). Empty where it accepts none; None with fewer seeds that all three have.
    """
    seeds = sorted(anchor.by_seed.keys() & below.by_seed.keys() & above.by_seed.keys())
    n = len(seeds)
    if n < least_pairs:
        return None
    lower, upper, own = (np.array([point.by_seed[seed] for seed in seeds]) for point in (below, above, anchor))
    gap, rise = lower - own, upper - lower
    spread = np.cov(gap, rise)
    square = t_quantile(n - 1) ** 2 / n
    constant, linear, quadratic = (
        float(gap.mean() ** 2 - square * spread[0, 0]),
        float(2 * (gap.mean() * rise.mean() - square * spread[0, 1])),
        float(rise.mean() ** 2 - square * spread[1, 1]),
    )
    roots = [float(root.real) for root in np.roots([quadratic, linear, constant]) if np.isreal(root)]
    return [share for share in (0.0, 1.0) if constant + linear * share + quadratic * share**2 <= 0] + [
        root for root in roots if 0 <= root <= 1
    ]


def _times(ratio: Estimate) -> str:
    """'0.42x [0.36, 0.51]'."""
    low = "0" if ratio.low == 0 else f"{ratio.low:.2f}"
    return f"{ratio.value:.2f}x [{low}, {'open' if math.isinf(ratio.high) else f'{ratio.high:.2f}'}]"


def _open_end(ratio: Estimate) -> str:
    if ratio.low > 0 and math.isfinite(ratio.high):
        return ""
    return "; these sizes and seeds do not close the interval"


def _why_not(
    fronts: Sequence[Sequence[SizePoint]],
    names: tuple[str, str],
    spell: Callable[[float], str],
    *,
    is_larger_better: bool,
    least_pairs: int,
) -> str:
    """No anchor is reached by the other front."""
    for name, front in zip(names, fronts, strict=True):
        if not front:
            return f"{name} has no place on this axis"
    worst, best = ([front[index].mean for front in fronts] for index in (0, -1))
    sign = 1 if is_larger_better else -1
    for above, below in ((0, 1), (1, 0)):
        if sign * worst[above] > sign * best[below]:
            return (
                f"the smallest {names[above]} of the front ({spell(worst[above])}) is better than the best {names[below]} "
                f"({spell(best[below])}), and nothing is extrapolated"
            )
    if len(fronts[0]) < 2 and len(fronts[1]) < 2:
        return "each has one size on its front, and it needs two of one of them"
    return f"the configurations around an equal result share fewer than {least_pairs} seeds"
