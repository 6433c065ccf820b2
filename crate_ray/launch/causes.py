"""What an error of a fit means: whether starting the workers again can cure it, and in one sentence what happened.

In: what Ray Train gives of a failure, an exception of its own around those of the ranks. Out: a Cure, a sentence. When one rank
ends, the others fail in their next collective; so the ranks' errors are put in order first, and the collateral ones come last.
"""

from enum import Enum

from ray.exceptions import OutOfMemoryError as WorkerKilledForMemory
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from crate_ray.config import ConfigError
from crate_ray.training.health import TrainingDivergedError
from crate_ray.training.memory import OutOfMemory, is_out_of_memory
from crate_ray.training.saving import CheckpointError


class WorkersPausedError(RuntimeError):
    """The workers wrote a checkpoint and left, so that others go on from it."""


class Cure(Enum):
    """What a failure calls for."""

    RESTART = "restart"
    """Start again, and count it: it may be a fault of the run itself."""
    RESTART_FREELY = "restart freely"
    """Start again without counting: it was asked for, or it ends by itself."""
    WAIT = "wait"
    """Try again to start: no worker has trained yet."""
    NONE = "none"
    """Whatever starts again fails again."""


_HOPELESS = (CheckpointError, ConfigError, TrainingDivergedError)
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL", "ProcessGroup")
_START = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError, RayActorError)


def cure_of(error: BaseException) -> Cure:
    """What to do about it.

    Args:
        error: A TrainingFailedError.
    """
    if isinstance(error, PreemptionError):
        return Cure.RESTART_FREELY
    if isinstance(error, ControllerError):
        return Cure.WAIT if isinstance(error.controller_failure, _START) else Cure.NONE
    if not isinstance(error, WorkerGroupError):
        return Cure.NONE
    causes = list(error.worker_failures.values())
    if any(isinstance(cause, _HOPELESS) or _never_fits(cause) for cause in causes):
        return Cure.NONE
    if any(isinstance(cause, WorkersPausedError | OutOfMemory) or _is_preempted(cause) for cause in causes):
        return Cure.RESTART_FREELY
    return Cure.RESTART


def sentence_of(error: BaseException) -> str:
    """The one line that a person wants: what the rank that failed first said.

    Args:
        error: What `fit()` raised.
    """
    if isinstance(error, ControllerError):
        return _told_of_start(error.controller_failure)
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return _last_line(error)
    rank, cause = min(error.worker_failures.items(), key=lambda item: (_distance(item[1]), item[0]))
    return f"rank {rank}: {_told(cause)}"


def _told_of_start(failure: BaseException) -> str:
    if isinstance(failure, WorkerGroupStartupTimeoutError):
        return f"the cluster has no room for {failure.num_workers} workers; `ray status` shows what it has"
    return _last_line(failure)


def _never_fits(cause: BaseException) -> bool:
    """Whether memory ran out where no smaller micro-batch helps: outside of a step, or at a single image."""
    return is_out_of_memory(cause) and (not isinstance(cause, OutOfMemory) or cause.micro_batch is None)


def _distance(cause: BaseException) -> int:
    """How far from the origin of the failure an error usually is."""
    if isinstance(cause, (*_HOPELESS, OutOfMemory)):
        return 0
    if _death(cause) is not None:
        return 1
    return 3 if any(words in str(cause) for words in _LOST_PEER) else 2


def _told(cause: BaseException) -> str:
    death = _death(cause)
    if death is None:
        return _last_line(cause)
    if isinstance(death, WorkerKilledForMemory):
        return "Ray ended the process, because its node ran out of memory"
    return "the process died (killed, or out of memory; its node's kernel log knows more)"


def _death(cause: BaseException) -> BaseException | None:
    """The death of a process, where that is what the error tells."""
    if isinstance(cause, WorkerHealthCheckFailedError):
        cause = cause.health_check_failure
    return cause if isinstance(cause, RayActorError | WorkerKilledForMemory) else None


def _is_preempted(cause: BaseException) -> bool:
    death = _death(cause)
    return isinstance(death, RayActorError) and death.preempted


def _last_line(error: BaseException) -> str:
    """Where messages of libraries say what matters; ours are whole."""
    if isinstance(error, ConfigError):
        return " ".join(str(error).split())
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
