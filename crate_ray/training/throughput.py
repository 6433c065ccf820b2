"""How fast a run goes, and what it waits for."""

import resource
import sys
import time

import torch

WARMUP_STEPS = 5


class Throughput:
    """Images a second and data wait, by window and over the attempt.

    The first steps of an attempt (compilation, first reads) and everything between steps that is not
    training (evaluation, checkpoints) stay out: call `resume` after such work.
    """

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._steps = 0
        self._counted_steps = 0
        self._counted_s = 0.0
        self._window_steps = 0
        self._window_s = 0.0
        self._window_wait_s = 0.0
        self._mark = time.perf_counter()

    def step_done(self, wait_s: float) -> float:
        """Counts a step that waited `wait_s` for its batch; returns its duration in seconds."""
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        self._steps += 1
        self._window_steps += 1
        self._window_s += elapsed
        self._window_wait_s += wait_s
        if self._steps > WARMUP_STEPS:
            self._counted_steps += 1
            self._counted_s += elapsed
        return elapsed

    def resume(self) -> None:
        """Leaves out the time since the last step."""
        self._mark = time.perf_counter()

    def window(self) -> dict[str, float]:
        """Metrics since the last call."""
        seconds = max(self._window_s, 1e-9)
        values = {
            "perf/images_per_s": self._window_steps * self._global_batch / seconds,
            "perf/step_s": seconds / max(1, self._window_steps),
            "perf/data_wait_fraction": self._window_wait_s / seconds,
        }
        self._window_steps, self._window_s, self._window_wait_s = 0, 0.0, 0.0
        return values

    @property
    def images_per_s(self) -> float | None:
        """Over the attempt without its first steps; None when it was shorter than those."""
        return self._counted_steps * self._global_batch / self._counted_s if self._counted_steps else None


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
