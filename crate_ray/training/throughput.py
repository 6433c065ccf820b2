"""How fast a run goes, what it waits for, and how many loader threads would be enough.

In: marks of the loop around the read of a batch and at the end of a step. Out: metrics of a window, at times a sentence.
On a CPU the wait is the time that the read of a batch took. On a GPU the loop runs a step ahead: it may wait for a batch while
the device is still computing the step before, which costs nothing. There the wait is the time that the device had nothing to
do, between two events on its stream, for which the host waited too.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from crate_ray.config import DataConfig

_MOST_LOADERS: int = next(bound.le for bound in DataConfig.model_fields["num_loaders"].metadata if hasattr(bound, "le"))
WARMUP_STEPS = 5
WATCHED_STEPS = 20
BOTTLENECK_FRACTION = 0.05
"""Of the time; below it nothing is said. A loader that keeps up stays under 0.02."""
HEADROOM = 1.1
"""Loader threads beyond the rate of the device, for images that take longer than most."""


@dataclass(frozen=True)
class Window:
    """Some steps of one rank: how long they took, and how long the device waited for batches in that time."""

    steps: int
    seconds: float
    wait_s: float

    @property
    def wait_fraction(self) -> float:
        """Share of the time that was spent waiting."""
        return self.wait_s / max(self.seconds, 1e-9)

    def metrics(self, global_batch: int) -> dict[str, float]:
        """What is recorded of these steps."""
        return {
            "perf/images_per_s": self.steps * global_batch / max(self.seconds, 1e-9),
            "perf/step_s": self.seconds / max(1, self.steps),
            "perf/data_wait_fraction": self.wait_fraction,
        }


class _HostWait:
    """Waiting on a CPU: the host is the device."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def arrived(self, waited_s: float) -> None:
        """A batch came after so long."""
        self._seconds += waited_s

    def queued(self) -> None:
        """The step of that batch is on its way."""

    def interrupted(self) -> None:
        """Something else than steps happened."""

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _StreamWait(_HostWait):
    """Waiting on a GPU: from the end of a step on its stream until the next may begin, but no longer than the host waited."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._last_end: torch.cuda.Event | None = None
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def arrived(self, waited_s: float) -> None:
        if self._last_end is None:  # nothing was computing
            super().arrived(waited_s)
        else:
            self._gaps.append((self._last_end, self._event(), waited_s))

    def queued(self) -> None:
        self._last_end = self._event()

    def interrupted(self) -> None:
        self._last_end = None

    def take(self) -> float:
        gaps, self._gaps = self._gaps, []
        if gaps:
            gaps[-1][1].synchronize()
        idle_s: float = sum(min(end.elapsed_time(begin) / 1e3, waited_s) for end, begin, waited_s in gaps)
        return super().take() + idle_s


class Throughput:
    """Images a second and data wait, by window and over the attempt.

    The first steps of an attempt (compilation, first reads) and everything between steps that is not
    training (evaluation, checkpoints) stay out: call `resume` after such work.
    """

    def __init__(self, global_batch: int, device: torch.device) -> None:
        self._global_batch = global_batch
        self._wait = _StreamWait(device) if device.type == "cuda" else _HostWait()
        self._steps = 0
        self._counted_steps = 0
        self._counted_s = 0.0
        self._window_steps = 0
        self._window_s = 0.0
        self._mark = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the read of a batch."""
        started = time.perf_counter()
        yield
        self._wait.arrived(time.perf_counter() - started)

    def step_done(self) -> float:
        """Counts a step; returns its duration in seconds."""
        self._wait.queued()
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        self._steps += 1
        self._window_steps += 1
        self._window_s += elapsed
        if self._steps > WARMUP_STEPS:
            self._counted_steps += 1
            self._counted_s += elapsed
        return elapsed

    def resume(self) -> float:
        """Leaves out the time since the last step; returns it in seconds."""
        self._wait.interrupted()
        now = time.perf_counter()
        left_out, self._mark = now - self._mark, now
        return left_out

    def window(self) -> Window:
        """What happened since the last call."""
        window = Window(self._window_steps, self._window_s, self._wait.take())
        self._window_steps, self._window_s = 0, 0.0
        return window

    @property
    def images_per_s(self) -> float | None:
        """Over the attempt without its first steps; None when it was shorter than those."""
        return self._counted_steps * self._global_batch / self._counted_s if self._counted_steps else None


def largest_of_ranks(values: Sequence[float], *, world_size: int, device: torch.device) -> list[float]:
    """Each value's largest over the ranks: the others wait for the one that waits longest, and the fullest runs out first.

    A collective: with more than one rank, all of them call it at the same step.
    """
    if world_size == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [float(value) for value in largest.tolist()]


def enough_loaders(read_s: float, *, images: float, step_s: float) -> int:
    """Loader threads that keep a device busy.

    Images of one step take `images * read_s` seconds of a thread; that many threads share them within the `step_s` seconds
    that the device computes, with some headroom. Supposes a free core for each.

    Args:
        read_s: Seconds of a thread an image: read, decode, transform.
        images: Images a step on this rank.
        step_s: Seconds that the device computes on them, without waiting.
    """
    return max(1, math.ceil(HEADROOM * images * read_s / max(step_s, 1e-9)))


class LoaderWatch:
    """Names the loader as the bottleneck, with the number of threads that would be enough.

    While steps wait for batches all loaders are at work, threads or actors of `data.preprocess`, so the seconds of a loader an
    image are loaders times time over images. It speaks once, and again when the number has doubled or halved since.

    Args:
        num_loaders: data.num_loaders.
        images_per_step: Images a step on this rank.
    """

    def __init__(self, *, num_loaders: int, images_per_step: float) -> None:
        self._num_loaders, self._images_per_step = num_loaders, images_per_step
        self._warming_up = WARMUP_STEPS
        self._watched = Window(0, 0.0, 0.0)
        self._said: int | None = None

    def look(self, window: Window) -> str | None:
        """Take in a window of steps; the sentence, where there is one to say."""
        if self._warming_up > 0:
            self._warming_up -= window.steps
            return None
        before = self._watched
        seen = Window(before.steps + window.steps, before.seconds + window.seconds, before.wait_s + window.wait_s)
        if seen.steps < WATCHED_STEPS:
            self._watched = seen
            return None
        self._watched = Window(0, 0.0, 0.0)
        return self._judge(seen) if seen.wait_fraction > BOTTLENECK_FRACTION else None

    def _judge(self, seen: Window) -> str | None:
        images = seen.steps * self._images_per_step
        busy_s = self._num_loaders * seen.seconds if self._num_loaders else seen.wait_s
        read_s, step_s = busy_s / images, (seen.seconds - seen.wait_s) / seen.steps
        enough = enough_loaders(read_s, images=self._images_per_step, step_s=step_s)
        if self._said is not None and self._said / 2 < enough < self._said * 2:
            return None
        self._said = enough
        return (
            f"the loader is the bottleneck: {seen.wait_fraction:.0%} of the time goes into waiting for images. An image takes "
            f"{read_s * 1e3:.3g} ms of a loader, and a step computes {self._images_per_step:g} images in "
            f"{step_s * 1e3:.3g} ms: {_remedy(enough, self._num_loaders)}"
        )


def _remedy(enough: int, num_loaders: int) -> str:
    if enough > _MOST_LOADERS:
        return f"{enough:,} loaders would be needed, more than data.num_loaders can be ({_MOST_LOADERS})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = "" if enough <= cores else f", if as many CPU cores are free (here {cores})"
    return f"data.num_loaders={enough} would be enough instead of {num_loaders}{room}"
