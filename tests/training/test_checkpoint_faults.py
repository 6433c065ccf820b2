"""Storage that fails under a run: the checkpoint before is whole, a partial one is never picked, and no number is lost."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fault_server import FaultServer
from full_disks import file_size_limit, small_disk

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig
from crate_ray.runs import NullSink, RecordWriter, RunFolder, read_records
from crate_ray.storage import remote, retry
from crate_ray.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, latest_checkpoint, list_checkpoints
from crate_ray.training.loop import LocalContext, LoopResult, run_training
from crate_ray.training.parallel import Parallel
from crate_ray.training.prepare import prepare_run
from crate_ray.training.saving import CheckpointError, CheckpointSaver

LoadTiny = Callable[..., RunConfig]
TIMEOUT_S = 60


class Events(LocalContext):
    """Does something after given steps."""

    def __init__(self, after: dict[int, Callable[[], object]], attempt: int = 1) -> None:
        super().__init__(attempt)
        self._after = after
        self.checkpoints: list[int] = []

    def heartbeat(self, step: int) -> None:
        if step in self._after:
            self._after[step]()

    def checkpoint_written(self, step: int, uri: str) -> None:
        assert storage.exists(storage.join(uri, "manifest.json"))
        self.checkpoints.append(step)


def losses(folder: RunFolder) -> dict[int, float]:
    return {record.step: record.values["train/loss"] for record in read_records(folder) if "train/loss" in record.values}


def state(folder: RunFolder) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(folder)
    assert newest is not None
    return {**newest.read(MODEL_FILE), **newest.read(OPTIMIZER_FILE)}


def assert_same_run(folder: RunFolder, other: RunFolder) -> None:
    """Bit by bit: float32 on one thread."""
    assert losses(folder) == losses(other)
    ours, theirs = state(folder), state(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def once_whole(folder: RunFolder, step: int, action: Callable[[], object]) -> Callable[[], None]:
    """Does something when a checkpoint that is being written has become whole."""

    def act() -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while step not in [checkpoint.step for checkpoint in list_checkpoints(folder)]:
            assert time.monotonic() < deadline
        action()

    return act


@pytest.fixture
def undisturbed(load_tiny: LoadTiny, tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path / "undisturbed"))
    run_training(load_tiny(), folder, LocalContext())
    return folder


def test_a_disk_that_fills_up_and_is_emptied_costs_one_checkpoint_and_no_step(
    load_tiny: LoadTiny, undisturbed: RunFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        folder, ballast = RunFolder(str(disk / "run")), disk / "ballast"

        def fill() -> None:
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

        context = Events({3: once_whole(folder, 2, fill), 7: ballast.unlink})
        config = load_tiny("checkpoint.every_steps=2", "checkpoint.keep_last=9")
        assert run_training(config, folder, context) == LoopResult("FINISHED", 12)
        assert {2, 8, 10, 12} <= set(context.checkpoints) <= {2, 6, 8, 10, 12}
        assert_same_run(folder, undisturbed)
    assert "the checkpoint of step 4 was not written: [Errno 28] No space left on device" in caplog.text


def test_a_disk_that_stays_full_ends_the_run_after_three_checkpoints_and_freed_it_goes_on(
    load_tiny: LoadTiny, undisturbed: RunFolder, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        folder, ballast = RunFolder(str(disk / "run")), disk / "ballast"
        # Room for records, but not for another checkpoint.

        def nearly_fill() -> None:
            ballast.write_bytes(bytes((storage.free_bytes(folder.uri) or 0) - (40 << 10)))

        context = Events({3: once_whole(folder, 2, nearly_fill)})
        config = load_tiny("checkpoint.every_steps=2")
        expected = (
            r"3 checkpoints in a row, up to step 8, could not be written: .*No space left.* were free.*goes on from step 2, "
        )
        with pytest.raises(CheckpointError, match=expected):
            run_training(config, folder, context)
        assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [2]
        ballast.unlink()
        assert run_training(config, folder, LocalContext(2)) == LoopResult("FINISHED", 12)
        assert_same_run(folder, undisturbed)


def test_a_disk_too_small_for_two_checkpoints_is_found_before_the_first_step(load_tiny: LoadTiny, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        with pytest.raises(ConfigError, match=r"is too full for this run: a checkpoint takes about [\d.]+ KiB and [\d.]+ KiB"):
            prepare_run(load_tiny(f"storage.path={disk}"), device_type="cpu")
        assert list(disk.iterdir()) == []


def test_a_write_that_breaks_off_in_the_middle_leaves_the_one_before(
    load_tiny: LoadTiny, undisturbed: RunFolder, tmp_path: Path
) -> None:
    folder, limit = RunFolder(str(tmp_path / "run")), contextlib.ExitStack()
    quota = once_whole(folder, 3, lambda: limit.enter_context(file_size_limit(24 << 10)))  # the optimizer's file is larger
    context = Events({4: quota, 10: limit.close})
    with limit:
        assert run_training(load_tiny("checkpoint.every_steps=3"), folder, context) == LoopResult("FINISHED", 12)
    assert {3, 12} <= set(context.checkpoints) <= {3, 9, 12}
    assert not Path(folder.path("checkpoints", "step_00000006")).exists()
    assert_same_run(folder, undisturbed)


@pytest.fixture
def proxied(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultServer, str]]:
    """A proxy before the S3 server, and a folder of the bucket through it."""
    monkeypatch.setattr(remote, "_S3_ATTEMPTS", 1)
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "DEADLINE_S", 0.3)
    remote._store.cache_clear()
    base, _, query = bucket.partition("?")
    upstream = re.search(r"endpoint_override=([\d.]+)%3A(\d+)", query)
    assert upstream is not None
    with FaultServer(upstream=f"{upstream[1]}:{upstream[2]}") as server:
        host, port = server.host.split(":")
        yield server, f"{base}/checkpoint-faults?endpoint_override={host}%3A{port}&scheme=http&region=us-east-1"
    remote._store.cache_clear()


def test_a_bucket_that_answers_503_for_a_while_costs_one_checkpoint_and_no_step(
    load_tiny: LoadTiny, undisturbed: RunFolder, proxied: tuple[FaultServer, str], caplog: pytest.LogCaptureFixture
) -> None:
    server, url = proxied
    folder = RunFolder(storage.join(url, "a-while"))
    outage = once_whole(folder, 3, lambda: server.fail("503", path="", methods="PUT POST"))
    context = Events({4: outage, 10: server.rules.clear})
    config = load_tiny("checkpoint.every_steps=3", "checkpoint.keep_last=2")
    assert run_training(config, folder, context) == LoopResult("FINISHED", 12)
    assert {3, 12} <= set(context.checkpoints) <= {3, 9, 12}
    assert 12 in [checkpoint.step for checkpoint in list_checkpoints(folder)]
    assert_same_run(folder, undisturbed)
    assert "the checkpoint of step 6 was not written: cannot write s3://" in caplog.text


def test_a_bucket_that_stays_away_ends_the_run_with_one_error_and_the_one_before_is_whole(
    load_tiny: LoadTiny, undisturbed: RunFolder, proxied: tuple[FaultServer, str]
) -> None:
    server, url = proxied
    folder = RunFolder(storage.join(url, "away"))

    go_away = once_whole(folder, 3, lambda: server.fail("503", path="", methods="PUT POST"))
    config = load_tiny("checkpoint.every_steps=3")
    with pytest.raises(CheckpointError, match=r"could not be written: cannot write s3://.*goes on from step 3, s3://"):
        run_training(config, folder, Events({4: go_away}))
    server.rules.clear()
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [3]
    assert run_training(config, folder, LocalContext(2)) == LoopResult("FINISHED", 12)
    assert_same_run(folder, undisturbed)


WRITER = """
import sys, torch
from crate_ray.config import RunConfig
from crate_ray.runs import NullSink, RunFolder
from crate_ray.training.parallel import Parallel
from crate_ray.training.saving import CheckpointSaver

