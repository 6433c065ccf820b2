"""The saver: a thread writes while the training goes on, ranks agree when a checkpoint is whole, and faults are counted."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from full_disks import LIMIT, file_size_limit
from torch import Tensor

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig
from crate_ray.runs import NullSink, RunFolder
from crate_ray.training.checkpoint import MODEL_FILE, latest_checkpoint, list_checkpoints
from crate_ray.training.disk_space import check_disk_space, checkpoint_bytes
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.parallel import Parallel
from crate_ray.training.saving import MAX_FAILURES, CheckpointError, CheckpointSaver, Ranks

LoadTiny = Callable[..., RunConfig]
CPU = torch.device("cpu")
TIMEOUT_S = 20


class Gate(NullSink):
    """A store of records that takes them only once the gate is open; notes whether a manifest was there before."""

    def __init__(self, folder: RunFolder | None = None) -> None:
        self.open = threading.Event()
        self.manifests: list[bool] = []
        self._folder = folder

    def flush(self) -> None:
        assert self.open.wait(TIMEOUT_S)
        if self._folder is not None:
            self.manifests.append(storage.exists(self._folder.path("checkpoints", "step_00000001", "manifest.json")))

    def position(self) -> dict[str, int]:
        return {"attempt": 3, "count": 17}


class RanksOfThreads:
    """Ranks that meet in this process."""

    def __init__(self, rank: int, barrier: threading.Barrier, counts: list[int]) -> None:
        self.rank, self.world_size, self.num_shards = rank, barrier.parties, barrier.parties
        self._barrier, self._counts = barrier, counts

    def sum_up(self, values: Tensor) -> Tensor:
        self._counts[self.rank] = int(values)
        self._barrier.wait(TIMEOUT_S)
        total = sum(self._counts)
        self._barrier.wait(TIMEOUT_S)
        return values.fill_(total)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


@contextmanager
def saver_of(
    folder: RunFolder, *overrides: str, sink: NullSink | None = None, ranks: Ranks | None = None, attempt: int = 3
) -> Iterator[CheckpointSaver]:
    config = RunConfig.load("digits_crate_mae", overrides)
    saver = CheckpointSaver(config, folder, ranks=ranks or Parallel(), device=CPU, sink=sink or NullSink(), attempt=attempt)
    yield saver
    saver.close()


def save(saver: CheckpointSaver, step: int, *, size: int = 3, **evaluation: float) -> None:
    files = {MODEL_FILE: ({"w": torch.ones(size)}, {})}
    values = {key.replace("_", "/", 1): number for key, number in evaluation.items()}
    saver.save(step, files, {"cursor": 8 * step, "train_seconds": 0.5, "evaluation": values})


def steps(folder: RunFolder) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


def test_a_step_waits_for_the_copy_alone_and_what_it_changes_later_is_not_in_the_file(folder: RunFolder) -> None:
    gate, weights = Gate(folder), torch.ones(3)
    with saver_of(folder, sink=gate) as saver:
        saver.save(1, {MODEL_FILE: ({"w": weights}, {})}, {"cursor": 8, "train_seconds": 0.5})
        weights.fill_(2.0)
        assert (saver.written, saver.finished(), steps(folder)) == (0, [], [])
        gate.open.set()
        saver.wait()
        assert (saver.finished(), saver.finished(), saver.written) == ([1], [], 0)
    assert gate.manifests == [False], "the records are in the store before the manifest that counts them"
    found = latest_checkpoint(folder)
    assert found is not None
    assert torch.equal(found.read(MODEL_FILE)["w"], torch.ones(3))
    assert found.state == {"cursor": 8, "train_seconds": 0.5, "records": {"attempt": 3, "count": 17}}


def test_a_checkpoint_is_whole_when_the_votes_of_a_later_step_say_so(folder: RunFolder) -> None:
    with saver_of(folder) as saver:
        save(saver, 1)
        saver.settle(0)
        assert saver.finished() == []
        until(lambda: saver.written == 1)
        saver.settle(1)
        assert saver.finished() == [1]
        saver.settle(1)
        assert saver.finished() == []


def until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(TIMEOUT_S * 200):
        if condition():
            return
        waiting.wait(0.005)
    raise AssertionError("never came true")


def test_where_trials_copy_each_other_a_checkpoint_is_whole_when_its_step_ends(folder: RunFolder) -> None:
    with saver_of(folder, "checkpoint.wait=true") as saver:
        save(saver, 1)
        assert saver.finished() == [1]
        assert steps(folder) == [1]


def test_a_second_save_waits_for_the_first(folder: RunFolder) -> None:
    gate = Gate()
    with saver_of(folder, sink=gate) as saver, ThreadPoolExecutor(1) as another:
        save(saver, 1)
        second = another.submit(save, saver, 2)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.1)
        gate.open.set()
        second.result(timeout=TIMEOUT_S)
        assert saver.finished() == [1]
        saver.wait()
        assert saver.finished() == [2]
    assert steps(folder) == [1, 2]


def test_a_run_outlives_two_failures_in_a_row_and_not_three(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    with saver_of(folder, "checkpoint.keep_best=2", "eval.every_steps=5") as saver:
        with file_size_limit():
            save(saver, 1, size=LIMIT)
            save(saver, 2, size=LIMIT)
            saver.wait()
        save(saver, 3, size=LIMIT)
        saver.wait()
        assert saver.finished() == [3], "a success sets the count back"
        with file_size_limit():
            for step in (4, 5, 6):
                save(saver, step, size=LIMIT)
            expected = f"{MAX_FAILURES} checkpoints in a row, up to step 6, .*goes on from step 3, .*step_00000003"
            with pytest.raises(CheckpointError, match=expected):
                saver.wait()
    assert "the checkpoint of step 1 was not written: [Errno 27] File too large; 4 MiB were to be written" in caplog.text
    assert "failures left: 1" in caplog.text
    for words in ("lower checkpoint.keep_last (2) or checkpoint.keep_best (2)", "another storage.path", "were free"):
        assert words in caplog.text


def test_a_write_that_breaks_off_leaves_no_half_file_and_what_is_left_goes_before_the_next(folder: RunFolder) -> None:
    partial = Path(folder.path("checkpoints", "step_00000002"))
    with saver_of(folder) as saver:
        save(saver, 1)
        saver.wait()
        with file_size_limit():
            files = {"a.safetensors": ({"w": torch.ones(3)}, {}), MODEL_FILE: ({"w": torch.ones(LIMIT)}, {})}
            saver.save(2, files, {"cursor": 2, "train_seconds": 0.0})
            saver.wait()
        assert [path.name for path in partial.iterdir()] == ["a.safetensors"]
        assert steps(folder) == [1]
        save(saver, 3)
        saver.wait()
    assert not partial.exists()
    assert steps(folder) == [1, 3]


def test_the_last_checkpoint_of_a_run_may_not_fail_and_the_error_says_where_the_run_goes_on(folder: RunFolder) -> None:
    with saver_of(folder) as saver, file_size_limit():
        save(saver, 1, size=LIMIT)
        with pytest.raises(CheckpointError, match=r"the last checkpoint, up to step 1, .*the run starts from the beginning"):
            saver.wait(is_last=True)


def test_what_is_no_fault_of_the_store_is_raised_at_once(folder: RunFolder) -> None:
    with saver_of(folder) as saver:
        saver.save(1, {MODEL_FILE: ({"w": torch.ones(2, dtype=torch.complex64)}, {})}, {"cursor": 1, "train_seconds": 0.0})
        with pytest.raises(KeyError, match="complex64"):
            saver.wait()


def test_an_evaluation_among_the_best_is_due_and_kept(folder: RunFolder) -> None:
    options = ("checkpoint.keep_best=2", "checkpoint.keep_last=1", "checkpoint.every_steps=10", "eval.every_steps=1")

    def see(saver: CheckpointSaver, step: int, loss: float) -> bool:
        is_due = saver.is_due(step, {"eval/loss": loss})
        if is_due:
            save(saver, step, eval_loss=loss)
        return is_due

    with saver_of(folder, *options) as saver:
        assert [see(saver, *each) for each in ((1, 0.5), (2, 0.4), (3, 0.6), (4, 0.45))] == [True, True, False, True]
        assert see(saver, 5, float("nan")) is False
        assert see(saver, 10, 0.9) is True, "by its number"
        assert saver.is_due(11, {}) is False
        saver.wait()
    assert steps(folder) == [2, 4, 10]
    with saver_of(folder, *options) as saver:
        assert [see(saver, *each) for each in ((11, 0.46), (12, 0.44))] == [False, True]
        saver.wait()
    assert steps(folder) == [2, 12]


def test_a_best_one_that_could_not_be_written_is_none(folder: RunFolder) -> None:
    with saver_of(folder, "checkpoint.keep_best=1", "eval.every_steps=1") as saver:
        with file_size_limit():
            save(saver, 1, size=LIMIT, eval_loss=0.1)
            saver.wait()
        assert saver.is_due(2, {"eval/loss": 0.2})


def test_ranks_that_hold_shards_make_one_checkpoint(folder: RunFolder) -> None:
    barrier, counts = threading.Barrier(3), [0, 0, 0]

    def work(rank: int) -> list[int]:
        with saver_of(folder, ranks=RanksOfThreads(rank, barrier, counts), attempt=2) as saver:
            for step in (1, 2):
                files = {f"model.shard-{rank}.safetensors": ({"w": torch.full((2,), 10.0 * step + rank)}, {"rank": str(rank)})}
                saver.save(step, files, {"cursor": step, "train_seconds": 0.0})
            saver.wait(is_last=True)
            return saver.finished()

    storage.write_atomic(folder.path("checkpoints", "step_00000002", "part-0001-00002-00001.json"), "of an earlier attempt")
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [[1, 2]] * 3
    assert steps(folder) == [1, 2]
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert sorted(newest.files) == [f"model.shard-{rank}.safetensors" for rank in range(3)]
    for rank in range(3):
        assert torch.equal(newest.read(f"model.shard-{rank}.safetensors")["w"], torch.full((2,), 20.0 + rank))
    assert not list(Path(newest.uri).glob("part-*")), "the parts are in the manifest"


def test_the_manifest_waits_for_the_parts_of_all_ranks(folder: RunFolder) -> None:
    barrier, counts = threading.Barrier(2), [0, 0]
    with (
        saver_of(folder, ranks=RanksOfThreads(0, barrier, counts)) as first,
        saver_of(folder, ranks=RanksOfThreads(1, barrier, counts)) as second,
    ):
        for rank, saver in enumerate((first, second)):
            saver.save(1, {f"{rank}.safetensors": ({"w": torch.ones(1)}, {})}, {"cursor": 1, "train_seconds": 0.0})
        until(lambda: first.written + second.written == 2)
        assert steps(folder) == []
        first.settle(2)
        second.settle(2)
        until(lambda: first.written + second.written == 3)
        first.settle(3)
        second.settle(3)
        assert (first.finished(), second.finished()) == ([1], [1])
    assert steps(folder) == [1]


def test_the_size_of_a_checkpoint_is_known_before_there_is_one(load_tiny: LoadTiny, folder: RunFolder) -> None:
    # Headers and step counters, a few hundred bytes a tensor, are not counted; in this tiny model they are a fifth.
    wide = ("model.width=128", "model.decoder_width=128", "train.steps=1")
    config = load_tiny(*wide)
    run_training(config, folder, LocalContext())
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert sum(int(entry["bytes"]) for entry in newest.files.values()) == pytest.approx(checkpoint_bytes(config), rel=0.05)
    assert checkpoint_bytes(load_tiny(*wide, "train.ema=0.9")) > 1.3 * checkpoint_bytes(config)


def test_a_disk_that_cannot_hold_two_checkpoints_is_refused_and_one_that_cannot_hold_all_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig.load("digits_crate_mae", [f"storage.path={tmp_path}", "checkpoint.keep_last=3"])
    folder, size = RunFolder(str(tmp_path / "new" / "run")), checkpoint_bytes(config)
    monkeypatch.setattr(storage, "free_bytes", lambda uri: free)
    free = 2 * size - 1
    with pytest.raises(
        ConfigError, match=r"storage\.path = .* is too full for this run: a checkpoint takes about .*free 1 B more"
    ):
        check_disk_space(config, folder)
    free = 3 * size
    with caplog.at_level(logging.WARNING):
        check_disk_space(config, folder)
    assert "3 are to be kept and one more" in caplog.text
    caplog.clear()
    free = 4 * size
    check_disk_space(config, folder)
    assert caplog.text == ""
    assert not Path(folder.uri).exists()


def test_a_store_in_the_network_is_not_asked_for_room() -> None:
    assert storage.free_bytes("s3://bucket/runs?region=us-east-1") is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["checkpoint.best_metric=eval/loss"], "no effect without checkpoint.keep_best"),
        (["checkpoint.keep_best=1", "checkpoint.best_metric=eval/top1", "eval.every_steps=1"], "measured of classifiers"),
        (["checkpoint.keep_best=1", "eval.every_steps=null"], "set data.eval and eval.every_steps"),
        (
            ["checkpoint.keep_best=1", "checkpoint.best_metric=eval/knn_top1", "eval.probe_every_steps=null"],
            "eval.probe_every_steps",
        ),
    ],
)
def test_a_choice_of_the_best_by_what_is_not_measured_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        RunConfig.load("digits_crate_mae", overrides)
