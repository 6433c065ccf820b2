"""Progress, of a run or of things counted: a bar in a terminal, plain lines elsewhere.

The driver learns of a run's progress in one way only, by following the run folder, so what is shown is what
is recorded.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from crate_ray import storage
from crate_ray.cli.output import errors
from crate_ray.cli.sweep_table import fit_parts
from crate_ray.runs import SEGMENT_SECONDS, Record, RecordTail, RunFolder

LINE_EVERY_S = 10.0
WIDE = 116  # columns from which the bar has its whole width
BAR_WIDTH = 24
RATE_POINTS = 50  # windows of steps that the time left is reckoned from
SILENT_S = 60.0  # after so long without a record it is said
SKIPPED_STEPS = "train/skipped_steps"
_SHOWN = {
    "train/loss": "loss {:.4f}",
    "perf/images_per_s": "{:,.0f} images/s",
    "perf/data_wait_fraction": "data wait {:.0%}",
    "perf/mfu": "MFU {:.0%}",
    "eval/loss": "eval {:.4f}",
    "eval/top1": "top-1 {:.1%}",
    "eval/knn_top1": "kNN {:.1%}",
}


class Count(Protocol):
    """Shows how far some work is."""

    def __call__(self, done: int, total: int, detail: str = "") -> None:
        """So much of so much, and what else is worth saying."""


@contextmanager
def count_progress(unit: str) -> Iterator[Count]:
    """Gives what is called with (done, total): a bar on a terminal's standard error, a line every ten seconds elsewhere."""
    last_line = time.monotonic()

    def line(done: int, total: int, detail: str = "") -> None:
        nonlocal last_line
        if time.monotonic() - last_line > LINE_EVERY_S:
            last_line = time.monotonic()
            errors.print(f"{done:,}/{total:,} {unit} {detail}".rstrip(), soft_wrap=True)

    if not errors.is_terminal or errors.is_dumb_terminal:
        yield line
        return
    detail_column = TextColumn("{task.fields[detail]}")
    columns = (TextColumn(unit), BarColumn(bar_width=32), MofNCompleteColumn(), detail_column, TimeRemainingColumn())
    bar = Progress(*columns, console=errors, transient=True)
    task = bar.add_task(unit, total=None, detail="")
    with ExitStack() as shown:  # from the first count on, so that nothing is left of it when there is nothing to count

        def show(done: int, total: int, detail: str = "") -> None:
            bar.update(task, completed=done, total=total, detail=detail)
            if not bar.live.is_started:
                shown.enter_context(bar)
                shown.enter_context(logging_above())

        yield show


@contextmanager
def logging_above() -> Iterator[None]:
    """What is logged to standard error goes above the display, which has put itself in the place of `sys.stderr`."""
    with ExitStack() as stack:
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler and handler.stream is sys.__stderr__:
                stack.callback(handler.setStream, handler.stream)
                handler.setStream(sys.stderr)
        yield


class RunProgress:
    """Shows one run at a time: how far it is, loss, speed, waits, time left, the last checkpoint, workers; those before stay.

    What it knows it has read from the run's records; it draws in a thread of its own, so that ages go on while nothing comes.
    """

    def __init__(self) -> None:
        self._is_terminal = errors.is_terminal and not errors.is_dumb_terminal
        self._runs: list[ShownRun] = []
        self._live = Live(console=errors, refresh_per_second=4, get_renderable=self.render)
        self._stack = ExitStack()
        self._tail: RecordTail | None = None
        self._read_every_s = self._next_read = self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._stack.enter_context(self._live)
            self._stack.enter_context(logging_above())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def follow(self, folder: RunFolder, *, total: int, attempt: int, done: int = 0, workers: str = "workers") -> None:
        """Turns to a run.

        Args:
            folder: Its folder.
            total: Its steps.
            attempt: This start of it; records of earlier ones are not shown.
            done: Steps of the checkpoint that it goes on from.
            workers: What is started for it, in words.
        """
        self._read_every_s = 0.0 if folder.is_local else SEGMENT_SECONDS / 2
        self._tail, self._next_read = RecordTail(folder), 0.0
        self._runs.append(ShownRun(folder.name, total=total, attempt=attempt, done=done, workers=workers))

    def poll(self) -> None:
        """Shows what came since the last call; a store that does not answer for a moment is asked again later."""
        if self._tail is None or time.monotonic() < self._next_read:
            return
        self._next_read = time.monotonic() + self._read_every_s
        try:
            with storage.retry_deadline(0):  # the caller has a lease to renew and signals to pass on
                records = self._tail.poll()
        except OSError:
            return
        run = self._runs[-1]
        was_done = run.is_done
        for record in records:
            run.take(record)
        is_news = run.is_done and not was_done
        if not self._is_terminal and run.has_begun and (is_news or time.monotonic() - self._last_line > LINE_EVERY_S):
            self._last_line = time.monotonic()
            errors.print("  ".join(run.parts(time.time())), soft_wrap=True, markup=False)

    def render(self) -> RenderableType:
        """All runs of this command, the last one as it stands now."""
        now, width = time.time(), errors.width
        return Group(*(run.render(now, width) for run in list(self._runs)))


