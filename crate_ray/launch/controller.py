"""Ending a Ray Train controller from outside: `fit()` gives nobody the means to."""

from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.v2._internal.execution.callback import ControllerCallback

from crate_ray.launch.placement import free_groups_of

ABORT_S = 5.0  # for a controller to end its workers; then it is killed


class ControllerHandle(ControllerCallback):
    """Sends the controller's own handle down a RunLine."""

    def __init__(self, line: Any) -> None:
        self._line = line

    def after_controller_start(self, train_run_context: Any) -> None:
        """See ControllerCallback."""
        # As Ray's own scaling policies name their wish for nodes.
        self._line.put_controller.remote(ray.get_runtime_context().current_actor, f"train-{train_run_context.run_id}")


def end_controller(controller: Any, requester: str) -> None:
    """Ends the controller with its workers and their group; by force where it does not listen, as when it waits for room.

    Args:
        controller: Its handle.
        requester: What its wish for nodes goes by: one that was killed leaves it behind, and nodes would come for minutes.
    """
    try:
        ray.get(controller.abort.remote(), timeout=ABORT_S)
    except ray.exceptions.GetTimeoutError:
        ray.kill(controller)
    except ray.exceptions.RayActorError:
        pass  # that is how it ends
    free_groups_of(controller._actor_id.hex())
    get_or_create_autoscaling_coordinator().cancel_request.remote(requester)  # type: ignore[no-untyped-call]