config = RunConfig.load("digits_crate_mae", ["checkpoint.keep_last=2"])
folder = RunFolder(sys.argv[1])
saver = CheckpointSaver(config, folder, ranks=Parallel(), device=torch.device("cpu"), sink=NullSink(), attempt=1)
for step in range(1, 10**6):
    tensors = {f"w{number}": torch.full((1 << 20,), float(step)) for number in range(8)}
    saver.save(step, {"model.safetensors": (tensors, {})}, {"cursor": step, "train_seconds": 0.0})
"""


@pytest.mark.parametrize(
    "victim",
    ["*/.model.safetensors.*.tmp", pytest.param("*/model.safetensors", marks=pytest.mark.slow)],
    ids=["in a file", "before the manifest"],
)
def test_a_writer_that_is_killed_in_the_middle_leaves_whole_checkpoints_alone(victim: str, tmp_path: Path) -> None:
    """Killed when a file is half written, and when one is there and its manifest is not, after some that were whole."""
    folder = RunFolder(str(tmp_path / "run"))
    place = Path(folder.path("checkpoints"))
    process = subprocess.Popen([sys.executable, "-c", WRITER, folder.uri], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        partial = until_partial(place, victim, process)
    finally:
        process.kill()
        process.wait(TIMEOUT_S)
    assert process.returncode == -signal.SIGKILL
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert all(torch.equal(value, torch.full((1 << 20,), float(newest.step))) for value in newest.read(MODEL_FILE).values())
    left = {path.parent for path in place.glob(victim)} - {Path(checkpoint.uri) for checkpoint in list_checkpoints(folder)}
    assert left or partial.exists(), "killed too late"

    config = RunConfig.load("digits_crate_mae", ["checkpoint.keep_last=2"])
    saver = CheckpointSaver(config, folder, ranks=Parallel(), device=torch.device("cpu"), sink=NullSink(), attempt=2)
    saver.save(10**7, {MODEL_FILE: ({"w": torch.ones(3)}, {})}, {"cursor": 1, "train_seconds": 0.0})
    saver.wait(is_last=True)
    saver.close()
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [newest.step, 10**7]
    assert sorted(path.name for path in place.iterdir()) == [f"step_{newest.step:08d}", "step_10000000"]
    assert all(not list(path.glob(".*")) for path in place.iterdir())


def until_partial(place: Path, victim: str, process: subprocess.Popen[bytes]) -> Path:
    """Waits until a whole checkpoint is there and another one is begun, and stops the writer there and then."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None
        if list(place.glob("*/manifest.json")):
            for path in place.glob(victim):
                if not (path.parent / "manifest.json").exists():
                    process.send_signal(signal.SIGSTOP)
                    if path.exists() and not (path.parent / "manifest.json").exists():
                        return path
                    process.send_signal(signal.SIGCONT)
    raise AssertionError("no checkpoint was begun")


def test_records_that_a_full_disk_cut_off_are_written_whole_when_there_is_room(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    writer = RecordWriter(folder, 1)
    writer.write(1, {"train/loss": 0.5})
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    with file_size_limit(len(whole) + 10):
        writer.write(2, {"train/loss": 0.25})
        writer.write(3, {"train/loss": 0.125})
        assert path.read_bytes() == whole, "no torn line"
        with pytest.raises(OSError, match="File too large"):
            writer.flush()
    writer.write(4, {"train/loss": 0.0625})
    writer.close()
    assert [(record.step, record.values["train/loss"]) for record in read_records(folder)] == [
        (1, 0.5),
        (2, 0.25),
        (3, 0.125),
        (4, 0.0625),
    ]
