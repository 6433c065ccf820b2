"""Status and lease: is this run going on, how did it end, and who holds it.

status.json says RUNNING, FINISHED, FAILED or KILLED, with a heartbeat. lease.json names the live
driver, so that two drivers cannot write one folder: the second is refused until the first has not
beaten for LEASE_SECONDS. Not a lock against malice; clocks are assumed to agree within seconds.
"""

import fcntl
import logging
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, replace
from typing import Literal

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.runs.folder import RunFolder

log = logging.getLogger(__name__)

State = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
LEASE_SECONDS = 60.0
HEARTBEAT_SECONDS = 15.0
SETTLE_SECONDS = 2.0
_RETRY_SECONDS = 5.0  # after a beat that could not be written


@dataclass(frozen=True)
class Status:
    """How a run stands; times in unix seconds."""

    state: State
    attempt: int
    started: float
    heartbeat: float
    ended: float | None = None
    reason: str | None = None

    @property
    def is_stale(self) -> bool:
        """RUNNING, yet nothing has beaten for the length of a lease: its driver died."""
        return self.state == "RUNNING" and time.time() - self.heartbeat > LEASE_SECONDS


def read_status(folder: RunFolder) -> Status | None:
    """The run's status, or None when it never started."""
    body = folder.read_json("status.json")
    if body is None:
        return None
    body.pop("schema_version", None)
    return Status(**body)


def write_status(folder: RunFolder, status: Status) -> None:
    """Writes status.json."""
    folder.write_json("status.json", asdict(status))


def close_stale(folder: RunFolder) -> bool:
    """Writes FAILED, as of the last heartbeat, for a run whose driver died; whether it was one."""
    status = read_status(folder)
    if status is None or not status.is_stale:
        return False
    write_status(folder, replace(status, state="FAILED", ended=status.heartbeat, reason="driver died"))
    return True


class LeaseLostError(RuntimeError):
    """Another driver took the run over while this one did not beat."""


class Lease:
    """The right of one driver to write a run folder, and its heartbeat in the status.

    Use as: `lease = Lease.take(folder)`, `lease.beat()` at least every HEARTBEAT_SECONDS, `lease.end(state)`.
    """

    def __init__(self, folder: RunFolder, owner: str, status: Status) -> None:
        self._folder = folder
        self._owner = owner
        self._last_beat = 0.0
        self.status = status

    @classmethod
    def take(cls, folder: RunFolder) -> "Lease":
        """Takes the folder and marks the run RUNNING with the next attempt number.

        Raises:
            ConfigError: Another live driver holds it.
        """
        cls.check_free(folder)
        previous = read_status(folder)
        now = time.time()
        status = Status("RUNNING", (previous.attempt if previous else 0) + 1, now, now)
        lease = cls(folder, uuid.uuid4().hex, status)
        lease._claim()
        lease.beat(force=True)
        return lease

    def _claim(self) -> None:
        """Writes the lease so that of two drivers at once only one gets it.

        On a local disk a file lock orders them. An object store has none: the last writer wins, and after SETTLE_SECONDS
        both read who that was.
        """
        if self._folder.is_local:
            storage.make_dir(self._folder.uri)
            with storage.local_path(self._folder.path(".lease.lock")).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.check_free(self._folder)
                self._folder.write_json("lease.json", self._body(time.time()))
            return
        self._folder.write_json("lease.json", self._body(time.time()))
        time.sleep(SETTLE_SECONDS)
        held = self._folder.read_json("lease.json")
        if held is None or held["owner"] != self._owner:
            raise ConfigError(f"run '{self._folder.name}' was taken by another driver at this moment; watch that one instead")

    def _body(self, now: float) -> dict[str, object]:
        return {"owner": self._owner, "heartbeat": now, "host": socket.gethostname(), "pid": os.getpid()}

    @classmethod
    def check_free(cls, folder: RunFolder) -> None:
        """Refuses a folder that another live driver holds.

        Raises:
            ConfigError: Who holds it.
        """
        held = folder.read_json("lease.json")
        if held is not None and time.time() - held["heartbeat"] < LEASE_SECONDS and not _is_dead(held):
            raise ConfigError(
                f"run '{folder.name}' is held by another live driver ({held['host']}, process {held['pid']}, last seen "
                f"{time.time() - held['heartbeat']:.0f} s ago); stop that one, wait {LEASE_SECONDS:.0f} s, "
                "or give this run another name"
            )

    @property
    def attempt(self) -> int:
        """Which start of the run this is, from 1."""
        return self.status.attempt

    def beat(self, *, force: bool = False) -> None:
        """Says that the driver lives; cheap to call often.

        Raises:
            LeaseLostError: This driver was silent for so long that another one took the run.
        """
        if not force:
            if time.monotonic() - self._last_beat < HEARTBEAT_SECONDS:
                return
            self._check_held()
        now = time.time()
        self.status = Status("RUNNING", self.status.attempt, self.status.started, now)
        try:
            with storage.retry_deadline(HEARTBEAT_SECONDS):  # a beat that is written late would vouch for what is past
                self._folder.write_json("lease.json", self._body(now))
                write_status(self._folder, self.status)
        except OSError as error:
            # A store that refuses must not end a run; before each beat is a look whether another driver has taken it.
            log.warning("no heartbeat in %s: %s", self._folder.uri, error)
            if force:
                raise
            self._last_beat = time.monotonic() - HEARTBEAT_SECONDS + _RETRY_SECONDS
            return
        self._last_beat = time.monotonic()

    def end(self, state: State, reason: str | None = None) -> None:
        """Writes how the run ended and gives the folder back; LeaseLostError where it is another's by now."""
        self._check_held()
        now = time.time()
        self.status = Status(state, self.status.attempt, self.status.started, now, ended=now, reason=reason)
        write_status(self._folder, self.status)
        storage.delete(self._folder.path("lease.json"))

    def _check_held(self) -> None:
        try:
            with storage.retry_deadline(HEARTBEAT_SECONDS):
                held = self._folder.read_json("lease.json")
        except OSError as error:
            log.warning("cannot read the lease in %s: %s", self._folder.uri, error)
            return
        if held is None or held["owner"] != self._owner:
            raise LeaseLostError(f"run '{self._folder.name}' was taken over by another driver; this one leaves it alone")


def _is_dead(held: dict[str, object]) -> bool:
    """Whether the holder was a process of this machine that is gone: no need to wait for its lease."""
    if held["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(str(held["pid"])), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
