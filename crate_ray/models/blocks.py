"""The layers: CRATE encoder and decoder layer, transformer layer, and the two encoder layers between them.

In: tokens (B, N, D). Out: tokens of the same shape. The ISTA step is computed with two matrix products
instead of the published three, which is the same algebra at 8 instead of 10 N D^2 operations a layer;
attention is fused where that was measured to be faster (`attend`). A layer of a decoder can be asked for some tokens only:
whatever only other tokens would need is then left out, and the tokens asked for come out the same.

An encoder layer has two halves: attention, tied (`SubspaceAttention`) or not (`SelfAttention`), and ISTA without a residual or
a perceptron with one. The second half names the class: `CrateEncoderLayer` has ISTA, `TransformerLayer` the perceptron.

Shapes: B batch, N tokens with the class token, M tokens asked for, D width, H heads, P = D / H head width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from crate_ray.models.linear import Linear, linear
from crate_ray.models.patches import take_tokens


def attend(q_BHNP: Tensor, k_BHNP: Tensor, v_BHNP: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(P)) v by the faster of two kernels.

    A GPU runs the fused kernel. A CPU runs it in float32 only: in bfloat16 a CRATE layer, forward and backward, took
    1.6 to 3.3 times as long with it as with two matrix products and a softmax (docs/numerics.md: figures, command, date).
    """
    if q_BHNP.device.type == "cpu" and q_BHNP.dtype in (torch.bfloat16, torch.float16):
        logits_BHNN = (q_BHNP * q_BHNP.shape[-1] ** -0.5) @ k_BHNP.transpose(-2, -1)
        weights_BHNN: Tensor = logits_BHNN.softmax(dim=-1)
        return weights_BHNN @ v_BHNP
    return functional.scaled_dot_product_attention(q_BHNP, k_BHNP, v_BHNP)


def _split_heads(x_BND: Tensor, num_heads: int) -> Tensor:
    """(B, N, H P) to (B, H, N, P)."""
    return x_BND.reshape(*x_BND.shape[:-1], num_heads, -1).transpose(1, 2)


def _join_heads(x_BHNP: Tensor) -> Tensor:
    """(B, H, N, P) to (B, N, H P)."""
    return x_BHNP.transpose(1, 2).flatten(2)


def _residual(x_BND: Tensor, wanted_BM: Tensor | None) -> Tensor:
    """What goes around a layer: every token, or the wanted ones."""
    return x_BND if wanted_BM is None else take_tokens(x_BND, wanted_BM)


