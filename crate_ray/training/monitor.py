"""What a run records of itself while it trains: losses, speed, waits, memory, norms, and on request a profile.

In: marks of the loop around the read of a batch, the end of a step, and work between steps; the outcome of each step. Out:
records under `train/`, `perf/`, `memory/`, `data/`, `norms/` and `checkpoint/`. Nothing waits for the device but `log`, for
which the loop has waited already. The trade-off: numbers of a window are means over it, so one slow step shows only at
`eval.log_every_steps: 1`.
"""

import logging
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from crate_ray.config import RunConfig
from crate_ray.models.cost import training_flops_per_image
from crate_ray.models.peaks import peak_tflops
from crate_ray.runs import MetricSink, WorkerContext
from crate_ray.training.norms import BlockNorms
from crate_ray.training.profiling import StepProfiler
from crate_ray.training.step import StepOutcome
from crate_ray.training.throughput import LoaderWatch, Throughput, Window, largest_of_ranks

log = logging.getLogger(__name__)

Pause = Literal["checkpoint", "eval"]
_GIB = 2**30
_STATM = Path("/proc/self/statm")


class Monitor:
    """Measures one attempt on one rank; rank 0's sink keeps the numbers.

    Args:
        config: Batch, cadence, scale and model.
        model: As it is trained, sharded where it is to be.
        optimizer: Of its parameters.
        context: This worker.
        sink: Where records go.
        precision: The resolved precision.
        profiler: Of this rank, where steps are to be traced.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        context: WorkerContext,
        sink: MetricSink,
        precision: str,
        profiler: StepProfiler | None = None,
    ) -> None:
        self._global_batch, self._world_size, self._rank = config.train.global_batch, context.world_size, context.rank
        self._device = next(model.parameters()).device
        self._sink, self._profiler = sink, profiler
        self._throughput = Throughput(self._global_batch, self._device)
        self._loader_watch = LoaderWatch(
            num_loaders=config.data.num_loaders, images_per_step=self._global_batch / self._world_size
        )
        self._norms_every = config.eval.norms_every_steps
        self._norms = BlockNorms(model, optimizer) if self._norms_every is not None else None
        peak = device_peak_tflops(config, self._device, precision)
        flops = training_flops_per_image(config.model)
        self._mfu_of_image = None if peak is None else flops / (self._world_size * peak * 1e12)
        self._outcomes: list[StepOutcome] = []
        self._paused_s: defaultdict[str, float] = defaultdict(float)

    @property
    def images_per_s(self) -> float | None:
        """See Throughput."""
        return self._throughput.images_per_s

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Around the read of the batch of a step, which begins here."""
        if self._profiler is not None:
            self._profiler.step_begins(step)
        if self._norms is not None and self._norms_every is not None and step % self._norms_every == 0:
            self._norms.arm(step)
        with self._throughput.waiting():
            yield

    def step_done(self, step: int) -> float:
        """Counts a step that the loop has handed to the device; returns its seconds."""
        seconds = self._throughput.step_done()
        if self._profiler is not None and self._profiler.step_done(step):
            self._throughput.resume()
        return seconds

    def observe(self, step: int, outcome: StepOutcome) -> None:
        """Takes in a step that the device has finished."""
        self._outcomes.append(outcome)
        if self._norms is not None and (norms := self._norms.take(step, grad_norm=outcome.grad_norm)):
            self._sink.write(step, norms)

    def resume(self, after: Pause) -> None:
        """Leaves the time since the last step out of the throughput, and counts it as a pause."""
        self._paused_s[after] += self._throughput.resume()

    def checkpoint_saved(self, step: int) -> None:
        """Records that the checkpoint of a step is whole."""
        self._sink.write(step, {"checkpoint/step": step})

    def log(self, step: int, *, lr: float, others: Mapping[str, float]) -> None:
        """Records the window of steps since the last call, all of which were observed; a collective.

        Args:
            step: The last of them.
            lr: Learning rate of that step.
            others: What is recorded beside: passes over the data, skipped steps.
        """
        outcomes, self._outcomes = [o for o in self._outcomes if o.is_finite], []
        window, memory = self._worst_of_ranks(self._throughput.window())
        if (advice := self._loader_watch.look(window)) and self._rank == 0:
            log.warning("%s", advice)
        values = {
            **_means(outcomes),
            "train/lr": lr,
            **others,
            **memory,
            **window.metrics(self._global_batch),
            **self._pauses(window),
            "perf/num_workers": self._world_size,
        }
        if self._mfu_of_image is not None:
            values["perf/mfu"] = values["perf/images_per_s"] * self._mfu_of_image
        self._sink.write(step, values)

    def close(self) -> None:
        """Writes a trace that the end of the run cut short."""
        if self._profiler is not None:
            self._profiler.close()

    def _worst_of_ranks(self, window: Window) -> tuple[Window, dict[str, float]]:
        """The window with the longest wait of any rank, and the most memory of any rank."""
        memory = memory_gib(self._device)
        wait_s, *sizes = largest_of_ranks([window.wait_s, *memory.values()], world_size=self._world_size, device=self._device)
        slowest = Window(window.steps, window.seconds, min(wait_s, window.seconds))
        return slowest, dict(zip(memory, sizes, strict=True))

    def _pauses(self, window: Window) -> dict[str, float]:
        """Shares of all time since the last window, this rank's: what went into checkpoints, and into evaluation."""
        paused, self._paused_s = self._paused_s, defaultdict(float)
        whole_s = max(window.seconds + sum(paused.values()), 1e-9)
        return {f"perf/{what}_wait_fraction": paused[what] / whole_s for what in ("checkpoint", "eval")}


def _means(outcomes: Sequence[StepOutcome]) -> dict[str, float]:
    """Over the steps that were no skipped ones; nothing where all were."""
    if not outcomes:
        return {}
    return {
        "train/loss": sum(o.loss for o in outcomes) / len(outcomes),
        "train/grad_norm": sum(o.grad_norm for o in outcomes) / len(outcomes),
        "data/replaced_samples": outcomes[-1].replaced,
    }


def device_peak_tflops(config: RunConfig, device: torch.device, precision: str) -> float | None:
    """What MFU is a share of: `scale.peak_tflops`, or what the vendor of a known GPU prints; None for any other."""
    if config.scale.peak_tflops is not None:
        return config.scale.peak_tflops
    return peak_tflops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peak of the device (of the process on a CPU), and what the process holds now where the system says it."""
    unit = _GIB if sys.platform == "darwin" else 2**10 * 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    values = {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else peak}
    if _STATM.exists():
        values["memory/host_rss_gib"] = int(_STATM.read_text().split()[1]) * resource.getpagesize() / _GIB
    return values
