"""What a handful of seeds, and a handful of source images, can tell.

In: one value or difference a seed; totals and rows a source image; p values. Out: means with two-sided intervals, tests, and
corrected p values. A handful is small: the t quantile pays for the unknown spread, where a normal interval or a bootstrap over
five values would be far too narrow.

Shapes: S source images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crate_ray.runs.rows import Estimate

LEAST_PAIRS = 4
"""Of a rank correlation."""


@dataclass(frozen=True)
class PairedInterval:
    """Mean difference over `n` pairs and the ends of its interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedTest(PairedInterval):
    """The same with the p value of a two-sided t test that the mean difference is 0."""

    p_value: float


def t_quantile(dof: float, confidence: float = 0.95) -> float:
    """Half the width of a two-sided t interval in standard errors."""
    from scipy import special

    return float(special.stdtrit(dof, (1 + confidence) / 2))


def paired_t_interval(differences: Sequence[float], *, confidence: float = 0.95) -> PairedInterval:
    """Mean +- t(n - 1) s / sqrt(n), with s the standard deviation over n - 1.

    Args:
        differences: One value a seed.
        confidence: Coverage, between 0 and 1.

    Raises:
        ValueError: Fewer than two differences: their spread is unknown.
    """
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} difference(s): an interval over seeds needs at least 2; train more seeds")
    half = t_quantile(n - 1, confidence) * float(values.std(ddof=1)) / math.sqrt(n)
    mean = float(values.mean())
    return PairedInterval(mean, mean - half, mean + half, n)


def paired_t_test(differences: Sequence[float], *, confidence: float = 0.95) -> PairedTest:
    """`paired_t_interval` with its p value; the interval holds 0 just where p is above 1 - confidence.

    Differences without any spread give p = 1 where they are 0, else p = 0.

    Args:
        differences: One value a seed.
        confidence: Coverage of the interval, between 0 and 1.

    Raises:
        ValueError: Fewer than two differences: their spread is unknown.
    """
    from scipy import special

    interval = paired_t_interval(differences, confidence=confidence)
    error = float(np.std(differences, ddof=1)) / math.sqrt(interval.n)
    p_value = float(2 * special.stdtr(interval.n - 1, -abs(interval.mean) / error)) if error > 0 else float(interval.mean == 0)
    return PairedTest(interval.mean, interval.low, interval.high, interval.n, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: reject where the outcome is below alpha, and the family-wise error is at most alpha.

    Holds whatever the dependence of the tests. The i-th smallest of m becomes the largest of (m - j + 1) p_j over j <= i, at
    most 1 (Holm 1979).

    Args:
        p_values: Of all that were tested, chosen before any outcome was looked at. What was refused beforehand, whatever it
            would have measured, is no member of the family; one given up after a look at its outcome counts as 1.

    Returns:
        Corrected p values in the order given.

    Raises:
        ValueError: A p value outside [0, 1].
    """
    raw = np.asarray(p_values, dtype=np.float64)
    if not ((raw >= 0) & (raw <= 1)).all():
        raise ValueError(f"p values lie in [0, 1], got {list(p_values)}; a hypothesis that was not tested counts as 1")
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1))
    corrected = np.empty_like(raw)
    corrected[order] = np.minimum(stepped, 1)
    return [float(value) for value in corrected]


def mean_t_interval(values: Sequence[float]) -> Estimate:
    """Mean over seeds with its 95% t interval; with one value both ends are NaN.

    Args:
        values: One a seed.

    Raises:
        ValueError: No values.
    """
    if len(values) == 0:
        raise ValueError("no values: a mean needs at least one")
    if len(values) == 1:
        return Estimate(float(values[0]), math.nan, math.nan)
    interval = paired_t_interval(values)
    return Estimate(interval.mean, interval.low, interval.high)


def source_interval(difference_by_source: Sequence[tuple[float, int]]) -> Estimate:
    """Mean difference over the rows of all source images, with a 95% interval over the draw of these images.

    Several rows of one source (placements, crops) are not independent, so what varies is the source, never the row. With total
    t_s and rows r_s of S sources, d = sum t / sum r has the standard error sqrt(S / (S - 1) sum (t_s - d r_s)^2) / sum r: what
    a bootstrap of sources tends to, without its draws. The quantile is t's with S - 1 degrees of freedom, so that it covers
    with few sources too, where the percentiles of a bootstrap are too narrow.

    Args:
        difference_by_source: For each source image the sum of (first's answer - second's answer) over its rows, and their
            number. Answers averaged over seeds hold the models fixed and leave the noise of the test set.

    Raises:
        ValueError: Fewer than two sources, or one without rows.
    """
    num_sources = len(difference_by_source)
    if num_sources < 2:
        raise ValueError(f"{num_sources} source image(s): an interval over them needs at least 2")
    total_S, rows_S = np.asarray(difference_by_source, dtype=np.float64).T
    if not (rows_S > 0).all():
        raise ValueError("a source image without rows; leave it out")
    mean = float(total_S.sum() / rows_S.sum())
    spread = math.sqrt(num_sources / (num_sources - 1) * float(np.square(total_S - mean * rows_S).sum()))
    half = t_quantile(num_sources - 1) * spread / float(rows_S.sum())
    return Estimate(mean, mean - half, mean + half)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation over the pairs that are finite on both sides.

    Args:
        first: One value a run.
        second: Another of the same runs.

    Returns:
        In [-1, 1]; None with fewer than 4 pairs, or where one side does not vary: that says nothing.

    Raises:
        ValueError: The two differ in length.
    """
    from scipy import stats

    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"{len(x)} values beside {len(y)}: give the two of each run")
    is_pair = np.isfinite(x) & np.isfinite(y)
    x, y = x[is_pair], y[is_pair]
    if len(x) < LEAST_PAIRS or not np.ptp(x) or not np.ptp(y):
        return None
    return float(stats.spearmanr(x, y).statistic)
