"""One Tune experiment in a thread: a stage of a sweep.

In: a searcher and what its trials may hold. Out: nothing but that it has ended; what happened stands in the trials' folders.
"""

import threading
from typing import Any

import ray
from ray import tune
from ray.tune.experiment import Trial

from crate_ray import storage
from crate_ray.config import SweepConfig
from crate_ray.config.sweep import SchedulerConfig, TrialResources
from crate_ray.launch.cluster import trial_need
from crate_ray.launch.sweeps.schedulers import GroupedScheduler
from crate_ray.launch.sweeps.searcher import PlannedSearch
from crate_ray.launch.sweeps.trial import SweepTrial
from crate_ray.runs import RunFolder
from crate_ray.space.check import scheduler_metric

MAX_FAILURES = 2  # of one trial, before it counts as failed
SCRATCH = ".tune"
_FOLLOWER_BYTES = 1e6
"""Of memory, for the actor that follows several workers: Tune refuses a trial that takes nothing, and no CPU may be left."""


class Experiment:
    """Runs the trials that a searcher proposes.

    Args:
        sweep: The sweep.
        folder: Its folder.
        stage: "screen", or "confirm", where no trial is stopped.
        search: Proposes the trials.
        grace_s: How long trials may take to write a checkpoint when the experiment is stopped.
    """

    def __init__(self, sweep: SweepConfig, folder: RunFolder, stage: str, search: PlannedSearch, *, grace_s: float) -> None:
        self._sweep, self._folder, self._stage, self._search = sweep, folder, stage, search
        self.scheduler = GroupedScheduler(
            sweep.scheduler if stage == "screen" else SchedulerConfig(),
            metric=scheduler_metric(sweep) or "eval_loss",
            entry_of=search.entry_of,
            is_closed=lambda: search.is_closed,
            room=search.room if sweep.resources_per_trial.num_workers > 1 else None,
            actor_grace_s=grace_s,
            seed=sweep.search.seed,
        )
        search.num_paused = lambda: self.scheduler.num_paused
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"tune-{stage}", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def is_running(self) -> bool:
        """Whether it goes on."""
        return self._thread.is_alive()

    def wait(self, timeout_s: float) -> None:
        """Waits at most this long."""
        self._thread.join(timeout_s)

    def end(self) -> str | None:
        """Why it did not come to its end; None when it did."""
        return None if self._error is None else f"{type(self._error).__name__}: {self._error}"

    def abort(self) -> None:
        """Leaves the cluster; Ray ends this driver's actors."""
        ray.shutdown()

    def _run(self) -> None:
        store, path = storage.open_store(self._folder.path(SCRATCH))
        try:
            tune.run(
                SweepTrial,
                name=self._stage,
                storage_path=path,
                storage_filesystem=None if self._folder.is_local else store,
                resources_per_trial=_request(self._sweep.resources_per_trial),
                search_alg=self._search,
                scheduler=self.scheduler,
                num_samples=-1,
                stop=_WhenAsked(self._search),
                callbacks=[_ForgetEnded()],
                max_failures=MAX_FAILURES,
                reuse_actors=True,
                raise_on_failed_trial=False,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
                verbose=0,
            )
        except BaseException as error:  # noqa: BLE001  handed to the main thread
            self._error = error


class _WhenAsked(tune.Stopper):  # type: ignore[misc]
    """Stops everything when the searcher was told to stop."""

    def __init__(self, search: PlannedSearch) -> None:
        self._search = search

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._search.is_stopping()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles it into a state that nobody reads, and the searcher holds locks."""
        return {}


class _ForgetEnded(tune.Callback):  # type: ignore[misc]
    """Lets go of what Tune keeps of trials that have ended, which stands in their folders too.

    Tune holds every trial to the end: running means of each number that it reported, its last result and its configuration,
    twice. One trial behind, for Tune still reads the one that has just ended.
    """

    def __init__(self) -> None:
        self._last: Trial | None = None

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forget_the_one_before(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forget_the_one_before(trial)

    def _forget_the_one_before(self, trial: Trial) -> None:
        before, self._last = self._last, trial
        if before is None or before is trial or before.status not in (Trial.TERMINATED, Trial.ERROR):
            return
        kept = before.run_metadata
        kept.metric_analysis, kept.metric_n_steps, kept.last_result = {}, {}, {"done": True}
        before.evaluated_params, before.config = {}, {}


def _request(resources: TrialResources) -> tune.PlacementGroupFactory:
    """What Tune itself holds for a trial: the loop's resources, or those of the actor that follows several workers."""
    alone = resources.num_workers == 1
    return tune.PlacementGroupFactory([trial_need(resources) if alone else {"memory": _FOLLOWER_BYTES}])


def _name(trial: Any) -> str:
    return str(trial.trial_id)
