"""Threads that run a reader's tasks in the order they were given, and threads that fetch its shards ahead.

In: functions. Out: futures. They differ from a ThreadPoolExecutor in one thing: a thread that is stuck, in a read from a dead
mount or in a decoder, holds up neither `close` nor the end of the interpreter. So they are daemons, and are waited for briefly.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

logger = logging.getLogger(__name__)

NAME = "crate-ray-loader"
_CLOSE_S = 5.0
_PREFETCH_THREADS = 2
_ROOM_POLL_S = 1.0


def _join(threads: list[threading.Thread]) -> None:
    """Wait for threads to end, some seconds in all."""
    deadline = time.monotonic() + _CLOSE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if stuck:
        logger.warning("closed without %s: still busy after %.0f s", ", ".join(stuck), _CLOSE_S)


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
        _join(self._threads)


class Prefetcher:
    """Threads that fetch shards in the order in which they will be needed; one that does not fit waits for room."""

    def __init__(self, fetch: Callable[[int], bool]) -> None:
        self._fetch = fetch
        self._queue: deque[int] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"crate-ray-prefetch-{i}", daemon=True) for i in range(_PREFETCH_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, shards: Iterable[int]) -> None:
        """Fetch these after those before them, each once; with none, look again whether there is room."""
        with self._changed:
            queued = set(self._queue)
            self._queue.extend(number for number in shards if number not in queued)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                number = self._queue.popleft()
            if not self._fetch(number):
                with self._changed:
                    self._queue.appendleft(number)
                    self._changed.wait(_ROOM_POLL_S)

    def close(self) -> None:
        """End the threads; one that is stuck is left behind."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        _join(self._threads)
