"""The Pareto front, against its definition."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crate_ray.analysis.pareto import front
from crate_ray.config import LARGER_IS_BETTER

NAMES = ("knn_top1", "encoder_params_m", "gflops")


class Candidate:
    def __init__(self, values):
        self.values = values

    def value_of(self, objective):
        return self.values.get(objective)


def dominates(a, b, names):
    """The definition: at least as good in all, better in one."""
    as_good = [a.values[n] >= b.values[n] if LARGER_IS_BETTER[n] else a.values[n] <= b.values[n] for n in names]
    return all(as_good) and any(a.values[n] != b.values[n] for n in names)


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@given(data=st.data())
def test_the_front_is_all_that_nothing_dominates(names, data):
    few = st.integers(0, 4).map(float)  # few values, so that ties are common
    rows = data.draw(st.lists(st.tuples(*[few] * len(names)), max_size=25))
    candidates = [Candidate(dict(zip(names, row, strict=True))) for row in rows]
    expected = [c for c in candidates if not any(dominates(other, c, names) for other in candidates)]
    assert front(candidates, names) == expected


def test_directions_are_those_of_the_objectives():
    small, large, worse = (
        Candidate({"knn_top1": top1, "encoder_params_m": size}) for top1, size in [(0.7, 1.0), (0.9, 5.0), (0.6, 2.0)]
    )
    assert front([worse, large, small], ["knn_top1", "encoder_params_m"]) == [large, small]


def test_what_was_not_measured_or_is_no_number_takes_no_part():
    good = Candidate({"knn_top1": 0.5, "gflops": 1.0})
    others = [Candidate({"knn_top1": value, "gflops": 0.1}) for value in (math.nan, math.inf, None)]
    assert front([*others, good], ["knn_top1", "gflops"]) == [good]
    assert front([], ["knn_top1", "gflops"]) == []


def test_one_objective_is_refused():
    with pytest.raises(ValueError, match="rank by one"):
        front([], ["knn_top1"])


def test_a_front_of_two_objectives_does_not_grow_with_the_square():
    candidates = [Candidate({"knn_top1": i % 977 / 977, "gflops": float(i)}) for i in range(20_000)]
    started = time.process_time()
    front(candidates, ["knn_top1", "gflops"])
    assert time.process_time() - started < 3  # 20 000 squared comparisons would take far longer
