"""One attempt at a trial: the training runs in a thread, and stands still at each evaluation until the next is asked for.

In: a prepared run and its lease. Out: events, one a call: a report, a placement group, the end. With one worker the loop itself
runs in the thread; with several the thread follows a TorchTrainer. The price of the standstill is the scheduler's time to
decide; in return a trial that is stopped has trained not one step past the report that stopped it.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal

import torch

from crate_ray.config import ConfigError, RunConfig
from crate_ray.launch.cluster import NODE_WAIT_S, resolve_scale, set_environment, worker_need
from crate_ray.launch.train import EXIT_GRACE_S, Fit
from crate_ray.runs import Lease, LeaseLostError, RunFolder
from crate_ray.training.health import TrainingDivergedError
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.memory import is_out_of_memory, release_memory

log = logging.getLogger(__name__)

IDLE_S = 5.0
"""So long a trial holds its folder without being asked for its next report: Tune keeps actors of paused trials in store."""
FIRST_WORD_S = 4 * NODE_WAIT_S + 1800.0
"""So long several workers may take to begin: as often as Ray waits for nodes that an autoscaler starts, and half an hour."""
LOOK_S = 1.0  # between two looks for a stop, and for a beat that is due
_POLL_S = 0.05
_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
"""Where Ray passes an error on as text."""


@dataclass(frozen=True)
class Report:
    """What was measured at a step, by the keys of records."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Placed:
    """The workers' placement group, hexadecimal."""

    group: str


@dataclass(frozen=True)
class Ended:
    """How the attempt ended; KILLED was asked for, with a checkpoint, or came of idleness."""

    state: Literal["FINISHED", "KILLED", "INFEASIBLE", "FAILED"]
    reason: str | None = None
    error: BaseException | None = None


class TrialContext(LocalContext):
    """The gate between a loop and who asks for its reports.

    Args:
        attempt: See WorkerContext.
        after_step: Reports up to this step were seen before.
        total_steps: Of the run; what is measured at the last step belongs to the end and is no report.
    """

    def __init__(self, attempt: int, *, after_step: int, total_steps: int) -> None:
        super().__init__(attempt)
        self.events: queue.SimpleQueue[Report | Placed | Ended] = queue.SimpleQueue()
        self._after_step, self._total_steps = after_step, total_steps
        self._released = threading.Event()

    def evaluated(self, step: int, values: Mapping[str, float]) -> None:
        """Hands over a report and waits for `release`, or IDLE_S long: then the loop stops by itself."""
        if not self._after_step < step < self._total_steps or self.stop_requested():
            return
        self._released.clear()
        self.events.put(Report(step, dict(values)))
        if not self._released.wait(IDLE_S):
            self.stop()

    def release(self) -> None:
        """Lets the loop go on to its next report."""
        self._released.set()

    def stop(self) -> None:
        """See LocalContext; a loop that waits is released."""
        super().stop()
        self._released.set()


