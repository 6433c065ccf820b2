"""One stay of a trial in an actor: what its folder holds is reported again, then the training goes on and reports the rest.

In: what is to be trained and where. Out: one flat result a call, as Tune wants them, and trial.json, written at every report.
A trial looks into its folder first, so nothing that was measured is measured again: a trial that is over only repeats its
reports. Errors that another attempt would repeat are results too; only those that one might not repeat are raised.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from json import dumps, loads
from typing import Any

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig, SchedulerConfig, SweepConfig, apply_override
from crate_ray.data import load_source
from crate_ray.launch.sweeps.generations import Generation, Pointer, clone, newest_generation, point_to
from crate_ray.launch.sweeps.rungs import Leg, branch_off, is_cooled, legs_of
from crate_ray.launch.sweeps.trial_attempt import IDLE_S, Attempt, Ended, Placed, Report
from crate_ray.runs import LEASE_SECONDS, Lease, LeaseLostError, RunFolder, is_finished, read_records
from crate_ray.runs.trials import TrialRow, TrialState, loss_target, objective_values, read_trial, write_trial
from crate_ray.training.prepare import prepare_run
from crate_ray.training.probes import probe_run

_WAIT_S = LEASE_SECONDS + 2 * IDLE_S
_POLL_S = 0.2
_CLONING = ("pbt", "hyperband")  # Tune passes their trials on by checkpoint, at any report


@dataclass(frozen=True)
class TrialSpec:
    """What Tune's configuration says of a trial.

    Attributes:
        run: The resolved configuration of the point, with absolute paths.
        sweep: The sweep that it belongs to.
        point: Arm, values, seed and stage, as in `TrialRow`.
        folder: URI of the trial.
        study: See `runs.open_run`.
        parent_uid: See `runs.open_run`.
        quantities: What is known of the point beforehand.
        set: Keys over those of `run`, which a scheduler has changed.
        stop_file: URI that exists once the sweep is stopping: Tune cannot interrupt a trial between two reports.
    """

    run: RunConfig
    sweep: SweepConfig
    point: Mapping[str, Any]
    folder: str
    study: str = ""
    parent_uid: str | None = None
    quantities: Mapping[str, float] = field(default_factory=dict)
    set: Mapping[str, Any] = field(default_factory=dict)
    stop_file: str | None = None

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> "TrialSpec":
        """From Tune's configuration, with run and sweep as JSON, which may hold more; ConfigError where it is not valid."""
        known = {item.name: config[item.name] for item in fields(cls) if item.name in config}
        run, sweep = RunConfig.parse(loads(config["run"])), SweepConfig.parse(loads(config["sweep"]))
        return cls(**known | {"run": run, "sweep": sweep})

    def is_stopping(self) -> bool:
        """Whether the sweep is."""
        return self.stop_file is not None and storage.exists(self.stop_file)

    @property
    def scheduler(self) -> SchedulerConfig:
        """Who judges the trial: nobody where it confirms, so such a run is one leg to its end."""
        return self.sweep.scheduler if self.point["stage"] == "screen" else SchedulerConfig()

    def config(self, changes: Mapping[str, Any]) -> RunConfig:
        """The run of a generation, with the checkpoints that its scheduler needs; one that diverges is not helped up."""
        values = self.run.model_dump(mode="json")
        for key, value in changes.items():
            apply_override(values, f"{key}={dumps(value)}")
        every = self.sweep.report_every_steps
        if self.scheduler.type in _CLONING:
            values["checkpoint"] |= {"every_steps": every, "wait": True}
        if values["health"]["max_rollbacks"] is None:
            values["health"]["max_rollbacks"] = 0  # it would spend its budget on rollbacks, and no longer be the point it is
        return RunConfig.parse(values)


