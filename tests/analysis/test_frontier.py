"""Fits, fronts and ratios on numbers whose answer is known by hand. How often intervals cover is in test_coverage.py."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from crate_ray.analysis.comparison.frontier import SizePoint, fit_curve, pareto_front, ratio_at_equal


def point(x: float, *values: float, label: str = "") -> SizePoint:
    return SizePoint(label or f"{x:g}", x, dict(enumerate(values)))


def law(x: float, *, a: float = 0.95, b: float = 0.15, c: float = 0.4) -> float:
    return a - b * x**-c


def sizes(xs: Sequence[float], *, seeds: int = 3, noise: float = 0.0, shift: float = 1.0) -> list[SizePoint]:
    """Points on the law, whose seeds lie evenly around it."""
    around = np.linspace(-noise, noise, seeds)
    return [point(x, *(law(x / shift) + around)) for x in xs]


def test_the_front_leaves_out_what_costs_more_and_gives_less() -> None:
    points = [point(4, 0.8), point(1, 0.7), point(2, 0.6), point(8, 0.79), point(16, 0.9)]
    assert [p.x for p in pareto_front(points)] == [1, 4, 16]
    assert [p.x for p in pareto_front(points, is_larger_better=False)] == [1, 2]


@pytest.mark.parametrize("bad", [point(0, 0.5), point(-1, 0.5), point(math.inf, 0.5), point(1), point(1, math.nan)])
def test_a_point_without_place_or_values_is_refused(bad: SizePoint) -> None:
    with pytest.raises(ValueError, match=r"above 0|not finite"):
        pareto_front([point(1, 0.5), bad])


@pytest.mark.parametrize("is_rising", [True, False])
def test_the_fit_recovers_the_law_that_made_its_points(is_rising: bool) -> None:
    """An accuracy that rises, and a loss that falls, by the same law."""
    sign = 1 if is_rising else -1
    points = [point(x, *([sign * (0.95 - 2.0 * x**-0.4)] * 3)) for x in np.geomspace(10, 1000, 5)]
    curve = fit_curve(points, axis="params", family="crate", is_larger_better=is_rising)
    assert curve is not None and curve.kind == "power_law"
    found = {name: estimate.value for name, estimate in curve.parameters.items()}
    assert found == pytest.approx({"asymptote": sign * 0.95, "scale": 2.0, "exponent": 0.4}, rel=1e-4)
    assert curve.y == pytest.approx([sign * (0.95 - 2.0 * x**-0.4) for x in curve.x], abs=1e-6)


def test_the_curve_ends_where_the_sizes_end() -> None:
    curve = fit_curve(sizes([3, 6, 12, 24, 48], noise=0.002), axis="flops", family="vit")
    assert curve is not None and curve.kind == "power_law"
    assert (curve.x[0], curve.x[-1]) == pytest.approx((3, 48))
    assert all(low < y < high for low, y, high in zip(curve.low, curve.y, curve.high, strict=True))


@pytest.mark.parametrize(
    "points",
    [
        sizes([1, 2, 4, 8]),  # four sizes
        sizes([1, 2, 4, 8, 16], seeds=2),  # two seeds
        sizes([1, 2, 4, 8, 8.01]),  # two that are one
        sizes([1, 1.1, 1.2, 1.3, 1.4]),  # too near
    ],
    ids=["sizes", "seeds", "distinct", "range"],
)
def test_too_little_for_a_law_gives_lines_through_the_front(points: list[SizePoint]) -> None:
    curve = fit_curve([*points, point(1.05, 0.1, 0.1, 0.1, label="dominated")], axis="params", family="crate")
    assert curve is not None and curve.kind == "log_linear"
    assert curve.x == tuple(p.x for p in points)
    assert curve.y == pytest.approx([p.mean for p in points])
    assert "dominated" not in curve.front
    assert curve.parameters == {} and curve.low == ()


def test_sizes_off_the_law_give_lines() -> None:
    steps = [point(x, y - 0.001, y, y + 0.001) for x, y in ((1, 0.5), (2, 0.5), (4, 0.8), (8, 0.5), (16, 0.9))]
    curve = fit_curve(steps, axis="params", family="crate")
    assert curve is not None and curve.kind == "log_linear"


def test_sizes_whose_seeds_vary_by_other_amounts_give_lines() -> None:
    uneven = [point(x, law(x) - d, law(x), law(x) + d) for x, d in ((1, 0.05), (2, 1e-5), (4, 1e-5), (8, 1e-5), (16, 1e-5))]
    curve = fit_curve(uneven, axis="params", family="crate")
    assert curve is not None and curve.kind == "log_linear"


def test_a_straight_line_over_log_x_leaves_the_asymptote_open() -> None:
    noise = np.random.default_rng(0).normal(0, 0.004, size=(6, 5))
    points = [point(x, *(0.5 + 0.02 * math.log(x) + noise[i])) for i, x in enumerate(np.geomspace(1, 64, 6))]
    curve = fit_curve(points, axis="params", family="crate")
    assert curve is not None
    assert curve.parameters["asymptote"].high == math.inf
    assert curve.parameters["exponent"].low == 0


def test_one_place_is_no_curve() -> None:
    assert fit_curve([point(1, 0.5), point(2, 0.4)], axis="params", family="crate") is None
    assert fit_curve([], axis="params", family="crate") is None


def test_equal_seeds_give_the_ratio_read_off_the_lines() -> None:
    # CRATE runs from 70% at 1 to 90% at 4, MAE is at 80% at 4: halfway up, so at 2 on a log axis, which is half of 4.
    ratio = ratio_at_equal([point(1, 0.7, 0.7), point(4, 0.9, 0.9)], [point(4, 0.8, 0.8)], axis="params", baseline="mae")
    assert ratio.ratio is not None
    assert (ratio.metric_value, ratio.ratio.value, ratio.ratio.high) == pytest.approx((0.8, 0.5, 0.5))
    assert ratio.ratio.low == pytest.approx((2 / (1 + 1 / 2)) ** 2 / 4)  # halfway up over x^-1/2
    assert ratio.sentence == "CRATE-MAE needs 0.50x [0.44, 0.50] of the encoder parameters of MAE at 80.0% probe accuracy."


def test_the_ratio_of_exchanged_sides_is_its_inverse() -> None:
    crate, mae = sizes([1, 2, 4, 8], noise=0.004, shift=0.5), sizes([1, 2, 4, 8], noise=0.003)
    ratio = ratio_at_equal(crate, mae, axis="flops", baseline="mae").ratio
    inverse = ratio_at_equal(mae, crate, axis="flops", baseline="mae").ratio
    assert ratio is not None and inverse is not None
    assert inverse == pytest.approx((1 / ratio.value, 1 / ratio.high, 1 / ratio.low))
    assert ratio.low < 0.5 < ratio.high


def test_the_anchor_leaves_a_size_beyond_where_there_is_one() -> None:
    crate, mae = sizes([1, 2, 4, 8]), sizes([1, 2, 4, 8], shift=1.5)
    ratio = ratio_at_equal(crate, mae, axis="params", baseline="mae")
    # MAE at 8 stands between CRATE's 4 and 8; MAE at 4 is the best that CRATE's second-best, 4, reaches too.
    assert ratio.metric_value == pytest.approx(law(4 / 1.5))


def test_losses_compare_the_other_way_round() -> None:
    # CRATE falls from 0.9 at 1 to 0.5 at 4, MAE is at 0.7 at 4.
    ratio = ratio_at_equal(
        [point(1, 0.9, 0.9), point(4, 0.5, 0.5)], [point(4, 0.7, 0.7)], axis="flops", baseline="mae", is_larger_better=False
    )
    assert ratio.ratio is not None and ratio.ratio.value == pytest.approx(0.5)


def test_an_end_that_the_seeds_do_not_close_is_open_and_said_to_be() -> None:
    crate = [point(1, 0.7, 0.72), point(4, 0.81, 0.83)]
    ratio = ratio_at_equal(crate, [point(4, 0.78, 0.83)], axis="time", baseline="mae")
    assert ratio.ratio is not None
    assert (ratio.ratio.low, ratio.ratio.high) == (0, math.inf)
    assert ratio.sentence.endswith("; these sizes and seeds do not close the interval.")


@pytest.mark.parametrize(
    ("crate", "mae", "says"),
    [
        ([point(1, 0.8, 0.8), point(2, 0.9, 0.9)], [point(1, 0.5, 0.5), point(2, 0.6, 0.6)], "better than the best MAE (60.0%"),
        ([point(1, 0.5, 0.5), point(2, 0.6, 0.6)], [point(1, 0.8, 0.8)], "smallest MAE of the front (80.0%"),
        ([point(1, 0.5, 0.5)], [point(2, 0.5, 0.5)], "needs two"),
        ([], [point(1, 0.5, 0.5)], "CRATE-MAE has no place"),
        ([point(1, 0.5), point(2, 0.7)], [point(1, 0.6)], "fewer than 2 seeds"),
    ],
    ids=["crate above", "mae above", "one size each", "no runs", "one seed"],
)
def test_nothing_is_extrapolated(crate: list[SizePoint], mae: list[SizePoint], says: str) -> None:
    ratio = ratio_at_equal(crate, mae, axis="params", baseline="mae")
    assert ratio.ratio is None and ratio.metric_value is None
    assert ratio.why_not is not None and says in ratio.why_not
    assert ratio.why_not in ratio.sentence


def test_a_ratio_of_fewer_shared_seeds_than_it_takes_is_withheld() -> None:
    crate = [SizePoint(label, x, dict.fromkeys(range(5), value)) for label, x, value in (("a", 1, 0.7), ("b", 4, 0.9))]
    mae = [SizePoint("c", 4, dict.fromkeys(range(3, 8), 0.8))]
    ratio = ratio_at_equal(crate, mae, axis="params", baseline="mae", least_pairs=5)
    assert ratio.ratio is None
    assert ratio.why_not == "the configurations around an equal result share fewer than 5 seeds"
    assert ratio_at_equal(crate, mae, axis="params", baseline="mae", least_pairs=2).ratio is not None


def test_seeds_that_both_do_not_have_take_no_part() -> None:
    crate = [SizePoint("a", 1, {0: 0.7, 1: 0.71, 7: 0.7}), SizePoint("b", 4, {0: 0.9, 1: 0.91, 7: 0.9})]
    mae = [SizePoint("c", 4, {0: 0.8, 1: 0.812, 9: 0.806})]
    only_paired = [SizePoint(p.label, p.x, {s: p.by_seed[s] for s in (0, 1)}) for p in (*crate, *mae)]
    with_more = ratio_at_equal(crate, mae, axis="params", baseline="mae").ratio
    without = ratio_at_equal(only_paired[:2], only_paired[2:], axis="params", baseline="mae").ratio
    assert with_more is not None and without is not None
    assert (with_more.low, with_more.high) == pytest.approx((without.low, without.high), rel=1e-9)