class Attempt:
    """The training of one trial from where its folder stands.

    Args:
        config: Resolved.
        folder: Prepared.
        lease: Taken; it is ended with the attempt.
        after_step: See TrialContext.
        total_steps: See TrialContext.
        is_stopping: Asked now and then; once it is true the training stops, with a checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        lease: Lease,
        *,
        after_step: int,
        total_steps: int,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, self._folder, self._lease, self._is_stopping = config, folder, lease, is_stopping
        self._context = TrialContext(lease.attempt, after_step=after_step, total_steps=total_steps)
        self._thread = threading.Thread(target=self._run, name=f"trial-{folder.name}", daemon=True)
        self._thread.start()

    def next_event(self) -> Report | Placed | Ended:
        """Lets the training go on, and returns what comes of it."""
        self._context.release()
        return self._context.events.get()

    def stop(self) -> bool:
        """Asks for a checkpoint and the end, and waits for it.

        Returns:
            Whether it came within `checkpoint.stop_grace_s` and some seconds.
        """
        self._context.stop()
        self._thread.join(self._config.checkpoint.stop_grace_s + 2 * EXIT_GRACE_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self._beating():
                ended = self._train()
            state = "FAILED" if ended.state == "INFEASIBLE" else ended.state
            self._lease.end(state, ended.reason)
        except (LeaseLostError, OSError) as error:
            ended = Ended("FAILED", str(error), error)
        self._context.events.put(ended)

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Keeps the lease and looks for a stop, in a thread of its own: a step or a checkpoint may take longer than a lease."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(LOOK_S):
                try:
                    self._lease.beat()
                    if not self._is_stopping():
                        continue
                except (LeaseLostError, OSError) as error:
                    log.warning("%s", error)
                self._context.stop()
                return

        beating = threading.Thread(target=beat, name="trial-lease", daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()

    def _train(self) -> Ended:
        try:
            return self._train_alone() if self._config.scale.num_workers == 1 else self._train_on_workers()
        except ConfigError as error:
            return Ended("FAILED", str(error))
        except Exception as error:  # noqa: BLE001  handed to who asks for the next event
            reason = infeasible_reason(error)
            return Ended("INFEASIBLE", reason) if reason else Ended("FAILED", f"{type(error).__name__}: {error}", error)
        finally:
            release_memory()  # the next trial of this process needs it
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.reset_peak_memory_stats()

    def _train_alone(self) -> Ended:
        torch.set_num_threads(max(1, int(self._config.scale.cpus_per_worker)))
        torch.use_deterministic_algorithms(False)  # what the trial before asked for in this process; the loop sets its own
        result = run_training(self._config, self._folder, self._context)
        return Ended(result.state, None if result.state == "FINISHED" else "stopped; a checkpoint was written")

    def _train_on_workers(self) -> Ended:
        set_environment()
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process fewer; Tune starts the trial again
        config = self._config.model_copy(update={"scale": resolve_scale(self._config.scale)})
        fit = Fit(config, self._folder, self._lease.attempt, is_followed=True)
        try:
            in_time = self._follow(fit)
        finally:
            fit.tear_down()
        if not in_time:
            return Ended("KILLED", "stopped; no checkpoint in time, the run goes on from the one before")
        state, reason = fit.end()
        if fit.diverged:
            return Ended("INFEASIBLE", reason)
        if fit.error is not None:
            raise fit.error
        if state not in ("FINISHED", "KILLED"):
            raise RuntimeError(reason)
        return Ended(state, reason)

    def _follow(self, fit: Fit) -> bool:
        """Passes the workers' evaluations on until they end; False when they do not end in time after a stop."""
        deadline: float | None = None
        first_word: float | None = monotonic() + FIRST_WORD_S
        while fit.is_running():
            event = fit.next_event(_POLL_S)
            if event is not None:
                first_word = None  # from here on the watchdogs of the workers end what hangs
                self._pass_on(fit, event)
            if first_word is not None and monotonic() > first_word:
                raise TimeoutError(self._silence())
            if self._context.stop_requested() and deadline is None:
                fit.stop()
                deadline = monotonic() + self._config.checkpoint.stop_grace_s + EXIT_GRACE_S
            if deadline is not None and monotonic() > deadline:
                return False
        return True

    def _silence(self) -> str:
        scale = self._config.scale
        need = " and ".join(f"{amount:g} {key}" for key, amount in worker_need(scale).items())
        return (
            f"{scale.max_workers} workers of {need} did not begin within {FIRST_WORD_S:.0f} s: the cluster had no room for "
            "them, or their processes do not start (Ray's logs on the nodes know more)"
        )

    def _pass_on(self, fit: Fit, event: Mapping[str, Any]) -> None:
        if "placement_group" in event:
            self._context.events.put(Placed(event["placement_group"]))
            return
        self._context.evaluated(event["step"], event["values"])
        if not self._context.stop_requested():
            fit.release()


def infeasible_reason(error: BaseException) -> str | None:
    """Why no other attempt at a trial would end better; None where one might.

    Args:
        error: What ended the training, or a TrainingFailedError with what its workers raised.
    """
    if isinstance(error, TrainingDivergedError):
        return str(error)
    causes = [error, *getattr(error, "worker_failures", {}).values()]
    for cause in causes:
        if is_out_of_memory(cause):
            return f"out of memory: {cause}".partition("\n")[0]
        named = next((line for line in str(cause).splitlines() if any(name in line for name in _OUT_OF_MEMORY)), None)
        if named is not None:
            return f"out of memory: {named.strip()}"
    return None
