"""One sweep through Ray Tune, from the driver's side.

In: a SweepConfig. Out: a sweep folder with its trials and its end written down. Each stage is one Tune experiment in a thread;
the main thread owns the signals, the lease and the caller's callbacks. What a later session goes on from is the trials' own
folders and the study; Tune's state lives in a scratch folder that is gone at the end.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from crate_ray import storage
from crate_ray.config import ConfigError, ScaleConfig, SchedulerConfig, SweepConfig
from crate_ray.config.prices import find_price
from crate_ray.data import load_source
from crate_ray.launch.autoscaler import seat_coordinator
from crate_ray.launch.capacity import Capacity
from crate_ray.launch.cluster import (
    capacity,
    check_population_fits,
    check_trial_fits,
    connect,
    fit_problem,
    trial_room,
    worker_bytes,
)
from crate_ray.launch.placement import free_orphaned_groups
from crate_ray.launch.sweeps.budget import Budget
from crate_ray.launch.sweeps.experiment import SCRATCH, Experiment
from crate_ray.launch.sweeps.folder import STOP_FILE, locate_sweep, withdraw_sweep, write_sweep
from crate_ray.launch.sweeps.generations import runs_of
from crate_ray.launch.sweeps.roster import Roster
from crate_ray.launch.sweeps.rungs import Leg, legs_of
from crate_ray.launch.sweeps.schedulers import size_bounds
from crate_ray.launch.sweeps.searcher import PlannedSearch, Watcher
from crate_ray.launch.sweeps.trial_session import recorded_reports
from crate_ray.launch.train import EXIT_GRACE_S, POLL_S, StopSignals, failure_written
from crate_ray.launch.waiting import NodeWatch
from crate_ray.runs import (
    Lease,
    RunFolder,
    State,
    TrialRow,
    list_trials,
    read_status,
    read_sweep,
    write_status,
)
from crate_ray.runs.trials import objective_values
from crate_ray.space.arms import arm_config, arms, point_config
from crate_ray.space.check import check_sweep
from crate_ray.space.confirm import confirm_points
from crate_ray.space.costs import quantities
from crate_ray.space.listed import ListedPlanner
from crate_ray.space.plan import make_plan
from crate_ray.space.planner import Planner, make_planner
from crate_ray.space.point import Point
from crate_ray.training.prepare import absolute_paths

log = logging.getLogger(__name__)

ROOM_S = 5.0  # between two looks at what the cluster has, and at what trials may have left behind
_READERS = 16
# Tune's output, loggers, signal handler and own checkpoints are not wanted: folders and records are ours.
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_INIT": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",  # the searcher knows better; Tune's own limit is one
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class SweepEvents(Watcher, Protocol):
    """Who watches a sweep. Called from the main thread but for the two of a Watcher; each must return soon."""

    def known(self, rows: list[TrialRow], *, total: int | None, refused: int = 0) -> None:
        """What earlier sessions ended, how many trials the screening has, and how many points were refused."""
        ...

    def stage(self, name: str, total: int) -> None:
        """A stage begins."""
        ...

    def notes(self, *parts: str) -> None:
        """What is used of the budget, in a few words each."""
        ...


class Silent:
    """Nobody watches."""

    def known(self, rows: list[TrialRow], *, total: int | None, refused: int = 0) -> None:
        """See SweepEvents."""

    def stage(self, name: str, total: int) -> None:
        """See SweepEvents."""

    def notes(self, *parts: str) -> None:
        """See SweepEvents."""

    def trial_started(self, row: TrialRow, folder: RunFolder) -> None:
        """See SweepEvents."""

    def trial_ended(self, row: TrialRow) -> None:
        """See SweepEvents."""


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep stands after `run_sweep`; `signal` is the one that stopped it, `cut_short` the budget that did."""

    folder: RunFolder
    rows: list[TrialRow]
    state: State
    reason: str | None = None
    signal: int | None = None
    cut_short: str | None = None
    spent: dict[str, float] = field(default_factory=dict)
    was_finished: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state."""
        return dict(Counter(row.state for row in self.rows))


def run_sweep(
    sweep: SweepConfig,
    *,
    events: SweepEvents | None = None,
    on_start: Callable[[RunFolder], None] = lambda folder: None,
    on_poll: Callable[[], None] = lambda: None,
    on_stop: Callable[[int], None] = lambda number: None,
) -> SweepOutcome:
    """Runs a sweep to its end, or until SIGINT or SIGTERM; goes on with what is there.

    Args:
        sweep: As loaded.
        events: Who watches.
        on_start: Called once, when the folder is taken.
        on_poll: Called several times a second from the main thread; must return soon.
        on_stop: Called once with the signal, when a stop has been passed on.

    Raises:
        ConfigError: The sweep cannot start; nothing was written, or its status alone, with the reason.
        LeaseLostError: Another driver took the sweep over.
    """
    folder = locate_sweep(sweep)
    if _is_done(folder, sweep):
        rows = list_trials(folder.uri)
        return SweepOutcome(folder, rows, "FINISHED", spent=_spent_before(folder), was_finished=True)
    Lease.check_free(folder)
    num_samples = num_samples_of(sweep)
    check_sweep(sweep, num_samples)
    find_price(sweep.budget, sweep.resources_per_trial)  # refuses one that is not known before anything starts
    connect()
    have = sweep_capacity(sweep)
    check_trial_fits(sweep.resources_per_trial, have)
    if sweep.scheduler.type == "pbt":
        check_population_fits(sweep.scheduler.population * len(arms(sweep)), sweep.resources_per_trial, have)
    storage.check_writable(storage.join(folder.uri, ".."))
    if have.may_grow and sweep.resources_per_trial.num_workers > 1:
        seat_coordinator()
    with StopSignals() as signals:
        lease = Lease.take(folder)
        with failure_written(lease):
            uid = _begin(folder, sweep, on_start)
            run = _Run(sweep, folder, lease, signals, events or Silent(), on_poll, on_stop, num_samples, uid)
            outcome = run.run()
        lease.end(outcome.state, outcome.reason)
    on_poll()
    return outcome


def _begin(folder: RunFolder, sweep: SweepConfig, on_start: Callable[[RunFolder], None]) -> str:
    """Writes the sweep down and tells the caller; what the caller refuses leaves the sweep.yaml that was there, or none."""
    held = read_sweep(folder)
    uid = write_sweep(folder, sweep)
    try:
        on_start(folder)
    except ConfigError:
        withdraw_sweep(folder, held)
        raise
    return uid


def _is_done(folder: RunFolder, sweep: SweepConfig) -> bool:
    """Whether this very sweep, with this budget and confirmation, has come to its end."""
    status = read_status(folder)
    return status is not None and status.state == "FINISHED" and read_sweep(folder) == sweep


def num_samples_of(sweep: SweepConfig) -> int:
    """Images of the training data, which the arms of a sweep share."""
    first = next(iter(arms(sweep)))
    return int(load_source(absolute_paths(arm_config(sweep, first)).data.source).num_samples)


def sweep_capacity(sweep: SweepConfig) -> Capacity:
    """What the cluster has for a sweep, and may get."""
    return capacity(scale_of(sweep))


def scale_of(sweep: SweepConfig) -> ScaleConfig:
    """How the runs of a sweep wait for nodes, which its arms share."""
    return arm_config(sweep, next(iter(arms(sweep)))).scale


def _spent_before(folder: RunFolder) -> dict[str, float]:
    spent = folder.read_json("spent.json") or {}
    return {key: value for key, value in spent.items() if key != "schema_version"}


class _Run:
    """One session of a sweep."""

    def __init__(
        self,
        sweep: SweepConfig,
        folder: RunFolder,
        lease: Lease,
        signals: StopSignals,
        events: SweepEvents,
        on_poll: Callable[[], None],
        on_stop: Callable[[int], None],
        num_samples: int,
        uid: str,
    ) -> None:
        self.sweep, self.folder, self.lease, self.signals = sweep, folder, lease, signals
        self.events, self.on_poll, self.on_stop = events, on_poll, on_stop
        self.num_samples, self.uid = num_samples, uid
        resources = sweep.resources_per_trial
        price = find_price(sweep.budget, resources)
        self.budget = Budget(
            sweep.budget,
            resources,
            hour_price=price.usd_per_trial_hour(resources) if price else None,
            hours_before=_spent_before(folder).get("hours", 0.0),
        )
        self.grace_s = arm_config(sweep, next(iter(arms(sweep)))).checkpoint.stop_grace_s
        self.cut_short: str | None = None
        self.is_stopping = threading.Event()
        self.watch = NodeWatch(scale_of(sweep))
        self._room, self._looked_at = 1, 0.0
        self._room = self._find_room()

    def run(self) -> SweepOutcome:
        """Both stages."""
        rows = _forget_unplanned(self.folder, list_trials(self.folder.uri))
        self.budget.take_in(rows)
        _settle(self.folder, rows)
        self._clear()  # what a session that was killed has left
        with _tune_environment():
            reason = self._screen(rows)
            if reason is None and not self.is_stopping.is_set() and self.sweep.confirm is not None:
                reason = self._confirm()
        self._clear()
        rows = self._write_results()
        if not self.is_stopping.is_set():
            _settle(self.folder, rows)
        state, reason = self._end_state(rows, reason)
        return SweepOutcome(
            self.folder,
            rows,
            state,
            reason,
            signal=self.signals.received,
            cut_short=self.cut_short,
            spent=self.budget.spent(),
        )

    def _clear(self) -> None:
        for name in (SCRATCH, STOP_FILE):
            storage.delete(self.folder.path(name))

    def _end_state(self, rows: list[TrialRow], reason: str | None) -> tuple[State, str | None]:
        if self.is_stopping.is_set():
            return "KILLED", reason or f"{self.signals.name}; running trials wrote a checkpoint"
        if reason is not None:
            return "FAILED", reason
        ended = {row.arm for row in rows if row.state in ("FINISHED", "STOPPED")}
        missing = [name for name in arms(self.sweep) if name not in ended]
        if missing:
            return "FAILED", f"no trial of arm {', '.join(missing)} came to an end"
        failed = [row.id for row in rows if row.stage == "confirm" and row.state == "FAILED"]
        if failed:
            return "FAILED", f"confirming runs failed: {', '.join(failed)}; the same command starts them again"
        return "FINISHED", None

    def _screen(self, rows: list[TrialRow]) -> str | None:
        local = storage.local_path(self.folder.path("study.db")) if self.folder.is_local else None
        planner = make_planner(self.sweep, self.num_samples, study_path=None if local is None else str(local))
        over = [row for row in rows if row.is_over and row.stage == "screen"]
        planner.restore([(_point(row), None if row.state == "INFEASIBLE" else _values(row)) for row in over])
        self.events.known(over, total=planner.total, refused=sum(planner.refused.values()))
        return self._fit("screen", planner, over)

    def _confirm(self) -> str | None:
        try:
            points = confirm_points(self.sweep, self._write_results(), self.num_samples)
        except ConfigError as error:  # an arm of which no trial finished: the sweep has an end all the same, and a report
            return str(error)
        over = [row for row in list_trials(self.folder.uri) if row.is_over and row.stage == "confirm"]
        return self._fit("confirm", ListedPlanner(points), over)

    def _fit(self, stage: str, planner: Planner, over: Sequence[TrialRow]) -> str | None:
        """One Tune experiment; a reason when it did not come to its end."""
        self.events.stage(stage, planner.total or 0)
        roster = Roster(
            self.sweep,
            self.folder,
            num_samples=self.num_samples,
            parent_uid=self.uid,
            bounds=self._size_bounds(stage),
            worker_bytes=worker_bytes(self.sweep.resources_per_trial, sweep_capacity(self.sweep)),
        )
        search = PlannedSearch(
            planner,
            over=[row.id for row in over],
            roster=roster,
            budget=self.budget,
            room=lambda: self._room,
            is_stopping=self.is_stopping.is_set,
            watcher=self.events,
        )
        experiment = Experiment(self.sweep, self.folder, stage, search, grace_s=self.grace_s + EXIT_GRACE_S)
        if experiment.scheduler.learns_from_the_past:
            self._prime(experiment, roster, over)
        try:
            experiment.start()
            reason = self._follow(experiment)
        except BaseException:
            experiment.abort()
            raise
        search.abandon(self.signals.name if self.is_stopping.is_set() else "the sweep ended")
        self._free_groups()
        self.cut_short = self.cut_short or search.cut_short  # a screening cut short stays so
        self._write_results()
        return reason or search.failure

    def _prime(self, experiment: Experiment, roster: Roster, over: Sequence[TrialRow]) -> None:
        for row in over:
            self.lease.beat()  # folders are read one by one, which takes a while in a bucket
            try:
                planned = roster.plan(_point(row))
                legs = legs_of(planned.run, planned.folder, self.sweep.scheduler, num_samples=self.num_samples)
                reports = past_reports(row, legs, self.sweep.scheduler)
            except (ConfigError, OSError) as error:
                log.warning("trial %s of an earlier session is left out of the rungs: %s", row.id, error)
                continue
            experiment.scheduler.prime(row.id, planned.entry, reports)

    def _size_bounds(self, stage: str) -> list[float]:
        scheduler = self.sweep.scheduler
        if scheduler.bracket_by is None or stage == "confirm":
            return []
        planned = [point for points in make_plan(self.sweep, self.num_samples).points.values() for point in points]
        sizes = [quantities(point_config(self.sweep, point))["params_m"] for point in planned]
        return size_bounds(sizes, scheduler.num_brackets)

    def _follow(self, experiment: Experiment) -> str | None:
        """Waits for the experiment, passing a stop on."""
        deadline: float | None = None
        while experiment.is_running():
            experiment.wait(POLL_S)
            self.lease.beat()
            self._look_around()
            self.on_poll()
            given_up = self.watch.look()
            if given_up is not None and deadline is None and self.signals.received is None:
                experiment.abort()
                return given_up
            if self.signals.received is not None and deadline is None:
                self.is_stopping.set()
                self._write_stop_file()
                deadline = time.monotonic() + self.grace_s + 2 * EXIT_GRACE_S
                self.on_stop(self.signals.received)
            if deadline is not None and time.monotonic() > deadline:
                experiment.abort()
                return f"{self.signals.name}; trials without a checkpoint in time go on from the one before"
        return experiment.end()

    def _write_stop_file(self) -> None:
        try:
            self.folder.write_json(STOP_FILE, {"signal": self.signals.name})
        except OSError as error:  # then trials stop at their next report, or go on from their last checkpoint
            log.warning("%s was not written: %s", STOP_FILE, error)

    def _look_around(self) -> None:
        """Now and then: what the cluster has, what the sweep has used, and what trials have left behind."""
        if time.monotonic() - self._looked_at < ROOM_S:
            return
        self._looked_at = time.monotonic()
        self._room = self._find_room()
        self._free_groups()
        spent = self.budget.spent()
        try:
            self.folder.write_json("spent.json", spent)
        except OSError as error:  # a store that refuses for a moment must not end a sweep; the next look writes it again
            log.warning("what the sweep has used was not written: %s", error)
        self.events.notes(*_notes(self.sweep, spent))

    def _find_room(self) -> int:
        resources, have = self.sweep.resources_per_trial, sweep_capacity(self.sweep)
        room = trial_room(resources, have)
        if room == 0 < self._room:
            log.warning("no trial can start, the sweep waits for nodes: %s", fit_problem(resources, have))
        elif room > 0 == self._room:
            log.warning("there is room for %d trials again", room)
        most = self.sweep.max_concurrent
        return (most or room) if have.is_open else min(room, most or room)

    def _free_groups(self) -> None:
        if self.sweep.resources_per_trial.num_workers > 1:
            free_orphaned_groups()

    def _write_results(self) -> list[TrialRow]:
        rows = list_trials(self.folder.uri)
        spent = self.budget.spent()
        counts = Counter(row.state for row in rows)
        self.folder.write_json("spent.json", spent)
        self.folder.write_json(
            "results.json", {"rows": [row.as_dict() for row in rows], "spent": spent, "counts": dict(counts)}
        )
        return rows


def _forget_unplanned(folder: RunFolder, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Drops what stands for points that made no trial, see `Roster.unplanned`: they are asked again, and may make one now."""
    kept = []
    for row in rows:
        trial = RunFolder(folder.path("trials", row.id))
        if row.state == "FAILED" and row.total_steps is None and not trial.exists():
            storage.delete(trial.uri)
        else:
            kept.append(row)
    return kept


