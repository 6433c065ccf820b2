"""A sweep while it runs: one table on a terminal, plain lines elsewhere.

In: the trials as they start and end, and the records that the running ones write. Out: standard error. What is shown is what
is recorded: the screen follows the run folders of running trials in a thread of its own and asks nothing of the driver, which
waits for it no longer than a lock. Only the newest trials that ended are kept, so that a long sweep costs no memory.
"""

import threading
import time
from collections import Counter, deque
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from crate_ray.analysis.objectives import MEASURES
from crate_ray.cli.output import errors
from crate_ray.cli.progress import LINE_EVERY_S, duration, logging_above
from crate_ray.cli.sweep_table import TrialLine, fit_parts, shape_of, state_word, trial_table, varying_keys
from crate_ray.config import LARGER_IS_BETTER, SweepConfig
from crate_ray.runs import SEGMENT_SECONDS, Record, RecordTail, RunFolder, TrialRow, objective_values

REFRESH_S = 0.5
KEPT = 200  # ended trials that the table can show: more rows than a terminal has
NAMES = {
    "eval_loss": "eval loss",
    "knn_top1": "kNN",
    "probe_top1": "probe",
    "params_m": "params",
    "encoder_params_m": "encoder params",
    "gflops": "GFLOPs",
    "images_per_s": "images/s",
}
_UNITS = {"%": "%", "millions": "M"}


class _Running:
    """A trial that holds its resources: its row as it started, and what its records said since.

    Args:
        row: As it started.
        folder: Of the trial.
        is_cloning: Whether it may go on in a copy of another trial, below its own folder.
    """

    def __init__(self, row: TrialRow, folder: RunFolder, *, is_cloning: bool) -> None:
        self.row, self.step, self.values = row, row.step, dict(row.objectives)
        self._folder, self._is_cloning = folder, is_cloning
        self._run, self._tail = folder, RecordTail(folder)
        self._read_every_s = 0.0 if folder.is_local else SEGMENT_SECONDS / 2
        self._next_read = 0.0

    def poll(self) -> None:
        """Reads what is new; a store that does not answer for a moment is asked again later."""
        if time.monotonic() < self._next_read:
            return
        self._next_read = time.monotonic() + self._read_every_s
        try:
            records = self._records()
        except OSError:
            return
        for record in records:
            self.values.update(objective_values(record.values))
            self.step = record.step

    def _records(self) -> list[Record]:
        if self._is_cloning:
            from crate_ray.launch.sweeps.generations import newest_generation

            newest = newest_generation(self._folder).folder
            if newest.uri != self._run.uri:
                self._run, self._tail = newest, RecordTail(newest)
        return self._tail.poll()