class ShownRun:
    """What the records say of one run.

    Args:
        name: Of the run.
        total: Its steps.
        attempt: Records of earlier attempts do not count.
        done: Steps of the checkpoint that it goes on from.
        workers: What is started for it, in words.
    """

    def __init__(self, name: str, *, total: int, attempt: int, done: int, workers: str) -> None:
        self._name, self._total, self._attempt, self._workers = name, total, attempt, workers
        self._step = done
        self._values: dict[str, float] = {}
        self._points: deque[tuple[int, float]] = deque(maxlen=RATE_POINTS)
        self._checkpoint: tuple[int, float | None] | None = (done, None) if done else None
        self._last_record: float | None = None
        self._first_record = 0.0

    @property
    def has_begun(self) -> bool:
        """Whether this attempt has recorded anything."""
        return self._last_record is not None

    @property
    def is_done(self) -> bool:
        """Whether the numbers of the last step are there."""
        return self._step >= self._total and "train/loss" in self._values

    def take(self, record: Record) -> None:
        """Takes in the next record."""
        if record.attempt < self._attempt:
            return
        if self._last_record is None:
            self._first_record = record.time
        self._last_record = record.time
        self._values.update(record.values)
        if "checkpoint/step" in record.values:
            self._checkpoint = (int(record.values["checkpoint/step"]), record.time)
        if "train/lr" in record.values:  # the record of a window of steps; others may be of a step before it
            if record.step <= self._step:  # went back to a checkpoint: the speed is measured anew
                self._points.clear()
            self._step = record.step
            self._points.append((record.step, record.time))

    def parts(self, now: float) -> list[str]:
        """The whole state in words, most important first."""
        return [self._name, self._count(), *filter(None, [self._left(now)]), *self._facts(now)]

    def render(self, now: float, width: int) -> RenderableType:
        """One line where all fits beside the bar, else the bar on a line of its own."""
        count, left, facts = self._count(), self._left(now) or "", self._facts(now)
        bar_width = BAR_WIDTH if width >= WIDE else BAR_WIDTH // 2
        room = width - sum(len(text) + 2 for text in (count, left)) - bar_width - 2
        name = self._name if len(self._name) <= room else f"{self._name[: max(room - 1, 1)]}…"
        head = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(total=self._total, completed=self._step, width=bar_width, pulse=not self.has_begun)
        beside = "  ".join(facts)
        if len(name) + len(beside) + 2 <= room:
            head.add_row(Text(name), bar, Text(count), Text(left), Text(beside))
            return head
        head.add_row(Text(name), bar, Text(count), Text(left))
        return Group(head, *(Text(f"  {line}") for line in fit_parts(facts, width - 2)))

    def _count(self) -> str:
        return f"step {self._step:,}/{self._total:,}"

    def _left(self, now: float) -> str | None:
        if self.is_done:
            return f"in {duration((self._last_record or now) - self._first_record)}"
        points = list(self._points)  # the screen's thread reads while the other one writes
        if len(points) < 2:
            return None
        (first_step, first_time), (last_step, last_time) = points[0], points[-1]
        left_s = (last_time - first_time) / (last_step - first_step) * (self._total - last_step) - (now - last_time)
        return f"{duration(max(left_s, 0.0))} left"

    def _facts(self, now: float) -> list[str]:
        if self._last_record is None or "train/lr" not in self._values:  # before the first window of steps
            return [f"starting {self._workers}", *self._saved(now)]
        facts = [form.format(self._values[key]) for key, form in _SHOWN.items() if key in self._values]
        facts += self._saved(now)
        if "perf/num_workers" in self._values:
            facts.append(plural(int(self._values["perf/num_workers"]), "worker"))
        if skipped := int(self._values.get(SKIPPED_STEPS, 0)):
            facts.append(f"{plural(skipped, 'step')} skipped")
        silent_s = now - self._last_record
        if silent_s > SILENT_S and not self.is_done:
            facts.append(f"nothing new for {duration(silent_s)}")
        return facts

    def _saved(self, now: float) -> list[str]:
        if self._checkpoint is None:
            return []
        step, saved = self._checkpoint
        age = "" if saved is None or self.is_done else f" ({duration(max(now - saved, 0))} ago)"
        return [f"checkpoint {step:,}{age}"]


def plural(count: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
