"""Ends a worker that makes no progress, with a trace: a hang becomes a failure, which restarts the group.

In: `feed` after every step, `patient` around what may take long. Out: when nothing came for `scale.hang_timeout_s`, the
stacks of all threads in `hangs/attempt_K_rank_R.txt` of the run folder, and the end of the process. Every rank watches
itself: one that is stopped from outside cannot speak, but those that wait for it in a collective can, and do.

Two clocks run. A thread writes the readable trace; it needs Python's lock, as all Python does. Behind it a timer of
`faulthandler`, which needs no lock, is set anew by the thread; it fires where native code holds the lock for good. The price
is one wake-up a second, and a bound on honest work: what takes longer than LONG times the limit at a stretch counts as a hang.
"""

import faulthandler
import logging
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Self

from crate_ray import storage
from crate_ray.runs import RunFolder, WorkerContext

log = logging.getLogger(__name__)

HANG_EXIT_CODE = 74
"""Of a process that ended itself because it made no progress."""
LONG = 6.0
"""The first step with its compilation, an evaluation, a checkpoint: so many times the limit, each."""
_WRITE_S = 30.0  # for the trace to reach a store that may be what hangs
_FALLBACK_S = 2.0  # so much later the timer without Python's lock fires
_FOLDER = "hangs"


class Watchdog:
    """Watches one worker from `with` to its end.

    Args:
        folder: The run.
        context: This worker.
        timeout_s: Silence after which it counts as hanging.
    """

    def __init__(self, folder: RunFolder, context: WorkerContext, *, timeout_s: float) -> None:
        self._folder, self._rank, self._attempt, self._timeout_s = folder, context.rank, context.attempt, timeout_s
        self._name = f"attempt_{context.attempt}_rank_{context.rank}.txt"
        self._fed_at, self._limit_s, self._doing = time.monotonic(), LONG * timeout_s, "start"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._fallback: IO[str] | None = None

    def __enter__(self) -> Self:
        self._fallback = self._open_fallback()
        self._set_timer()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._fallback is not None:
            self._fallback.close()
            self._drop_if_empty(self._name)
            with suppress(OSError):  # other traces are there
                storage.local_path(self._folder.path(_FOLDER)).rmdir()

    def feed(self, doing: str, *, is_long: bool = False) -> None:
        """Progress was made; costs three assignments, and after a long phase the start of a timer.

        Args:
            doing: What comes next, for the trace.
            is_long: Whether that may take LONG times the limit.
        """
        limit_s = LONG * self._timeout_s if is_long else self._timeout_s
        is_shorter = limit_s < self._limit_s
        self._fed_at, self._limit_s, self._doing = time.monotonic(), limit_s, doing
        if is_shorter:  # the thread may never come to it: what follows could be what holds Python's lock for good
            self._set_timer()

    @contextmanager
    def patient(self, doing: str) -> Iterator[None]:
        """Around what may take LONG times the limit at a stretch; the limit of before holds again afterwards."""
        before = self._doing
        self.feed(doing, is_long=True)
        yield
        self.feed(before)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._timeout_s / 4)):
            self._set_timer()
            if self._silent_s() > self._limit_s:
                self._end()

    def _silent_s(self) -> float:
        return time.monotonic() - self._fed_at

    def _set_timer(self) -> None:
        left_s = max(0.0, self._limit_s - self._silent_s())
        faulthandler.dump_traceback_later(left_s + _FALLBACK_S, file=self._fallback or sys.stderr, exit=True)

    def _end(self) -> None:
        """Writes the trace, in a thread of its own, for the store may be what hangs; then ends the process."""
        text = self._trace()
        log.error("%s", text.partition("\n")[0])
        # Whoever reads standard error may have stopped too, and writing there would wait for ever.
        faulthandler.dump_traceback_later(_WRITE_S + 10, file=self._fallback or sys.stderr, exit=True)
        writer = threading.Thread(target=self._write, args=(text,), daemon=True)
        writer.start()
        writer.join(_WRITE_S)
        sys.stderr.write(text)
        sys.stderr.flush()
        os._exit(HANG_EXIT_CODE)

    def _write(self, text: str) -> None:
        with suppress(OSError), storage.retry_deadline(_WRITE_S):
            storage.write_atomic(self._folder.path(_FOLDER, self._name), text)

    def _trace(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        head = (
            f"rank {self._rank} made no progress for {self._silent_s():.0f} s in: {self._doing} (limit {self._limit_s:g} s, "
            f"scale.hang_timeout_s = {self._timeout_s:g}); attempt {self._attempt}, process {os.getpid()} "
            f"on {platform.node()}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        stacks = [
            f"\nthread {names.get(ident, '?')} ({ident})\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident)
            if ident != threading.get_ident()
        ]
        return head + "".join(stacks)

    def _open_fallback(self) -> IO[str] | None:
        """Where the timer writes: it needs an open file, so an object store has none and standard error takes it."""
        if not self._folder.is_local:
            return None
        for name in storage.list_dir(self._folder.path(_FOLDER)):
            if name.endswith(f"_rank_{self._rank}.txt"):  # of an attempt that was killed while all was well
                self._drop_if_empty(name)
        storage.make_dir(self._folder.path(_FOLDER))
        return storage.local_path(self._folder.path(_FOLDER, self._name)).open("a")

    def _drop_if_empty(self, name: str) -> None:
        path = storage.local_path(self._folder.path(_FOLDER, name))
        with suppress(FileNotFoundError):  # somebody cleaned up
            if path.stat().st_size == 0:
                path.unlink()
