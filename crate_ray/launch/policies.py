"""When the workers start again, and how many: our two policies for Ray Train's controller.

In: a failure, or a look at the cluster. Out: Ray's decisions. Ray's own policies count every failure of a run's whole life, try
hopeless errors again, believe a view of the cluster that is up to 20 s old, and tear workers down to resize without a word to
them. Ours stand in the same places: they live in the controller's process, which is why they carry plain values and a RunLine.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray._private.state import state
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from crate_ray.launch.causes import Cure, cure_of, sentence_of
from crate_ray.launch.placement import free_groups_of
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import latest_checkpoint

log = logging.getLogger(__name__)

MAX_STARTS = 3  # that fail in a row, after each of which the workers are asked for again
ANSWER_S = 1.0  # for a node's port to take a connection
WAIT_S = 0.5
LOOK_S = 10.0  # for the coordinator to look at the cluster


class RestartPolicy(FailurePolicy):
    """Starts again what can be cured; counts failures in a row without a new checkpoint between them.

    Args:
        failure_config: Its max_failures bounds the count.
        newest_step: Of the run's checkpoints, the measure of progress; -1 before the first.
        is_stopping: Whether the run is to stop: then nothing starts again.
    """

    def __init__(self, failure_config: FailureConfig, newest_step: Callable[[], int], is_stopping: Callable[[], bool]) -> None:
        super().__init__(failure_config)
        self._newest_step, self._is_stopping = newest_step, is_stopping
        self._failures = self._starts = 0
        self._step = -1

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """See FailurePolicy."""
        cure = cure_of(training_failed_error)
        self._forgive_after_progress()
        if cure is Cure.WAIT:
            self._starts += 1
            free_groups_of(str(ray.get_runtime_context().get_actor_id()))  # left over where a worker died as it started
        elif cure is Cure.RESTART:
            self._failures += 1
        is_over = self._failures > self.failure_config.max_failures or self._starts > MAX_STARTS
        is_over = cure is Cure.NONE or is_over or self._is_stopping()
        log.warning("%s: %s", "no further start" if is_over else "the workers start again", sentence_of(training_failed_error))
        return FailureDecision.RAISE if is_over else FailureDecision.RETRY

    def _forgive_after_progress(self) -> None:
        try:
            step = self._newest_step()
        except OSError as error:  # a store that refuses for a moment; the count stands
            log.warning("cannot list checkpoints: %s", error)
            return
        if step != self._step:  # less after a rollback, which is no standstill either
            self._step = step
            self._failures = self._starts = 0


def stop_wished(line: Any) -> bool:
    """Whether the driver wants the run to stop, or is gone.

    Args:
        line: A RunLine.
    """
    try:
        return bool(ray.get(line.wish.remote(), timeout=LOOK_S)[0])
    except ray.exceptions.ActorDiedError:
        return True
    except ray.exceptions.RayError:  # too busy to answer; who stops is asked again
        return False


def newest_step(folder: str) -> int:
    """Step of the newest whole checkpoint of a run, -1 where there is none.

    Args:
        folder: URI.
    """
    newest = latest_checkpoint(RunFolder(folder))
    return -1 if newest is None else newest.step


class ElasticPolicy(ElasticScalingPolicy):
    """As many workers as there is room for now; a group that is to change its size writes a checkpoint first.

    Args:
        scaling_config: With a range of workers.
        line: A RunLine, through which workers are asked to pause.
        grace_s: After so long they are torn down without.
    """

    def __init__(self, scaling_config: ScalingConfig, line: Any, grace_s: float) -> None:
        super().__init__(scaling_config)
        self._line, self._grace_s = line, grace_s
        self._asked: tuple[float, ResizeDecision] | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """See ScalingPolicy."""
        self._asked = None
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            if stop_wished(self._line):
                raise RuntimeError(f"stopped while it waited for room for {self.scaling_config.min_workers} workers")
            time.sleep(WAIT_S)  # the controller asks again at once, for as long as there is no room
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Asks the workers to pause instead of resizing; they leave with an error of their own, and new ones start."""
        if self._asked is not None:
            asked_at, wanted = self._asked
            if time.monotonic() - asked_at <= self._grace_s:
                return NoopDecision()
            self._asked = None  # the group that comes next was asked nothing yet
            return wanted
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            self._asked = time.monotonic(), decision
            self._line.pause.remote(f"there is room for {decision.num_workers} workers")
        return decision if not isinstance(decision, ResizeDecision) else NoopDecision()

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """What the run may use of each node, of those that can take a worker at this moment."""
        try:
            reserved = ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=LOOK_S
            )
        except ray.exceptions.RayError as error:
            log.warning("cannot look at the cluster: %s", error)
            # It may have died with its node: the next look finds or makes another one, and asks it for room at once.
            if (client := self._coordinator_client) is not None:
                client.__dict__.pop("_autoscaling_coordinator", None)
                client._latest_autoscaling_request_time = float("-inf")
            return None
        usable = usable_nodes(reserved)
        return {node: resources for node, resources in reserved.items() if node in usable}


def usable_nodes(node_ids: Iterable[str]) -> set[str]:
    """Those that are not about to leave, and whose raylet answers: the control store believes in a dead node for seconds."""
    draining = state.get_draining_nodes()
    wanted = set(node_ids) - set(draining)
    nodes = [node for node in ray.nodes() if node["NodeID"] in wanted and node["Alive"]]  # type: ignore[no-untyped-call]
    if not nodes:
        return set()
    with ThreadPoolExecutor(min(32, len(nodes))) as pool:
        answers = pool.map(lambda node: _answers(node["NodeManagerAddress"], node["NodeManagerPort"]), nodes)
        return {node["NodeID"] for node, answer in zip(nodes, answers, strict=True) if answer}


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


class PolicedTrainer(TorchTrainer):
    """A TorchTrainer whose controller has our policies; Ray offers no argument for them.

    Args:
        worker: What every rank runs.
        failure_policy: For the controller.
        scaling_policy: For the controller; None: Ray's own for a fixed number of workers.
        named: Other arguments of TorchTrainer.
    """

    def __init__(
        self,
        worker: Callable[..., Any],
        *,
        failure_policy: RestartPolicy,
        scaling_policy: ElasticPolicy | None,
        **named: Any,
    ) -> None:
        super().__init__(worker, **named)
        self._policies = {"failure_policy": failure_policy} | ({"scaling_policy": scaling_policy} if scaling_policy else {})

    def _initialize_and_run_controller(self, **named: Any) -> Any:
        return super()._initialize_and_run_controller(**{**named, **self._policies})
