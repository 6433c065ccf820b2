"""One run folder, replayed to MLflow: from the beginning, or from where an earlier replay stopped.

In: a RunFolder. Out: an MLflow run with its points, status and small files. Delivery is at least
once: a point is (key, step, time of measurement, value), which the server stores once however often
it comes, so a lost or wrong progress marker costs time and never correctness. MLflow cannot take a
point back: steps that a resumed attempt repeats are sent once, from the attempt that came first,
where the run folder lets the last attempt win. A second point there would draw a saw-tooth. A small file is
uploaded once for each content: pictures made after the run's end go with the next replay, and only they.
"""

import hashlib
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crate_ray import storage
from crate_ray.runs import Record, RecordTail, RunFolder, Status, read_status
from crate_ray.tracking.client import one_line, public_uri
from crate_ray.tracking.content import RunContent
from crate_ray.tracking.describe import PARENT_TAG, RUN_UID_TAG, Description, describe, to_ms
from crate_ray.tracking.limits import MAX_TAG, valid_key, valid_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

MAX_BATCH = 500
MARKER = "tracking.json"
MAX_ARTIFACT_BYTES = 8 * 2**20
MAX_PICTURES = 64
_JUDGED = ("final/", "emergence/")  # measured of a finished run, and again when its judge changes
_FILES = (
    "config.yaml", "fingerprint.json", "final.json", "trial.json", "sweep.yaml", "results.json", "report.md",
)  # fmt: skip
_PICTURE_TYPES = (".png", ".jpg", ".svg", ".json")  # .json: numbers behind a figure


@dataclass
class Session:
    """A connection: client, experiment, and the MLflow run of every run_uid met so far."""

    client: "MlflowClient"
    uri: str
    experiment_id: str
    run_ids: dict[str, str] = field(default_factory=dict)


