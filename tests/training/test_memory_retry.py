"""A step that does not fit: half as many images at once, at the same global batch and curve, remembered for the next start."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_batches import hungry
from ranks import Group, values

from crate_ray.config import RunConfig
from crate_ray.data import BatchReader
from crate_ray.models.memory import activation_bytes, training_state_bytes
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import list_checkpoints
from crate_ray.training.loop import LocalContext, LoopResult, run_training
from crate_ray.training.memory import OutOfMemory, is_out_of_memory

LoadTiny = Callable[..., RunConfig]
BATCH = 8
# float32: the same sums over micro-batches of another size, through ten updates of AdamW.
ACCUMULATION_TOLERANCE = 1e-5


def remembered(folder: RunFolder) -> int:
    return int(json.loads(Path(folder.path("micro_batch.json")).read_text())["micro_batch"])


def test_a_run_that_runs_out_of_memory_goes_on_with_half_the_images_at_once(
    load_tiny: LoadTiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, calm = RunFolder(str(tmp_path / "run")), RunFolder(str(tmp_path / "calm"))
    config = load_tiny("checkpoint.every_steps=2", "train.steps=8", "data.num_loaders=0")
    run_training(config, calm, LocalContext())
    with caplog.at_level(logging.WARNING):
        result = run_training(config, folder, LocalContext(), open_batches=hungry(2, from_cursor=3 * BATCH))
    assert result == LoopResult("FINISHED", 8)
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert [text.partition(" (")[0] for text in told] == [
        "out of memory at step 4 on rank 0 with 8 images at once",
        "out of memory at step 4 on rank 0 with 4 images at once",
    ]
    assert remembered(folder) == 2
    losses, expected = values(folder, "train/loss"), values(calm, "train/loss")
    assert losses == pytest.approx(expected, rel=ACCUMULATION_TOLERANCE)
    assert [losses[step] for step in (1, 2)] == [expected[step] for step in (1, 2)], "from before the first checkpoint"


def test_the_next_start_begins_with_what_fitted(load_tiny: LoadTiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_json("micro_batch.json", {"micro_batch": 4})
    with caplog.at_level(logging.INFO):
        run_training(load_tiny("train.steps=3"), folder, LocalContext(), open_batches=hungry(4))
    assert "at most 4 images at once on a worker" in caplog.text
    assert "out of memory at step" not in caplog.text
    smaller = RunFolder(str(tmp_path / "smaller"))
    smaller.write_json("micro_batch.json", {"micro_batch": 4})
    config = load_tiny("train.steps=3", "train.micro_batch=2")
    run_training(config, smaller, LocalContext(), open_batches=hungry(2))
    assert remembered(smaller) == 4, "what the configuration asks for is less already"


def test_at_a_single_image_one_error_says_what_it_needs(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    config = load_tiny("checkpoint.every_steps=2", "train.steps=6")
    with pytest.raises(OutOfMemory) as raised:
        run_training(config, folder, LocalContext(), open_batches=hungry(0, from_cursor=3 * BATCH))
    error = raised.value
    assert error.micro_batch is None
    state, image = training_state_bytes(config.model) / 2**30, activation_bytes(config.model) / 2**30
    assert f"moments take {state:.2f} GiB, what the backward pass needs of 1 image(s) {image:.2f} GiB" in str(error)
    assert "with 1 images at once ([enforce fail at alloc_cpu.cpp" in str(error)
    assert str(error).count("\n") == 0
    assert [c.step for c in list_checkpoints(folder)] == [2]


def test_rows_that_are_mixed_in_pairs_stay_in_pairs(load_tiny: LoadTiny, tmp_path: Path) -> None:
    mixing = ("data.mixup_alpha=0.8", "data.cutmix_alpha=1.0", "train.global_batch=12", "train.steps=2")
    config = load_tiny(*mixing, recipe="digits_crate_classify")
    folder = RunFolder(str(tmp_path / "run"))
    with pytest.raises(OutOfMemory, match="with 2 images at once"):
        run_training(config, folder, LocalContext(), open_batches=hungry(1))
    assert remembered(folder) == 2, "12, 6 and 2: half of 6 would tear a pair"


def test_allocations_that_fail_are_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as on_host:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(on_host.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_when_one_of_two_workers_runs_out_of_memory_both_go_on_with_less(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("checkpoint.every_steps=2", "train.steps=8", "scale.num_workers=2")
    calm, folder = str(tmp_path / "calm"), str(tmp_path / "run")
    assert Group(config, calm).run() == [0, 0]
    codes = Group(config, folder, open_batches=hungry_on_rank_1).run()
    assert all(code != 0 for code in codes), "the one that failed, and the one that waited for it"
    assert remembered(RunFolder(folder)) == 2
    assert [c.step for c in list_checkpoints(RunFolder(folder))] == [2]
    assert Group(config, folder, attempt=2, open_batches=hungry_on_rank_1).run() == [0, 0]
    losses, expected = values(RunFolder(folder), "train/loss"), values(RunFolder(calm), "train/loss")
    assert losses == pytest.approx(expected, rel=ACCUMULATION_TOLERANCE)
    assert losses.keys() == set(range(1, 9))


def hungry_on_rank_1(source: object, **named: object) -> BatchReader:
    """At module level, so that a new process finds it."""
    return hungry(2, from_cursor=3 * BATCH, on_rank=1)(source, **named)
