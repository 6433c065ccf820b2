"""A Ray cluster of several nodes on this machine, whose nodes can be lost, drained and added."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

START_S = 60
# What docs/operations.md recommends for the head: a node that is silent for three seconds is lost.
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True)
class Node:
    """One of the cluster: its id, and the processes that were started with it."""

    id: str
    pids: tuple[int, ...]

    def family(self) -> list[psutil.Process]:
        """Every process of the node that lives, workers included."""
        found: dict[int, psutil.Process] = {}
        for pid in self.pids:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                found |= {process.pid: process for process in (root, *root.children(recursive=True))}
        return list(found.values())

    def send(self, number: int) -> None:
        """A signal to all of them at once, as when the machine loses its power (SIGKILL) or its network (SIGSTOP)."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def workers(self) -> list[int]:
        """Process ids of Train workers on this node."""
        return [process.pid for process in self.family() if "RayTrainWorker" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


class Nodes:
    """The cluster; its first node is the head, where drivers run.

    Args:
        folder: Short, for Ray's sockets.
        head_cpus: Of the head.
        environment: Settings of the cluster's processes.
    """

    def __init__(self, folder: Path, head_cpus: int, environment: dict[str, str]) -> None:
        (folder / "ray").mkdir(exist_ok=True)
        variables = {**os.environ, "RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", **environment}
        variables.pop("RAY_ADDRESS", None)
        self._log = (folder / "host.log").open("a")
        self._host = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("node_host.py")), str(head_cpus)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=variables,
            start_new_session=True,
        )
        facts = self._hear()
        self.address: str = facts["address"]
        self.head = Node(facts["id"], tuple(facts["pids"]))
        self.nodes = [self.head]
        self.environment = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(folder)}

    def add(self, cpus: int) -> Node:
        """Starts another node."""
        facts = self._ask(f"add {cpus}")
        self.nodes.append(Node(facts["id"], tuple(facts["pids"])))
        return self.nodes[-1]

    def drain(self, node: Node, seconds: float) -> None:
        """Announces that the node will be taken away, as a provider does with a spot machine."""
        answer = self._ask(f"drain {node.id} {seconds}")
        assert answer["accepted"], answer

    def close(self) -> None:
        """Ends every process of every node."""
        families = [process for node in self.nodes for process in node.family()]
        with contextlib.suppress(BrokenPipeError):
            self._host.stdin.close()  # type: ignore[union-attr]
        try:
            self._host.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._host.pid, signal.SIGKILL)
            self._host.wait(10)
        for process in families:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(families, timeout=10)
        self._host.stdout.close()  # type: ignore[union-attr]
        self._log.close()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._host.stdin is not None
        self._host.stdin.write(line + "\n")
        self._host.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._host.stdout is not None
        while True:  # Ray prints lines of its own
            ready, _, _ = select.select([self._host.stdout], [], [], START_S)
            line = self._host.stdout.readline() if ready else ""
            assert line, f"no answer from the cluster's host in {START_S} s"
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