class SubspaceAttention(nn.Module):
    r"""Multi-head subspace self-attention (MSSA): queries, keys and values are one projection.

    .. math:: MSSA(Z) = W [V_1 A_1; ...; V_H A_H] + b,  V_h = U_h^T Z,  A_h = softmax(V_h^T V_h / \sqrt{P})

    Z: tokens, D x N (columns are tokens in the text, rows here). U_h: basis of subspace h, D x P; the H
    transposed bases stacked are `qkv.weight`, D x D, without bias. W: `proj.weight`, D x D; b: D.

    Source: Yu et al., "White-Box Transformers via Sparse Rate Reduction" (arXiv:2306.01129), the MSSA operator.
    As in the published code and unlike that text: logits are scaled by 1 / sqrt(P); a learned W with bias stands
    where the text has [U_1 ... U_H] and the factor p / (N eps^2). One head has no W and b, as published.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, width, bias=False)
        self.proj = Linear(width, width) if num_heads > 1 else nn.Identity()

    def project(self, z_BND: Tensor) -> Tensor:
        """The coordinates U_h^T z in every subspace, (B, H, N, P): what coding rates are measured on."""
        return _split_heads(self.qkv(z_BND), self.num_heads)

    def forward(self, z_BND: Tensor, wanted_BM: Tensor | None = None) -> Tensor:
        """MSSA(z), without the residual: of every token, or of those at the given positions, (B, M, D)."""
        v_BND: Tensor = self.qkv(z_BND)
        v_BHNP = _split_heads(v_BND, self.num_heads)
        q_BHMP = v_BHNP if wanted_BM is None else _split_heads(take_tokens(v_BND, wanted_BM), self.num_heads)
        return self.proj(_join_heads(attend(q_BHMP, v_BHNP, v_BHNP)))  # type: ignore[no-any-return]


class IstaStep(nn.Module):
    r"""One proximal gradient step on a non-negative sparse code.

    .. math:: ISTA(y) = ReLU(y + \eta D^T (y - D y) - \eta \lambda 1)

    y: token, D-dimensional. D: `dictionary`, D x D, complete and without bias. eta > 0: step size.
    lambda >= 0: weight of the l1 norm; the threshold is eta lambda. Every output is at least 0, and no residual
    goes around the step.

    Source: Yu et al., arXiv:2306.01129, the ISTA block: a step on 1/2 |y - D x|^2 + lambda |x|_1 over x >= 0 from x = y.
    The published code computes y + eta (D^T y - D^T D y) - eta lambda with three products; these are two.
    The texts use eta = 1 or 0.1 and lambda = 0.1; the published autoencoder 0.1 and 5.0, later 0.5.

    With `learnable`, eta and lambda are trained as `log_step_size` and `log_lambda`, which keeps them positive and
    makes an optimizer step relative.
    """

    def __init__(self, width: int, *, step_size: float, lam: float, learnable: bool = False) -> None:
        super().__init__()
        self.dictionary = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.dictionary)
        self._constants = (step_size, lam)
        self.learnable = learnable
        if learnable:
            self.log_step_size = nn.Parameter(torch.full((1,), math.log(step_size)))
            self.log_lambda = nn.Parameter(torch.full((1,), math.log(lam)))

    @property
    def step_size(self) -> float | Tensor:
        """eta: a number, or a tensor of shape (1,) when trained."""
        return self.log_step_size.exp() if self.learnable else self._constants[0]

    @property
    def lam(self) -> float | Tensor:
        """lambda: a number, or a tensor of shape (1,) when trained."""
        return self.log_lambda.exp() if self.learnable else self._constants[1]

    def forward(self, y_BND: Tensor) -> Tensor:
        """The sparse code after one step."""
        residual_BND = y_BND - linear(y_BND, self.dictionary)
        ascent_BND = linear(residual_BND, self.dictionary.t())
        return functional.relu(y_BND + self.step_size * (ascent_BND - self.lam))


def _attention(width: int, num_heads: int, *, tied: bool, qkv_bias: bool) -> "SubspaceAttention | SelfAttention":
    return SubspaceAttention(width, num_heads) if tied else SelfAttention(width, num_heads, qkv_bias=qkv_bias)


class Layer(nn.Module):
    """What the layers have in common: each computes its outputs in `compute`, and can do so twice.

    Attributes:
        recompute: In training, keep the layer's input alone and compute the rest again in the backward pass. The numbers are
            the same; memory falls by what a layer keeps, and a step has one more forward pass (`models.memory` counts both).
    """

    compute: Callable[..., Tensor]
    recompute = False

    def forward(self, *tokens: Tensor | None) -> Tensor:
        """See `compute`."""
        if self.recompute and torch.is_grad_enabled():  # nothing here draws random numbers, so their state need not be kept
            return checkpoint(self.compute, *tokens, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return self.compute(*tokens)


class CrateEncoderLayer(Layer):
    r"""Compression, then sparsification.

    .. math:: Z' = Z + MSSA(LN_1(Z)),  Z^+ = ISTA(LN_2(Z'))

    Z: tokens, D x N. Source: arXiv:2306.01129 and, for the autoencoder, Pai et al. (arXiv:2404.02446).
    The residual is taken before LN_1, as in the published code; a figure of arXiv:2311.13110 draws it after.
    Not published: without `tied`, the attention of a transformer in the place of MSSA.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        eps: float,
        step_size: float,
        lam: float,
        learnable: bool = False,
        tied: bool = True,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _attention(width, num_heads, tied=tied, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.ista = IstaStep(width, step_size=step_size, lam=lam, learnable=learnable)

    def compute(self, z_BND: Tensor) -> Tensor:
        """Z^{l+1} from Z^l."""
        half_BND = z_BND + self.attn(self.norm1(z_BND))
        return self.ista(self.norm2(half_BND))  # type: ignore[no-any-return]


class CrateDecoderLayer(Layer):
    r"""The encoder layer run backwards: synthesis, then the inverse of a compression.

    .. math:: Y' = E LN_1(Y),  Y^+ = Y' - MSSA(LN_2(Y'))

    Y: tokens, D x N. E: `dictionary`, D x D, without bias and without ReLU. Source: Pai et al., arXiv:2404.02446.
    The text writes E as a transposed dictionary; it is a free matrix, so that is naming only.
    """

    def __init__(self, width: int, num_heads: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.dictionary = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.dictionary)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.attn = SubspaceAttention(width, num_heads)

    def compute(self, y_BND: Tensor, wanted_BM: Tensor | None = None) -> Tensor:
        """Y^{l+1} from Y^l: every token, or those at the given positions, (B, M, D); each token is still a key and a value."""
        synthesis_BND = linear(self.norm1(y_BND), self.dictionary)
        compressed = self.attn(self.norm2(synthesis_BND), wanted_BM)
        return _residual(synthesis_BND, wanted_BM) - compressed  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    r"""Multi-head self-attention: W softmax(Q K^T / \sqrt{P}) V + b.

    Q, K, V: three projections in one `qkv.weight`, 3D x D, rows in the order Q, K, V. Source: Vaswani et al. 2017.
    """

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(self, x_BND: Tensor, wanted_BM: Tensor | None = None) -> Tensor:
        """Attention without the residual: of every token, or of those at the given positions, (B, M, D)."""
        if wanted_BM is None:
            q_BND, k_BND, v_BND = self.qkv(x_BND).chunk(3, dim=-1)
        else:
            q_BND, k_BND, v_BND = self._project_wanted(x_BND, wanted_BM)
        q_BHNP, k_BHNP, v_BHNP = (_split_heads(x, self.num_heads) for x in (q_BND, k_BND, v_BND))
        return self.proj(_join_heads(attend(q_BHNP, k_BHNP, v_BHNP)))  # type: ignore[no-any-return]

    def _project_wanted(self, x_BND: Tensor, wanted_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the wanted tokens, keys and values of all."""
        width = x_BND.shape[-1]
        weight_q, weight_kv = self.qkv.weight.split_with_sizes((width, 2 * width))
        bias_q, bias_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split_with_sizes((width, 2 * width))
        q_BMD = linear(take_tokens(x_BND, wanted_BM), weight_q, bias_q)
        k_BND, v_BND = linear(x_BND, weight_kv, bias_kv).chunk(2, dim=-1)
        return q_BMD, k_BND, v_BND


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between; 4D hidden units unless told otherwise."""

    def __init__(self, width: int, hidden_width: int | None = None) -> None:
        super().__init__()
        hidden_width = 4 * width if hidden_width is None else hidden_width
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """The perceptron without the residual."""
        return self.fc2(functional.gelu(self.fc1(x_BND)))  # type: ignore[no-any-return]


class TransformerLayer(Layer):
    r"""The pre-norm layer of ViT and MAE.

    .. math:: X' = X + Attention(LN_1(X)),  X^+ = X' + MLP(LN_2(X'))

    X: tokens, D x N. Source: Dosovitskiy et al. 2021, equations 2 and 3. The baseline in the CRATE repository has
    no bias on Q, K, V and LayerNorm eps 1e-5; the published MAE has the bias and 1e-6.
    Not published: with `tied`, MSSA in the place of the attention, which has no bias to set; a perceptron of other width.
    """

    def __init__(
        self, width: int, num_heads: int, *, eps: float, qkv_bias: bool, tied: bool = False, mlp_width: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _attention(width, num_heads, tied=tied, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_width)

    def compute(self, x_BND: Tensor, wanted_BM: Tensor | None = None) -> Tensor:
        """X^{l+1} from X^l: every token, or those at the given positions, (B, M, D); each token is still a key and a value."""
        half = _residual(x_BND, wanted_BM) + self.attn(self.norm1(x_BND), wanted_BM)
        return half + self.mlp(self.norm2(half))  # type: ignore[no-any-return]
