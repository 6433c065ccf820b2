"""Where Tune's next trial comes from, and where its end goes.

In: the planner of a stage, a budget, the room in the cluster. Out: a Tune Searcher, and events for whoever watches. It proposes
a trial only when there is room for it, because Tune does not see what the workers of a nested trainer hold. Tune's own state
is no truth here: that is the trials' folders and the study, both written before Tune hears of anything.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from ray.tune.search import Searcher

from crate_ray.config import ConfigError
from crate_ray.launch.sweeps.budget import Budget
from crate_ray.launch.sweeps.roster import Planned, Roster
from crate_ray.launch.sweeps.schedulers import Entry
from crate_ray.runs import RunFolder, TrialRow, read_trial, write_trial
from crate_ray.space.planner import Planner
from crate_ray.space.point import Point

log = logging.getLogger(__name__)

SILENCE_S = 60.0
"""So long a study may raise instead of giving a point."""


class Watcher(Protocol):
    """Who is told what happens; called from Tune's thread, must return at once."""

    def trial_started(self, row: TrialRow, folder: RunFolder) -> None:
        """A trial got its resources, or waits for the cluster to give them."""
        ...

    def trial_ended(self, row: TrialRow) -> None:
        """A trial is over."""
        ...


class PlannedSearch(Searcher):
    """The Searcher of one stage.

    Args:
        planner: Of the points of the stage.
        over: Ids of trials that have ended: a point that leads to one of them is passed over.
        roster: Makes trials of points.
        budget: The account of the sweep.
        room: How many trials may hold resources now.
        is_stopping: Whether the sweep is to end.
        watcher: Who is told.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        over: Iterable[str],
        roster: Roster,
        budget: Budget,
        room: Callable[[], int],
        is_stopping: Callable[[], bool],
        watcher: Watcher,
    ) -> None:
        super().__init__()
        self._planner, self._known = planner, set(over)
        self._roster, self._budget, self.room = roster, budget, room
        self.is_stopping, self._watcher = is_stopping, watcher
        self._lock = threading.Lock()
        self._running: dict[str, Planned] = {}
        self.num_paused: Callable[[], int] = lambda: 0
        self._silent_since: float | None = None
        self.is_closed = False
        self.cut_short: str | None = None
        self.failure: str | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """See Searcher."""
        if self.is_stopping():
            return self._close()
        if len(self._running) - self.num_paused() >= self.room():
            return None
        self.cut_short = self._budget.refusal()
        if self.cut_short is not None:
            return self._close()
        try:
            planned = self._next()
        except Exception as error:  # noqa: BLE001  said, and the reason of the sweep's end where it lasts
            return self._not_answered(error)
        self._silent_since = None
        if planned is None:
            return self._close() if self._planner.is_exhausted else None
        with self._lock:
            self._running[trial_id] = planned
            self._budget.started(planned.row)
        self._tell(self._watcher.trial_started, planned.row, planned.folder)
        return planned.config

    @staticmethod
    def _tell(event: Callable[..., None], *what: Any) -> None:
        """Whoever watches never ends a sweep: an error in Tune's thread would."""
        try:
            event(*what)
        except Exception:
            log.exception("a trial was not shown")

    def _close(self) -> str:
        self.is_closed = True
        return str(Searcher.FINISHED)

    def _not_answered(self, error: Exception) -> str | None:
        """A database that is locked for a moment is asked again; after SILENCE_S no more trials start, and the others end."""
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
            log.warning("the search gave no point, and is asked again: %s: %s", type(error).__name__, error)
        if now - self._silent_since < SILENCE_S:
            return None
        self.failure = f"the search gave no point for {SILENCE_S:.0f} s: {type(error).__name__}: {error}"
        return self._close()

    def _next(self) -> Planned | None:
        while (point := self._planner.ask()) is not None:
            try:
                planned = self._roster.plan(point)
            except (ConfigError, OSError) as error:  # its data or first weights are not there; a later session tries again
                self._refuse(point, self._roster.unplanned(point, str(error)))
                continue
            if planned.row.id in self._known:
                continue
            self._known.add(planned.row.id)
            if planned.refusal is None:
                return planned
            self._refuse(point, replace(planned.row, state="INFEASIBLE", reason=planned.refusal))
        return None

    def _refuse(self, point: Point, row: TrialRow) -> None:
        """Writes down a trial that is over before it costs anything."""
        self._write(row)
        self._teach(point, row)
        self._tell(self._watcher.trial_ended, row)

    def _write(self, row: TrialRow) -> None:
        """A store that refuses costs the word of one trial, not the sweep: what the trial wrote itself is there."""
        try:
            write_trial(self._roster.folder_of(row.id), row)
        except OSError as error:
            log.warning("the end of trial %s (%s) was not written: %s", row.id, row.state, error)

    def _teach(self, point: Point, row: TrialRow) -> None:
        """Tells the planner of an end; where it cannot take it, a later session tells it again from the trial's folder."""
        measured = row.state in ("FINISHED", "STOPPED") and all(math.isfinite(value) for value in row.objectives.values())
        try:
            if measured:
                self._planner.tell(point, {**row.quantities, **row.objectives})
            else:
                self._planner.tell_infeasible(point, row.reason or row.state.lower())
        except Exception:
            log.exception("the search did not take the end of trial %s", row.id)

    def entry_of(self, config: Mapping[str, Any]) -> Entry:
        """What the scheduler must know of a trial that this searcher has proposed."""
        return next(planned.entry for planned in self._running.values() if planned.config["folder"] == config["folder"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See Searcher: the planner and the watcher hear how it ended, and trial.json what only the driver knows."""
        with self._lock:
            planned = self._running.pop(trial_id, None)
        if planned is None:
            return  # Tune says it twice of a trial that it could not stop
        written = _read(planned)
        row = _ended_row(written, planned.row, result, error=error)
        if row != written:
            self._write(row)
        with self._lock:
            self._budget.ended(row)
        self._teach(planned.point, row)
        self._tell(self._watcher.trial_ended, row)

    def abandon(self, reason: str) -> None:
        """Writes down what the trials that were running when the sweep was stopped have become.

        Args:
            reason: Why they did not end by themselves.
        """
        with self._lock:
            left, self._running = list(self._running.values()), {}
        for planned in left:
            row = _read(planned)
            if row is None:
                continue  # it never got its resources
            if row.state == "RUNNING":
                row = replace(row, state="KILLED", reason=reason)
                self._write(row)
            with self._lock:
                self._budget.ended(row)
            self._tell(self._watcher.trial_ended, row)

    def save(self, checkpoint_path: str) -> None:
        """See Searcher: nothing that the folders do not hold."""

    def restore(self, checkpoint_path: str) -> None:
        """See Searcher."""


def _read(planned: Planned) -> TrialRow | None:
    """What a trial wrote of itself; None where it did not, or nobody can read it."""
    try:
        return read_trial(planned.folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("trial.json of %s cannot be read: %s", planned.row.id, error)
        return None


def _ended_row(written: TrialRow | None, planned: TrialRow, result: Mapping[str, Any] | None, *, error: bool) -> TrialRow:
    """How a trial ended: as it wrote itself, but for the ends that it cannot know of."""
    row = written or planned
    if error:
        known = row.is_over or row.state == "FAILED"
        return row if known else replace(row, state="FAILED", reason="its process died again and again")
    if result is None or result.get("state", "RUNNING") == "RUNNING":
        return replace(row, state="STOPPED", reason=None)
    return written or replace(row, state="FAILED", reason="its trial.json cannot be read")
