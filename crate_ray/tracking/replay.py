"""One run folder, replayed to MLflow: from the beginning, or from where an earlier replay stopped.

In: a RunFolder. Out: an MLflow run with its points, status and small files. Everything may be sent again: points are
stored once (see backlog), tags and parameters replace themselves, a small file is uploaded once for each content; so a
lost or wrong progress marker costs time and never correctness. MLflow cannot take a point back: steps that a resumed
attempt repeats are sent once, from the attempt that came first, where the run folder lets the last attempt win. A second
point there would draw a saw-tooth.
MLflow itself never notices that a driver died. While a run goes on, a tag says when its driver was last known to live.
"""

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crate_ray import storage
from crate_ray.runs import RunFolder, Status, read_status
from crate_ray.tracking.backlog import Backlog
from crate_ray.tracking.client import hide_secrets, one_line, public_uri
from crate_ray.tracking.content import RunContent
from crate_ray.tracking.describe import HEARTBEAT_TAG, PARENT_TAG, RUN_UID_TAG, Description, describe, to_ms
from crate_ray.tracking.limits import MAX_TAG, log_params, log_points, log_tags, point, valid_text
from crate_ray.tracking.row_tag import MirroredRow

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

MARKER = "tracking.json"
MAX_ARTIFACT_BYTES = 8 * 2**20
MAX_PICTURES = 64
BEAT_SECONDS = 60.0  # between two heartbeats of a run in MLflow
_MAX_TWINS = 20
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
        self._backlog = Backlog(folder)
        self._beaten: float | None = None  # the driver's heartbeat that MLflow shows
        self._next_beat = 0.0
        self._status: Status | None = None
        self._described: Description | None = None
        self._is_incomplete = False  # a folder with files missing that say what the run is
        self._mirrored: tuple[str, int] | None = None  # (state, attempt) that MLflow shows
        self._has_parent = False
        self._stored: dict[str, str] = {}  # file: digest of the content that MLflow has
        self._files_sent_at: tuple[str, int] | None = None  # (state, attempt) at which this replay sent the files
        self._marker: dict[str, Any] = {}
        self._content = RunContent(folder)  # what is shown beside the numbers
        self._row = MirroredRow(folder)

    @property
    def sent(self) -> int:
        """Records sent by this replay."""
        return self._backlog.sent

    @property
    def pending(self) -> int:
        """Records read from the folder and not sent."""
        return len(self._backlog) + self._content.pending

    @property
    def pending_points(self) -> int:
        """Values in memory."""
        return self._backlog.points + self._content.points

    @property
    def has_more(self) -> bool:
        """Whether the folder may hold records that were not read yet."""
        return self._backlog.has_more or self._content.has_more

    @property
    def is_behind(self) -> bool:
        """Whether records wait that can be sent, in memory or in the folder, as far as it was read."""
        return (self._backlog.is_behind or self._content.is_behind) and not self._is_incomplete

    @property
    def is_complete(self) -> bool:
        """Whether the run ended well and all of it is in MLflow."""
        return self._mirrored is not None and self._mirrored[0] == "FINISHED" and not self.is_behind

    @property
    def has_ended(self) -> bool:
        """Whether the run had ended, well or not, when the folder was read last."""
        return self._status is not None and self._status.state != "RUNNING"

    def look_again(self) -> None:
        """Compares the files with what is stored once more at the next push: some may have come after the run's end."""
        self._files_sent_at = None

    def poll(self) -> None:
        """Reads what is new, a piece at a time. The status first: of a run that had ended then, the last piece is the end."""
        if self._described is None:
            self._described = describe(self.folder)
        self._is_incomplete = self._described is None
        self._status = read_status(self.folder)
        self._content.see(self._backlog.poll())
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
            self._beat(session)
            self._link_parent(session)
            self._backlog.push(session.client, self._run_id, expired=expired)
            if self._backlog:
                return
            status = None if self._backlog.is_behind else self._status
            self._content.send(session.client, self._run_id, self._described, status, expired=expired)
            if self._status is not None and not self.is_behind:
                self._mirror_status(session, self._status)
        finally:
            self._save_marker(session)

    @property
    def _run_id(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _open(self, session: Session, described: Description) -> None:
        """Finds the run by its tag or creates it, completes its parameters, and skips what it has."""
        found = self._find_one(session, described.run_uid)
        if found is None:
            beat = self._status.heartbeat if self._status else described.start_ms / 1000
            found = session.client.create_run(
                session.experiment_id,
                start_time=described.start_ms,
                tags=described.tags | {HEARTBEAT_TAG: f"{beat:.0f}"},
                run_name=described.name,
            )
            self._has_beaten(beat)
        run_id = str(found.info.run_id)
        missing = {key: value for key, value in described.params.items() if key not in found.data.params}
        log_params(session.client, run_id, missing)
        tags = found.data.tags
        log_tags(session.client, run_id, {key: value for key, value in described.tags.items() if key not in tags})
        self._mirrored = (str(found.info.status), int(tags.get("attempt", 0)))
        self._has_parent = PARENT_TAG in tags
        self._row.restore(tags)
        self._skip_sent(session, run_id)
        session.run_ids[described.run_uid] = run_id
        self.run_id = run_id

    def _find_one(self, session: Session, run_uid: str) -> Any:
        """This run in MLflow, or None; of several, that of the marker, or the oldest, and the others are deleted.

        There are several where two processes created it at once, or a server took so long over it that it was asked again.
        """
        found = find_runs(session, run_uid)
        if len(found) > 1:
            known = (self.folder.read_json(MARKER) or {}).get("run_id") if self.run_id is None else self.run_id
            found.sort(key=lambda run: run.info.run_id != known)  # stable: the known one, then by age
            for twin in found[1:]:
                session.client.delete_run(twin.info.run_id)
        return found[0] if found else None

    def _skip_sent(self, session: Session, run_id: str) -> None:
        """Follows the marker where it is about this MLflow run and agrees with the records."""
        marker = self.folder.read_json(MARKER) or {}
        if marker.get("run_id") != run_id or marker.get("uri") != public_uri(session.uri):
            return
        stored = marker.get("artifacts")
        self._stored = dict(stored) if isinstance(stored, dict) else {}
        self._content.restore(marker.get("content"))
        self._backlog.resume(marker)

    def _beat(self, session: Session) -> None:
        """Says at most once a minute when the driver was last known to live; a run that somebody closed meanwhile is opened."""
        status = self._status
        if status is None or status.state != "RUNNING" or status.heartbeat == self._beaten:
            return
        is_shown = self._mirrored is not None and self._mirrored[0] == "RUNNING"
        if is_shown and time.monotonic() < self._next_beat:
            return
        client = session.client
        run = client.get_run(self._run_id)
        if run.info.status != "RUNNING" and not status.is_stale:
            client.update_run(self._run_id, status="RUNNING")
            self._forget_failure(session, run)
        client.set_tag(self._run_id, HEARTBEAT_TAG, f"{status.heartbeat:.0f}")
        self._mirrored = ("RUNNING", self._mirrored[1] if self._mirrored else 0)
        self._has_beaten(status.heartbeat)

    def _has_beaten(self, beat: float) -> None:
        self._beaten, self._next_beat = beat, time.monotonic() + BEAT_SECONDS

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
        if status.state != "RUNNING":
            self._send_finals(session, status)
            if state != status.state or attempt != status.attempt:
                self._terminate(session, status)
        if self._files_sent_at != (status.state, status.attempt):
            self._row.send(client, self._run_id)
            self._send_artifacts(session, status)  # of a run that goes on: what it was asked to do
        self._mirrored = (status.state, status.attempt)

    def _terminate(self, session: Session, status: Status) -> None:
        client = session.client
        run = self._find_one(session, self._described.run_uid) if self._described else None
        if status.state == "FAILED":
            client.set_tag(self._run_id, "failure", valid_text(status.reason or "no reason given", MAX_TAG))
        elif run is not None:
            self._forget_failure(session, run)
        client.set_terminated(self._run_id, status.state, end_time=to_ms(status.ended or status.heartbeat))

    def _forget_failure(self, session: Session, run: Any) -> None:
        if "failure" in run.data.tags:
            session.client.delete_tag(self._run_id, "failure")  # of an earlier attempt

    def _send_finals(self, session: Session, status: Status) -> None:
        """The values of final.json that no record carried; of a sweep, how many of its trials ended how."""
        values = (self.folder.read_json("final.json") or {}).get("values", {})
        counts = (self.folder.read_json("results.json") or {}).get("counts", {})
        values |= {f"trials/{state.lower()}": count for state, count in counts.items()}
        last_step = self._backlog.last_step
        step = max(last_step.values(), default=0)
        time_ms = to_ms(status.ended or status.heartbeat)
        new = {key: value for key, value in values.items() if key not in last_step and value is not None}
        log_points(
            session.client, self._run_id, [point(key, float(f"{float(v):.4g}"), time_ms, step) for key, v in new.items()]
        )
        last_step.update(dict.fromkeys(new, step))

    def _send_artifacts(self, session: Session, status: Status) -> None:
        """Uploads each small file once for each content. A store without room for files is no reason to hold up numbers."""
        try:
            for name, target in _artifacts(self.folder):
                content = _read_public(self.folder.path(name))
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
            **self._backlog.marker(),
            "artifacts": dict(self._stored),
            "content": self._content.marker(),
        }
        if marker != self._marker:
            self.folder.write_json(MARKER, marker)
            self._marker = marker


