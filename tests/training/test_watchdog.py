"""Workers that hang: stacks in the run folder, the end of the process, and the same losses after the next start."""

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import Group, stop_itself, values, wait_for

from crate_ray import storage
from crate_ray.config import RunConfig
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.watchdog import HANG_EXIT_CODE, LONG

LoadTiny = Callable[..., RunConfig]
LIMIT_S = 8.0
HANGS_AT = 5
FAULTHANDLER_EXIT_CODE = 1


def sleep_forever(rank: int, step: int) -> None:
    if (rank, step) == (1, HANGS_AT):
        threading.Event().wait()


def stop_from_outside(rank: int, step: int) -> None:
    if (rank, step) == (1, HANGS_AT):
        stop_itself()


def call_another_collective(rank: int, step: int) -> None:
    """The other rank is in an all-reduce, which this one never joins."""
    if (rank, step) == (1, HANGS_AT):
        dist.barrier()


def keep_the_lock_of_python(rank: int, step: int) -> None:
    """Native code that never gives Python's lock back: no thread of the process runs Python any more."""
    if (rank, step) == (1, HANGS_AT):
        ctypes.PyDLL(None).pause()


def trace(folder: str, *, attempt: int, rank: int) -> str:
    return Path(folder, "hangs", f"attempt_{attempt}_rank_{rank}.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("hang", [sleep_forever, stop_from_outside, call_another_collective, keep_the_lock_of_python])
def test_a_group_that_hangs_ends_with_its_stacks_and_goes_on_as_if_nothing_had_been(
    hang: Callable[[int, int], None], load_tiny: LoadTiny, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    overrides = ("checkpoint.every_steps=2", "train.steps=8", "scale.num_workers=2", "data.num_loaders=0")
    config, watched = load_tiny(*overrides), load_tiny(*overrides, f"scale.hang_timeout_s={LIMIT_S}")
    calm = str(tmp_path_factory.getbasetemp() / "two-calm-ranks")
    if not Path(calm).exists():  # the same for every way to hang
        assert Group(config, calm).run() == [0, 0]
        assert not Path(calm, "hangs").exists()
    folder = str(tmp_path / "run")
    codes = first, second = Group(watched, folder, at_step=hang).run()
    gone_s = time.time() - read_records(RunFolder(folder))[-1].time
    print(f"{hang.__name__}: the group was gone {gone_s:.1f} s after its last step, limit {LIMIT_S:g} s")
    assert 0 not in codes
    if hang is stop_from_outside:
        assert first == HANG_EXIT_CODE
        assert "in all_reduce" in trace(folder, attempt=1, rank=0), "where the rank that lives waits for the other"
        assert "made no progress" in trace(folder, attempt=1, rank=0)
    elif hang is keep_the_lock_of_python:
        assert second == FAULTHANDLER_EXIT_CODE
        assert "in keep_the_lock_of_python" in trace(folder, attempt=1, rank=1)
    elif hang is call_another_collective:  # who ends first takes the other with it
        ended = codes.index(HANG_EXIT_CODE)
        assert ("in all_reduce", "in barrier")[ended] in trace(folder, attempt=1, rank=ended)
    else:
        assert second == HANG_EXIT_CODE
        assert f"in {hang.__name__}" in trace(folder, attempt=1, rank=1)
        assert f"s in: step {HANGS_AT + 1} (limit {LIMIT_S:g} s, " in trace(folder, attempt=1, rank=1)

    assert Group(config, folder, attempt=2).run() == [0, 0]
    assert values(RunFolder(folder), "train/loss") == values(RunFolder(calm), "train/loss")
    assert [name for name in storage.list_dir(f"{folder}/hangs") if name.startswith("attempt_2")] == []


class SlowReport(LocalContext):
    """Takes longer over an evaluation than a step may."""

    def evaluated(self, step: int, values: object) -> None:
        began = time.monotonic()
        wait_for(lambda: time.monotonic() - began > 1.5 * LIMIT_S)


def test_what_may_take_long_is_no_hang_and_a_run_leaves_no_trace_of_being_watched(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    assert LONG > 1.5
    run_training(load_tiny("train.steps=3", f"scale.hang_timeout_s={LIMIT_S}", "eval.every_steps=3"), folder, SlowReport())
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    assert "hangs" not in storage.list_dir(folder.uri)


def test_traces_of_hangs_stay_when_those_of_killed_attempts_go(load_tiny: LoadTiny, tmp_path: Path) -> None:
    hangs = tmp_path / "run" / "hangs"
    hangs.mkdir(parents=True)
    (hangs / "attempt_1_rank_0.txt").touch()  # killed while all was well
    (hangs / "attempt_2_rank_0.txt").write_text("stacks")
    run_training(load_tiny("train.steps=1"), RunFolder(str(tmp_path / "run")), LocalContext(3))
    assert storage.list_dir(str(hangs)) == ["attempt_2_rank_0.txt"]
