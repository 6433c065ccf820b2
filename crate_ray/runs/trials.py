"""The trials of a sweep as rows: what was tried, how it ended and what it measured.

In: trial folders, which are run folders with a trial.json beside the run's own files. Out: one TrialRow each. A row reads
trial.json, and final.json where the trial finished, never the records: hundreds of trials cost two small files each, and in
return a row knows the last report alone, not the curve.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from crate_ray import storage
from crate_ray.config import LOSS_TARGET, RunConfig, Stage, SweepConfig, read_yaml
from crate_ray.runs.folder import RunFolder
from crate_ray.runs.records import decode_number, encode_number

TrialState = Literal["RUNNING", "FINISHED", "STOPPED", "INFEASIBLE", "FAILED", "KILLED"]
TRIAL_STATES: tuple[TrialState, ...] = get_args(TrialState)
_READERS = 16
_TRAINED = ("eval_", "train_", "rollbacks", "skipped_steps", "params_m", "encoder_params_m", "gflops", "images_per_s")
_NAMES = {"eval/": "eval_", "eval/knn_": "knn_", "perf/images_per_s": "images_per_s", "final/": ""}


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial.

    Attributes:
        id: Name of its folder below `trials/`.
        arm: The side of the comparison that it belongs to.
        stage: "screen", or "confirm" for the only runs that comparisons use.
        seed: Of the run.
        state: How it stands; STOPPED is an early end by the scheduler, INFEASIBLE one that no other attempt would change.
        reason: Why it is INFEASIBLE, FAILED or KILLED.
        values: Dotted keys of `space` and `tune` with their values, over the configuration of the arm.
        quantities: What is known before it starts: params_m, encoder_params_m, gflops, ...
        objectives: What was measured, by the names of objectives; of the last report, or of the end where it finished.
        loss_target: What the validation loss asks of the model (see `loss_target`); losses rank only where it is equal.
        step: The last step that it reported.
        total_steps: Steps of the whole run.
        seconds: Wall time that it held its resources, over all attempts.
        placement_group: Hexadecimal id of the placement group that it holds or held, for cleaning up.
    """

    id: str
    arm: str
    stage: Stage = "screen"
    seed: int
    state: TrialState
    reason: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    quantities: Mapping[str, float] = field(default_factory=dict)
    objectives: Mapping[str, float] = field(default_factory=dict)
    loss_target: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    total_steps: int | None = None
    seconds: float = 0.0
    placement_group: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether it ended by itself: what a later session need not start again."""
        return self.state in ("FINISHED", "STOPPED", "INFEASIBLE")

    def value_of(self, objective: str) -> float | None:
        """An objective as measured, or as known beforehand; None where it is neither."""
        measured = self.objectives.get(objective)
        return self.quantities.get(objective) if measured is None else measured

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON can hold it: non-finite numbers by name."""
        numbers = {
            name: {key: encode_number(value) for key, value in getattr(self, name).items()}
            for name in ("quantities", "objectives")
        }
        return asdict(self) | numbers

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`; keys that another release wrote are passed over."""
        known = {item.name: body[item.name] for item in fields(cls) if item.name in body}
        for name in ("quantities", "objectives"):
            known[name] = {key: decode_number(value) for key, value in known.get(name, {}).items()}
        return cls(**known)


def write_trial(folder: RunFolder, row: TrialRow) -> None:
    """Writes the row as the folder's trial.json, atomically."""
    folder.write_json("trial.json", row.as_dict())


def read_trial(folder: RunFolder) -> TrialRow | None:
    """The trial's row, or None when no trial was started here.

    What training wrote into final.json replaces the last report where the trial finished. Of a probe only the judgement on
    validation is read: final.json may hold one on test by now, which no choice may see. kNN stays the one that was measured
    while training, so that it means the same for trials with a probe and without.
    """
    body = folder.read_json("trial.json")
    if body is None:
        return None
    row = TrialRow.of(body | {"id": folder.name})
    if row.state != "FINISHED":
        return row
    final = (folder.read_json("final.json") or {}).get("values", {})
    probed = (folder.read_json("probe_validation.json") or {}).get("values", {}) if "final/probe_top1" in final else {}
    trained = {key: value for key, value in objective_values(final).items() if key.startswith(_TRAINED)}
    return TrialRow.of(body | {"id": folder.name, "objectives": objective_values(probed) | body["objectives"] | trained})


def list_trials(sweep_uri: str) -> list[TrialRow]:
    """The rows of a sweep's trials, sorted by id; folders without a trial.json are passed over."""
    root = storage.join(sweep_uri, "trials")
    with ThreadPoolExecutor(_READERS) as pool:
        rows = pool.map(lambda name: read_trial(RunFolder(storage.join(root, name))), storage.list_dir(root))
        return [row for row in rows if row is not None]


def read_sweep(folder: RunFolder) -> SweepConfig | None:
    """The resolved configuration of a sweep, from its folder; None where there is none."""
    where = folder.path("sweep.yaml")
    try:
        return SweepConfig.parse(read_yaml(storage.read_text(where), where=where), where=where)
    except FileNotFoundError:
        return None


def objective_values(measured: Mapping[str, float]) -> dict[str, float]:
    """Keys of records and final values as names of objectives: eval/loss and final/eval_loss are eval_loss.

    Keys of other scopes are left out.
    """
    return dict(_renamed(measured))


def _renamed(measured: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for key, value in measured.items():
        scope = max((prefix for prefix in _NAMES if key.startswith(prefix)), key=len, default=None)
        if scope is not None:
            yield _NAMES[scope] + key.removeprefix(scope), value


def loss_target(config: RunConfig) -> dict[str, Any]:
    """What the validation loss of a pretraining run asks: losses of runs that differ here answer different questions."""
    return {key: getattr(config.model, key) for key in LOSS_TARGET}
