"""Points of a sweep as trials: which folder each has, what Tune starts it with, and whom it competes with.

In: a sweep and its folder. Out: for a point, a Planned. The data's digest is read once for each data set, since a sweep names
hundreds of trials by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from json import dumps
from typing import Any

from crate_ray.config import DataConfig, RunConfig, SweepConfig, digest, resume_parts
from crate_ray.launch.sweeps.folder import STOP_FILE
from crate_ray.launch.sweeps.generations import newest_generation
from crate_ray.launch.sweeps.schedulers import Entry, size_class
from crate_ray.runs import RunFolder, TrialRow, loss_target
from crate_ray.space.arms import point_config
from crate_ray.space.check import scheduler_metric
from crate_ray.space.costs import quantities
from crate_ray.space.forecast import memory_reason
from crate_ray.space.point import Point
from crate_ray.training.first_weights import pin_weights
from crate_ray.training.prepare import absolute_paths, data_digest


@dataclass(frozen=True)
class Planned:
    """A trial before it starts.

    Attributes:
        point: What is tried.
        folder: Of the trial.
        run: Its configuration.
        config: What Tune starts it with.
        entry: What the scheduler must know.
        row: As it stands in tables until its own trial.json is there.
        refusal: Why it cannot fit into the memory of a worker; None where it may.
    """

    point: Point
    folder: RunFolder
    run: RunConfig
    config: dict[str, Any]
    entry: Entry
    row: TrialRow
    refusal: str | None = None


class Roster:
    """Makes trials of points.

    Args:
        sweep: The sweep.
        folder: Its folder.
        num_samples: Images of the training data.
        parent_uid: The sweep's own run_uid.
        bounds: Limits between classes of size, see `schedulers.size_bounds`.
        worker_bytes: Memory of a worker's device; None where it is not known, and nothing is refused.
    """

    def __init__(
        self,
        sweep: SweepConfig,
        folder: RunFolder,
        *,
        num_samples: int,
        parent_uid: str,
        bounds: Sequence[float] = (),
        worker_bytes: int | None = None,
    ) -> None:
        self._sweep, self._folder, self._num_samples = sweep, folder, num_samples
        self._parent_uid, self._bounds, self._worker_bytes = parent_uid, bounds, worker_bytes
        # One text for all trials: Tune keeps what it is given of every trial to the end, and copies and flattens mappings.
        self._sweep_text = dumps(sweep.model_dump(mode="json"))
        self._digests: dict[DataConfig, str] = {}

    def plan(self, point: Point) -> Planned:
        """The trial of a point.

        Raises:
            ConfigError: Its values make no run, or its data or first weights are not there.
        """
        config = pin_weights(absolute_paths(point_config(self._sweep, point)))
        if config.data not in self._digests:
            self._digests[config.data] = data_digest(config)
        name = f"{point.arm}-{digest(resume_parts(config, self._digests[config.data]))[:8]}"
        known = quantities(config, num_samples=self._num_samples)
        steps = config.train.num_steps(self._num_samples)
        assert steps is not None
        folder = self.folder_of(name)
        row = TrialRow(
            id=name,
            arm=point.arm,
            stage=point.stage,
            seed=point.seed,
            state="RUNNING",
            values=dict(point.values),
            quantities=known,
            loss_target=loss_target(config),
            total_steps=steps,
        )
        given = {
            "run": dumps(config.model_dump(mode="json")),
            "sweep": self._sweep_text,
            "point": point.as_dict(),
            "folder": folder.uri,
            "study": self._sweep.name,
            "parent_uid": self._parent_uid,
            "quantities": known,
            "set": self._changed(folder),
            "stop_file": self._folder.path(STOP_FILE),
        }
        refusal = None if self._worker_bytes is None else memory_reason(config, device_bytes=self._worker_bytes)
        entry = Entry(self._group(point, config, known["params_m"]), steps)
        return Planned(point, folder, config, given, entry, row, refusal)

    def _changed(self, folder: RunFolder) -> dict[str, Any]:
        """What a population has changed of a trial in an earlier session: who copies it takes its values from here."""
        return dict(newest_generation(folder).set) if self._sweep.scheduler.type == "pbt" else {}

    def unplanned(self, point: Point, reason: str) -> TrialRow:
        """The row of a point that `plan` refused: FAILED, under a name of its own, for it has no identity without its data."""
        name = f"{point.arm}-{digest(point.as_dict())[:8]}"
        return TrialRow(id=name, state="FAILED", reason=reason, **point.as_dict())

    def folder_of(self, name: str) -> RunFolder:
        """Of a trial."""
        return RunFolder(self._folder.path("trials", name))

    def _group(self, point: Point, config: RunConfig, params_m: float) -> str:
        """Arms never compete: each is to have its best judged. Losses that answer different questions never do either."""
        parts = [point.arm, *([str(size_class(params_m, self._bounds))] if self._bounds else [])]
        if scheduler_metric(self._sweep) == "eval_loss":
            parts += [f"{key}={value}" for key, value in sorted(loss_target(config).items())]
        return " ".join(parts)
