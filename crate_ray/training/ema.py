r"""An exponential moving average of the weights, kept beside the ones that are trained.

In: a model whose weights an optimizer changes. Out: averaged weights, exchanged with the model's for as long as something is
measured. It costs 4 bytes a parameter, and a pass over the weights a step; nothing is corrected for the start, so an average
over 1 / (1 - decay) steps still remembers the initial weights for a few times as many.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from crate_ray.config import ConfigError, RunConfig
from crate_ray.training.checkpoint import MODEL_FILE, Checkpoint

EMA_FILE = "ema.safetensors"


class Ema:
    r"""The average of a model's trained parameters.

    .. math:: a_0 = w_0,\quad a_t = d\, a_{t-1} + (1 - d)\, w_t

    w: weights after update t; a: average, in the precision of the weights; d: decay. A skipped step changes neither.

    Args:
        model: On its device already, weights set; sharded already if it will be.
        decay: d, above 0 and below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._decay = decay
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names: list[str] = list(named)
        self._weights: list[Tensor] = list(named.values())
        self._averages = [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def update(self, is_finite: Tensor) -> None:
        """Follows the weights after an update.

        Args:
            is_finite: Scalar on the device, which is not waited for: whether the update was taken.
        """
        change = torch._foreach_sub(self._weights, self._averages)
        torch._foreach_mul_(change, (1 - self._decay) * is_finite.float())
        torch._foreach_add_(self._averages, change)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the model's own state has, with averages in the place of weights."""
        return {**self._model.state_dict(), **dict(zip(self._names, self._averages, strict=True))}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            ValueError: Averages are missing.
        """
        missing = [name for name in self._names if name not in tensors]
        if missing:
            raise ValueError(f"the checkpoint's average has no {', '.join(missing[:5])}")
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(tensors[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averages; behind it its own weights again, bit for bit.

        Values move and tensors stay, so compiled, replicated and sharded models notice nothing.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for weight, average in zip(self._weights, self._averages, strict=True):
            held = weight.detach().clone()
            weight.copy_(average)
            average.copy_(held)


def weights_file(config: RunConfig, checkpoint: Checkpoint, *, use_ema: bool | None = None) -> str:
    """Which file of a checkpoint holds the weights to judge or to hand out.

    Args:
        config: The run's.
        checkpoint: Of the run.
        use_ema: The average, or not; None as the run's own evaluation does, `eval.use_ema`.

    Raises:
        ConfigError: The average is asked for, and the run keeps none.
    """
    wanted = config.eval.use_ema if use_ema is None else use_ema
    if wanted and not checkpoint.holds(EMA_FILE):
        raise ConfigError(
            f"{checkpoint.uri} holds no average of the weights: the run was trained without train.ema; "
            "take the weights themselves (--no-ema), or train with train.ema=0.999, say"
        )
    return EMA_FILE if wanted else MODEL_FILE
