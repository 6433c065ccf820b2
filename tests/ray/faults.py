"""What tests of faults share: when training went on, and whether its losses are those of the undisturbed run."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_train_on_ray import WORKER_COUNT_TOLERANCE, losses_of, undisturbed_losses

from crate_ray.runs import RunFolder, read_status

TOTAL = 20_000  # steps; more than any of these tests waits for
# Differences of float sums grow with each update: at the recipe's learning rate to 2e-5 in 300 steps, at this one not.
LONG = [f"train.steps={TOTAL}", "optimizer.lr=1e-4"]


def records_after(folder: RunFolder, moment: float) -> list[dict[str, Any]]:
    """Lines of the metrics file from then on, repeated steps included."""
    lines = Path(folder.path("metrics.jsonl")).read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in records if record["time"] > moment and "train/loss" in record["values"]]


def wait_until_training_goes_on(folder: RunFolder, moment: float, driver: Any, timeout_s: float = 120) -> dict[str, Any]:
    """The first step that was trained after a fault; what was under way is over in half a second."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if records := records_after(folder, moment + 0.5):
            return records[0]
        assert driver.process.poll() is None, driver.output()
        time.sleep(0.1)
    raise AssertionError(f"no step in {timeout_s} s after the fault:\n{driver.output()}\n{log_of(folder)}")


def log_of(folder: RunFolder) -> str:
    return Path(folder.path("train.log")).read_text()


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} in {timeout_s} s"
        time.sleep(0.1)


def worker_pids() -> list[int]:
    """Train workers of this machine, by the name that Ray gives them."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
            found.append(process.info["pid"])
    return found


def check_losses(folder: RunFolder, overrides: list[str]) -> None:
    measured = losses_of(folder)
    steps = max(measured)
    assert sorted(measured) == list(range(1, steps + 1))
    expected = undisturbed_losses([*overrides, *LONG], steps, total=TOTAL)
    for step in range(1, steps + 1):
        assert measured[step] == pytest.approx(expected[step], rel=WORKER_COUNT_TOLERANCE), step


def check_same_command_goes_on(
    start: Callable[[], Any], folder: RunFolder, overrides: list[str], *, saved: int, more_steps: int
) -> None:
    """A second attempt begins after the last checkpoint, makes progress, and has the losses of the undisturbed run."""
    started = time.time()
    again = start()
    record = wait_until_training_goes_on(folder, started, again)
    print(f"the same command: training again at step {record['step']} after {record['time'] - started:.1f} s")
    assert (record["attempt"], record["step"]) == (2, saved + 1)
    wait_for(lambda: max(losses_of(folder)) >= saved + more_steps, "progress")
    stop(again, folder, attempt=2)
    check_losses(folder, overrides)


def stop(driver: Any, folder: RunFolder, *, attempt: int = 1) -> None:
    """Stops a driver with SIGTERM, and finds a checkpoint and an honest status."""
    driver.process.send_signal(signal.SIGTERM)
    assert driver.wait(120) == 143, driver.output()
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.attempt) == ("KILLED", attempt)