class RunReplay:
    """What of one run folder is in MLflow, and what is not yet.

    `poll` reads the folder and `push` talks to MLflow; both may raise, and a new RunReplay of the
    same folder then goes on from the marker.

    Args:
        folder: The run; it need not have been created yet.
        parent_uid: run_uid of the run above it, where run_meta.json does not say.
    """

    def __init__(self, folder: RunFolder, *, parent_uid: str | None = None) -> None:
        self.folder = folder
        self.parent_uid = parent_uid
        self.run_id: str | None = None
        self.sent = 0
        self._tail = RecordTail(folder)
        self._queue: deque[Record] = deque()
        self._passed = 0  # records before the queue, sent now or earlier
        self._last: Record | None = None
        self._last_step: dict[str, int] = {}
        self._status: Status | None = None
        self._described: Description | None = None
        self._mirrored: tuple[str, int] | None = None  # (state, attempt) that MLflow shows
        self._has_parent = False
        self._stored: dict[str, str] = {}  # file: digest of the content that MLflow has
        self._files_sent_at: tuple[str, int] | None = None  # (state, attempt) at which this replay sent the files
        self._marker: dict[str, Any] = {}
        self._content = RunContent(folder)  # what is shown beside the numbers

    @property
    def pending(self) -> int:
        """Records read from the folder and not sent."""
        return len(self._queue)

    @property
    def is_complete(self) -> bool:
        """Whether the run ended well and all of it is in MLflow."""
        return self._mirrored is not None and self._mirrored[0] == "FINISHED" and not self._queue

    @property
    def has_ended(self) -> bool:
        """Whether the run had ended, well or not, when the folder was read last."""
        return self._status is not None and self._status.state != "RUNNING"

    def look_again(self) -> None:
        """Compares the files with what is stored once more at the next push: some may have come after the run's end."""
        self._files_sent_at = None

    def poll(self) -> None:
        """Reads what is new. The status first: a run that had ended then has no record after this."""
        if self._described is None:
            self._described = describe(self.folder)
        self._status = read_status(self.folder)
        records = [self._without_repeats(record) for record in self._tail.poll()]
        self._queue.extend(records)
        self._content.see(records)
        self._content.poll()

    def push(self, session: Session, *, expired: Callable[[], bool] = lambda: False) -> None:
        """Sends what was polled, in batches, until done or `expired`.

        Raises:
            mlflow.exceptions.MlflowException: The store does not answer, or refuses.
        """
        if self._described is None:
            return
        if self.run_id is None:
            self._open(session, self._described)
        try:
            for records, metrics in self._batches():
                if metrics:
                    session.client.log_batch(self._run_id, metrics=metrics, synchronous=True)
                self._advance(records)
                self.sent += records
                if expired():
                    return
            self._link_parent(session)
            self._content.send(session.client, self._run_id, self._described, self._status)
            if self._status is not None and not self._queue:
                self._mirror_status(session, self._status)
        finally:
            self._save_marker(session)

    @property
    def _run_id(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _open(self, session: Session, described: Description) -> None:
        """Finds the run by its tag or creates it, completes its parameters, and skips what it has."""
        client = session.client
        found = find_run(session, described.run_uid)
        if found is None:
            found = client.create_run(
                session.experiment_id, start_time=described.start_ms, tags=described.tags, run_name=described.name
            )
        run_id = str(found.info.run_id)
        missing = {key: value for key, value in described.params.items() if key not in found.data.params}
        if missing:
            from mlflow.entities import Param

            client.log_batch(run_id, params=[Param(key, value) for key, value in missing.items()], synchronous=True)
        tags = found.data.tags
        self._mirrored = (str(found.info.status), int(tags.get("attempt", 0)))
        self._has_parent = PARENT_TAG in tags
        self._skip_sent(session, run_id)
        session.run_ids[described.run_uid] = run_id
        self.run_id = run_id

    def _skip_sent(self, session: Session, run_id: str) -> None:
        """Follows the marker where it is about this MLflow run and agrees with the records."""
        marker = self.folder.read_json(MARKER) or {}
        if marker.get("run_id") != run_id or marker.get("uri") != public_uri(session.uri):
            return
        stored = marker.get("artifacts")
        self._stored = dict(stored) if isinstance(stored, dict) else {}
        self._content.restore(marker.get("content"))
        count = marker.get("records", 0)
        if self._passed == 0 and 0 < count <= len(self._queue) and marker.get("last") == _stamp(self._queue[count - 1]):
            self._advance(count)

    def _batches(self) -> Iterator[tuple[int, list["Metric"]]]:
        """The queue as (number of records, their points); whole records, cut only where one is larger than a batch."""
        while self._queue:
            count, metrics = 0, list["Metric"]()
            for record in self._queue:
                points = _points(record)
                if metrics and len(metrics) + len(points) > MAX_BATCH:
                    break
                metrics.extend(points)
                count += 1
            for start in range(0, max(len(metrics) - MAX_BATCH, 0), MAX_BATCH):
                yield 0, metrics[start : start + MAX_BATCH]
            yield count, metrics[-(len(metrics) % MAX_BATCH or MAX_BATCH) :]

    def _without_repeats(self, record: Record) -> Record:
        """The record without the steps of a key that an earlier attempt had measured.

        What is measured of a finished run is exempt: judged again, the newer value is the one to show.
        """
        values = {k: v for k, v in record.values.items() if k.startswith(_JUDGED) or record.step > self._last_step.get(k, -1)}
        self._last_step.update(dict.fromkeys(values, record.step))
        return replace(record, values=values)

    def _advance(self, count: int) -> None:
        for _ in range(count):
            self._last = self._queue.popleft()
            self._passed += 1

    def _link_parent(self, session: Session) -> None:
        """Puts the run below its sweep, as soon as the sweep is known."""
        uid = self.parent_uid or (self._described.parent_uid if self._described else None)
        if uid is None or self._has_parent:
            return
        if uid not in session.run_ids:
            parent = find_run(session, uid)
            if parent is None:
                return
            session.run_ids[uid] = str(parent.info.run_id)
        session.client.set_tag(self._run_id, PARENT_TAG, session.run_ids[uid])
        self._has_parent = True

    def _mirror_status(self, session: Session, status: Status) -> None:
        """Makes MLflow's status, attempt, final values and files those of the folder."""
        client = session.client
        state, attempt = self._mirrored or ("RUNNING", 0)
        if attempt != status.attempt:
            client.set_tag(self._run_id, "attempt", str(status.attempt))
        if status.state == "RUNNING":
            if state != "RUNNING":
                client.update_run(self._run_id, status="RUNNING")
        else:
            self._send_finals(session, status)
            if state != status.state or attempt != status.attempt:
                self._terminate(session, status)
        if self._files_sent_at != (status.state, status.attempt):
            self._send_artifacts(session, status)  # of a run that goes on: what it was asked to do
        self._mirrored = (status.state, status.attempt)

    def _terminate(self, session: Session, status: Status) -> None:
        if status.state == "FAILED":
            session.client.set_tag(self._run_id, "failure", valid_text(status.reason or "no reason given", MAX_TAG))
        elif "failure" in session.client.get_run(self._run_id).data.tags:
            session.client.delete_tag(self._run_id, "failure")  # of an earlier attempt
        session.client.set_terminated(self._run_id, status.state, end_time=to_ms(status.ended or status.heartbeat))

    def _send_finals(self, session: Session, status: Status) -> None:
        """The values of final.json that no record carried; of a sweep, how many of its trials ended how."""
        from mlflow.entities import Metric

        values = (self.folder.read_json("final.json") or {}).get("values", {})
        counts = (self.folder.read_json("results.json") or {}).get("counts", {})
        values |= {f"trials/{state.lower()}": count for state, count in counts.items()}
        step = max(self._last_step.values(), default=0)
        time_ms = to_ms(status.ended or status.heartbeat)
        metrics = [
            Metric(valid_key(key), float(f"{float(value):.4g}"), time_ms, step)
            for key, value in values.items()
            if key not in self._last_step and value is not None
        ]
        if metrics:
            session.client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            self._last_step.update(dict.fromkeys(values, step))

    def _send_artifacts(self, session: Session, status: Status) -> None:
        """Uploads each small file once for each content. A store without room for files is no reason to hold up numbers."""
        try:
            for name, target in _artifacts(self.folder):
                content = storage.read_bytes(self.folder.path(name))
                found = hashlib.sha256(content).hexdigest()
                if self._stored.get(name) != found:
                    _upload(session.client, self._run_id, name, content, target)
                    self._stored[name] = found
            self._files_sent_at = (status.state, status.attempt)
        except Exception as error:  # noqa: BLE001 - every artifact store raises its own kind
            logger.warning("files of run %s were not stored in MLflow: %s", self.folder.name, one_line(error))

    def _save_marker(self, session: Session) -> None:
        marker = {
            "uri": public_uri(session.uri),
            "run_id": self._run_id,
            "records": self._passed,
            "last": _stamp(self._last) if self._last else None,
            "artifacts": dict(self._stored),
            "content": self._content.marker(),
        }
        if marker != self._marker:
            self.folder.write_json(MARKER, marker)
            self._marker = marker


def find_run(session: Session, run_uid: str) -> Any:
    """The MLflow run with a run_uid, or None; the oldest where two drivers raced to create it."""
    found = session.client.search_runs(
        [session.experiment_id],
        filter_string=f"tags.`{RUN_UID_TAG}` = '{run_uid}'",
        max_results=1,
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
    )
    return found[0] if found else None


def _points(record: Record) -> list["Metric"]:
    from mlflow.entities import Metric

    time_ms = to_ms(record.time)
    return [Metric(valid_key(key), value, time_ms, record.step) for key, value in record.values.items()]


def _stamp(record: Record) -> dict[str, Any]:
    return {"step": record.step, "time": record.time, "attempt": record.attempt}


def _artifacts(folder: RunFolder) -> list[tuple[str, str | None]]:
    """(file in the folder, folder among the artifacts) of what a run leaves to look at."""
    files: list[tuple[str, str | None]] = [(name, None) for name in _FILES]
    pictures = [name for name in storage.list_dir(folder.path("pictures")) if name.endswith(_PICTURE_TYPES)]
    files += [(f"pictures/{name}", "pictures") for name in pictures[-MAX_PICTURES:]]
    return [(name, target) for name, target in files if _is_small(folder.path(name))]


def _is_small(uri: str) -> bool:
    try:
        return storage.size(uri) <= MAX_ARTIFACT_BYTES
    except FileNotFoundError:
        return False


def _upload(client: "MlflowClient", run_id: str, name: str, content: bytes, target: str | None) -> None:
    """Stores exactly the bytes that were digested, from a file of that name: MLflow takes no bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / name.rpartition("/")[2]
        path.write_bytes(content)
        client.log_artifact(run_id, str(path), target)