class TrialSession:
    """A trial from the moment it gets its resources until it gives them back.

    Args:
        spec: The trial.
        pointer: What Tune restores it from: its own state, of which Tune has seen the reports, or another trial's.
    """

    def __init__(self, spec: TrialSpec, pointer: Pointer | None = None) -> None:
        self._spec, self._trial = spec, RunFolder(spec.folder)
        self._began = time.monotonic()
        self._after_step = pointer.step if pointer else -1
        self._attempt: Attempt | None = None
        self._is_open = False
        self._before: Leg | None = None
        earlier = read_trial(self._trial)
        self._seconds_before = earlier.seconds if earlier else 0.0
        self._row = earlier or self._new_row()
        self._failure: str | None = None
        try:
            self._legs = self._find_legs(pointer)
        except ConfigError as error:
            self._failure = str(error)
            return
        self._replays = deque(self._recorded_reports())

    def _find_legs(self, pointer: Pointer | None) -> deque[Leg]:
        spec = self._spec
        generation = self._find_generation(pointer)
        config = spec.config(generation.set)
        num_samples = load_source(config.data.source).num_samples
        legs = legs_of(config, generation.folder, spec.scheduler, num_samples=num_samples)
        self._row = replace(
            self._row,
            values={**self._row.values, **generation.set},
            loss_target=loss_target(config),
            total_steps=legs[-1].total_steps,
        )
        return deque(legs)

    def _new_row(self) -> TrialRow:
        point = {key: self._spec.point[key] for key in ("arm", "values", "seed", "stage")}
        return TrialRow(id=self._trial.name, state="RUNNING", quantities=self._spec.quantities, **point)

    def _find_generation(self, pointer: Pointer | None) -> Generation:
        if pointer is not None and pointer.trial != self._trial.uri:
            return clone(self._trial, pointer, self._spec.set)
        return newest_generation(self._trial)

    def _recorded_reports(self) -> list[Report]:
        """The reports in the folder that Tune has not seen; of a population only the last, for it is judged as it goes."""
        scheduler = self._spec.scheduler
        reports = recorded_reports(list(self._legs), scheduler)
        while len(self._legs) > 1 and is_finished(self._legs[0].folder):
            self._end_of_leg()
        unseen = [report for report in reports if report.step > self._after_step]
        return unseen[-1:] if scheduler.type == "pbt" else unseen

    def _end_of_leg(self) -> Report:
        """What a finished branch measured at its end; the next one is on."""
        leg = self._before = self._legs.popleft()
        self._attempt = None
        return Report(leg.total_steps, _last_values(leg.folder))

    @property
    def pointer(self) -> Pointer:
        """The state that another trial, or this one later, can go on from."""
        return point_to(self._trial, self._legs[0].folder, step=self._row.step)

    def next_result(self) -> dict[str, Any]:
        """The next report, or the end, as a flat mapping.

        Raises:
            Exception: What ended the attempt, where another one may end better.
        """
        if self._failure is not None:
            return self._end("FAILED", self._failure)
        if self._replays:
            return self._report(self._replays.popleft())
        if self._row.state in ("STOPPED", "INFEASIBLE"):
            return self._end(self._row.state, self._row.reason)
        if is_finished(self._legs[0].folder):
            return self._finish()
        return self._train_on()

    def _train_on(self) -> dict[str, Any]:
        while True:
            event = self._next_event()
            if isinstance(event, Report):
                return self._report(event)
            if isinstance(event, Placed):
                self._write(placement_group=event.group)
            elif event.state == "KILLED" and self._spec.is_stopping():
                self._attempt = None
                return self._result(self._row.step, {}, state="KILLED", done=False)
            elif event.state == "KILLED":  # it was idle for too long, and goes on from where its folder stands by now
                self._attempt, self._replays = None, deque(self._recorded_reports())
                return self.next_result()
            elif event.state == "FINISHED":
                return self._report(self._end_of_leg()) if len(self._legs) > 1 else self._finish()
            else:
                return self._end(event.state, event.reason, event.error)

    def _next_event(self) -> Report | Placed | Ended:
        if self._attempt is None:
            if self._spec.is_stopping():
                time.sleep(_POLL_S)  # until Tune has heard of it too
                return Ended("KILLED")
            try:
                self._attempt = self._start()
            except ConfigError as error:
                return Ended("FAILED", str(error))
        return self._attempt.next_event()

    def _start(self) -> Attempt:
        spec, leg = self._spec, self._legs[0]
        device_type = "cuda" if leg.config.scale.use_gpu else "cpu"
        config, folder = prepare_run(
            leg.config,
            device_type=device_type,
            kind="trial",
            study=spec.study,
            parent_uid=spec.parent_uid,
            stage=spec.point["stage"],
            uri=leg.folder.uri,
        )
        lease = _wait_for_lease(folder)
        if self._before is not None:
            branch_off(self._before, leg)
        self._is_open = True
        self._write(state="RUNNING", reason=None)
        reports_from = leg.total_steps if is_cooled(leg.config, spec.scheduler) else self._after_step
        steps = {"after_step": reports_from, "total_steps": leg.total_steps}
        return Attempt(config, folder, lease, is_stopping=spec.is_stopping, **steps)

    def _report(self, report: Report) -> dict[str, Any]:
        measured = objective_values(report.values)
        self._after_step = report.step
        if self._is_open:
            self._write(step=report.step, objectives={**self._row.objectives, **measured})
        return self._result(report.step, measured, state="RUNNING", done=False)

    def _finish(self) -> dict[str, Any]:
        """The final numbers, with the probe where the sweep is judged by it."""
        leg = self._legs[0]
        if "probe_top1" in self._spec.sweep.objective:
            try:
                probe_run(leg.folder)
            except ConfigError as error:
                return self._end("FAILED", str(error))
        final = (leg.folder.read_json("final.json") or {"values": {}})["values"]
        objectives = {**objective_values(final), **objective_values(_last_values(leg.folder))}
        self._is_open = False
        self._write(state="FINISHED", reason=None, step=leg.total_steps, objectives=objectives)
        return self._result(leg.total_steps, objectives, state="FINISHED", done=True)

    def _end(self, state: TrialState, reason: str | None, error: BaseException | None = None) -> dict[str, Any]:
        self._is_open = False
        if not isinstance(error, LeaseLostError):  # then it is another's trial by now
            self._write(state=state, reason=reason)
        if error is not None:
            raise error
        end = {"reason": reason or ""} | ({"infeasible": reason} if state == "INFEASIBLE" else {})
        return self._result(self._row.step, {}, state=state, done=True) | end

    def _result(self, step: int, measured: Mapping[str, float], *, state: TrialState, done: bool) -> dict[str, Any]:
        return {"step": step, **self._row.quantities, **measured, "state": state, "done": done}

    def _write(self, **changes: Any) -> None:
        seconds = self._seconds_before + time.monotonic() - self._began
        self._row = replace(self._row, seconds=seconds, **changes)
        write_trial(self._trial, self._row)

    def close(self, *, reason: str | None) -> bool:
        """Gives the folder back; what was going on can go on from a checkpoint.

        Args:
            reason: Why it is no longer running, where it was and its end is not known.

        Returns:
            Whether the training has ended; a thread that hangs cannot be ended.
        """
        ended = self._attempt is None or self._attempt.stop()
        if self._is_open:
            written = read_trial(self._trial)
            state: TrialState = "KILLED"
            if written is not None and written.state == "STOPPED":  # by the driver, which alone knows it
                state, reason = "STOPPED", written.reason
            self._write(state=state, reason=reason)
        return ended


def recorded_reports(legs: Sequence[Leg], scheduler: SchedulerConfig) -> list[Report]:
    """What the folders of a trial hold of its reports before its end: the ends of its rungs, or each evaluation on the way."""
    rungs = [Report(leg.total_steps, _last_values(leg.folder)) for leg in legs[:-1] if is_finished(leg.folder)]
    if is_cooled(legs[-1].config, scheduler):
        return rungs
    evaluated = [r for r in read_records(legs[-1].folder) if any(key.startswith("eval/") for key in r.values)]
    return [Report(r.step, r.values) for r in evaluated if r.step < legs[-1].total_steps]


def _last_values(folder: RunFolder) -> Mapping[str, float]:
    """What a finished run measured at its last evaluation."""
    evaluated = (record.values for record in reversed(read_records(folder)) if "eval/loss" in record.values)
    return {key: value for key, value in next(evaluated, {}).items() if not key.startswith("final/")}  # those are rounded


def _wait_for_lease(folder: RunFolder) -> Lease:
    """Takes a run whose last holder may have died, or may be ending, in another actor of the same sweep.

    Raises:
        ConfigError: Somebody holds it for longer than a dead one could.
    """
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            return Lease.take(folder)
        except ConfigError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)
