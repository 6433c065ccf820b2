"""What a failure calls for, and how it is told in one sentence."""

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from crate_ray.config import ConfigError
from crate_ray.launch.causes import Cure, WorkersPausedError, cure_of, sentence_of
from crate_ray.launch.policies import RestartPolicy
from crate_ray.training.health import TrainingDivergedError
from crate_ray.training.memory import OutOfMemory

PEER = RuntimeError("[/pytorch/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
DEATH = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())


def of_ranks(*causes: Exception) -> WorkerGroupError:
    return WorkerGroupError("", dict(enumerate(causes)))


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (of_ranks(DEATH, PEER), Cure.RESTART),
        (of_ranks(PEER, OSError("disk")), Cure.RESTART),
        (of_ranks(PEER, ConfigError("no such data")), Cure.NONE),
        (of_ranks(TrainingDivergedError("loss nan"), PEER), Cure.NONE),
        (of_ranks(PEER, OutOfMemory("out of memory", 4)), Cure.RESTART_FREELY),
        (of_ranks(PEER, OutOfMemory("out of memory", None)), Cure.NONE),
        (of_ranks(WorkersPausedError("a node is about to leave")), Cure.RESTART_FREELY),
        (PreemptionError(PreemptionInfo(None, {"node": [0]})), Cure.RESTART_FREELY),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), Cure.WAIT),
        (ControllerError(ActorDiedError()), Cure.WAIT),
        (ControllerError(ValueError("a fault of ours")), Cure.NONE),
    ],
)
def test_a_failure_is_met_by_what_can_cure_it(error: Exception, cure: Cure) -> None:
    assert cure_of(error) is cure


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (of_ranks(PEER, ConfigError("data.train: no such shards")), "rank 1: data.train: no such shards"),
        (of_ranks(PEER, DEATH), "rank 1: the process died (killed, or out of memory; its node's kernel log knows more)"),
        (of_ranks(PEER, OSError("No space left on device")), "rank 1: No space left on device"),
        (of_ranks(PEER, OutOfMemory("1.2 GiB more than there is", 4)), "rank 1: 1.2 GiB more than there is"),
        (of_ranks(RuntimeError("several\nlines\nlast")), "rank 0: last"),
        (of_ranks(PEER, PEER), f"rank 0: {PEER}"),
        (ControllerError(ValueError("a fault of ours")), "a fault of ours"),
        (RuntimeError(), "RuntimeError"),
        (of_ranks(ConfigError("invalid:\n  a: no\n  b: no")), "rank 0: invalid: a: no b: no"),
        (
            ControllerError(WorkerGroupStartupTimeoutError(2)),
            "the cluster has no room for 2 workers; `ray status` shows what it has",
        ),
    ],
)
def test_the_rank_that_failed_first_is_quoted_and_not_those_that_lost_it(error: Exception, sentence: str) -> None:
    assert sentence_of(error) == sentence


def test_failures_are_counted_in_a_row_and_forgiven_by_a_checkpoint() -> None:
    newest = [-1]
    policy = RestartPolicy(FailureConfig(max_failures=2), lambda: newest[0], lambda: False)
    retry, end = FailureDecision.RETRY, FailureDecision.RAISE
    died, paused = of_ranks(DEATH, PEER), of_ranks(WorkersPausedError("resize"))
    assert [policy.make_decision(died) for _ in range(2)] == [retry, retry]
    assert [policy.make_decision(paused) for _ in range(9)] == [retry] * 9
    newest[0] = 20
    assert [policy.make_decision(died) for _ in range(3)] == [retry, retry, end]


def test_what_cannot_be_cured_ends_the_run_at_once() -> None:
    policy = RestartPolicy(FailureConfig(max_failures=9), lambda: -1, lambda: False)
    assert policy.make_decision(of_ranks(ConfigError("no such data"))) is FailureDecision.RAISE


def test_a_store_that_refuses_does_not_decide_about_a_run() -> None:
    def refuse() -> int:
        raise OSError("503")

    policy = RestartPolicy(FailureConfig(max_failures=1), refuse, lambda: False)
    assert policy.make_decision(of_ranks(DEATH)) is FailureDecision.RETRY
    assert policy.make_decision(of_ranks(DEATH)) is FailureDecision.RAISE


def test_nothing_starts_again_once_the_run_is_to_stop() -> None:
    policy = RestartPolicy(FailureConfig(max_failures=9), lambda: -1, lambda: True)
    assert policy.make_decision(of_ranks(DEATH)) is FailureDecision.RAISE
