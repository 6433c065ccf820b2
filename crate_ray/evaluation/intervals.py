"""Accuracies with intervals that respect where the images come from.

In: which rows were answered correctly, and the source image of each row. Out: a value with a
95% interval. Several rows of one source image (placements, crops) are not independent, so the
bootstrap draws sources, never rows: an interval over rows would be too narrow by up to the
square root of the rows a source has. A draw of sources is a vector of counts, which turns all
resamples into one matrix product.

Shapes: N rows, S sources, R resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
_COUNTS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def accuracy_interval(correct: ArrayLike, sources: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Share of correct rows with a source-clustered percentile bootstrap interval.

    Args:
        correct: (N,) booleans.
        sources: (N,) name of the source image of each row.
        seed: Same seed, same interval.
        resamples: Number of bootstrap draws R.

    Raises:
        ValueError: No rows, or the two differ in length.
    """
    return _clustered_mean(np.asarray(correct, dtype=np.float64), np.asarray(sources), seed, resamples)


def mean_interval(values: ArrayLike, sources: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Mean of a number measured on each row, with the same interval.

    Args:
        values: (N,) numbers; a difference of two models on the same rows gives the interval of their gain.
        sources: (N,) name of the source image of each row.
        seed: Same seed, same interval.
        resamples: Number of bootstrap draws R.

    Raises:
        ValueError: No rows, or the two differ in length.
    """
    return _clustered_mean(np.asarray(values, dtype=np.float64), np.asarray(sources), seed, resamples)


def paired_gain(
    correct_model: ArrayLike, correct_control: ArrayLike, sources: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Accuracy of a model minus that of its control, on the same rows.

    The difference is taken row by row before sources are drawn, so what both find hard cancels.

    Args:
        correct_model: (N,) booleans.
        correct_control: (N,) booleans in the same row order.
        sources: (N,) name of the source image of each row.
        seed: Same seed, same interval.
        resamples: Number of bootstrap draws R.

    Raises:
        ValueError: No rows, or the three differ in length.
    """
    model_N, control_N = np.asarray(correct_model, dtype=np.float64), np.asarray(correct_control, dtype=np.float64)
    if model_N.shape != control_N.shape:
        raise ValueError(f"{len(model_N)} answers of the model, {len(control_N)} of its control: judge both on the same rows")
    return _clustered_mean(model_N - control_N, np.asarray(sources), seed, resamples)


def _clustered_mean(value_N: NDArray[np.float64], sources_N: NDArray[np.generic], seed: int, resamples: int) -> Interval:
    if len(value_N) == 0 or len(value_N) != len(sources_N):
        raise ValueError(f"{len(value_N)} rows but {len(sources_N)} sources: give one source a row, and at least one row")
    _, source_of_row_N = np.unique(sources_N.astype(str), return_inverse=True)
    rows_S = np.bincount(source_of_row_N)
    total_S = np.bincount(source_of_row_N, weights=value_N)
    num_sources = len(rows_S)
    resampled_R = np.empty(resamples)
    random = np.random.default_rng(seed)
    share_S = np.full(num_sources, 1 / num_sources)
    # In slices, so that 50,000 sources do not need a matrix of 2,000 x 50,000 counts at once.
    step = max(1, _COUNTS_AT_ONCE // num_sources)
    for start in range(0, resamples, step):
        counts_RS = random.multinomial(num_sources, share_S, size=min(step, resamples - start))
        resampled_R[start : start + step] = (counts_RS @ total_S) / (counts_RS @ rows_S)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled_R, (tail, 1 - tail))
    return Interval(float(value_N.mean()), float(low), float(high))
