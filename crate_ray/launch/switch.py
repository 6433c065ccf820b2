"""What can end a worker group from outside, watched by rank 0 in a thread of its own.

In: the line to the driver, the notices of nodes that leave, the attempt that the run folder stands at. Out: a wish to stop that
the loop makes all ranks agree on, and why others are to go on from there. Workers whose driver is gone write a last checkpoint;
those of an attempt that is no longer the newest end at once and write nothing more.
"""

import logging
import os
import threading
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.context import get_train_context

from crate_ray import storage
from crate_ray.runs import RunFolder, read_status

log = logging.getLogger(__name__)

POLL_S = 0.5
ANSWER_S = 5.0  # for the line to answer
LOST_S = 30.0  # without an answer the driver counts as gone: its node may be, and nobody left to say so
FENCE_S = 5.0  # between two looks at the attempt; a driver that takes a run over needs longer to start workers
OUTDATED = 3  # exit code of a process that a newer attempt has replaced


class StopSwitch:
    """Whether this group is to write a checkpoint and leave.

    Args:
        line: A RunLine.
        folder: The run.
        attempt: Of this group's driver.
    """

    def __init__(self, line: Any, folder: RunFolder, attempt: int) -> None:
        self._line, self._folder, self._attempt = line, folder, attempt
        self._stop = False
        self._pause: str | None = None
        self._heard = self._fenced = time.monotonic()
        self._closed = threading.Event()

    def start(self) -> None:
        """Begins to watch; what was asked of the group before this one is forgotten."""
        self._line.join.remote()
        threading.Thread(target=self._watch, name="stop-switch", daemon=True).start()

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    @property
    def is_set(self) -> bool:
        """Whether to stop, for any reason."""
        return self._stop or self._pause is not None

    @property
    def pause_reason(self) -> str | None:
        """Why others are to go on from the checkpoint; None when the run itself is to stop."""
        return None if self._stop else self._pause

    def ask(self) -> None:
        """Asks the line now.

        Raises:
            RayError: Nobody answers, or the line is gone.
        """
        stop, pause = ray.get(self._line.wish.remote(), timeout=ANSWER_S)
        self._heard = time.monotonic()
        self._stop, self._pause = self._stop or stop, self._pause or pause

    def give_up(self) -> None:
        """Stops because the driver is gone."""
        self._stop = True

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            self._end_if_outdated()
            notice = get_train_context().preemption_context.preemption_info
            if notice is not None:
                self._pause = self._pause or f"a node is about to leave (ranks {notice.preempted_ranks})"
            try:
                self.ask()
            except ray.exceptions.ActorDiedError:
                self.give_up()
            except ray.exceptions.RayError:  # a passing fault of the network, or the end of the driver's node
                if time.monotonic() - self._heard > LOST_S:
                    self.give_up()

    def _end_if_outdated(self) -> None:
        """A process that outlived its driver must not write beside the driver that took the run over."""
        if time.monotonic() - self._fenced < FENCE_S:
            return
        try:
            with storage.retry_deadline(FENCE_S):
                status = read_status(self._folder)
        except (OSError, ValueError, TypeError):  # out of reach, or written by a program that is newer than this one
            return
        self._fenced = time.monotonic()
        if status is not None and status.attempt > self._attempt:
            log.error("attempt %d has taken over from attempt %d: ending this process", status.attempt, self._attempt)
            os._exit(OUTDATED)
