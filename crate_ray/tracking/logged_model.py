"""A run's model in MLflow: an external logged model that points at the newest checkpoint.

In: the checkpoints and final values of a run folder. Out: one logged model a run, without a copy of the weights: its tags say
where they lie and their digest, its parameters are the run's, its metrics the run's final points, tied to the data set that
they were measured on. A resumed run keeps its model, whose tags move to the newer checkpoint.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crate_ray import storage
from crate_ray.config import digest
from crate_ray.runs import Record, RunFolder
from crate_ray.tracking.describe import RUN_UID_TAG, Description, to_ms
from crate_ray.tracking.limits import log_points, valid_key

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

logger = logging.getLogger(__name__)

CHECKPOINT_TAG = "crate_ray.checkpoint"
STEP_TAG = "crate_ray.step"
DIGEST_TAG = "crate_ray.digest"
_EXTERNAL_TAG = "mlflow.model.isExternal"
_KEPT_TAGS = ("kind", "family", "study", "stage", "seed")
_FINAL = "final/"
_ON_VALIDATION = ("eval_",)
_JUDGED = re.compile(r"(probe|control|cls|knn|fewshot\d*)_top1|probe_top1_gain|top1|rankme|alpha_req|coding_rate")


@dataclass(frozen=True)
class SavedModel:
    """Where a run's newest checkpoint is, its step, and one digest of all its files."""

    uri: str
    step: int
    digest: str


def newest_checkpoint(folder: RunFolder) -> SavedModel | None:
    """The newest checkpoint that has a manifest; None where there is none."""
    for name in reversed(storage.list_dir(folder.path("checkpoints"))):
        manifest = folder.read_json(f"checkpoints/{name}/manifest.json")
        if manifest is not None:
            files = {file: entry["sha256"] for file, entry in manifest["files"].items()}
            return SavedModel(folder.path("checkpoints", name), int(manifest["step"]), digest(files)[:32])
    return None


class LoggedRunModel:
    """What MLflow knows of one run's model.

    Args:
        folder: The run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._finals: dict[str, Record] = {}
        self._sent: str | None = None  # digest of what MLflow was told

    def see(self, records: Sequence[Record]) -> None:
        """Keeps the newest final values, with the time of their points."""
        for record in records:
            self._finals.update({key: record for key in record.values if key.startswith(_FINAL)})

    def marker(self) -> str | None:
        """What was sent."""
        return self._sent

    def restore(self, marker: object) -> None:
        """Goes on from a marker; anything else than one is none."""
        self._sent = marker if isinstance(marker, str) else None

    def send(
        self, client: "MlflowClient", run_id: str, described: Description, datasets: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Creates the model or moves it to the newest checkpoint, and ties the final values to it.

        Args:
            client: Of the store.
            run_id: The MLflow run, which has the final values already.
            described: Of the run.
            datasets: Name and digest by split.

        Raises:
            mlflow.exceptions.MlflowException: The store does not answer, or knows no logged models.
        """
        saved = newest_checkpoint(self._folder)
        if saved is None:
            return
        values = {key: (record.time, record.values[key]) for key, record in self._finals.items()}
        told = digest([saved.uri, saved.digest, {key: [time, repr(value)] for key, (time, value) in values.items()}])
        if told == self._sent:
            return
        model = _find_or_create(client, run_id, described, saved)
        self._log_finals(client, run_id, model.model_id, datasets)
        self._sent = told

    def _log_finals(
        self, client: "MlflowClient", run_id: str, model_id: str, datasets: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """The same points as the run's, so that it gains none."""
        from mlflow.entities import Metric

        points = []
        for key, split in self._measured():
            record, dataset = self._finals[key], datasets.get(split or "")
            tied = {"dataset_name": dataset["name"], "dataset_digest": dataset["digest"]} if dataset else {}
            value, time_ms = record.values[key], to_ms(record.time)
            points.append(Metric(valid_key(key), value, time_ms, record.step, model_id=model_id, run_id=run_id, **tied))
        log_points(client, run_id, points)

    def _measured(self) -> Iterator[tuple[str, str | None]]:
        """Each final value with the split that it was measured on; None for costs and counts."""
        judged = "test" if self._folder.read_json("probe_test.json") is not None else "eval"
        for key in self._finals:
            name = key.removeprefix(_FINAL)
            yield key, "eval" if name.startswith(_ON_VALIDATION) else judged if _JUDGED.fullmatch(name) else None


def find_model(client: "MlflowClient", experiment_id: str, run_uid: str) -> "LoggedModel | None":
    """The logged model of a run, or None."""
    found = client.search_logged_models([experiment_id], filter_string=f"tags.`{RUN_UID_TAG}` = '{run_uid}'", max_results=1)
    return found[0] if found else None


def _find_or_create(client: "MlflowClient", run_id: str, described: Description, saved: SavedModel) -> "LoggedModel":
    run = client.get_run(run_id)
    tags = {CHECKPOINT_TAG: saved.uri, STEP_TAG: str(saved.step), DIGEST_TAG: saved.digest}
    found = find_model(client, run.info.experiment_id, described.run_uid)
    if found is None:
        kept = {key: value for key, value in described.tags.items() if key in _KEPT_TAGS}
        found = client.create_logged_model(
            run.info.experiment_id,
            name=re.sub(r"[/:.%\"']", "_", described.name),
            source_run_id=run_id,
            tags={RUN_UID_TAG: described.run_uid, _EXTERNAL_TAG: "true", **kept, **tags},
            params=described.params,
            model_type="classifier" if described.tags.get("task") == "classify" else "masked autoencoder",
        )
    elif any((found.tags or {}).get(key) != value for key, value in tags.items()):
        client.set_logged_model_tags(found.model_id, tags)
    if str(found.status) != "READY":
        client.finalize_logged_model(found.model_id, "READY")
    outputs = run.outputs.model_outputs if run.outputs else []
    if all(output.model_id != found.model_id for output in outputs):
        from mlflow.entities import LoggedModelOutput

        client.log_outputs(run_id, [LoggedModelOutput(found.model_id, saved.step)])
    return found
