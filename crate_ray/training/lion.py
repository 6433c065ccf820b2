r"""Lion: every coordinate moves by the learning rate, in the direction of the sign of an interpolated momentum.

In: parameters with gradients. Out: updated parameters, one momentum each (AdamW keeps two moments). Beside its size it
has another rule of thumb than AdamW: rates 3 to 10 times smaller, weight decay as much larger, so that their product stays.
"""

from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    r"""Sign of a momentum, with decoupled weight decay.

    .. math:: c = \beta_1 m + (1 - \beta_1) g,\quad \theta \leftarrow \theta - \gamma (sign(c) + \lambda \theta),
        \quad m \leftarrow \beta_2 m + (1 - \beta_2) g

    theta: parameter; g: its gradient; m: momentum, 0 at first, `exp_avg` in the state; gamma: `lr`; lambda: `weight_decay`.
    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), the published program;
    the weights are decayed first here, as AdamW does, which is the same sum.

    A `found_inf` of 1 (a scalar on the device, as of torch's fused optimizers) leaves weights and momentum as they are,
    without waiting for the device.

    Args:
        groups: Parameter groups; each may have a `weight_decay` of its own.
        lr: Learning rate.
        betas: Of the direction and of the momentum.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, [self._momentum(p) for p in parameters], group)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        momentum: Tensor = state["exp_avg"]
        return momentum

    def _update(self, parameters: list[Tensor], momenta: list[Tensor], group: dict[str, Any]) -> None:
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["lr"] * group["weight_decay"]
        gradients = [p.grad for p in parameters if p.grad is not None]
        step: float | Tensor = -lr
        factor: float | Tensor = 1 - decay
        if self.found_inf is not None:
            gradients = without_non_finite(gradients, momenta, self.found_inf)
            taken = 1 - self.found_inf
            step, factor = -lr * taken, 1 - decay * taken
        signs = torch._foreach_lerp(momenta, gradients, 1 - beta1)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(signs, step)
        torch._foreach_mul_(parameters, factor)
        torch._foreach_add_(parameters, signs)
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)


def without_non_finite(gradients: list[Tensor], momenta: list[Tensor], found_inf: Tensor) -> list[Tensor]:
    """The gradients; where the step is skipped the momenta, which an average of the two then leaves bit for bit."""
    skipped = found_inf > 0
    return [torch.where(skipped, m, g) for g, m in zip(gradients, momenta, strict=True)]
