"""How many directions the features of an encoder use: effective rank and power-law decay.

In: features, one row a token or an image. Out: RankMe and alpha-ReQ. Both come from eigenvalues of the smaller Gram
matrix in float64, which costs less than a decomposition of the features and keeps half of float64's digits: enough
for features that were computed in float32.

Shapes: N rows, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RANKME_EPS = 1e-7
FIT_FIRST, FIT_LAST = 4, 100
FIT_FEWEST = 5
NUMERICAL_RANK = 1e-10


@dataclass(frozen=True)
class LatentMeasures:
    """Effective rank and spectral decay of features; None where a number is not defined.

    Attributes:
        rankme: See `rankme`.
        alpha_req: See `alpha_req`.
    """

    rankme: float | None
    alpha_req: float | None


def measure_latents(latent_ND: Tensor) -> LatentMeasures:
    """Both numbers of one set of features."""
    return LatentMeasures(rankme(latent_ND), alpha_req(latent_ND))


def rankme(latent_ND: Tensor) -> float | None:
    r"""Effective rank, between 1 and min(N, D): how many directions share the features evenly.

    .. math:: \exp(-\sum_k p_k \ln p_k),  p_k = \sigma_k / \sum_j \sigma_j + 10^{-7}

    sigma_k: singular values of the features, not centred. Source: Garrido et al., "RankMe", ICML 2023
    (arXiv:2210.02885). No unit. None if the features are all zero or not finite.
    """
    spread = _gram_eigenvalues(latent_ND.double())
    if spread is None:
        return None
    sigma = spread.sqrt()
    share = sigma / sigma.sum() + RANKME_EPS
    return float(torch.exp(-(share * share.log()).sum()))


def alpha_req(latent_ND: Tensor) -> float | None:
    r"""Exponent alpha of the decay of the covariance spectrum, lambda_k ~ k^-alpha.

    Weighted least squares of ln lambda_k on ln k over the ranks k = 4 to 100, or to the numerical rank (eigenvalues
    above 1e-10 of the largest) where that is smaller, with weights 1/k. Source: Agrawal et al., "alpha-ReQ", NeurIPS
    2022. Range and weights are those of its published code; the text names none. Near 1 is said to be good; far
    above, few directions hold everything. No unit. None if fewer than 5 ranks are there to fit, or a feature is not finite.
    """
    latent = latent_ND.double()
    spread = _gram_eigenvalues(latent - latent.mean(dim=0))
    if spread is None:
        return None
    last = min(FIT_LAST, int((spread > NUMERICAL_RANK * spread[0]).sum()))
    if last - FIT_FIRST + 1 < FIT_FEWEST:
        return None
    rank = torch.arange(FIT_FIRST, last + 1, dtype=torch.float64, device=spread.device)
    x, y, weight = rank.log(), spread[FIT_FIRST - 1 : last].log(), 1 / rank
    x_mean, y_mean = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    slope = (weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean).square()).sum()
    return float(-slope)


def _gram_eigenvalues(features: Tensor) -> Tensor | None:
    """Squared singular values, greatest first; None for features that are not finite or all zero."""
    rows, width = features.shape
    gram = features @ features.T if rows < width else features.T @ features
    if not bool(gram.isfinite().all()) or not bool(gram.any()):
        return None
    ascending: Tensor = torch.linalg.eigvalsh(gram)
    return ascending.flip(0).clamp_min(0)
