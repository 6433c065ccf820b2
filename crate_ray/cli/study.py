"""What every verb that trains shares: the mirror, the progress display, and one run through Ray Train.

A Study is one MLflow experiment with the runs of one command. The driver initialises the tracking
store before workers exist, and follows every run folder while it is written.
"""

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from crate_ray.cli.output import errors
from crate_ray.cli.progress import RunProgress
from crate_ray.config import RunConfig
from crate_ray.runs import RunFolder, read_status

if TYPE_CHECKING:
    from crate_ray.launch.train import RunOutcome


class Study:
    """Runs of one command.

    Args:
        config: Of the first run: names the tracking store and the experiment.
    """

    def __init__(self, config: RunConfig) -> None:
        from crate_ray import tracking

        self.uri = config.tracking.uri or tracking.default_uri(config.storage.path)
        self.experiment = config.tracking.experiment
        tracking.initialise(self.uri, self.experiment)
        self.mirror = tracking.Mirror(self.uri, self.experiment)
        self._progress = RunProgress()

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, trace)
        summary = self.mirror.close()
        if summary.error is not None:
            errors.print(
                f"[yellow]MLflow did not take everything ({summary.error}); the run folder has it, "
                "`crate-ray tracking sync` sends it[/yellow]"
            )

    def train(self, config: RunConfig) -> "RunOutcome":
        """Trains one run to its end or to a stop."""
        from crate_ray.launch.train import launch_training

        study = self.experiment.rsplit("/", 1)[-1]
        outcome = launch_training(config, study=study, on_start=self._started, on_poll=self._progress.poll)
        self.mirror.follow(outcome.folder)
        return outcome

    def links(self) -> dict[str, Any]:
        """Addresses in the tracking UI."""
        return self.mirror.links()

    def _started(self, folder: RunFolder, config: RunConfig) -> None:
        from crate_ray.data import load_index
        from crate_ray.training.schedule import total_steps

        self.mirror.follow(folder)
        status = read_status(folder)
        total = total_steps(config, load_index(config.data.train).num_samples)
        self._progress.follow(folder, total=total, attempt=status.attempt if status else 1)
