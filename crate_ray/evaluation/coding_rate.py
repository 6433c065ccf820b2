"""The coding rate of tokens in learned subspaces: how many nats it takes to write them down.

In: the coordinates U_h^T z of every token in every subspace. Out: one rate an image, in nats, and the two bounds
between which it must lie. The determinant is taken of the smaller Gram matrix, tokens or coordinates: the same number,
and at 197 tokens of 64 coordinates a tenth of the work. One place forces float32, because bfloat16 is 2% off.

Shapes: B images, H heads, N tokens with the class token, P head width, M = min(N, P).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

EPS = 0.01
"""The published constant. Its code uses it as it stands where the texts have a squared precision, so theirs is 0.1."""


@torch.no_grad()
def coding_rate(subspace_tokens_BHNP: Tensor, *, eps: float = EPS) -> Tensor:
    r"""R^c of each image, (B,) float32, in nats: the sum over heads of each subspace's coding rate.

    .. math:: R^c = \sum_h 1/2 \log\det(I + \frac{P}{N \epsilon} X_h X_h^T)

    X_h, N x P, has the tokens' coordinates U_h^T z as rows, each scaled to length 1. Source: Yu et al.,
    arXiv:2306.01129, the coding rate against subspaces, in the form of the published `coding_rate`: natural logarithm,
    class token included, eps as it stands. A coordinate vector shorter than 1e-12 has no direction; it counts as
    zero: it stays in N and adds nothing, where the published code gives NaN. Rates then lie below
    `coding_rate_floor`, and are 0 if every token is zero. A NaN or infinite token makes its image's rate NaN.

    Args:
        subspace_tokens_BHNP: Any floating type; computed in float32, under autocast too.
        eps: Above 0.
    """
    num_tokens, head_width = subspace_tokens_BHNP.shape[-2:]
    with torch.autocast(subspace_tokens_BHNP.device.type, enabled=False):
        x_BHNP = functional.normalize(subspace_tokens_BHNP.float(), dim=-1, eps=1e-12)
        x_BHMX = x_BHNP if num_tokens < head_width else x_BHNP.transpose(-2, -1)
        gram_BHMM = x_BHMX @ x_BHMX.transpose(-2, -1)
        identity_MM = torch.eye(gram_BHMM.shape[-1], device=gram_BHMM.device)
        return torch.logdet(identity_MM + head_width / (num_tokens * eps) * gram_BHMM).sum(dim=-1) / 2


def coding_rate_floor(num_heads: int, head_width: int, *, eps: float = EPS) -> float:
    """The least rate of non-zero tokens, in nats: H/2 ln(1 + P/eps), when each head's tokens lie on one line.

    N tokens of length 1 have a Gram matrix of trace N. The rate is a concave function of its eigenvalues, so at a given
    trace it is least when one of them holds all of it.
    """
    return num_heads / 2 * math.log1p(head_width / eps)


def coding_rate_ceiling(num_heads: int, num_tokens: int, head_width: int, *, eps: float = EPS) -> float:
    """The greatest rate, in nats: H M/2 ln(1 + P/(eps M)), M = min(N, P), when tokens fill each subspace evenly.

    The same trace N in M equal eigenvalues. With at least as many tokens as coordinates this is H P/2 ln(1 + 1/eps);
    with fewer, that larger number is a bound that nothing reaches.

    Args:
        num_heads: H.
        num_tokens: N, the class token included.
        head_width: P.
        eps: As for the rate.
    """
    rank = min(num_tokens, head_width)
    return num_heads * rank / 2 * math.log1p(head_width / (eps * rank))
