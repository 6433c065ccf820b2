"""Holds a Ray cluster of several nodes on this machine; a process of its own, spoken to by lines (see nodes.py).

In: a head's CPUs as argument, then `add CPUS` and `drain NODE_ID SECONDS` on standard input. Out: one JSON line for each. The
cluster ends with the input.
"""

import json
import sys
import time
from typing import Any

from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

MEMORY = 80 * 1024 * 1024


def main(head_cpus: int) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": head_cpus, "include_dashboard": False, "object_store_memory": MEMORY},
    )
    say({"address": cluster.gcs_address, **node_facts(cluster.head_node)})
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "add":
            node = cluster.add_node(num_cpus=int(arguments[0]), object_store_memory=MEMORY)
            say(node_facts(node))
        else:
            deadline_ms = int((time.time() + float(arguments[1])) * 1000)
            reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            accepted, why = GcsClient(cluster.gcs_address).drain_node(arguments[0], reason, "test", deadline_ms)
            say({"accepted": accepted, "why": why})
    cluster.shutdown()


def node_facts(node: Any) -> dict[str, Any]:
    """Its id, and its processes: the raylet with its children, on the head the control store too."""
    pids = [process.process.pid for kind in node.all_processes.values() for process in kind]
    return {"id": node.node_id, "pids": pids}


def say(body: dict[str, Any]) -> None:
    print(json.dumps(body), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
