"""What the cluster's autoscaler may start, and what it is doing.

In: the cluster that this process belongs to. Out: its node groups, and nodes that are on their way or did not come. Ray 2.60
has a place for the groups in the control store, which its own autoscaler leaves empty; they stand in the file that it was
started with, on the head. Under KubeRay there is no such file: nothing is known there beforehand, which `scale.node_wait_s` is
for. What it is doing is told by Ray's newer autoscaler ("v2") only.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray._private.state import state
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply, NodeStatus  # type: ignore[attr-defined]
from ray.experimental.internal_kv import internal_kv_get_gcs_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crate_ray.launch.capacity import NodeGroup

log = logging.getLogger(__name__)

LOOK_S = 15.0  # for a process on the head to find the file, its start included
ANSWER_S = 5  # for the control store
_HEAD = "node:__internal_head__"
_MONITORS = ("autoscaler/v2/monitor.py", "autoscaler/_private/monitor.py")
_CONFIG_FLAG = "--autoscaling-config="


def node_groups(nodes: list[dict[str, Any]]) -> tuple[tuple[NodeGroup, ...], int | None]:
    """What the autoscaler may still start.

    Args:
        nodes: The live ones, as `ray.nodes()` lists them.

    Returns:
        The groups, without the head's, and how many nodes of all of them together; nothing where no groups are known.
    """
    config = _config(ray.get_runtime_context().gcs_address, _head_of(nodes))
    told = _status() if config else None
    states = [] if told is None else told.cluster_resource_state.node_states
    return groups_left(config, Counter(node.ray_node_type_name for node in states if node.status != NodeStatus.DEAD))


def groups_left(config: Mapping[str, Any], live: Mapping[str, int]) -> tuple[tuple[NodeGroup, ...], int | None]:
    """The groups of an autoscaler's file, less the nodes that are there.

    Args:
        config: As for `ray up`; empty where there is none.
        live: Nodes by group.
    """
    types = dict(config.get("available_node_types") or {})
    types.pop(config.get("head_node_type"), None)
    most = config.get("max_workers")
    groups = []
    for name, body in types.items():
        limit = body.get("max_workers", most)
        if not body.get("resources"):
            log.info("node group '%s' does not say its resources: what fits it is not known", name)
        elif limit:
            groups.append(
                NodeGroup(name, {key: float(a) for key, a in body["resources"].items()}, max(0, limit - live.get(name, 0)))
            )
    left = None if most is None else max(0, most - sum(live.get(name, 0) for name in types))
    return tuple(groups), left if groups else None


def seat_coordinator() -> None:
    """Has Ray's coordinator, through which worker groups ask for nodes, started on the head.

    Else it starts beside the first controller that asks, outlives it, and a node that it stands on is never idle: it would not
    be taken away again.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

    head = _head_of(ray.nodes())  # type: ignore[no-untyped-call]
    if head is None or head == ray.get_runtime_context().get_node_id():
        get_or_create_autoscaling_coordinator()  # type: ignore[no-untyped-call]
        return
    seat = ray.remote(num_cpus=0)(get_or_create_autoscaling_coordinator)
    try:
        ray.get(seat.options(scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False)).remote(), timeout=LOOK_S)
    except ray.exceptions.RayError as error:
        log.warning("Ray's autoscaling coordinator did not start on the head; the node where it does may stay: %s", error)


def _head_of(nodes: list[dict[str, Any]]) -> str | None:
    return next((node["NodeID"] for node in nodes if _HEAD in node["Resources"]), None)


@lru_cache(maxsize=4)
def _config(address: str, head: str | None) -> Mapping[str, Any]:
    """The autoscaler's file, looked for once; a mapping without groups where there is none to be found."""
    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:  # some managed platforms do
        return _of_reported(reported)
    if head is None or head == ray.get_runtime_context().get_node_id():
        return find_config(address)
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    look = ray.remote(num_cpus=0, max_retries=0)(find_config).options(scheduling_strategy=there).remote(address)
    try:
        found: Mapping[str, Any] = ray.get(look, timeout=LOOK_S)
    except ray.exceptions.RayError as error:
        log.info("the head does not say what its autoscaler may start: %s", error)
        ray.cancel(look, force=True)
        return {}
    return found


def _of_reported(reported: Any) -> Mapping[str, Any]:
    return {
        "available_node_types": {
            group.name: {"resources": dict(group.resources), "max_workers": group.max_count}
            for group in reported.node_group_configs
            if group.max_count > 0
        }
    }


def find_config(address: str) -> Mapping[str, Any]:
    """What the autoscaler of a cluster was started with, on the machine of its head.

    Args:
        address: Of the control store, which tells one cluster's autoscaler from another's.

    Returns:
        Its file; empty where none runs here, or it was given none.
    """
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"--gcs-address={address}" not in words or not any(word.endswith(_MONITORS) for word in words):
            continue
        path = next((word.removeprefix(_CONFIG_FLAG) for word in words if word.startswith(_CONFIG_FLAG)), None)
        if path is None:
            return {}
        try:
            body = yaml.safe_load(Path(path).expanduser().read_text())
        except (OSError, yaml.YAMLError) as error:
            log.info("the autoscaler's file cannot be read: %s", error)
            return {}
        return {key: body.get(key) for key in ("available_node_types", "head_node_type", "max_workers") if key in body}
    return {}


@dataclass(frozen=True)
class Growth:
    """What the autoscaler is doing.

    Attributes:
        coming: Nodes that were asked of the provider and have not joined, by group.
        since_s: How long ago the oldest of them was asked for; None where none is on its way.
        failed: Groups of which a node could not be started; Ray 2.60 passes no reason on.
        impossible: Placement groups, hexadecimal, that the nodes it may still add cannot hold.
    """

    coming: Mapping[str, int] = field(default_factory=dict)
    since_s: float | None = None
    failed: frozenset[str] = frozenset()
    impossible: frozenset[str] = frozenset()


def growth() -> Growth:
    """What the autoscaler is doing, as of its last round; nothing where the control store does not answer."""
    told = _status()
    return Growth() if told is None else growth_of(told.autoscaling_state)


def _status() -> Any:
    try:
        client = internal_kv_get_gcs_client()  # type: ignore[no-untyped-call]
        return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=ANSWER_S))
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        log.info("the control store does not say what the autoscaler does: %s", error)
        return None


def growth_of(told: Any) -> Growth:
    """What an AutoscalingState says.

    Args:
        told: The message.
    """
    coming: Counter[str] = Counter()
    for request in told.pending_instance_requests:
        coming[request.ray_node_type_name] += request.count
    coming.update(instance.ray_node_type_name for instance in told.pending_instances)
    asked = [request.request_ts for request in told.pending_instance_requests if request.request_ts]
    return Growth(
        coming,
        max(0.0, time.time() - min(asked)) if asked else None,
        frozenset(failed.ray_node_type_name for failed in told.failed_instance_requests),
        frozenset(gang.details.partition(":")[0] for gang in told.infeasible_gang_resource_requests),
    )
