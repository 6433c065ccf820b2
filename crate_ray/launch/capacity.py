"""What a cluster has and may still get, as plain numbers.

In: resources of nodes and of node groups. Out: how many workers fit, now or at most. One worker never spans two nodes, so sums
over a cluster say little: eight nodes of two CPUs have no room for one worker of four.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind that an autoscaler starts.

    Attributes:
        name: As the autoscaler calls them.
        resources: Of one node.
        num_left: Nodes that may still be started.
    """

    name: str
    resources: Mapping[str, float]
    num_left: int


@dataclass(frozen=True)
class Capacity:
    """What the cluster has now, node by node, and what it may get.

    Attributes:
        nodes: Resources of each live node.
        groups: What the autoscaler may start; empty without one, or where it does not say.
        num_left: Nodes of all groups together that may still be started; None: as many as the groups say.
        is_open: Nodes of a kind that nobody has named may come: what does not fit is waited for, not refused.
    """

    nodes: tuple[Mapping[str, float], ...]
    groups: tuple[NodeGroup, ...] = ()
    num_left: int | None = None
    is_open: bool = False

    @property
    def may_grow(self) -> bool:
        """Whether nodes may come by themselves."""
        return self.is_open or bool(self.groups)

    def total(self, resource: str) -> float:
        """Sum over the live nodes."""
        return sum(node.get(resource, 0.0) for node in self.nodes)

    def total_at_most(self, resource: str) -> float:
        """Sum over the live nodes and those that the autoscaler may still start."""
        return self.total(resource) + self._most_of([group.resources.get(resource, 0.0) for group in self.groups])

    def workers(self, need: Mapping[str, float]) -> int:
        """How many workers of this need fit now."""
        return sum(_workers_on(node, need) for node in self.nodes)

    def workers_at_most(self, need: Mapping[str, float]) -> int:
        """How many fit with the nodes that the autoscaler may still start; as many as now where none are known."""
        return self.workers(need) + int(self._most_of([_workers_on(group.resources, need) for group in self.groups]))

    def may_fit(self, need: Mapping[str, float], count: int) -> bool:
        """Whether so many workers could ever run side by side, as far as is known."""
        return self.is_open or self.workers_at_most(need) >= count

    def _most_of(self, amounts: list[float] | list[int]) -> float:
        """The largest sum over nodes to come, where one of group i adds amounts[i]."""
        left = sum(group.num_left for group in self.groups) if self.num_left is None else self.num_left
        most = 0.0
        for amount, group in sorted(zip(amounts, self.groups, strict=True), key=lambda pair: -pair[0]):
            started = min(left, group.num_left)
            most, left = most + started * amount, left - started
        return most

    def described(self, need: Mapping[str, float]) -> str:
        """The live nodes and the groups, as far as a worker of this need is concerned."""
        kinds = Counter(amounts_in_words({key: node.get(key, 0.0) for key in need}) for node in self.nodes)
        there = ", ".join(f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()) or "none"
        if not self.groups:
            return f"the cluster's nodes have {there}"
        return f"the cluster's nodes have {there}, its autoscaler may add {self._growth(need)}"

    def _growth(self, need: Mapping[str, float]) -> str:
        groups = ", ".join(
            f"{group.num_left} x {group.name} of {amounts_in_words({key: group.resources.get(key, 0.0) for key in need})}"
            for group in self.groups
        )
        bounded = self.num_left is not None and self.num_left < sum(group.num_left for group in self.groups)
        return f"{groups} ({self.num_left} nodes in all)" if bounded else groups


def amounts_in_words(amounts: Mapping[str, float]) -> str:
    """Such as `2 CPU and 1 GPU`."""
    return " and ".join(f"{amount:g} {key}" for key, amount in amounts.items())


def _workers_on(have: Mapping[str, float], need: Mapping[str, float]) -> int:
    """A fraction of a card is a fraction of one card: two halves never lie on two."""
    fits = []
    for key, amount in need.items():
        if key == "GPU" and amount < 1:
            fits.append(int(have.get(key, 0.0)) * int(1 / amount + 1e-9))
        else:
            fits.append(int(have.get(key, 0.0) / amount + 1e-9))
    return min(fits)
