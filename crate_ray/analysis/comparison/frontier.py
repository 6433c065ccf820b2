"""What each family reaches along an axis, and what one needs of it for what the other reaches.

In: configurations with their place on an axis (encoder parameters, PFLOPs, hours) and a metric for every seed. Out: a Curve a
family and a Ratio of the two, both inside what was measured. The place on the axis is taken as exact; all noise is that of the
seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from crate_ray.analysis.comparison.result import Axis, Curve, Ratio

LEAST_SIZES = 5
LEAST_SEEDS = 3
"""Of each size; with fewer sizes or seeds no power law is fitted."""


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


def pareto_front(points: Sequence[SizePoint], *, is_larger_better: bool = True) -> list[SizePoint]:
    """The points whose mean no other one reaches with less, by rising x.

    Args:
        points: Of one family.
        is_larger_better: Of the metric.
    """
    raise NotImplementedError


def fit_curve(points: Sequence[SizePoint], *, axis: Axis, family: str, is_larger_better: bool = True) -> Curve | None:
    """What a family reaches along an axis: a saturating power law where there is enough of it, else lines between its front.

    The law is y = a - b x^-c (a + b x^-c for a loss). Its parameters and the band have 95% profile intervals: at a given c the
    law is linear, so that the interval of any of them is the union over c of what the residuals allow. An end that the data
    leave open is infinite. It needs at least LEAST_SIZES sizes of LEAST_SEEDS seeds, and a lack-of-fit test that does not
    reject it. All points given take part in it, not the front alone: to fit the lucky ones flatters. The lines run through the
    front, over log x, without a band.

    Args:
        points: Of one family.
        axis: Of their x.
        family: crate or vit.
        is_larger_better: Of the metric.

    Returns:
        The curve, between the smallest and the largest x measured; None with fewer than two sizes.

    Raises:
        ValueError: An x that is not above 0, or a point without seeds.
    """
    raise NotImplementedError


def ratio_at_equal(
    first: Sequence[SizePoint],
    second: Sequence[SizePoint],
    *,
    axis: Axis,
    baseline: str,
    names: tuple[str, str] = ("CRATE-MAE", "MAE"),
    spell: Callable[[float], str] = "{:.1%} probe accuracy".format,
    is_larger_better: bool = True,
) -> Ratio:
    """What `first` needs of an axis over what `second` needs, where both reach the same metric.

    One side is a configuration of a front, the anchor; the other side's front is interpolated to the anchor's metric. Anchors
    are tried from the best mean downwards, of both fronts; taken is the first one whose interval closes inside the range
    measured, else the first that the other front reaches at all, with an end at infinity or 0. So the metric is the highest at
    which the runs can tell the ratio, and follows from the configurations alone.

    Args:
        first: Configurations of CRATE.
        second: Configurations of MAE.
        axis: Of their x.
        baseline: Model of MAE that `second` is of.
        names: What the sentence calls the two.
        spell: The metric in words: "90.1% probe accuracy".
        is_larger_better: Of the metric.

    Returns:
        `ratio` with `why_not` None, or `ratio` None with the reason: the fronts do not overlap, or there are too few paired
        seeds.
    """
    raise NotImplementedError
