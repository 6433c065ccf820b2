"""A node that is lost under a sweep: its trial goes on elsewhere, the others do not notice."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import wait_for
from nodes import HEALTH, Nodes

from crate_ray.runs import RunFolder, list_trials
from sweeps import attempts, steps_done_twice, write_sweep_file

pytestmark = pytest.mark.slow

EVERY = 20  # steps between two checkpoints


@pytest.mark.timeout(600)
def test_the_trial_of_a_lost_node_goes_on_from_its_checkpoint_on_another(
    start_nodes: Callable[..., Nodes], start_driver: Callable[..., Any], digits: Path, tmp_path: Path
) -> None:
    cluster = start_nodes(1, HEALTH)
    other = cluster.add(1)
    more = {"train.steps": 600, "checkpoint.every_steps": EVERY}
    grid = {"optimizer.lr": {"grid": [1e-3, 3e-4, 1e-4]}}
    path = write_sweep_file(digits, tmp_path, tune=grid, report_every_steps=EVERY, max_concurrent=2, more=more)
    folder = RunFolder(str(tmp_path / "out" / "tiny"))
    driver = start_driver("sweep", str(path), environment=cluster.environment)

    def two_train() -> bool:
        return sum(row.state == "RUNNING" and row.step >= 2 * EVERY for row in list_trials(folder.uri)) == 2

    wait_for(two_train, "two trials on two nodes")
    other.send(signal.SIGKILL)
    assert driver.process.wait(400) == 0
    rows = list_trials(folder.uri)
    assert [row.state for row in rows] == ["FINISHED"] * 3, [(row.id, row.reason) for row in rows]
    assert sorted(attempts(folder).values()) == [1, 1, 2]
    twice = steps_done_twice(folder)
    assert sum(steps > 0 for steps in twice.values()) <= 1
    assert max(twice.values()) <= EVERY
