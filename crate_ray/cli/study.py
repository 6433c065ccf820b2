"""What every verb that trains shares: the mirror, the progress display, and one run or one sweep through Ray.

A Study is one MLflow experiment with the runs of one command. The tracking store is opened when the
first run has its folder and before its workers exist: a command that is refused leaves nothing behind.
"""

import signal
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from crate_ray.cli.output import errors
from crate_ray.cli.progress import RunProgress, plural
from crate_ray.config import RunConfig, ScaleConfig
from crate_ray.runs import RunFolder, read_status

if TYPE_CHECKING:
    from crate_ray.launch.train import RunOutcome
    from crate_ray.tracking import Mirror
    from crate_ray.training.profiling import ProfiledSteps


class Tracking:
    """The mirror of one command's runs, opened by the first of them; a context manager.

    Args:
        config: Of one of the runs: names the tracking store and the experiment.
    """

    def __init__(self, config: RunConfig) -> None:
        from crate_ray import tracking

        self.uri = config.tracking.uri or tracking.default_uri(config.storage.path)
        self.experiment = config.tracking.experiment
        self._storage_path = config.storage.path
        self._mirror: Mirror | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._mirror is None:
            return
        summary = self._mirror.close()
        if summary.error is not None:
            errors.print(
                f"[yellow]MLflow did not take everything ({summary.error}); the run folder has it, "
                "`crate-ray tracking sync` sends it[/yellow]",
                soft_wrap=True,
            )

    def follow(self, folder: RunFolder, *, parent_uid: str | None = None) -> None:
        """Mirrors a run from now on."""
        from crate_ray import tracking

        if self._mirror is None:
            artifact_root = tracking.default_artifact_root(self._storage_path)
            tracking.initialise(self.uri, self.experiment, artifact_root=artifact_root)
            self._mirror = tracking.Mirror(self.uri, self.experiment, artifact_root=artifact_root)
        self._mirror.follow(folder, parent_uid=parent_uid)

    def release(self, folder: RunFolder) -> None:
        """A run has ended: once all of it is there the mirror forgets it."""
        if self._mirror is not None:
            self._mirror.release(folder)

    def links(self) -> dict[str, Any]:
        """Addresses in the tracking UI."""
        return self._mirror.links() if self._mirror is not None else {"experiment": None, "views": {}, "runs": {}}


class Study:
    """Runs of one command.

    Args:
        config: Of the first run: names the tracking store and the experiment.
    """

    def __init__(self, config: RunConfig) -> None:
        self._tracking = Tracking(config)
        self._progress = RunProgress()

    @property
    def uri(self) -> str:
        """The tracking store."""
        return self._tracking.uri

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return self._tracking.experiment

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, trace)
        self._tracking.__exit__(kind, error, trace)

    def train(
        self,
        config: RunConfig,
        *,
        kind: str = "train",
        parent_uid: str | None = None,
        profiled: "ProfiledSteps | None" = None,
    ) -> "RunOutcome":
        """Trains one run to its end or to a stop, and traces some of its steps where that is asked for."""
        from crate_ray.launch.train import launch_training

        study = self.experiment.rsplit("/", 1)[-1]
        outcome = launch_training(
            config,
            kind=kind,
            study=study,
            parent_uid=parent_uid,
            on_start=self._started,
            on_poll=self._progress.poll,
            on_stop=say_stopping,
            profiled=profiled,
        )
        if outcome.was_finished:
            self._tracking.follow(outcome.folder)
        return outcome

    def release(self, folder: RunFolder) -> None:
        """Nothing more is written to this run: the mirror takes what came after its end, and forgets it."""
        self._tracking.release(folder)

    def links(self) -> dict[str, Any]:
        """Addresses in the tracking UI."""
        return self._tracking.links()

    def _started(self, folder: RunFolder, config: RunConfig) -> None:
        from crate_ray.data import load_source
        from crate_ray.training.checkpoint import latest_checkpoint
        from crate_ray.training.schedule import total_steps

        self._tracking.follow(folder)
        held = latest_checkpoint(folder)
        if held is not None:
            errors.print(f"{folder.name}: resuming from step {held.step}", soft_wrap=True)
        status = read_status(folder)
        self._progress.follow(
            folder,
            total=total_steps(config, load_source(config.data.source).num_samples),
            attempt=status.attempt if status else 1,
            done=held.step if held else 0,
            workers=workers_in_words(config.scale),
        )


def workers_in_words(scale: ScaleConfig) -> str:
    """`1 worker`, `2 workers`, `1 to 4 workers`."""
    return (
        f"{scale.min_workers} to {plural(scale.max_workers, 'worker')}"
        if scale.is_elastic
        else plural(scale.max_workers, "worker")
    )


def say_stopping(number: int) -> None:
    """One line: a signal came and what happens now."""
    name = signal.Signals(number).name
    errors.print(f"{name}: writing a checkpoint, then stopping; Ctrl-C once more leaves without it", soft_wrap=True)
