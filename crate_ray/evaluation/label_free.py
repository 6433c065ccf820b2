"""Measures of features that need no label, and whether they go with a probe.

In: features of images. Out: RankMe, alpha-ReQ and a coding rate; over several runs of one family the rank correlation of such a
measure with an accuracy. The measures say how features are spread, not what they know: two families differ in them for reasons
that have nothing to do with accuracy, so they are never ranked across families. Within one, the correlation says
whether they may steer a sweep there; few runs give a wide interval, and that is the point of printing it.

Shapes: N images, D width, R runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.evaluation.coding_rate import coding_rate
from crate_ray.evaluation.features import FloatArray
from crate_ray.evaluation.intervals import Interval
from crate_ray.evaluation.spectrum import alpha_req, rankme

FEWEST_RUNS = 5
_NORMAL_975 = 1.959964


@dataclass(frozen=True)
class LabelFree:
    """Three measures of the features of some images; None where one is not defined.

    Attributes:
        rankme: Effective rank, see `spectrum.rankme`.
        alpha_req: Decay of the spectrum, see `spectrum.alpha_req`.
        coding_rate: Nats, see `feature_coding_rate`.
    """

    rankme: float | None
    alpha_req: float | None
    coding_rate: float | None


def measure_features(features_ND: FloatArray) -> LabelFree:
    """All three of one set of features."""
    rows = torch.from_numpy(np.ascontiguousarray(features_ND))
    return LabelFree(rankme(rows), alpha_req(rows), feature_coding_rate(features_ND))


def feature_coding_rate(features_ND: FloatArray) -> float | None:
    r"""Coding rate of whole-image features, in nats: how much room they take as a set.

    .. math:: R(Z) = 1/2 \log\det(I + \frac{D}{N \epsilon} Z Z^T)

    with rows of length 1 and eps as in `coding_rate`, of which it is the case of one subspace, the whole space. Source: Yu et
    al., arXiv:2006.08558, the term that learning is to expand. None if a feature is not finite.
    """
    rate = float(coding_rate(torch.from_numpy(np.ascontiguousarray(features_ND))[None, None]))
    return rate if math.isfinite(rate) else None


def rank_correlation(measure: Sequence[float], accuracy: Sequence[float]) -> Interval | None:
    """Spearman's rank correlation over runs with a 95% interval by Fisher's z; None below five runs or without spread.

    The standard error is sqrt((1 + r^2 / 2) / (R - 3)), Bonett and Wright (2000), "Sample size requirements for estimating
    Pearson, Kendall and Spearman correlations".

    Args:
        measure: One number a run.
        accuracy: Of the same runs.

    Raises:
        ValueError: The two differ in length.
    """
    if len(measure) != len(accuracy):
        raise ValueError(f"{len(measure)} measures, {len(accuracy)} accuracies: give both of every run")
    ranks = np.stack([_ranks(np.asarray(values, dtype=np.float64)) for values in (measure, accuracy)])
    if len(measure) < FEWEST_RUNS or not ranks.std(axis=1).all():
        return None
    runs = len(measure)
    deviations = ranks - ranks.mean(axis=1, keepdims=True)
    r = float(deviations[0] @ deviations[1] / np.linalg.norm(deviations[0]) / np.linalg.norm(deviations[1]))
    nearest = 1 - 6 / (runs * (runs * runs - 1))  # between 1 and the next correlation that ranks can have; z of 1 is infinite
    z = math.atanh(max(-nearest, min(nearest, r)))
    half = _NORMAL_975 * math.sqrt((1 + r * r / 2) / (runs - 3))
    return Interval(r, min(r, math.tanh(z - half)), max(r, math.tanh(z + half)))


def _ranks(values_R: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, place_R, counts = np.unique(values_R, return_inverse=True, return_counts=True)
    mean_ranks: NDArray[np.float64] = np.asarray(np.cumsum(counts) - (counts + 1) / 2, dtype=np.float64)
    return mean_ranks[place_R]
