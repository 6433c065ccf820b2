"""Intervals over seeds.

In: one difference a seed, both sides trained with that seed. Out: the mean with a two-sided
t interval. A handful of seeds is small: the t quantile pays for the unknown spread, where a
normal interval or a bootstrap over five values would be far too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PairedInterval:
    """Mean difference over `n` pairs and the ends of its interval."""

    mean: float
    low: float
    high: float
    n: int


def paired_t_interval(differences: Sequence[float], *, confidence: float = 0.95) -> PairedInterval:
    """Mean +- t(n - 1) s / sqrt(n), with s the standard deviation over n - 1.

    Args:
        differences: One value a seed.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: Fewer than two differences: their spread is unknown.
    """
    from scipy import stats

    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} difference(s): an interval over seeds needs at least 2; train more seeds")
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    mean = float(values.mean())
    return PairedInterval(mean, mean - half, mean + half, n)
