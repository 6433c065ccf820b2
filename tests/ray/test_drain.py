"""A node that its provider is about to take away."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import LONG, check_losses, log_of, stop, wait_for, wait_until_training_goes_on
from nodes import HEALTH, Nodes
from test_train_on_ray import arguments, losses_of, wait_for_step

from crate_ray.training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow

NOTICE_S = 25.0


@pytest.mark.timeout(600)
def test_a_drained_node_is_left_with_a_checkpoint_and_the_run_goes_on_elsewhere(
    start_nodes: Callable[..., Nodes], start_driver: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    cluster = start_nodes(1, HEALTH)
    leaving = cluster.add(1)
    more = [*LONG, "scale.num_workers={min: 1, max: 2}", "checkpoint.every_steps=null", "checkpoint.every_minutes=null"]
    driver = start_driver("train", "digits_crate_mae", *arguments(overrides, *more), environment=cluster.environment)
    folder = wait_for_step(tmp_path / "out", 40, driver)
    assert len(leaving.workers()) == 1

    noticed = time.time()
    cluster.drain(leaving, NOTICE_S)
    wait_for(lambda: latest_checkpoint(folder) is not None, "checkpoint")
    print(f"\ndrained: a checkpoint was written after {time.time() - noticed:.1f} s")
    assert time.time() - noticed < NOTICE_S
    saved = latest_checkpoint(folder)
    assert saved is not None
    record = wait_until_training_goes_on(folder, time.time(), driver)
    print(f"training again at step {record['step']} after {record['time'] - noticed:.1f} s, on the node that stays")
    assert record["step"] == saved.step + 1
    assert len(cluster.head.workers()) == 1
    assert not leaving.workers()
    assert "about to leave" in log_of(folder)

    leaving.send(signal.SIGKILL)
    reached = max(losses_of(folder))
    wait_for(lambda: max(losses_of(folder)) >= reached + 60, "progress without the node")
    stop(driver, folder)
    check_losses(folder, overrides)
