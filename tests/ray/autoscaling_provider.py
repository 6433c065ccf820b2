"""Ray's provider of nodes that are processes of this machine, with the faults of a cloud; the autoscaler's process loads it.

In: requests for nodes of a group. Out: nodes, but for two groups: a node of `stuck` is taken on and never joins, one of
`sold_out` cannot be had.
"""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE

NO_CAPACITY = "InsufficientInstanceCapacity"


class Provider(FakeMultiNodeProvider):
    """See the module."""

    def _create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, int], labels: dict[str, str]
    ) -> None:
        group = tags[TAG_RAY_USER_NODE_TYPE]
        if group == "sold_out":
            raise RuntimeError(f"{NO_CAPACITY}: no machine of this kind is free")
        if group == "stuck":
            with self.lock:
                self._nodes[self._next_hex_node_id()] = {"tags": {**tags}}
            return
        super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)

    def _terminate_node(self, node: dict[str, Any]) -> None:
        if "node" in node:
            super()._terminate_node(node)
