"""`crate-ray train` through Ray Train: real clusters, real workers, real signals."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import ConfigError, RunConfig
from crate_ray.runs import RunFolder, list_runs, read_records, read_status

# Losses of different worker counts differ by the order of float32 sums only.
WORKER_COUNT_TOLERANCE = 2e-5


def losses_of(folder: RunFolder) -> dict[int, float]:
    return {record.step: record.values["train/loss"] for record in read_records(folder) if "train/loss" in record.values}


def arguments(overrides: list[str], *more: str) -> list[str]:
    return [word for override in (*overrides, *more) for word in ("--set", override)]


@pytest.mark.usefixtures("cluster")
def test_one_two_and_three_workers_agree_in_loss(overrides: list[str]) -> None:
    from crate_ray.launch.train import launch_training

    curves = []
    for workers in (1, 2, 3):
        more = [f"scale.num_workers={workers}", "train.steps=8", f"name=workers-{workers}"]
        outcome = launch_training(RunConfig.load("digits_crate_mae", [*overrides, *more]))
        assert outcome.state == "FINISHED", outcome.reason
        curves.append(losses_of(outcome.folder))
    assert list(curves[0]) == list(range(1, 9))
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=WORKER_COUNT_TOLERANCE)


@pytest.mark.usefixtures("cluster")
def test_a_finished_run_started_again_gives_its_result_without_work_and_a_trace_is_beside_it(overrides: list[str]) -> None:
    from crate_ray.launch.train import launch_training
    from crate_ray.training.profiling import ProfiledSteps

    config = RunConfig.load("digits_mae", [*overrides, "model.decoder_width=32", "model.decoder_num_heads=2", "train.steps=3"])
    first = launch_training(config, profiled=ProfiledSteps(2, 3))
    started = time.monotonic()
    second = launch_training(config)
    assert (first.state, second.state, second.was_finished) == ("FINISHED", "FINISHED", True)
    assert Path(first.folder.uri, "profile", "steps_2-3.json.gz").stat().st_size > 0
    assert time.monotonic() - started < 5
    assert first.folder.uri == second.folder.uri


def wait_for_step(root: Path, step: int, driver: Any, timeout_s: float = 150) -> RunFolder:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for folder in list_runs(str(root)):
            if max(losses_of(folder), default=0) >= step:
                return folder
        assert driver.process.poll() is None, driver.output()
        time.sleep(0.2)
    raise AssertionError(f"step {step} not reached in {timeout_s} s:\n{driver.output()}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on_as_if_nothing_happened(
    drive: Callable[..., Any], overrides: list[str], tmp_path: Path, number: int, code: int
) -> None:
    # As long as it takes: the test stops it. 400 steps of this model are half a minute.
    command = ["train", "digits_crate_mae", *arguments(overrides, "train.steps=400", "scale.num_workers=2")]
    driver = drive(*command)
    folder = wait_for_step(tmp_path / "out", 5, driver)
    driver.process.send_signal(number)
    assert driver.wait(120) == code, driver.output()
    status = read_status(folder)
    assert status is not None
    assert status.state == "KILLED"
    assert status.reason is not None
    assert status.reason.startswith(signal.Signals(number).name)
    saved = [path for path in (Path(folder.uri) / "checkpoints").iterdir() if (path / "manifest.json").exists()]
    stopped_at = max(json.loads((path / "manifest.json").read_text())["step"] for path in saved)
    assert stopped_at == max(losses_of(folder)) < 400

    again = drive(*command)
    wait_for_step(tmp_path / "out", stopped_at + 20, again)
    again.process.send_signal(number)
    assert again.wait(120) == code, again.output()
    undisturbed = undisturbed_losses(overrides, stopped_at + 20)
    resumed = losses_of(folder)
    for step in range(1, stopped_at + 21):
        assert resumed[step] == pytest.approx(undisturbed[step], rel=WORKER_COUNT_TOLERANCE), step


def undisturbed_losses(overrides: list[str], steps: int, *, total: int = 400, name: str = "undisturbed") -> dict[int, float]:
    """The same run in this process, without Ray and without a stop, for its first steps."""
    from crate_ray.training.loop import LocalContext, run_training
    from crate_ray.training.prepare import prepare_run

    class StopAt(LocalContext):
        def heartbeat(self, step: int) -> None:
            if step >= steps:
                self.stop()

    more = [f"train.steps={total}", f"name={name}", "scale.num_workers=1"]
    config, folder = prepare_run(RunConfig.load("digits_crate_mae", [*overrides, *more]), device_type="cpu")
    run_training(config, folder, StopAt())
    return losses_of(folder)


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_cpus_are_refused_at_once_with_the_numbers(overrides: list[str], tmp_path: Path) -> None:
    from crate_ray.launch.train import launch_training

    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"num_workers = 5 of 1 CPU each do not fit.* room for 4; use at most 4 workers"):
        launch_training(RunConfig.load("digits_crate_mae", [*overrides, "scale.num_workers=5"]))
    assert time.monotonic() - started < 5
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("cluster")
def test_a_run_that_another_live_driver_holds_is_refused(overrides: list[str]) -> None:
    from crate_ray.launch.train import launch_training
    from crate_ray.runs import Lease
    from crate_ray.training.prepare import prepare_run

    config = RunConfig.load("digits_crate_mae", [*overrides, "train.steps=3"])
    _, folder = prepare_run(config, device_type="cpu")
    lease = Lease.take(folder)
    with pytest.raises(ConfigError, match="held by another live driver"):
        launch_training(config)
    lease.end("FAILED", "given up by the test")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_what_no_restart_can_cure_fails_at_once_in_one_sentence(overrides: list[str]) -> None:
    from crate_ray.launch.train import launch_training

    undisturbed_losses(overrides, 5, name="damaged")
    config = RunConfig.load("digits_crate_mae", [*overrides, "train.steps=400", "name=damaged", "scale.num_workers=2"])
    weights = next(Path(config.storage.path).glob("damaged/checkpoints/*/model.safetensors"))
    body = bytearray(weights.read_bytes())
    body[-1] ^= 1
    weights.write_bytes(body)

    outcome = launch_training(config)
    assert outcome.state == "FAILED"
    assert outcome.reason is not None
    assert "model.safetensors" in outcome.reason
    assert "\n" not in outcome.reason
    status = read_status(outcome.folder)
    assert status is not None
    assert (status.state, status.reason) == ("FAILED", outcome.reason)


@pytest.mark.usefixtures("cluster")
def test_a_diverging_run_ends_failed_with_the_step_and_keeps_its_last_checkpoint(overrides: list[str]) -> None:
    from crate_ray.launch.train import launch_training

    more = [
        "train.steps=60",
        "train.clip_norm=null",
        "optimizer.lr=1e30",
        "schedule.warmup_steps=0",
        "checkpoint.every_steps=1",
    ]
    outcome = launch_training(RunConfig.load("digits_crate_mae", [*overrides, *more]))
    assert outcome.state == "FAILED"
    assert outcome.reason is not None
    assert "gradient norm" in outcome.reason
    status = read_status(outcome.folder)
    assert status is not None
    assert status.state == "FAILED"
