"""Muon for the matrices inside the layers, AdamW for all else, as one optimizer.

In: parameter groups, each of matrices or of other things. Out: an optimizer with one rate and one weight decay for both:
Muon's updates are scaled to the size of AdamW's, so a rate tuned for AdamW can be kept. Muon costs five iterations of three
matrix products a matrix and step, and keeps one momentum where AdamW keeps two moments.
"""

from typing import Any

import torch
from torch import Tensor

from crate_ray.config import ConfigError
from crate_ray.training.lion import without_non_finite


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on the groups marked `is_hidden`, fused AdamW on the others; groups and state are this object's own.

    Sources: Muon, Jordan et al. 2024 (momentum 0.95, Nesterov, five Newton-Schulz iterations in bfloat16: torch's defaults);
    the size of its updates, 0.2 sqrt(max(rows, columns)), Liu et al. (arXiv:2502.16982). Q, K and V that stand in one matrix
    are orthogonalised as one.

    A `found_inf` of 1 (a scalar on the device, as of torch's fused optimizers) leaves weights and state as they are, without
    waiting for the device; for that a second copy of the matrices is held during the step, when activations are gone.

    Args:
        groups: From `parameter_groups` with `hidden_apart`.
        lr: Learning rate.
        betas: Of AdamW.
        eps: Of AdamW.

    Raises:
        ConfigError: This torch has no Muon.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"optimizer.name = muon needs torch.optim.Muon, which torch {torch.__version__} lacks; "
                "install torch 2.9 or newer, or use adamw or lion"
            )
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        hidden, others = self._split_groups()
        self._muon: torch.optim.Optimizer = torch.optim.Muon(hidden, lr=lr, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)

    def _split_groups(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        hidden = [group for group in self.param_groups if group["is_hidden"]]
        return hidden, [group for group in self.param_groups if not group["is_hidden"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        # `load_state_dict` replaces groups and state: the parts look at them anew in each step.
        self._muon.param_groups, self._adamw.param_groups = self._split_groups()
        self._muon.state = self._adamw.state = self.state
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()
        if self.found_inf is None:
            self._muon.step()
        else:
            self._step_where_finite(self.found_inf)

    def _step_where_finite(self, found_inf: Tensor) -> None:
        matrices = [p for group in self._muon.param_groups for p in group["params"] if p.grad is not None]
        momenta = [self._momentum(p) for p in matrices]
        gradients = without_non_finite([p.grad for p in matrices if p.grad is not None], momenta, found_inf)
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient
        before = [p.clone() for p in matrices]
        self._muon.step()
        for matrix, value in zip(matrices, without_non_finite(matrices, before, found_inf), strict=True):
            matrix.copy_(value)

    def _momentum(self, matrix: Tensor) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"]
        return momentum
