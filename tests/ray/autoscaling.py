"""A real Ray head with Ray's real autoscaler, whose nodes are processes of this machine.

In: node groups. Out: an address to submit to, and what joined. Nothing of the autoscaler is replaced but the cloud: Ray's own
provider of local nodes, in the only form that Ray 2.60's wheel can start (`type: external`, every top-level key written out).
All processes are started by one `ray start --block`, below which they are found again to be ended.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler.v2.sdk import get_cluster_status

START_S = 60
OBJECT_STORE_BYTES = 80 * 1024 * 1024
IDLE_S = 9.0
LIFE_S = 900  # whatever becomes of the test
JOIN_S = 45  # after which a machine that has not joined is given up


@contextlib.contextmanager
def autoscaling(groups: Mapping[str, tuple[int, int, int]], *, most_nodes: int) -> Iterator["Autoscaling"]:
    """Such a cluster in a folder of its own; nothing is left of it. For the arguments see Autoscaling."""
    folder = Path(tempfile.mkdtemp(prefix="cr-a-"))
    cluster = Autoscaling(folder, groups, most_nodes=most_nodes)
    try:
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


class Autoscaling:
    """The cluster; its head has no CPUs, so that everything waits for nodes.

    Args:
        folder: Short, for Ray's sockets.
        groups: Logical CPUs of a node, how many nodes at most, and the group's priority, by name.
        most_nodes: Of all groups together.
    """

    def __init__(self, folder: Path, groups: Mapping[str, tuple[int, int, int]], *, most_nodes: int) -> None:
        self.folder = folder
        host = _own_address()
        self.address = f"{host}:{_free_port(host)}"
        (folder / "autoscaler.yaml").write_text(yaml.safe_dump(_config(self.address, groups, most_nodes)))
        variables = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),  # of the provider
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": str(JOIN_S),
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        variables.pop("RAY_ADDRESS", None)
        words = ["start", "--head", "--block", "--num-cpus=0", f"--port={self.address.rpartition(':')[2]}"]
        words += [f"--autoscaling-config={folder}/autoscaler.yaml", f"--temp-dir={folder}/ray", "--include-dashboard=false"]
        words += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--node-ip-address={host}"]
        self._log = (folder / "head.log").open("w")
        self._head = subprocess.Popen(
            ["timeout", "--kill-after=20", str(LIFE_S), sys.executable, "-m", "ray.scripts.scripts", *words],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        self.environment = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"}
        try:
            self._wait_for_head()
        except BaseException:
            self.close()
            raise

    def _wait_for_head(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._head.poll() is None:
            with contextlib.suppress(Exception):
                if get_cluster_status(self.address, timeout=2).idle_nodes:
                    return
            time.sleep(0.2)
        raise AssertionError(f"the head did not start:\n{(self.folder / 'head.log').read_text()}")

    def nodes(self) -> Counter[str]:
        """Live nodes by group, without the head."""
        status = get_cluster_status(self.address)
        return Counter(
            node.ray_node_type_name
            for node in (*status.active_nodes, *status.idle_nodes)
            if node.ray_node_type_name not in ("", FAKE_HEAD_NODE_TYPE)
        )

    def wait_for_nodes(self, expected: Mapping[str, int], timeout_s: float = 90) -> float:
        """Waits until exactly these are there; returns the seconds."""
        started = time.monotonic()
        while (found := self.nodes()) != Counter(expected):
            assert time.monotonic() - started < timeout_s, f"nodes are {dict(found)}, not {dict(expected)}:\n{self.log()}"
            time.sleep(0.2)
        return time.monotonic() - started

    def log(self) -> str:
        """The end of what the autoscaler wrote."""
        found = sorted(self.folder.glob("ray/session_2*/logs/monitor.log"))
        lines = found[-1].read_text().splitlines() if found else []
        return "\n".join([line for line in lines if "legacy field" not in line][-60:])

    def close(self) -> None:
        """Ends every process of every node."""
        family = self._family()
        self._head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._head.wait(15)
        for process in {*family, *self._family()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)
        self._head.wait(10)
        self._log.close()

    def _family(self) -> list[psutil.Process]:
        """The head with all that it started: its autoscaler, of whose children the nodes are."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._head.pid)
            return [*root.children(recursive=True), root]
        return []


def _config(address: str, groups: Mapping[str, tuple[int, int, int]], most_nodes: int) -> dict[str, Any]:
    types = {
        name: {
            "resources": {"CPU": cpus, "object_store_memory": OBJECT_STORE_BYTES},
            "labels": {"pool": name},
            "node_config": {},
            "min_workers": 0,
            "max_workers": most,
            "priority": priority,
        }
        for name, (cpus, most, priority) in groups.items()
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "local",
        "max_workers": most_nodes,
        "upscaling_speed": 100.0,
        "docker": {},
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "external",
            "module": "autoscaling_provider.Provider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **types},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