def find_runs(session: Session, run_uid: str) -> list[Any]:
    """The MLflow runs with a run_uid, the oldest first."""
    found = session.client.search_runs(
        [session.experiment_id],
        filter_string=f"tags.`{RUN_UID_TAG}` = '{run_uid}'",
        max_results=_MAX_TWINS,
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
    )
    return list(found)


def find_run(session: Session, run_uid: str) -> Any:
    """The MLflow run with a run_uid, or None; the oldest of several."""
    found = find_runs(session, run_uid)
    return found[0] if found else None


def _artifacts(folder: RunFolder) -> list[tuple[str, str | None]]:
    """(file in the folder, folder among the artifacts) of what a run leaves to look at."""
    files: list[tuple[str, str | None]] = [(name, None) for name in _FILES]
    pictures = [name for name in storage.list_dir(folder.path("pictures")) if name.endswith(_PICTURE_TYPES)]
    files += [(f"pictures/{name}", "pictures") for name in pictures[-MAX_PICTURES:]]
    return [(name, target) for name, target in files if _is_small(folder.path(name))]


def _read_public(uri: str) -> bytes:
    """A file as others may see it: a configuration names the tracking store, perhaps with its password."""
    content = storage.read_bytes(uri)
    return hide_secrets(content.decode()).encode() if uri.partition("?")[0].endswith(".yaml") else content


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