class SweepScreen:
    """Shows the trials of one sweep; a context manager. Its methods may be called from any thread, and return at once."""

    def __init__(self, sweep: SweepConfig) -> None:
        self._sweep = sweep
        self._keys = varying_keys(sweep)
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._ended: deque[TrialRow] = deque(maxlen=KEPT)
        self._ends: dict[str, str] = {}  # of every trial that ended, its state
        self._states: dict[str, Counter[str]] = {"screen": Counter(), "confirm": Counter()}
        self._totals: dict[str, int | None] = {"screen": None, "confirm": None}
        self._stage = "screen"
        self._refused = 0
        self._best: dict[str, TrialRow] = {}
        self._notes: tuple[str, ...] = ()
        self._started = time.monotonic()
        self._last_line = time.monotonic()
        self._stop = threading.Event()
        self._is_terminal = errors.is_terminal and not errors.is_dumb_terminal
        self._live = Live(console=errors, auto_refresh=False, transient=True, get_renderable=self.render)
        self._thread = threading.Thread(target=self._run, name="sweep-screen", daemon=True)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._is_terminal:
            self._stack.enter_context(self._live)
            self._stack.enter_context(logging_above())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._stack.close()

    def known(self, rows: list[TrialRow], *, total: int | None, refused: int = 0) -> None:
        """What earlier sessions ended, and how many trials the screening has; None or 0 where nobody knows."""
        with self._lock:
            self._totals["screen"], self._refused = total or None, refused
            for row in rows:
                self._count(row)

    def stage(self, name: str, total: int) -> None:
        """A stage begins, of so many trials."""
        with self._lock:
            self._stage, self._totals[name] = name, total or None

    def notes(self, *parts: str) -> None:
        """What is left of the budget and what the forecast says, each in a few words."""
        with self._lock:
            self._notes = parts

    def trial_started(self, row: TrialRow, folder: RunFolder) -> None:
        """A trial took its resources; called again for one that was started again."""
        with self._lock:
            self._running[row.id] = _Running(row, folder, is_cloning=self._sweep.scheduler.type == "pbt")

    def trial_ended(self, row: TrialRow) -> None:
        """A trial gave its resources back."""
        with self._lock:
            self._running.pop(row.id, None)
            self._count(row)
            counts = self._done_of()
        if not self._is_terminal:
            self._last_line = time.monotonic()
            why = f"  {row.reason.splitlines()[0]}" if row.reason else ""
            errors.print(f"{counts}  {self._line_text(self._line(row))}{why}", soft_wrap=True, markup=False)

    def _count(self, row: TrialRow) -> None:
        """Takes an end in; the newest of a trial that ended before, in this session or an earlier one."""
        if row.id in self._ends:
            self._states[row.stage][self._ends[row.id]] -= 1
            self._ended = deque((other for other in self._ended if other.id != row.id), maxlen=KEPT)
        self._ends[row.id] = row.state
        self._ended.append(row)
        self._states[row.stage][row.state] += 1
        held = self._best.get(row.arm)
        if row.state == "FINISHED" and row.stage == "screen" and (held is None or self._is_better(row, held)):
            self._best[row.arm] = row

    def _is_better(self, row: TrialRow, held: TrialRow) -> bool:
        name = self._sweep.objective[0]
        new, old = row.value_of(name), held.value_of(name)
        if new is None or old is None:
            return old is None and new is not None
        return new > old if LARGER_IS_BETTER[name] else new < old

    def _run(self) -> None:
        """Follows the running trials and draws, until the end."""
        while not self._stop.wait(REFRESH_S):
            for trial in list(self._running.values()):  # outside of the lock: a slow store must not hold up the driver
                trial.poll()
            if self._is_terminal:
                self._live.refresh()
            elif self._running and time.monotonic() - self._last_line > LINE_EVERY_S:
                self._last_line = time.monotonic()
                with self._lock:
                    parts = [*self._counts(), *self._bests(), *self._notes]
                errors.print(", ".join(parts), soft_wrap=True, markup=False)

    def render(self) -> RenderableType:
        """The whole screen, no higher than the terminal."""
        width, height = errors.size
        with self._lock:
            head = [Text(line) for line in self._head(width)]
            running = [self._line(trial.row, trial) for trial in self._running.values()]
            ended = [self._line(row) for row in reversed(self._ended)]
        shown = [*running, *ended][: max(height - len(head) - 2, 1)]  # the table's own head, and the line of the cursor
        if not shown:
            return Group(*head)
        return Group(*head, trial_table(shown, width))

    def _head(self, width: int) -> list[str]:
        clock = f"{duration(time.monotonic() - self._started)} elapsed"
        lines = fit_parts([f"{self._sweep.name}: {self._stage}", *self._counts()], width)
        lines += fit_parts(self._bests(), width)
        return lines + fit_parts([clock, *self._notes], width)

    def _done_of(self) -> str:
        """How many trials of this stage are over, of how many."""
        over = sum(self._states[self._stage].values())
        total = self._totals[self._stage]
        return f"{over}/{total}" if total is not None else f"{over}"

    def _counts(self) -> list[str]:
        states, total = +self._states[self._stage], self._totals[self._stage]
        running = sum(trial.row.stage == self._stage for trial in self._running.values())
        parts = [f"{states['FINISHED']} of {total} done" if total is not None else f"{states['FINISHED']} done"]
        parts.append(f"{running} running")
        if total is not None:
            parts.append(f"{max(total - running - sum(states.values()), 0)} waiting")
        parts += [f"{states[state]} {state_word(state)}" for state in ("STOPPED", "FAILED", "KILLED") if states[state]]
        infeasible = states["INFEASIBLE"] + (self._refused if self._stage == "screen" else 0)
        return parts + ([f"{infeasible} infeasible"] if infeasible else [])

    def _bests(self) -> list[str]:
        """The best screening trial of each arm so far, by the first objective."""
        name = self._sweep.objective[0]
        words = {
            arm: f"{objective_text(name, row.value_of(name))} ({self._shape(row) or row.id})" for arm, row in self._best.items()
        }
        texts = [f"{arm} {text}" for arm, text in words.items()]
        return [f"best {NAMES[name]}: {texts[0]}", *texts[1:]] if texts else []

    def _shape(self, row: TrialRow) -> str:
        return shape_of(row.values, self._keys, seed=row.seed if row.stage == "confirm" else None)

    def _line(self, row: TrialRow, live: _Running | None = None) -> TrialLine:
        def value(name: str) -> float | None:
            return live.values.get(name, row.objectives.get(name)) if live else row.objectives.get(name)

        return TrialLine(
            id=row.id,
            shape=self._shape(row),
            state=row.state,
            params_m=row.quantities.get("params_m"),
            step=live.step if live else row.step,
            total_steps=row.total_steps,
            eval_loss=value("eval_loss"),
            knn_top1=value("knn_top1"),
            probe_top1=value("probe_top1"),
            images_per_s=value("images_per_s"),
        )

    def _line_text(self, line: TrialLine) -> str:
        """A trial's end in one line."""
        measured = [(name, getattr(line, name)) for name in ("eval_loss", "knn_top1", "probe_top1", "images_per_s")]
        numbers = [f"{NAMES[name]} {objective_text(name, value)}" for name, value in measured if value is not None]
        step = f"step {line.step}/{line.total_steps}" if line.total_steps else f"step {line.step}"
        return "  ".join(part for part in (line.id, line.shape, state_word(line.state), step, *numbers) if part)


def objective_text(name: str, value: float | None) -> str:
    """A value of an objective with its unit, as short as it can be."""
    measure = MEASURES[name]
    return measure.text(value) + (_UNITS.get(measure.unit, "") if value is not None else "")
