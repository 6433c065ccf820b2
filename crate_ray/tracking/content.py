"""What MLflow shows of a run beside its numbers: its data sets, its machines and its model.

In: datasets.json, system/*.jsonl, checkpoints and records of a run folder. Out: dataset inputs, metrics under `system/` with
the names that MLflow's own page of system metrics draws, a logged model that points at the newest checkpoint, and the
white-box measures as curves over the layers.
Everything may be sent again: the server keeps one of each. What a server refuses, because it is older than logged models say,
costs one warning and holds up no number; a server in trouble is the mirror's to wait for.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crate_ray import storage
from crate_ray.config import digest
from crate_ray.runs import Record, RecordTail, RunFolder, Status, system_streams
from crate_ray.runs.settings import dataset_name
from crate_ray.tracking.backlog import CHUNK_BYTES
from crate_ray.tracking.client import one_line
from crate_ray.tracking.describe import Description, to_ms
from crate_ray.tracking.layers import LayerCurves
from crate_ray.tracking.limits import log_points, point
from crate_ray.tracking.logged_model import LoggedRunModel

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

logger = logging.getLogger(__name__)

DIGEST_CHARS = 32  # MLflow takes 36
_RECORDS_A_REQUEST = 32
_SYSTEM = "system metrics"
_CONTEXTS = {"eval": "evaluation", "test": "test"}
# The word of a server that does not know the request, not that of one in trouble.
_REFUSALS = {
    *("ENDPOINT_NOT_FOUND", "NOT_FOUND", "NOT_IMPLEMENTED"),
    *("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED"),
}


class RunContent:
    """What of one run's data sets, system metrics and model is in MLflow.

    `poll` and `see` read the folder, `send` talks to MLflow; `marker` and `restore` carry over what a former one has sent.

    Args:
        folder: The run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._tails: dict[str, RecordTail] = {}
        self._queue: deque[tuple[str, Record]] = deque()
        self._passed: dict[str, int] = {}  # records of each stream that MLflow has
        self._skip: dict[str, int] = {}  # records at the beginning of each that a former replay has sent
        self._inputs: str | None = None  # digest of the data sets that MLflow has
        self._datasets: list[dict[str, Any]] | None = None
        self._model = LoggedRunModel(folder)
        self._layers = LayerCurves()
        self._curves: str | None = None  # digest of the curves over layers that MLflow has
        self._refused: set[str] = set()

    @property
    def pending(self) -> int:
        """Records read and not sent."""
        return len(self._queue)

    @property
    def points(self) -> int:
        """Values in memory."""
        return sum(len(record.values) for _, record in self._queue)

    @property
    def has_more(self) -> bool:
        """Whether the folder may hold system metrics that were not read yet."""
        return _SYSTEM not in self._refused and any(tail.has_more for tail in self._tails.values())

    @property
    def is_behind(self) -> bool:
        """Whether system metrics wait that the store takes, in memory or, as far as was seen, in the folder."""
        return _SYSTEM not in self._refused and (bool(self._queue) or self.has_more)

    def see(self, records: Sequence[Record]) -> None:
        """Takes note of the run's own records: a model's metrics must be the very points of its run."""
        self._model.see(records)
        self._layers.see(records)

    def poll(self) -> None:
        """Reads about a megabyte of each node on, once what was read before is sent."""
        if self._queue:
            return
        for stream in system_streams(self._folder):
            tail = self._tails.setdefault(stream, RecordTail(self._folder, stream=stream))
            while True:
                self._take(stream, tail.poll(CHUNK_BYTES))
                if not tail.has_more:
                    self._skip.pop(stream, None)
                    break
                if self._passed.get(stream, 0) >= self._skip.get(stream, 0):
                    break

    def _take(self, stream: str, records: Sequence[Record]) -> None:
        """Queues records, but for those at the beginning that a former replay has sent."""
        passed = self._passed.get(stream, 0)
        sent = min(max(self._skip.get(stream, 0) - passed, 0), len(records))
        if sent:
            self._passed[stream] = passed + sent
        self._queue.extend((stream, record) for record in records[sent:])

    def marker(self) -> dict[str, Any]:
        """What was sent, as JSON."""
        sent = {"inputs": self._inputs, "layers": self._curves, "model": self._model.marker()}
        return {**sent, "system": dict(self._passed)}

    def restore(self, marker: object) -> None:
        """Passes over what a former replay has sent to the same MLflow run; anything else than a marker is none."""
        if not isinstance(marker, dict):
            return
        self._inputs, self._curves = marker.get("inputs"), marker.get("layers")
        self._model.restore(marker.get("model"))
        self._skip = {stream: int(count) for stream, count in (marker.get("system") or {}).items()}
        read, self._queue = self._queue, deque()
        for stream, record in read:
            self._take(stream, [record])
        self._skip = {stream: count for stream, count in self._skip.items() if self._reads_on(stream)}

    def _reads_on(self, stream: str) -> bool:
        return stream in self._tails and self._tails[stream].has_more

    def send(
        self,
        client: "MlflowClient",
        run_id: str,
        described: Description,
        status: Status | None,
        *,
        expired: Callable[[], bool] = lambda: False,
    ) -> None:
        """Sends what was polled, the data sets once, and of a run that has ended its model and its layers.

        Args:
            client: Of the store.
            run_id: The MLflow run.
            described: Of the run.
            status: The run's, once all its records are sent; before that None.
            expired: Whether system metrics that are left are to wait for the next time, and what comes after them.

        Raises:
            mlflow.exceptions.MlflowException: The store does not answer.
        """
        self._try("data sets", lambda: self._send_inputs(client, run_id, described))
        self._try(_SYSTEM, lambda: self._send_system(client, run_id, expired))
        if self.is_behind:
            return
        if status is not None and status.state != "RUNNING":
            datasets = {entry["split"]: entry for entry in self._read_datasets()}
            self._try("the model", lambda: self._model.send(client, run_id, described, datasets))
        if status is not None and status.state == "FINISHED":  # another may go on, and MLflow takes no point back
            self._try("curves over layers", lambda: self._send_layers(client, run_id))

    def _try(self, what: str, send: Callable[[], None]) -> None:
        """A part that the store does not know is left out from now on; the others go on."""
        from mlflow.exceptions import MlflowException

        if what in self._refused:
            return
        try:
            send()
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            self._refused.add(what)
            logger.warning("MLflow does not take %s of run %s: %s", what, self._folder.name, one_line(error))

    def _read_datasets(self) -> list[dict[str, Any]]:
        """The entries of datasets.json with the name and the digest that MLflow is told; none of a run without the file."""
        if self._datasets is None:
            entries = (self._folder.read_json("datasets.json") or {}).get("datasets", [])
            self._datasets = [
                {**entry, "name": f"{dataset_name(entry['url'])}/{entry['split']}", "digest": entry["digest"][:DIGEST_CHARS]}
                for entry in entries
            ]
        return self._datasets

    def _send_inputs(self, client: "MlflowClient", run_id: str, described: Description) -> None:
        entries = self._read_datasets()
        found = digest(entries)
        if not entries or found == self._inputs:
            return
        trained = "classification" if described.tags.get("task") == "classify" else "pretraining"
        client.log_inputs(run_id, datasets=[dataset_input(entry, trained) for entry in entries])
        self._inputs = found

    def _send_layers(self, client: "MlflowClient", run_id: str) -> None:
        points = self._layers.points()
        found = digest([(point.key, point.step, repr(point.value)) for point in points])
        if points and found != self._curves:
            log_points(client, run_id, points)
            self._curves = found

    def _send_system(self, client: "MlflowClient", run_id: str, expired: Callable[[], bool]) -> None:
        while self._queue:
            batch = [self._queue[i] for i in range(min(_RECORDS_A_REQUEST, len(self._queue)))]
            points = [point(key, value, to_ms(r.time), r.step) for _, r in batch for key, value in r.values.items()]
            log_points(client, run_id, points)
            for stream, _ in batch:
                self._queue.popleft()
                self._passed[stream] = self._passed.get(stream, 0) + 1
            if expired():
                return


def dataset_input(entry: Mapping[str, Any], trained: str) -> "DatasetInput":
    """One split as MLflow's dataset input.

    Args:
        entry: name, split, url, digest, images and classes.
        trained: The context of the training split.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source_type, key = _source_type(entry["url"])
    dataset = Dataset(
        name=entry["name"],
        digest=entry["digest"],
        source_type=source_type,
        source=json.dumps({key: entry["url"]}),
        profile=json.dumps({"num_rows": entry["images"], "num_classes": entry["classes"]}),
    )
    context = _CONTEXTS.get(entry["split"], trained)
    return DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)])


def _source_type(url: str) -> tuple[str, str]:
    """The type of MLflow's source that names such a place, and the key that it keeps it under."""
    if storage.is_local(url):
        return "local", "uri"
    scheme = storage.scheme(url)
    return ("http", "url") if scheme in ("http", "https") else (str(scheme), "uri")
