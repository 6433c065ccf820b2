import math

import numpy as np
import pytest

from crate_ray.analysis import paired_t_interval


def test_a_worked_example_from_the_t_table():
    # Mean 3, s = sqrt(2.5), t(4, 0.975) = 2.776445 (printed tables).
    interval = paired_t_interval([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (interval.mean, interval.low, interval.high, interval.n) == pytest.approx((3, 3 - half, 3 + half, 5), abs=1e-5)


@pytest.mark.parametrize("n", [5, 10])
def test_the_interval_covers_the_truth_as_often_as_it_says(n):
    random = np.random.default_rng(n)
    intervals = [paired_t_interval(random.normal(0.3, 2.0, size=n).tolist()) for _ in range(2000)]
    covered = np.mean([interval.low <= 0.3 <= interval.high for interval in intervals])
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize("values", [[], [0.1]])
def test_fewer_than_two_seeds_have_no_interval(values):
    with pytest.raises(ValueError, match="at least 2"):
        paired_t_interval(values)
