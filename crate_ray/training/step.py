"""One optimizer step over a global batch that several workers share.

In: a worker's rows of the global batch, padded to a static shape with rows of weight 0. Out: updated
weights, and the loss of the *global* batch. The gradient is the weighted sum over all B rows divided
by B, whatever the number of workers and micro-batches: gradients are averaged over W ranks, so each rank's
sum is scaled by W / B. How they are averaged, and who holds which parameters, is `parallel`'s.

Shapes: B global batch, M rows of this worker, C x H x W image.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn

from crate_ray.config import RunConfig
from crate_ray.config.run import check_pairs
from crate_ray.data import Batch
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.models.layers import recompute_layers
from crate_ray.training.ema import Ema
from crate_ray.training.nonfinite import Finding, find_non_finite
from crate_ray.training.objective import create_objective
from crate_ray.training.optimizer import step_where_finite
from crate_ray.training.parallel import Parallel
from crate_ray.training.precision import autocast, can_compile


@dataclass(frozen=True)
class Votes:
    """What a rank tells the others; it travels with the loss, in the all-reduce that the loss makes anyway."""

    stop: bool = False
    """To write a checkpoint and return."""
    save: bool = False
    """To write a checkpoint."""
    replaced: int = 0
    """Samples that this rank had to replace so far."""
    written: int = 0
    """Parts of the checkpoint under way that this rank has finished writing."""


@dataclass(frozen=True)
class StepOutcome:
    """Loss of the global batch, norm of its gradient, and the votes of all ranks: whether any says so, and sums."""

    loss: float
    grad_norm: float
    stop: bool
    save: bool
    replaced: int
    written: int

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; every rank sees the same two."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


_NO_VOTES = Votes()


class TrainStep:
    """Forward, backward, all-reduce, clipping and update.

    Args:
        model: On its device already, weights set, and distributed.
        optimizer: Of this model's parameters.
        config: Task, batch sizes, clipping, compilation.
        precision: The resolved precision.
        parallel: How workers share the model; by default there is one.
        ema: Follows the weights after every update that is taken.

    Raises:
        ConfigError: Images are mixed in pairs, and these workers would tear pairs apart.
    """

    def __init__(
        self,
        model: MaskedAutoencoder | Classifier,
        optimizer: torch.optim.Optimizer,
        config: RunConfig,
        *,
        precision: str,
        parallel: Parallel | None = None,
        ema: Ema | None = None,
    ) -> None:
        self._parallel = parallel or Parallel()
        if config.data.is_mixing:
            check_pairs(config, self._parallel.world_size)
        self.device = next(model.parameters()).device
        self._optimizer = optimizer
        self._ema = ema
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._precision = precision
        self._scale = self._parallel.world_size / config.train.global_batch
        self._micro_batch = config.train.micro_batch
        self._clip_norm = config.train.clip_norm
        self._objective = create_objective(model, config)
        if config.scale.activation_checkpointing:
            recompute_layers(model)
        if config.train.compile and can_compile(self.device):
            self._objective.compile()
        self._module = self._parallel.wrap(self._objective)
        self._rehearsals = self._parallel.rehearsals

    def __call__(self, batch: Batch, *, lr: float, votes: Votes = _NO_VOTES) -> "PendingOutcome":
        """Runs one update.

        Args:
            batch: This worker's rows.
            lr: Learning rate of this update; a parameter group's `lr_scale` multiplies it.
            votes: This rank's.

        Returns:
            The step's numbers, read later so that a GPU need not be waited for.
        """
        while self._rehearsals > 0:
            self._rehearse(batch)
        loss = self._backward(batch)
        grad_norm = self._clip()
        shared = self._share(loss, votes)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self._update(torch.isfinite(shared[0]) & torch.isfinite(grad_norm))
        return PendingOutcome(shared, grad_norm)

    def _share(self, loss: torch.Tensor, votes: Votes) -> torch.Tensor:
        """Loss of the global batch and sums of the votes, the same on every rank."""
        counts = [float(votes.stop), float(votes.save), float(votes.replaced), float(votes.written)]
        mean = (loss / self._parallel.world_size).view(1)
        return self._parallel.sum_up(torch.cat([mean, torch.tensor(counts).to(self.device, non_blocking=True)]))

    def _update(self, is_finite: torch.Tensor) -> None:
        """Steps the optimizer and drops the gradients.

        Args:
            is_finite: On the device, so that nobody waits for it: whether loss and gradient are numbers, on every rank alike.
        """
        step_where_finite(self._optimizer, is_finite)
        if self._ema is not None:
            self._ema.update(is_finite)
        self._optimizer.zero_grad(set_to_none=True)

    def find_non_finite(self, batch: Batch) -> Finding | None:
        """Runs a batch again, uncompiled and without an update, and says what of it is not finite first on this rank.

        Communicates as a step does, so every rank calls it at the same time.
        """
        with torch.compiler.set_stance("force_eager"):
            finding = find_non_finite(self._objective, lambda: self._backward(batch))
        self._optimizer.zero_grad(set_to_none=True)
        return finding

    def _rehearse(self, batch: Batch) -> None:
        """One backward pass that leaves nothing behind, so that the first step of every attempt runs like all others."""
        idle = dataclasses.replace(batch, weights_B=torch.zeros_like(batch.weights_B))
        size = min(self._micro_batch or len(idle.weights_B), len(idle.weights_B))
        self._put_through(idle, self._objective.targets(idle), slice(0, size), is_last=True)
        self._optimizer.zero_grad(set_to_none=True)
        self._rehearsals -= 1

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Accumulates the gradient over this worker's rows; returns its sum of losses times W / B."""
        targets_M = self._objective.targets(batch)
        rows = batch.images_BCHW.shape[0]
        size = min(self._micro_batch or rows, rows)
        total = torch.zeros((), device=self.device)
        for start in range(0, rows, size):
            total += self._put_through(batch, targets_M, slice(start, start + size), is_last=start + size >= rows)
        return total

    def _put_through(self, batch: Batch, targets_M: torch.Tensor, part: slice, *, is_last: bool) -> torch.Tensor:
        """Forward and backward pass of some rows."""
        tensors = (batch.images_BCHW, targets_M, batch.weights_B)
        images, targets, weights = (self._to_device(tensor[part]) for tensor in tensors)
        images, targets = self._objective.augment(images, targets, cursor=batch.cursor_after)
        with self._parallel.accumulating(is_last=is_last):
            with autocast(self._precision, self.device):
                loss: torch.Tensor = self._module(images, targets, weights) * self._scale
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _to_device(self, rows: torch.Tensor) -> torch.Tensor:
        """A copy that a GPU overlaps with its work needs page-locked memory."""
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def _clip(self) -> torch.Tensor:
        """Norm of the whole gradient before clipping."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = self._parallel.total_norm(gradients)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        return norm


class PendingOutcome:
    """A step's numbers, which the device may still be computing.

    From a GPU they are copied as soon as they are there: to ask for them later would wait for the steps that were queued since.
    """

    def __init__(self, shared: torch.Tensor, grad_norm: torch.Tensor) -> None:
        numbers = torch.cat([shared, grad_norm.detach().view(1)])
        self._numbers, self._arrived = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()

    def read(self) -> StepOutcome:
        """Waits for the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, stops, saves, replaced, written, grad_norm = self._numbers.tolist()
        return StepOutcome(loss, grad_norm, stops > 0, saves > 0, round(replaced), round(written))
