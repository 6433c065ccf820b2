"""One sweep as a command sees it: the screen, the mirror, and what the driver tells both.

In: a SweepConfig. Out: the outcome of `run_sweep`, shown while it runs and mirrored to MLflow: the sweep as a parent run, each
trial below it from its start. A trial that ended is released, so that the mirror of a long sweep holds the running ones alone.
"""

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from crate_ray.cli.output import errors
from crate_ray.cli.study import Tracking, say_stopping
from crate_ray.cli.sweep_forecast import LiveForecast, live_forecast
from crate_ray.cli.sweep_screen import SweepScreen
from crate_ray.config import SweepConfig
from crate_ray.runs import RunFolder, TrialRow, list_trials
from crate_ray.space import arm_config, arms, make_plan
from crate_ray.space.planned import PlannedSweep, planned_sweep

if TYPE_CHECKING:
    from crate_ray.launch.sweeps.driver import SweepOutcome


class SweepStudy:
    """A sweep and who watches it; a context manager. Its methods for events are those of `SweepEvents`.

    Args:
        sweep: As loaded.
    """

    def __init__(self, sweep: SweepConfig) -> None:
        self._sweep = sweep
        self._tracking = Tracking(arm_config(sweep, next(iter(arms(sweep)))))
        self._screen = SweepScreen(sweep)
        self._uid: str | None = None
        self._folder: RunFolder | None = None
        self._refused: dict[str, int] = {}
        self._forecast: LiveForecast | None = None
        self._planned: PlannedSweep | None = None
        self._num_samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._tracking.__exit__(kind, error, trace)

    def run(self) -> "SweepOutcome":
        """Runs the sweep to its end or to a stop."""
        from crate_ray.launch.sweeps.driver import run_sweep

        with self._screen:
            outcome = run_sweep(self._sweep, events=self, on_start=self._started, on_stop=say_stopping)
        if outcome.was_finished:
            self._follow(outcome.folder, outcome.rows)
        return outcome

    def report(self, folder: RunFolder) -> str:
        """Writes the report into the sweep's folder, and lets the mirror take it and forget the sweep.

        Returns:
            URI of report.md.
        """
        from crate_ray.analysis.sweep_report import write_report

        if self._planned is not None:
            self._look_for_forecast()
            found: dict[str, Any] = {"planned": len(self._planned.screen), "refused": self._refused}
            found |= {"forecast": self._forecast.as_dict()} if self._forecast is not None else {}
            folder.write_json("results.json", {**(folder.read_json("results.json") or {}), **found})
        written = write_report(folder.uri)
        self._tracking.release(folder)
        return written

    def links(self) -> dict[str, Any]:
        """Addresses in the tracking UI, and the command that serves it."""
        found = self._tracking.links()
        assert self._folder is not None
        return {
            "experiment": found["experiment"],
            "views": found["views"],
            "sweep": found["runs"].get(self._folder.name),
            "serve": f"crate-ray tracking ui {self._folder.uri.removesuffix('/' + self._folder.name)}",
        }

    def known(self, rows: list[TrialRow], *, total: int | None, refused: int = 0) -> None:
        """See SweepEvents."""
        self._screen.known(rows, total=total, refused=refused)

    def stage(self, name: str, total: int) -> None:
        """See SweepEvents."""
        self._screen.stage(name, total)

    def notes(self, *parts: str) -> None:
        """See SweepEvents."""
        self._look_for_forecast()
        used = [f"used {part}" for part in parts]
        self._screen.notes(*([self._forecast.text()] if self._forecast is not None else []), *used)

    def trial_started(self, row: TrialRow, folder: RunFolder) -> None:
        """See SweepEvents."""
        self._tracking.follow(folder, parent_uid=self._uid)
        if self._forecast is not None:
            self._forecast.started(row)
        self._screen.trial_started(row, folder)

    def trial_ended(self, row: TrialRow) -> None:
        """See SweepEvents."""
        assert self._folder is not None
        self._mirror_end(self._trial(self._folder, row))
        if self._forecast is not None:
            self._forecast.ended(row)
        self._screen.trial_ended(row)

    def _started(self, folder: RunFolder) -> None:
        """The folder is taken and the cluster is there: says what is done already, opens the mirror, forecasts the rest."""
        from crate_ray.launch.sweeps.driver import num_samples_of

        samples = self._num_samples = num_samples_of(self._sweep)
        plan = make_plan(self._sweep, samples)
        planned = self._planned = planned_sweep(self._sweep, plan, samples)
        self._refused = dict(plan.refused)
        rows = [row for row in list_trials(folder.uri) if row.is_over]
        if rows:
            screened = sum(row.stage == "screen" for row in rows)
            confirmed = f", and {len(rows) - screened} of {planned.num_confirm} to confirm" if len(rows) > screened else ""
            errors.print(f"resuming: {screened} of {len(planned.screen)} trials are done{confirmed}", soft_wrap=True)
        self._follow(folder, rows)
        self._screen.known(rows, total=len(planned.screen), refused=plan.refused.total())
        self._forecast = live_forecast(self._sweep, folder, planned, samples)
        self._take_in(rows)

    def _look_for_forecast(self) -> None:
        """Timing that took longer than the sweep waited for it may be done by now."""
        if self._forecast is None and self._planned is not None and self._folder is not None:
            self._forecast = live_forecast(self._sweep, self._folder, self._planned, self._num_samples, wait=False)
            if self._forecast is not None:
                self._take_in([row for row in list_trials(self._folder.uri) if row.is_over])

    def _take_in(self, rows: list[TrialRow]) -> None:
        """Trials that ended before there was a forecast."""
        if self._forecast is not None:
            for row in rows:
                self._forecast.ended(row)

    def _follow(self, folder: RunFolder, rows: list[TrialRow]) -> None:
        """Mirrors the sweep, then what is over of it: MLflow may have missed that."""
        self._folder, meta = folder, folder.read_json("run_meta.json")
        self._uid = str(meta["run_uid"]) if meta else None
        self._tracking.follow(folder)
        for row in rows:
            trial = self._trial(folder, row)
            self._tracking.follow(trial, parent_uid=self._uid)
            self._mirror_end(trial)

    def _mirror_end(self, trial: RunFolder) -> None:
        """Lets the mirror forget a trial; one of a population may have ended in a copy of another trial, a run of its own."""
        from crate_ray.launch.sweeps.generations import newest_generation

        self._tracking.release(trial)
        if self._sweep.scheduler.type == "pbt" and (newest := newest_generation(trial).folder).uri != trial.uri:
            self._tracking.follow(newest, parent_uid=self._uid)
            self._tracking.release(newest)

    def _trial(self, folder: RunFolder, row: TrialRow) -> RunFolder:
        return RunFolder(folder.path("trials", row.id))
