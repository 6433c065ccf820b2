"""The linear layer, by whichever of torch's two float32 matrix products is the faster on this processor.

In: tokens (..., K) and a weight (N, K). Out: (..., N). On a CPU torch sends float32 products to MKL, which leaves AVX-512
unused on an AMD processor that has it; oneDNN, which torch carries too, uses it and takes less than half the time there
(docs/numerics.md, Speed). Both compute in float32 and differ by rounding. The choice is a rule on processor, type and
shape, not a measurement when a run starts: a measurement can fall either way, and a resumed run would then not repeat its bits.
Everywhere else, and in what is exported, this is `torch.nn.Linear`; its state dict is the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

SMALLEST_PRODUCT = 2**21
"""Multiply-adds from which oneDNN is used; below, its fixed cost of some microseconds shows."""


class Linear(nn.Linear):
    """torch's linear layer with the faster product."""

    def forward(self, x: Tensor) -> Tensor:
        """The map x W^T + b."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The map x W^T + b.

    Args:
        x: (..., K).
        weight: (N, K), of any layout.
        bias: (N,).
    """
    if takes_onednn(x, weight):
        return _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return functional.linear(x, weight, bias)


def takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether a product goes to oneDNN by name: float32, outside of autocast, large, on an AMD CPU with AVX-512."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and ONEDNN_IS_FASTER
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()  # before the size, which is a symbol then
        and x.numel() * weight.shape[0] >= SMALLEST_PRODUCT
    )


def _mkl_leaves_avx512_unused() -> bool:
    capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    found = capabilities()
    is_amd = "AMD" in str(found.get("cpu_name", ""))
    has_both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return is_amd and bool(found.get("avx512_f")) and has_both


ONEDNN_IS_FASTER = _mkl_leaves_avx512_unused()
"""An AMD processor with AVX-512, under a torch that has both libraries and the operator used here."""


class _OneDnnLinear(torch.autograd.Function):
    """oneDNN's product with the gradient that its operator lacks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.crate_ray.onednn_linear(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        product = torch.ops.crate_ray.onednn_linear
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, x_rows = gradient.flatten(0, -2), x.flatten(0, -2)
        return (
            product(gradient, weight.t(), None) if needs_x else None,
            product(rows.t(), x_rows.t(), None) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )


# torch's compiler takes oneDNN's operator for frozen weights only; under a name of ours it calls it as it stands.
torch.library.define("crate_ray::onednn_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("crate_ray::onednn_linear", "cpu")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


@torch.library.register_fake("crate_ray::onednn_linear")  # type: ignore[untyped-decorator]
def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.crate_ray.onednn_linear)  # type: ignore[untyped-decorator]
def _flops_of_linear(x: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight[0]
