"""Progress, of a run or of things counted: a bar in a terminal, plain lines elsewhere.

The driver learns of a run's progress in one way only, by following the run folder, so what is shown is what
is recorded.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Protocol, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from crate_ray.cli.output import errors
from crate_ray.runs import SEGMENT_SECONDS, Record, RecordTail, RunFolder

LINE_EVERY_S = 10.0
WIDE = 116  # columns from which evaluation is shown too
_ALWAYS = {"train/loss": "loss {:.4f}", "perf/images_per_s": "{:.0f} images/s", "perf/data_wait_fraction": "wait {:.0%}"}
_WHERE_WIDE = {"eval/loss": "eval {:.4f}", "eval/top1": "top-1 {:.1%}", "eval/knn_top1": "kNN {:.1%}"}


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
    """Shows step, loss, images/s, data wait and time left of one run at a time."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[detail]}", table_column=Column(no_wrap=True)),
            console=errors,
            transient=False,
        )
        self._is_terminal = errors.is_terminal
        self._tail: RecordTail | None = None
        self._values: dict[str, float] = {}
        self._first: Record | None = None
        self._last_line = 0.0
        self._next_read = 0.0

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_terminal:
            self._bar.stop()

    def follow(self, folder: RunFolder, *, total: int, attempt: int) -> None:
        """Turns to a run of `total` steps; records of earlier attempts are not shown."""
        self._read_every_s = 0.0 if folder.is_local else SEGMENT_SECONDS / 2
        self._tail, self._attempt, self._total, self._name = RecordTail(folder), attempt, total, folder.name
        self._values, self._step, self._first = {}, 0, None
        self._task = self._bar.add_task(folder.name, total=total, detail="starting workers")

    def poll(self) -> None:
        """Shows what came since the last call."""
        if self._tail is None or time.monotonic() < self._next_read:
            return
        self._next_read = time.monotonic() + self._read_every_s
        for record in self._tail.poll():
            if record.attempt == self._attempt:
                self._take(record)

    def _take(self, record: Record) -> None:
        self._values.update(record.values)
        self._step = max(self._step, record.step)
        self._first = self._first or record
        detail = self._detail(record)
        self._bar.update(self._task, completed=self._step, detail=detail)
        is_last = self._step >= self._total and "train/loss" in record.values
        if not self._is_terminal and (is_last or time.monotonic() - self._last_line > LINE_EVERY_S):
            self._last_line = time.monotonic()
            errors.print(f"{self._name}  step {self._step}/{self._total}  {detail}", soft_wrap=True)

    def _detail(self, record: Record) -> str:
        is_wide = not self._is_terminal or errors.width >= WIDE
        shown = _ALWAYS | _WHERE_WIDE if is_wide else _ALWAYS
        parts = [text.format(self._values[key]) for key, text in shown.items() if key in self._values]
        first = self._first
        if first is not None and self._step > first.step:
            left_s = (record.time - first.time) / (self._step - first.step) * (self._total - self._step)
            parts.append(f"{duration(left_s)} left")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
