"""Workers that die while they train."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_train_on_ray import WORKER_COUNT_TOLERANCE, arguments, losses_of, undisturbed_losses, wait_for_step

from crate_ray.runs import read_status

pytestmark = pytest.mark.slow


def worker_pids() -> list[int]:
    """Train workers of this machine, by the name that Ray gives them."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
            found.append(process.info["pid"])
    return found


@pytest.mark.timeout(600)
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_no_number(
    drive: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    more = ["train.steps=400", "scale.num_workers=2", "checkpoint.every_steps=20"]
    driver = drive("train", "digits_crate_mae", *arguments(overrides, *more))
    folder = wait_for_step(tmp_path / "out", 30, driver)
    victims = worker_pids()
    assert len(victims) == 2
    killed = time.monotonic()
    os.kill(victims[1], signal.SIGKILL)
    before = max(losses_of(folder))
    wait_for_step(tmp_path / "out", before + 20, driver)
    print(f"training went on {time.monotonic() - killed:.1f} s after the kill, {20} steps included")
    driver.process.send_signal(signal.SIGTERM)
    assert driver.wait(120) == 143, driver.output()
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.attempt) == ("KILLED", 1)
    measured, expected = losses_of(folder), undisturbed_losses(overrides, before + 20)
    for step in range(1, before + 21):
        assert measured[step] == pytest.approx(expected[step], rel=WORKER_COUNT_TOLERANCE), step
