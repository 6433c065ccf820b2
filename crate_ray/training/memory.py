"""Out of memory: the next attempt puts half as many images through at once, at the same global batch.

In: an error of a step. Out: an OutOfMemory with the micro-batch to go on with, remembered in `micro_batch.json` of the run
folder, so that later starts begin there. Gradients are sums over the global batch, so the curve stays, up to the order of
float sums; what changes is the time of a step. No rank may retry alone, because the others wait for it in a collective: with
several workers all of them end, and start again.
"""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
import torch.distributed as dist

from crate_ray.config import RunConfig
from crate_ray.models.memory import Precision, run_activation_bytes, run_state_bytes
from crate_ray.runs import RunFolder, WorkerContext

log = logging.getLogger(__name__)

_FILE = "micro_batch.json"
_GIB = 2**30
_ALLOCATORS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""How allocators that raise a plain RuntimeError name themselves."""


class OutOfMemory(MemoryError):  # noqa: N818  it is what the exceptions of Python and torch that it stands for are called
    """A step did not fit.

    Args:
        message: What happened, and the figures.
        micro_batch: Images a worker should put through at once in the next attempt; None where there is nothing smaller.
    """

    def __init__(self, message: str, micro_batch: int | None) -> None:
        super().__init__(message, micro_batch)
        self.micro_batch = micro_batch

    def __str__(self) -> str:
        return str(self.args[0])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in _ALLOCATORS)


def agreed_micro_batch(config: RunConfig, folder: RunFolder, context: WorkerContext) -> RunConfig:
    """The configuration with the micro-batch that earlier attempts left over: what rank 0 reads, on all ranks; a collective."""
    remembered = [read_micro_batch(folder) if context.rank == 0 else None]
    if context.world_size > 1:
        dist.broadcast_object_list(remembered)
    if remembered[0] is None:
        return config
    micro_batch = min(remembered[0], config.train.micro_batch or remembered[0])
    if context.rank == 0:
        log.info(
            "at most %d images at once on a worker: a start before this one ran out of memory (delete %s to try more)",
            *(micro_batch, folder.path(_FILE)),
        )
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro_batch})})


def read_micro_batch(folder: RunFolder) -> int | None:
    """What `MemoryGuard` wrote; None where every step has fitted."""
    body = folder.read_json(_FILE)
    return None if body is None else int(body["micro_batch"])


def release_memory() -> None:
    """Gives back what the attempt before held: a model and its loop refer to each other."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


class MemoryGuard:
    """Turns allocations that fail in a step into one OutOfMemory.

    Args:
        config: With the micro-batch of this attempt.
        folder: Remembers the next one.
        context: This worker.
        precision: The resolved precision.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, context: WorkerContext, *, precision: str) -> None:
        self._config, self._folder, self._rank = config, folder, context.rank
        self._precision: Precision = "bfloat16" if precision == "bfloat16" else "float32"
        rows = -(-config.train.global_batch // context.world_size)
        self._micro_batch = min(config.train.micro_batch or rows, rows)

    @contextmanager
    def watching(self, step: int) -> Iterator[Self]:
        """Around the computation of a step.

        Raises:
            OutOfMemory: In place of what the allocator raised.
        """
        try:
            yield self
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self._explained(error, step) from error

    def _explained(self, error: BaseException, step: int) -> OutOfMemory:
        cause = str(error).strip().partition("\n")[0]
        what = f"out of memory at step {step} on rank {self._rank} with {self._micro_batch} images at once ({cause})"
        smaller = self._smaller()
        if smaller is None:
            return OutOfMemory(f"{what}; fewer do not go. {self._figures()}", None)
        remembered = read_micro_batch(self._folder)
        smaller = min(smaller, remembered or smaller)  # another rank may have been here before
        self._folder.write_json(_FILE, {"micro_batch": smaller, "reason": what})
        return OutOfMemory(f"{what}; the next attempt puts {smaller} through at once", smaller)

    def _smaller(self) -> int | None:
        """Half of the micro-batch; whole pairs where rows are mixed in pairs."""
        least = 2 if self._config.data.is_mixing else 1
        half = self._micro_batch // 2
        half -= half % least
        return half if half >= least else None

    def _figures(self) -> str:
        """What a worker needs, in closed form, and what would make it less."""
        state = run_state_bytes(self._config) / _GIB
        image = run_activation_bytes(self._config, precision=self._precision) / _GIB
        also = "" if self._config.scale.activation_checkpointing else "scale.activation_checkpointing: true, "
        return (
            f"Weights, gradients and moments take {state:.2f} GiB, what the backward pass needs of {self._micro_batch} "
            f"image(s) {self._micro_batch * image:.2f} GiB, temporaries not counted: use a smaller model, "
            f"train.precision: bfloat16, {also}or a device with more memory"
        )