def _settle(folder: RunFolder, rows: Sequence[TrialRow]) -> None:
    """Ends the status of runs whose process died before it could: of trials that are over, or failed for this session."""
    ended = [row for row in rows if row.is_over or row.state == "FAILED"]
    with ThreadPoolExecutor(_READERS) as pool:
        runs_by_row = pool.map(runs_of, (RunFolder(folder.path("trials", row.id)) for row in ended))
        for row, run in ((row, run) for row, runs in zip(ended, runs_by_row, strict=True) for run in runs):
            status = read_status(run)
            if status is not None and status.state == "RUNNING":
                has_failed = row.state == "FAILED" and row.reason is not None
                reason = row.reason if has_failed else "its trial is over; its process died before it wrote a checkpoint"
                write_status(
                    run,
                    replace(status, state="FAILED" if has_failed else "KILLED", ended=status.heartbeat, reason=reason),
                )


def _notes(sweep: SweepConfig, spent: dict[str, float]) -> list[str]:
    limits = sweep.budget
    return [
        f"{spent.get(name, 0.0):.3g} of {limit:g} {name.replace('_', ' ')}"
        for name in ("gpu_hours", "hours", "usd")
        if (limit := getattr(limits, name)) is not None
    ]


def _point(row: TrialRow) -> Point:
    return Point(row.arm, row.values, row.seed, row.stage)


def _values(row: TrialRow) -> dict[str, float]:
    return {**row.quantities, **row.objectives}


def past_reports(row: TrialRow, legs: Sequence[Leg], scheduler: SchedulerConfig) -> list[dict[str, float]]:
    """What a trial that is over has reported, from its folders, and its end.

    Args:
        row: The trial.
        legs: Its runs.
        scheduler: Of its sweep.
    """
    reports = [{"step": report.step, **objective_values(report.values)} for report in recorded_reports(legs, scheduler)]
    return [*reports, {"step": row.step, **row.objectives}] if row.state == "FINISHED" else reports


@contextmanager
def _tune_environment() -> Iterator[None]:
    """Tune reads its settings from the environment, and logs what rows and screens say better."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    added = [key for key in _ENVIRONMENT if key not in os.environ]
    os.environ.update({key: _ENVIRONMENT[key] for key in added})
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for key in added:
            os.environ.pop(key, None)
