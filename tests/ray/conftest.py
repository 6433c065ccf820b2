"""One Ray cluster for the whole session, in its own temporary folder; driver processes join it by RAY_ADDRESS.

Tests that lose whole nodes have clusters of their own (`start_nodes`). They come first, so that these never stand beside it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nodes import Nodes

TINY = [
    "model.width=32",
    "model.num_heads=2",
    "model.encoder_depth=1",
    "model.decoder_depth=1",
    "model.patch_size=8",
    "train.global_batch=32",
    "train.precision=float32",
    "data.num_loaders=1",
    "eval.every_steps=null",
    "eval.probe_every_steps=null",
    "eval.max_images=64",
    "eval.log_every_steps=1",
    "schedule.warmup_steps=5",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray's own warnings are not ours; everything here starts processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.timeout(400))
            item.add_marker(pytest.mark.filterwarnings("default"))
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Address of a local cluster with four logical CPUs."""
    import ray

    # Unix socket paths are short: pytest's own temporary folders are too deep for Ray.
    folder = tempfile.mkdtemp(prefix="cr-ray-")
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    os.environ["RAY_AUTH_MODE"] = "disabled"
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # workers get the environment of the cluster's start
        os.environ[key] = "test"
    ray.init(num_cpus=4, _temp_dir=folder, log_to_driver=False, include_dashboard=True)
    address = ray.get_runtime_context().gcs_address
    os.environ["RAY_ADDRESS"] = address
    try:
        yield address
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def overrides(digits: Path, tmp_path: Path) -> list[str]:
    """A tiny run on the digits, in a folder of its own."""
    paths = [f"data.{key}={digits}/{split}" for key, split in (("train", "train"), ("eval", "validation"), ("test", "test"))]
    return [*TINY, *paths, f"storage.path={tmp_path}/out"]


class Driver:
    """A `crate-ray train` process with a hard end."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log.open("w+")
        command = [sys.executable, "-m", "crate_ray", *arguments]
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **environment}
        )

    def wait(self, timeout_s: float) -> int:
        """Exit code."""
        return self.process.wait(timeout_s)

    def output(self) -> str:
        """What it printed so far."""
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """Ends it, whatever it does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        self._log.close()


@pytest.fixture
def start_driver(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Starts drivers, with settings of their own; all are gone after the test."""
    drivers: list[Driver] = []

    def start(*arguments: str, environment: dict[str, str] | None = None) -> Driver:
        drivers.append(Driver(list(arguments), tmp_path / f"driver-{len(drivers)}.log", environment or {}))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.close()


@pytest.fixture
def drive(cluster: str, start_driver: Callable[..., Driver]) -> Callable[..., Driver]:
    """Starts drivers on the session's cluster."""
    return start_driver


@pytest.fixture
def start_nodes() -> Iterator[Callable[..., Nodes]]:
    """Starts clusters of several nodes; all end with the test."""
    folder = Path(tempfile.mkdtemp(prefix="cr-n-"))
    clusters: list[Nodes] = []

    def start(head_cpus: int, environment: dict[str, str]) -> Nodes:
        clusters.append(Nodes(folder, head_cpus, environment))
        return clusters[-1]

    yield start
    for cluster in clusters:
        cluster.close()
    shutil.rmtree(folder, ignore_errors=True)
