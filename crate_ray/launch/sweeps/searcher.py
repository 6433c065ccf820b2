"""Where Tune's next trial comes from, and where its end goes.

In: the planner of a stage, a budget, the room in the cluster. Out: a Tune Searcher, and events for whoever watches. It proposes
a trial only when there is room for it, because Tune does not see what the workers of a nested trainer hold. Tune's own state
is no truth here: that is the trials' folders and the study, both written before Tune hears of anything.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from ray.tune.search import Searcher

from crate_ray.launch.sweeps.budget import Budget
from crate_ray.launch.sweeps.roster import Planned, Roster
from crate_ray.launch.sweeps.schedulers import Entry
from crate_ray.launch.sweeps.trial import mark_stopped
from crate_ray.runs import RunFolder, TrialRow, read_trial, write_trial
from crate_ray.space.planner import Planner

log = logging.getLogger(__name__)


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
        self.is_closed = False
        self.cut_short: str | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """See Searcher."""
        if self.is_stopping():
            return self._close()
        if len(self._running) - self.num_paused() >= self.room():
            return None
        self.cut_short = self._budget.refusal()
        if self.cut_short is not None:
            return self._close()
        planned = self._next()
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

    def _next(self) -> Planned | None:
        while True:
            point = self._planner.ask()
            if point is None:
                return None
            planned = self._roster.plan(point)
            if planned.row.id in self._known:
                continue
            self._known.add(planned.row.id)
            if planned.refusal is None:
                return planned
            self._refuse(planned, planned.refusal)

    def _refuse(self, planned: Planned, reason: str) -> None:
        """Writes down a trial that needs more memory than there is, before it costs anything."""
        row = replace(planned.row, state="INFEASIBLE", reason=reason)
        write_trial(planned.folder, row)
        self._planner.tell_infeasible(planned.point, reason)
        self._tell(self._watcher.trial_ended, row)

    def entry_of(self, config: Mapping[str, Any]) -> Entry:
        """What the scheduler must know of a trial that this searcher has proposed."""
        return next(planned.entry for planned in self._running.values() if planned.config["folder"] == config["folder"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """See Searcher: the planner and the watcher hear how it ended, and trial.json what only the driver knows."""
        planned = self._running[trial_id]
        row = _ended_row(planned, result, error=error)
        with self._lock:
            del self._running[trial_id]
            self._budget.ended(row)
        if row.state in ("FINISHED", "STOPPED") and all(math.isfinite(value) for value in row.objectives.values()):
            self._planner.tell(planned.point, {**row.quantities, **row.objectives})
        else:
            self._planner.tell_infeasible(planned.point, row.reason or row.state.lower())
        self._tell(self._watcher.trial_ended, row)

    def abandon(self, reason: str) -> None:
        """Writes down what the trials that were running when the sweep was stopped have become.

        Args:
            reason: Why they did not end by themselves.
        """
        with self._lock:
            left, self._running = list(self._running.values()), {}
        for planned in left:
            row = read_trial(planned.folder)
            if row is None:
                continue  # it never got its resources
            if row.state == "RUNNING":
                row = replace(row, state="KILLED", reason=reason)
                write_trial(planned.folder, row)
            with self._lock:
                self._budget.ended(row)
            self._tell(self._watcher.trial_ended, row)

    def save(self, checkpoint_path: str) -> None:
        """See Searcher: nothing that the folders do not hold."""

    def restore(self, checkpoint_path: str) -> None:
        """See Searcher."""


def _ended_row(planned: Planned, result: Mapping[str, Any] | None, *, error: bool) -> TrialRow:
    """How a trial ended: as it wrote itself, but for the two ends that it cannot know of."""
    row = read_trial(planned.folder) or planned.row
    if error:
        if row.state != "FAILED":
            row = replace(row, state="FAILED", reason="its process died again and again")
            write_trial(planned.folder, row)
        return row
    if result is not None and result.get("state", "RUNNING") != "RUNNING":
        return row
    mark_stopped(planned.folder.uri)
    return replace(row, state="STOPPED", reason=None)
