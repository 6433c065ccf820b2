"""Whole nodes that are lost, drained and come back, under a run that takes as many workers as there is room for."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import LONG, check_losses, records_after, stop, wait_for, wait_until_training_goes_on
from nodes import HEALTH, Node, Nodes
from test_train_on_ray import arguments, losses_of, wait_for_step

from crate_ray.runs import RunFolder, read_status
from crate_ray.training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow

ELASTIC = [*LONG, "scale.num_workers={min: 1, max: 2}", "scale.resize_check_s=5"]
EVERY = 25  # steps between two checkpoints
RECOVERY_S = 35.0


@pytest.mark.timeout(600)
def test_a_run_goes_on_without_lost_nodes_and_grows_when_one_comes_back(
    start_nodes: Callable[..., Nodes], start_driver: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    cluster = start_nodes(1, HEALTH)
    first = cluster.add(1)
    more = [*ELASTIC, f"checkpoint.every_steps={EVERY}"]
    driver = start_driver("train", "digits_crate_mae", *arguments(overrides, *more), environment=cluster.environment)
    folder = wait_for_step(tmp_path / "out", EVERY + 10, driver)
    assert [len(node.workers()) for node in cluster.nodes] == [1, 1]
    lose(first, signal.SIGKILL, folder, driver)
    assert len(cluster.head.workers()) == 1

    wait_for(lambda: max(losses_of(folder)) % EVERY > 10, "step between two checkpoints")
    started = time.time()
    second = cluster.add(1)
    added = time.time()
    wait_for(lambda: len(second.workers()) == 1, "worker on the new node")
    paused = latest_checkpoint(folder)
    assert paused is not None
    record = wait_until_training_goes_on(folder, time.time(), driver)
    now = record["time"]
    print(f"a node came back: training on two workers {now - added:.1f} s after it had joined ({now - started:.1f} s in all)")
    assert record["step"] == paused.step + 1  # the group wrote a checkpoint before it left: no step is repeated

    wait_for(lambda: max(losses_of(folder)) >= paused.step + EVERY + 10, "checkpoint of the new group")
    lose(second, signal.SIGSTOP, folder, driver)
    second.send(signal.SIGKILL)
    wait_for(lambda: max(losses_of(folder)) % EVERY > 5, "progress")
    stop(driver, folder)
    check_losses(folder, overrides)


def lose(node: Node, number: int, folder: RunFolder, driver: Any) -> None:
    """A node dies (SIGKILL) or falls silent (SIGSTOP); training goes on from the last checkpoint, soon enough."""
    lost = time.time()
    node.send(number)
    before = max(losses_of(folder))
    record = wait_until_training_goes_on(folder, lost, driver)
    seconds = record["time"] - lost
    print(
        f"\n{signal.Signals(number).name} to a node at step {before}: training at step {record['step']} after {seconds:.1f} s"
    )
    assert seconds < RECOVERY_S
    assert before - EVERY <= record["step"] - 1 <= before


@pytest.mark.timeout(600)
def test_a_run_that_waits_for_a_node_can_be_stopped(
    start_nodes: Callable[..., Nodes], start_driver: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    cluster = start_nodes(1, HEALTH)
    lost = cluster.add(1)
    more = [*LONG, "scale.num_workers={min: 2, max: 3}", f"checkpoint.every_steps={EVERY}"]
    driver = start_driver("train", "digits_crate_mae", *arguments(overrides, *more), environment=cluster.environment)
    folder = wait_for_step(tmp_path / "out", 30, driver)
    lost.send(signal.SIGKILL)
    wait_for(lambda: time.time() - records_after(folder, 0.0)[-1]["time"] > 5, "pause without a step")
    stopped = time.time()
    driver.process.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 143, driver.output()
    print(f"\nstopped while it waited: {time.time() - stopped:.1f} s")
    status = read_status(folder)
    assert status is not None
    assert status.state == "KILLED"
    assert "room for 2 workers" in str(status.reason)
