"""Norms of gradients and updates, block by block, on the device.

In: a model and its optimizer. Out: at the steps that are asked for, each block's gradient norm, and the norm of what the
optimizer changed over the norm of what was there. Hooks of the optimizer see gradients and weights at the right moment, so
the step knows nothing of it. Nothing here waits for the device: the numbers are read with those of their step. The
price is a copy of the weights while the optimizer steps, when the activations are gone.

Sharded parameters (DTensor) are measured shard by shard; one all-reduce makes their norms global. So with them every rank
must ask for the same steps.

Shapes: K blocks; 3 sums of each: gradient, update, weight.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from crate_ray.training.optimizer import layer_of
from crate_ray.training.sharded import local_part


def block_of(name: str) -> str:
    """Where a parameter lies: `embedding`, `layer03` of the encoder, `decoder01`, or `rest` (norms, heads, mask token)."""
    first, _, behind = name.partition(".")
    if first == "decoder_blocks":
        return f"decoder{int(behind.partition('.')[0]) + 1:02d}"
    top = 10**6  # above every layer: what follows the encoder
    layer = layer_of(name, top)
    if layer == 0:
        return "embedding"
    return "rest" if layer == top else f"layer{layer:02d}"


class BlockNorms:
    """Watches one optimizer; silent until `arm` is called.

    Args:
        model: Sharded already where it is to be.
        optimizer: Its hooks are called around every step.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._blocks: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._blocks.setdefault(block_of(name), []).append(parameter)
        self._step: int | None = None
        self._before: list[list[Tensor]] = []
        self._squares_3K: dict[int, Tensor] = {}
        optimizer.register_step_pre_hook(self._before_update)
        optimizer.register_step_post_hook(self._after_update)

    def arm(self, step: int) -> None:
        """Measures the next update, which is that of `step`."""
        self._step = step

    def take(self, step: int, *, grad_norm: float) -> dict[str, float]:
        """Names and values of a step that was measured, none of another: `norms/layer03/grad` and `norms/layer03/update_ratio`.

        Args:
            step: One that the device has finished; else this waits for it.
            grad_norm: Of its whole gradient before clipping: the optimizer saw it clipped, which changes no block's share.
        """
        squares_3K = self._squares_3K.pop(step, None)
        if squares_3K is None:
            return {}
        grads, updates, weights = squares_3K.double().sqrt().tolist()
        clipped_norm = math.hypot(*grads)
        scale = grad_norm / clipped_norm if 0 < clipped_norm < math.inf else 1.0
        values = {}
        for block, grad, update, weight in zip(self._blocks, grads, updates, weights, strict=True):
            values[f"norms/{block}/grad"] = grad * scale
            values[f"norms/{block}/update_ratio"] = update / weight if weight > 0 else 0.0
        return values

    def _before_update(self, *_: Any) -> None:
        if self._step is not None:
            self._before = [[local_part(p).clone() for p in block] for block in self._blocks.values()]

    @torch.no_grad()
    def _after_update(self, *_: Any) -> None:
        if self._step is None:
            return
        sums: list[list[Tensor]] = [[], [], []]
        for parameters, before in zip(self._blocks.values(), self._before, strict=True):
            sums[0].append(_square([local_part(p.grad) for p in parameters if p.grad is not None]))
            sums[2].append(_square(before))
            sums[1].append(_square([old.sub_(local_part(p)) for p, old in zip(parameters, before, strict=True)]))
        first = next(iter(self._blocks.values()))[0]
        self._squares_3K[self._step] = _over_shards(torch.stack([torch.stack(kind) for kind in sums]), first)
        self._before, self._step = [], None


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return nn.utils.get_total_norm(list(tensors)).float().square()


def _over_shards(squares_3K: Tensor, like: Tensor) -> Tensor:
    """Sums over the ranks that hold shards of `like`; copies of the same shard count once."""
    if not isinstance(like, DTensor):
        return squares_3K
    placements = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    return DTensor.from_local(squares_3K, like.device_mesh, placements).full_tensor()
