import math

import pytest

from crate_ray.analysis.statistics import (
    holm,
    mean_t_interval,
    paired_t_interval,
    paired_t_test,
    source_interval,
    spearman,
)


def test_a_worked_example_from_the_t_table() -> None:
    # Mean 3, s = sqrt(2.5), t(4, 0.975) = 2.776445 (printed tables).
    interval = paired_t_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (interval.mean, interval.low, interval.high, interval.n) == pytest.approx((3, 3 - half, 3 + half, 5), abs=1e-5)


@pytest.mark.parametrize("values", [[], [0.1]])
def test_fewer_than_two_seeds_have_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        paired_t_interval(values)


def test_the_p_value_is_that_of_the_t_table() -> None:
    # |t| = 2.776445 with 4 degrees of freedom is p = 0.05: shift the differences until their mean over its error is that.
    error = math.sqrt(2.5) / math.sqrt(5)
    test = paired_t_test([value - 3 - 2.776445 * error for value in (1, 2, 3, 4, 5)])
    assert test.p_value == pytest.approx(0.05, abs=1e-6)
    assert test.high == pytest.approx(0, abs=1e-5)  # the interval ends at 0 just there


def test_differences_without_spread_are_zero_for_sure_or_are_not() -> None:
    assert paired_t_test([0.0] * 5).p_value == 1
    assert paired_t_test([0.25] * 5).p_value == 0


def test_holm_gives_what_its_paper_says() -> None:
    # Worked by hand: sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, then never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9, 1.0]) == [1.0, 1.0, 1.0]
    assert holm([]) == []


def test_a_hypothesis_that_was_not_tested_still_counts() -> None:
    assert holm([0.02, 1.0, 1.0]) == pytest.approx([0.06, 1.0, 1.0])


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_probability(value: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([0.5, value])


def test_one_seed_has_a_mean_without_an_interval() -> None:
    alone = mean_t_interval([0.7])
    assert alone.value == 0.7
    assert math.isnan(alone.low) and math.isnan(alone.high)
    both = paired_t_interval([0.1, 0.3])
    assert mean_t_interval([0.1, 0.3]) == (both.mean, both.low, both.high)
    with pytest.raises(ValueError, match="at least one"):
        mean_t_interval([])


def test_with_one_row_a_source_the_interval_over_sources_is_a_plain_t_interval() -> None:
    values = [0.0, 1.0, -1.0, 1.0, 0.0, 1.0]
    plain = paired_t_interval(values)
    assert source_interval([(value, 1) for value in values]) == pytest.approx((plain.mean, plain.low, plain.high))


def test_rows_of_one_source_do_not_count_as_evidence_of_their_own() -> None:
    values = [0.0, 1.0, -1.0, 1.0, 0.0, 1.0]
    assert source_interval([(9 * value, 9) for value in values]) == pytest.approx(source_interval([(v, 1) for v in values]))


def test_the_mean_over_sources_is_over_their_rows() -> None:
    assert source_interval([(3, 3), (0, 1)]).value == 0.75


@pytest.mark.parametrize(
    ("sources", "says"), [([], "at least 2"), ([(1.0, 4)], "at least 2"), ([(1.0, 4), (0.0, 0)], "without rows")]
)
def test_sources_that_tell_nothing_are_refused(sources: list[tuple[float, int]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        source_interval(sources)


def test_ranks_correlate_whatever_the_scale() -> None:
    # One exchange of neighbours among five: 1 - 6 * 2 / (5 * 24).
    assert spearman([1, 2, 3, 4, 5], [1.0, 10.0, 1000.0, 100.0, 1e9]) == pytest.approx(0.9)


def test_a_correlation_of_few_or_constant_values_is_none() -> None:
    assert spearman([1, 2, 3], [1, 2, 3]) is None
    assert spearman([1, 2, 3, 4], [5, 5, 5, 5]) is None
    assert spearman([1, 2, 3, math.nan], [1, 2, 3, 4]) is None
    with pytest.raises(ValueError, match="beside"):
        spearman([1, 2], [1, 2, 3])


def test_a_pair_with_a_missing_side_is_left_out() -> None:
    assert spearman([1, 2, 3, 4, math.nan], [4, 3, 2, 1, 9]) == pytest.approx(-1)
