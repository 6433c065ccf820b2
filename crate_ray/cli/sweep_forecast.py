"""The forecast of a sweep while it runs: how long it still takes, and how far the forecast was from what trials took.

In: a sweep that is about to start, then the trials that end. Out: words for the screen, JSON for the folder. The times that
were taken are kept in forecast.json, so that a sweep that is resumed is held to those of its start.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape

from crate_ray.cli.output import errors
from crate_ray.cli.progress import duration
from crate_ray.config import ConfigError, SweepConfig
from crate_ray.config.prices import find_price
from crate_ray.runs import RunFolder, TrialRow
from crate_ray.space import Point, point_config
from crate_ray.space.forecast import Forecast, Forecaster, LiveError, Measured, planned_trial
from crate_ray.space.planned import PlannedSweep

FILE = "forecast.json"
WAIT_S = 45.0  # for the timing of steps, less than a lease lasts; then the sweep starts, and the forecast comes when it can
STEPS_S = 2.0  # of the steps of each run that is timed


class LiveForecast:
    """A forecast and its error so far.

    Args:
        sweep: The sweep.
        forecaster: Of its trials.
        forecast: Of the whole.
        num_samples: Images of the training data.
    """

    def __init__(self, sweep: SweepConfig, forecaster: Forecaster, forecast: Forecast, num_samples: int) -> None:
        self._sweep, self._forecaster, self._forecast, self._num_samples = sweep, forecaster, forecast, num_samples
        self._error = LiveError()
        self._since: dict[str, float] = {}
        self._over: Counter[str] = Counter()

    def started(self, row: TrialRow) -> None:
        """A trial got its resources."""
        self._since[row.id] = time.monotonic()

    def ended(self, row: TrialRow) -> None:
        """A trial is over. Those that trained as far as they were meant to say how good the forecast is."""
        self._since.pop(row.id, None)
        self._over[row.stage] += 1
        if row.state not in ("FINISHED", "STOPPED") or not row.step:
            return
        config = point_config(self._sweep, Point(row.arm, row.values, row.seed, row.stage))
        scheduler = self._sweep.scheduler if row.stage == "screen" else None
        planned = planned_trial(row.arm, config, scheduler=scheduler, num_samples=self._num_samples)
        predicted = self._forecaster.seconds(planned, steps=row.step, is_finished=float(row.state == "FINISHED"))
        self._error = self._error.with_trial(predicted.expected, row.seconds)

    def left_s(self) -> float:
        """Expected wall time to the end, where trials take as much longer as those that are over did."""
        left = 0.0
        for name, stage in self._forecast.stages.items():
            left += stage.wall_seconds.expected * max(1 - self._over[name] / stage.trials, 0.0)
        going = sum(time.monotonic() - since for since in [*self._since.values()])  # a copy: Tune's thread adds and removes
        return max(left * (1 + (self._error.relative or 0.0)) - going / self._forecast.concurrency, 0.0)

    def text(self) -> str:
        """What is left, and how far off the forecast was, in a few words."""
        off = self._error.relative
        return f"about {duration(self.left_s())} left" + ("" if off is None else f" (trials take {error_text(off)})")

    def as_dict(self) -> dict[str, Any]:
        """The forecast with its error."""
        return {**self._forecast.as_dict(), "error": self._error.as_dict()}


def error_text(relative: float) -> str:
    """How far real times are from the forecast: 0.25 is 25% longer."""
    return f"{abs(relative):.0%} {'longer' if relative >= 0 else 'less'} than forecast"


def live_forecast(
    sweep: SweepConfig, folder: RunFolder, planned: PlannedSweep, num_samples: int, *, wait: bool = True
) -> LiveForecast | None:
    """The forecast of a sweep on the cluster that this process is connected to; None, with a line why, where there is none.

    Args:
        sweep: The sweep.
        folder: Its folder.
        planned: Its runs.
        num_samples: Images of the training data.
        wait: Time the runs where that was not done before; otherwise only what is there by now is taken.
    """
    from crate_ray.launch.cluster import trial_room
    from crate_ray.launch.sweeps.driver import sweep_capacity

    measured: Mapping[str, Sequence[Measured]] | None = _read(folder, planned)
    if measured is None and not wait:
        return None
    room = trial_room(sweep.resources_per_trial, sweep_capacity(sweep))
    concurrency = min(room, sweep.max_concurrent or room)
    measured = measured or _measure(sweep, folder, planned, concurrency)
    if measured is None:
        return None
    forecaster = Forecaster(sweep, measured)
    price = find_price(sweep.budget, sweep.resources_per_trial)
    forecast = forecaster.forecast(
        planned.screen, confirm=planned.confirm, num_confirm=planned.num_confirm, concurrency=concurrency, price=price
    )
    return LiveForecast(sweep, forecaster, forecast, num_samples)


def _read(folder: RunFolder, planned: PlannedSweep) -> dict[str, list[Measured]] | None:
    """The times of an earlier session, where they cover every arm."""
    held = (folder.read_json(FILE) or {}).get("measured", {})
    if not held.keys() >= planned.to_measure.keys():
        return None
    return {arm: [Measured(**{**one, "step_s": tuple(one["step_s"])}) for one in runs] for arm, runs in held.items()}


def _measure(
    sweep: SweepConfig, folder: RunFolder, planned: PlannedSweep, concurrency: int
) -> Mapping[str, Sequence[Measured]] | None:
    """Times the runs in a thread, which may outlive the wait: what it finds late is there for who looks again."""
    from crate_ray.launch.sweeps.measure import measure

    found: dict[str, Sequence[Measured]] = {}
    problems: list[str] = []

    def run() -> None:
        try:
            found.update(measure(sweep, planned, concurrency=concurrency, limit_s=STEPS_S))
            body = {arm: [asdict(one) for one in runs] for arm, runs in found.items()}
            folder.write_json(FILE, {"measured": body})
        except ConfigError as error:
            problems.append(str(error))

    errors.print("[dim]timing the smallest and the largest run of every arm ...[/dim]")
    thread = threading.Thread(target=run, name="sweep-forecast", daemon=True)
    thread.start()
    thread.join(WAIT_S)
    if found and not thread.is_alive():
        return found
    if problems:
        errors.print(f"[yellow]no forecast: {escape(problems[0])}[/yellow]", soft_wrap=True)
    else:
        errors.print(
            f"[dim]timing takes longer than {WAIT_S:.0f} s: trials start, the forecast comes later[/dim]", soft_wrap=True
        )
    return None
