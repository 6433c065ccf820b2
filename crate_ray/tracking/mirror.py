"""The driver's mirror: one thread that follows run folders and sends them to MLflow.

In: run folders while they are written. Out: MLflow runs, as close behind as the server allows.
The run folder is the queue: nothing is lost when the server is down, slow or silent, or when this
process dies, and nothing is held in memory beyond `max_points`. The caller never waits: `follow`
hands over a name, `close` is bounded. The trade-off: one thread for all runs, so that a slow server
delays the mirror of every run, and the training of none. Runs take turns of `_TURN_SECONDS`, and one
that the server fails over comes last the next time: none keeps the others from being sent.
"""

import logging
import queue
import threading
import time
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder
from crate_ray.tracking.client import absolute_uri, explain, one_line, public_uri, web_url
from crate_ray.tracking.experiment import connect
from crate_ray.tracking.replay import RunReplay, Session
from crate_ray.tracking.views import run_url, view_links

logger = logging.getLogger(__name__)

_PASS_SECONDS = 1.0
_REMOTE_PASS_SECONDS = 10.0  # every look at an object store is a paid request
_TURN_SECONDS = 2.0
_MAX_BACKOFF_SECONDS = 60.0
# The server's word about one run; anything else is taken for a server in trouble.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "PERMISSION_DENIED"}


@dataclass(frozen=True)
class MirrorSummary:
    """What a mirror did: records sent, records it knows of and could not send, and the last reason why."""

    sent: int
    pending: int
    error: str | None


