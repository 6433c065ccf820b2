"""Whole nodes that are lost, drained and come back, under a run that takes as many workers as there is room for."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import LONG, check_losses, stop, wait_for, wait_until_training_goes_on
from nodes import HEALTH, Nodes
from test_train_on_ray import arguments, losses_of, wait_for_step

from crate_ray.runs import read_status
from crate_ray.training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow

ELASTIC = [*LONG, "scale.num_workers={min: 1, max: 2}", "scale.resize_check_s=5"]
RECOVERY_S = 35.0


def num_workers(cluster: Nodes) -> int:
    return sum(len(node.workers()) for node in cluster.nodes)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "word"), [(signal.SIGKILL, "killed"), (signal.SIGSTOP, "silent")])
def test_a_run_goes_on_without_a_lost_node_and_grows_when_one_comes_back(
    start_nodes: Callable[..., Nodes],
    start_driver: Callable[..., Any],
    overrides: list[str],
    tmp_path: Path,
    number: int,
    word: str,
) -> None:
    cluster = start_nodes(1, HEALTH)
    lost = cluster.add(1)
    driver = start_driver(
        "train",
        "digits_crate_mae",
        *arguments(overrides, *ELASTIC, "checkpoint.every_steps=25"),
        environment=cluster.environment,
    )
    folder = wait_for_step(tmp_path / "out", 40, driver)
    assert len(lost.workers()) == 1
    assert num_workers(cluster) == 2

    at = time.time()
    lost.send(number)
    before = max(losses_of(folder))
    record = wait_until_training_goes_on(folder, at, driver)
    recovery_s = record["time"] - at
    print(f"\nnode {word} at step {before}: training again at step {record['step']} after {recovery_s:.1f} s, one worker")
    assert recovery_s < RECOVERY_S
    assert before - 25 <= record["step"] - 1 <= before
    assert len(cluster.head.workers()) == 1
    if number == signal.SIGSTOP:
        lost.send(signal.SIGKILL)

    wait_for(lambda: max(losses_of(folder)) >= before + 20, "progress")
    at = time.time()
    back = cluster.add(1)
    wait_for(lambda: len(back.workers()) == 1, "worker on the new node")
    paused = latest_checkpoint(folder)
    assert paused is not None
    record = wait_until_training_goes_on(folder, time.time(), driver)
    print(f"node back: training on two workers after {record['time'] - at:.1f} s, from step {record['step']}")
    assert record["step"] == paused.step + 1  # the group wrote a checkpoint before it left: no step is repeated
    wait_for(lambda: max(losses_of(folder)) >= record["step"] + 20, "progress")
    assert num_workers(cluster) == 2
    stop(driver, folder)
    check_losses(folder, overrides)


@pytest.mark.timeout(600)
def test_a_run_that_waits_for_a_node_can_be_stopped(
    start_nodes: Callable[..., Nodes], start_driver: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    cluster = start_nodes(1, HEALTH)
    lost = cluster.add(1)
    more = [*LONG, "scale.num_workers={min: 2, max: 3}", "checkpoint.every_steps=25"]
    driver = start_driver("train", "digits_crate_mae", *arguments(overrides, *more), environment=cluster.environment)
    folder = wait_for_step(tmp_path / "out", 30, driver)
    lost.send(signal.SIGKILL)
    wait_for(lambda: not cluster.head.workers(), "end of the workers")
    stopped = time.time()
    driver.process.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 143, driver.output()
    print(f"\nstopped while it waited: {time.time() - stopped:.1f} s")
    status = read_status(folder)
    assert status is not None
    assert status.state == "KILLED"
    assert "room for 2 workers" in str(status.reason)
