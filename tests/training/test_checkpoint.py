"""A checkpoint is whole or it is none."""

import json
from pathlib import Path

import pytest
import torch
from saved_checkpoints import save_checkpoint

from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
)


def save(folder: RunFolder, step: int) -> Path:
    """Saves tensors that name their step; returns the checkpoint's folder."""
    model = {"w": torch.full((3, 5), float(step)).t(), "half": torch.tensor([1.5], dtype=torch.bfloat16)}
    checkpoint = save_checkpoint(
        folder, step=step, cursor=8 * step, train_seconds=0.5 * step, model=model, optimizer={"step.w": torch.tensor(step)}
    )
    return Path(checkpoint.uri)


def steps(folder: RunFolder) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(folder)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def test_tensors_and_position_come_back_as_they_were_saved(folder: RunFolder) -> None:
    save(folder, 4)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.cursor, checkpoint.train_seconds) == (4, 32, 2.0)
    model = checkpoint.read(MODEL_FILE)
    assert torch.equal(model["w"], torch.full((5, 3), 4.0))
    assert model["half"].dtype == torch.bfloat16
    assert checkpoint.read(OPTIMIZER_FILE)["step.w"].shape == ()


def test_a_run_without_checkpoints_has_no_latest(folder: RunFolder) -> None:
    assert latest_checkpoint(folder) is None


def test_the_latest_is_the_one_of_the_highest_step(folder: RunFolder) -> None:
    for step in (9, 100_000_001, 10):
        save(folder, step)
    assert steps(folder) == [9, 10, 100_000_001]


def test_a_folder_without_a_manifest_is_passed_over(folder: RunFolder) -> None:
    save(folder, 1)
    (save(folder, 2) / "manifest.json").unlink()
    assert steps(folder) == [1]


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE])
@pytest.mark.parametrize("harm", ["cut short", "gone"])
def test_a_checkpoint_that_lacks_bytes_is_passed_over_for_the_one_before(name: str, harm: str, folder: RunFolder) -> None:
    save(folder, 1)
    path = save(folder, 2) / name
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert steps(folder) == [1]


def test_damaged_bytes_are_refused_by_name(folder: RunFolder) -> None:
    path = save(folder, 3) / MODEL_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    with pytest.raises(ConfigError, match=r"step_00000003/model\.safetensors is damaged"):
        checkpoint.read(MODEL_FILE)
    checkpoint.read(OPTIMIZER_FILE)


def test_a_newer_format_is_refused_rather_than_passed_over(folder: RunFolder) -> None:
    save(folder, 1)
    path = save(folder, 2) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 999}))
    with pytest.raises(ConfigError, match=r"format 999.*install a newer crate-ray"):
        latest_checkpoint(folder)


def test_saving_a_step_again_replaces_it_whole(folder: RunFolder) -> None:
    path = save(folder, 2)
    (path / MODEL_FILE).write_bytes(b"half a file of a driver that died")
    save(folder, 2)
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    assert torch.equal(checkpoint.read(MODEL_FILE)["w"], torch.full((5, 3), 2.0))


def test_pruning_keeps_the_last_ones(folder: RunFolder) -> None:
    paths = [save(folder, step) for step in (1, 2, 3, 4)]
    prune_checkpoints(folder, keep_last=2)
    assert steps(folder) == [3, 4]
    assert [path.exists() for path in paths] == [False, False, True, True]
    prune_checkpoints(folder, keep_last=5)
    assert steps(folder) == [3, 4]


def test_pruning_does_not_count_a_broken_checkpoint_as_one_to_keep(folder: RunFolder) -> None:
    save(folder, 1)
    save(folder, 2)
    (save(folder, 3) / MODEL_FILE).unlink()
    prune_checkpoints(folder, keep_last=1)
    assert steps(folder) == [2]
