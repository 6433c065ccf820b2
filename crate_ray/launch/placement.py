"""Placement groups of this job: what it holds and waits for, and those of Train controllers that are gone.

In: the cluster that this process belongs to. Out: groups listed, groups removed. A group outlives the actor that made it until
its whole job ends, and holds its resources meanwhile. Ray Train has a cleaner, which needs the dashboard and knows a group only
when its workers have started; the control store itself knows the maker of each group, and whether it lives.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util.placement_group import PlacementGroup, remove_placement_group


@dataclass(frozen=True)
class Group:
    """A placement group.

    Attributes:
        id: Hexadecimal.
        bundles: Resources of each.
        is_placed: Whether it has them.
    """

    id: str
    bundles: tuple[Mapping[str, float], ...]
    is_placed: bool


def groups() -> list[Group]:
    """Those of this job that hold resources or wait for them."""
    return [
        Group(
            group.placement_group_id.hex(),
            tuple(dict(bundle.unit_resources) for bundle in group.bundles),
            group.state == PlacementGroupTableData.CREATED,
        )
        for group in _groups_of_this_job()
    ]


def free_orphaned_groups() -> list[str]:
    """Removes the groups of this job whose making actor is dead; nobody else can use them.

    Returns:
        Their ids, hexadecimal.
    """
    no_actor = ray.ActorID.nil().binary()  # the driver's own groups, those of Tune, count as made by a dead actor
    return _free(lambda group: group.creator_actor_id not in (b"", no_actor) and group.creator_actor_dead)


def free_groups_of(actor_id: str) -> list[str]:
    """Removes the groups that one actor has made.

    Args:
        actor_id: Hexadecimal.

    Returns:
        Their ids, hexadecimal.
    """
    return _free(lambda group: group.creator_actor_id.hex() == actor_id)


def _free(is_meant: Callable[[Any], bool]) -> list[str]:
    freed = []
    for group in _groups_of_this_job():
        if is_meant(group):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            freed.append(group.placement_group_id.hex())
    return freed


def _groups_of_this_job() -> Iterator[Any]:
    if not ray.is_initialized():  # the question would start a cluster; this job's groups went with its connection
        return
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for line in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(line)
        if group.creator_job_id == job and group.state != PlacementGroupTableData.REMOVED and not group.is_detached:
            yield group