class Mirror:
    """Follows run folders in one thread; use as a context manager, or call `close`.

    Args:
        uri: The tracking store; None of its faults reaches the caller.
        experiment: Name of the experiment.
        timeout_s: How long one request may take.
        max_points: Values held in memory over all runs before the folders are left to wait.
        artifact_root: Where a new experiment keeps files, for a database that is no sqlite; a server decides for itself.
    """

    def __init__(
        self, uri: str, experiment: str, *, timeout_s: float = 5, max_points: int = 200_000, artifact_root: str | None = None
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._timeout_s = timeout_s
        self._max_points = max_points
        self._artifact_root = artifact_root
        self._inbox: queue.SimpleQueue[RunReplay | str] = queue.SimpleQueue()  # a run to follow, or the URI of one to release
        self._replays: dict[str, RunReplay] = {}
        self._released: dict[str, bool] = {}  # whether the folder was read since
        self._retired: dict[str, str] = {}  # name: MLflow run, of released runs of which all is there
        self._retired_sent = 0
        self._session: Session | None = None
        self._server_error: str | None = None
        self._run_errors: dict[str, str] = {}
        self._warned = False
        self._backoff_s = 0.0
        self._retry_at = 0.0
        self._held_until: dict[str, float] = {}
        self._deadline: float | None = None
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def follow(self, folder: RunFolder, *, parent_uid: str | None = None) -> None:
        """Mirrors a run from now on; returns at once.

        Args:
            folder: The run; following it twice is following it once.
            parent_uid: run_uid of the sweep above it, where run_meta.json does not say.
        """
        self._inbox.put(RunReplay(folder, parent_uid=parent_uid))
        self._wake.set()

    def release(self, folder: RunFolder) -> None:
        """Nothing more is written to this run: what is new is sent, its files too, and then the mirror forgets it."""
        self._inbox.put(folder.uri)
        self._wake.set()

    def close(self, timeout_s: float = 10) -> MirrorSummary:
        """Drains what is there for at most `timeout_s` and stops; what is left waits for `tracking sync`."""
        if self._deadline is None:
            self._deadline = time.monotonic() + timeout_s
            self._wake.set()
        self._thread.join(max(self._deadline - time.monotonic(), 0))
        replays = list(self._replays.values())
        sent = self._retired_sent + sum(replay.sent for replay in replays)
        error = self._server_error or next(iter(self._run_errors.values()), None)
        if error is None and (self._thread.is_alive() or any(replay.is_behind for replay in replays)):
            error = f"MLflow did not take everything within {timeout_s:g} s"
        return MirrorSummary(sent, sum(replay.pending for replay in replays), error)

    def links(self) -> dict[str, Any]:
        """Addresses to open: {"experiment": the first view or None, "views": {title: address}, "runs": {run name: address}}."""
        session = self._session
        if session is None:
            return {"experiment": None, "views": {}, "runs": {}}
        base = web_url(session.uri)
        ids = dict(self._retired)
        ids |= {replay.folder.name: replay.run_id for replay in list(self._replays.values()) if replay.run_id is not None}
        runs = {name: run_url(base, session.experiment_id, run_id) for name, run_id in ids.items()}
        views = view_links(session.uri, base, session.experiment_id)
        return {"experiment": next(iter(views.values())), "views": views, "runs": runs}

    def _run(self) -> None:
        while self._deadline is None:
            self._wake.wait(0 if self._is_catching_up() else self._pass_seconds())
            self._wake.clear()
            self._admit()
            self._poll()
            if time.monotonic() >= self._retry_at:
                self._push()
        self._admit()
        self._poll()
        self._push()
        while self._is_catching_up():
            self._poll()
            self._push()

    def _pass_seconds(self) -> float:
        return _PASS_SECONDS if all(replay.folder.is_local for replay in self._replays.values()) else _REMOTE_PASS_SECONDS

    def _is_catching_up(self) -> bool:
        """Whether a run waits to be sent that a working server has not refused."""
        if self._server_error is not None or self._is_expired():
            return False
        return any(replay.is_behind and not self._is_held(uri) for uri, replay in self._replays.items())

    def _admit(self) -> None:
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(item, RunReplay):
                self._replays.setdefault(item.folder.uri, item)
                self._released.pop(item.folder.uri, None)
            elif item in self._replays:
                self._released[item] = False
                self._replays[item].look_again()

    def _poll(self) -> None:
        """Reads the folders a piece on, unless more waits in memory than may. The last pass reads finished runs again."""
        points = sum(replay.pending_points for replay in self._replays.values())
        for uri, replay in list(self._replays.items()):
            if self._is_expired() or points >= self._max_points:
                return
            if self._may_rest(uri, replay) or self._released.get(uri) or (replay.pending and replay.has_more):
                continue
            before = replay.pending_points
            try:
                replay.poll()
            except Exception as error:  # noqa: BLE001 - a folder that cannot be read must not end the mirror
                self._start_over(uri, error)
            else:
                points += replay.pending_points - before
                if uri in self._released:
                    self._released[uri] = replay.has_ended and not replay.has_more

    def _push(self) -> None:
        """Sends what was read; a server in trouble ends the pass, a refused run only its own turn."""
        for uri, replay in list(self._replays.items()):
            if self._is_expired():
                return
            if self._may_rest(uri, replay):
                continue
            turn_end = time.monotonic() + _TURN_SECONDS
            try:
                replay.push(self._connect(), expired=partial(self._is_over, turn_end))
            except Exception as error:  # noqa: BLE001 - the boundary: nothing of MLflow's reaches training
                if self._is_server_trouble(error):
                    self._back_off(error)
                    self._replays[uri] = self._replays.pop(uri)  # the next pass begins with another run
                    return
                self._start_over(uri, error)
            else:
                if replay.run_id is not None:
                    self._run_errors.pop(uri, None)
                if self._released.get(uri) and replay.run_id is not None and not replay.is_behind:
                    self._retire(uri, replay.run_id)
        if self._server_error is not None and self._session is not None:
            logger.info("MLflow at %s answers again", public_uri(self._uri))
            self._backoff_s, self._server_error = 0.0, None

    def _retire(self, uri: str, run_id: str) -> None:
        """Forgets a run of which everything is there but how it is found."""
        replay = self._replays[uri]
        self._retired[replay.folder.name] = run_id
        self._retired_sent += replay.sent
        del self._replays[uri], self._released[uri]
        self._held_until.pop(uri, None)

    def _may_rest(self, uri: str, replay: RunReplay) -> bool:
        """Nothing to do for this run now: it is all there, or was refused lately. The last pass tries everything."""
        is_done = replay.is_complete and uri not in self._released
        return self._deadline is None and (is_done or self._is_held(uri))

    def _is_held(self, uri: str) -> bool:
        """Whether MLflow refused the run lately."""
        return time.monotonic() < self._held_until.get(uri, 0)

    def _connect(self) -> Session:
        if self._session is None:
            uri = absolute_uri(self._uri)
            client, experiment_id = connect(uri, self._experiment, timeout_s=self._timeout_s, artifact_root=self._artifact_root)
            self._session = Session(client, uri, experiment_id)
        return self._session

    def _is_server_trouble(self, error: Exception) -> bool:
        if self._session is None:
            return True
        from mlflow.exceptions import MlflowException

        return isinstance(error, MlflowException) and error.error_code not in _REFUSALS

    def _start_over(self, uri: str, error: Exception) -> None:
        """Forgets what is known of one run and reads it again from its marker, after a while."""
        failed = self._replays[uri]
        if self._deadline is None:  # in the last pass its records still count as pending
            self._retired_sent += failed.sent
            self._replays[uri] = RunReplay(failed.folder, parent_uid=failed.parent_uid)
            if uri in self._released:
                self._released[uri] = False
        self._held_until[uri] = time.monotonic() + _MAX_BACKOFF_SECONDS
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            self._session = None  # the experiment itself may be gone
        self._run_errors[uri] = f"run {failed.folder.name}: {one_line(error)}"
        self._report(self._run_errors[uri])

    def _back_off(self, error: Exception) -> None:
        hopeless = isinstance(error, ConfigError)
        self._backoff_s = _MAX_BACKOFF_SECONDS if hopeless else min(max(1.0, 2 * self._backoff_s), _MAX_BACKOFF_SECONDS)
        self._retry_at = time.monotonic() + self._backoff_s
        self._server_error = explain(error)
        self._report(self._server_error)

    def _report(self, reason: str) -> None:
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        logger.log(
            level,
            "MLflow at %s is behind (%s); training goes on, the numbers are in the run folders and "
            "`crate-ray tracking sync` sends what is missing",
            public_uri(self._uri),
            reason,
        )

    def _is_over(self, turn_end: float) -> bool:
        return self._is_expired() or time.monotonic() >= turn_end

    def _is_expired(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline
