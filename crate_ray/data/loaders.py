"""Threads that run a reader's tasks in the order they were given.

In: functions. Out: futures. They differ from a ThreadPoolExecutor in one thing: a thread that is stuck, in a read from a dead
mount or in a decoder, holds up neither `close` nor the end of the interpreter. So they are daemons, and are waited for briefly.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger(__name__)

NAME = "crate-ray-loader"
_CLOSE_S = 5.0


class LoaderThreads:
    """A fixed number of daemon threads and their queue."""

    def __init__(self, num_threads: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"{NAME}-{i}", daemon=True) for i in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Queue a call; its future holds the result or the error."""
        future: Future[Any] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # noqa: BLE001  handed to whoever waits for the batch
                    future.set_exception(error)
            del task, future, arguments  # a batch must not live on in an idle thread

    def close(self) -> None:
        """End the threads; one that does not come back within seconds is named in the log and left behind."""
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [thread.name for thread in self._threads if thread.is_alive()]
        if stuck:
            logger.warning("closed without %s: still busy after %.0f s", ", ".join(stuck), _CLOSE_S)
