"""Two workers of Ray Train of which one runs out of memory, or stands still: the group starts again and nothing is lost."""

import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import bad_batches
import pytest
from faults import LONG, check_losses, stop, wait_for, wait_until_training_goes_on, worker_pids
from test_train_on_ray import WORKER_COUNT_TOLERANCE, arguments, losses_of, undisturbed_losses, wait_for_step

from crate_ray.config import RunConfig
from crate_ray.runs import RunFolder
from crate_ray.training.memory import read_micro_batch

pytestmark = pytest.mark.slow
HANG_TIMEOUT_S = 15.0
STEPS, FAILS_AFTER, BATCH = 40, 25, 32


def hungry_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """A worker whose reader hands rank 1 images of which more than eight do not fit into memory at once."""
    from crate_ray.launch import worker

    opener = bad_batches.hungry(8, from_cursor=FAILS_AFTER * BATCH, on_rank=1)
    worker._who_decodes = lambda config: opener  # type: ignore[assignment]
    return worker.train_worker(payload)


def raw_times(folder: RunFolder) -> list[float]:
    from crate_ray.runs import RecordTail

    return [record.time for record in RecordTail(folder).poll() if "train/loss" in record.values]


@pytest.mark.usefixtures("cluster")
def test_out_of_memory_on_one_worker_makes_all_go_on_with_less_and_is_no_failure(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from ray import cloudpickle

    from crate_ray.launch.train import launch_training

    for module in (bad_batches, sys.modules[__name__]):  # workers cannot import tests
        cloudpickle.register_pickle_by_value(module)
    monkeypatch.setattr("crate_ray.launch.worker.train_worker", hungry_worker)
    # 16 images a worker: they do not fit, 8 do.
    more = [f"train.steps={STEPS}", "scale.num_workers=2", "checkpoint.every_steps=10", "scale.max_failures=0"]
    outcome = launch_training(RunConfig.load("digits_crate_mae", [*overrides, *more]))
    assert outcome.state == "FINISHED", outcome.reason
    assert read_micro_batch(outcome.folder) == 8
    times = raw_times(outcome.folder)
    pause_s = max(after - before for before, after in pairwise(times))
    print(f"\nout of memory on one of two workers: training again after {pause_s:.1f} s")
    expected = undisturbed_losses(overrides, STEPS, total=STEPS)
    assert losses_of(outcome.folder) == pytest.approx(expected, rel=WORKER_COUNT_TOLERANCE)


@pytest.mark.timeout(600)
def test_a_worker_that_stands_still_is_found_by_the_other_and_the_group_starts_again(
    drive: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    more = [*LONG, "scale.num_workers=2", "checkpoint.every_steps=20", f"scale.hang_timeout_s={HANG_TIMEOUT_S}"]
    driver = drive("train", "digits_crate_mae", *arguments(overrides, *more))
    folder = wait_for_step(tmp_path / "out", 30, driver)
    victims = worker_pids()
    assert len(victims) == 2
    stopped = time.time()
    os.kill(victims[1], signal.SIGSTOP)
    try:
        record = wait_until_training_goes_on(folder, stopped, driver, timeout_s=HANG_TIMEOUT_S + 120)
    finally:
        if victims[1] in worker_pids():
            os.kill(victims[1], signal.SIGKILL)
    traces = [path.read_text() for path in Path(folder.uri, "hangs").iterdir() if path.stat().st_size]
    print(f"\nworker stopped: training again at step {record['step']} after {record['time'] - stopped:.1f} s")
    assert len(traces) == 1, "of the worker that waited for the one that stood still"
    assert "made no progress for " in traces[0]
    assert "in run_training" in traces[0]
    before = max(losses_of(folder))
    wait_for(lambda: max(losses_of(folder)) >= before + 20, "progress")
    stop(driver, folder)
    check_losses(folder, overrides)
