"""A checkpoint is whole or it is none."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from saved_checkpoints import save_checkpoint

from crate_ray.config import ConfigError, RunConfig
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    check_same_run,
    copy_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    pin_checkpoint,
    prune_checkpoints,
    saved_configuration,
)
from crate_ray.training.loop import LocalContext, run_training
from crate_ray.training.tensor_files import HostCopy, file_pieces

LoadTiny = Callable[..., RunConfig]
# Step 7 of a tiny run, and its losses without a break, by the last program that wrote format 1 (float32, one thread).
GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint_v1" / "step_00000007"
LOSSES_OF_STEPS_8_TO_12 = [0.6257055997848511, 0.5634937882423401, 0.5698598027229309, 0.5905552506446838, 0.6684041023254395]


def save(folder: RunFolder, step: int, **state: object) -> Path:
    """Saves tensors that name their step; returns the checkpoint's folder."""
    model = {"w": torch.full((3, 5), float(step)).t(), "half": torch.tensor([1.5], dtype=torch.bfloat16)}
    checkpoint = save_checkpoint(
        folder,
        step=step,
        cursor=8 * step,
        train_seconds=0.5 * step,
        model=model,
        optimizer={"step.w": torch.tensor(step)},
        state=state,
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


def test_a_manifest_cut_short_at_any_byte_is_passed_over(folder: RunFolder) -> None:
    save(folder, 1)
    path = save(folder, 2) / "manifest.json"
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert steps(folder) == [1], length
    path.write_bytes(whole)
    assert steps(folder) == [1, 2]


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE])
def test_a_file_cut_short_anywhere_in_its_header_or_between_tensors_is_passed_over(name: str, folder: RunFolder) -> None:
    save(folder, 1)
    path = save(folder, 2) / name
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    ends = [entry["data_offsets"][1] for key, entry in json.loads(whole[8:header]).items() if key != "__metadata__"]
    for length in {*range(header + 1), *(header + end - 1 for end in ends), *(header + end for end in ends)} - {len(whole)}:
        path.write_bytes(whole[:length])
        assert steps(folder) == [1], length


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


def test_the_best_are_kept_beside_the_last_and_of_equals_the_earlier(folder: RunFolder) -> None:
    losses = {1: 0.5, 2: 0.3, 3: 0.3, 4: float("nan"), 5: 0.9, 6: 0.8}
    for step, loss in losses.items():
        save(folder, step, evaluation={"eval/loss": loss})
    save(folder, 7)
    prune_checkpoints(folder, keep_last=2, keep_best=2)
    assert steps(folder) == [2, 3, 6, 7]
    prune_checkpoints(folder, keep_last=1, keep_best=1)
    assert steps(folder) == [2, 7]


def test_accuracy_is_the_better_the_higher(folder: RunFolder) -> None:
    for step, top1 in ((1, 0.1), (2, 0.9), (3, 0.5)):
        save(folder, step, evaluation={"eval/top1": top1})
    prune_checkpoints(folder, keep_last=1, keep_best=1, best_metric="eval/top1")
    assert steps(folder) == [2, 3]


def test_what_writers_that_died_left_behind_is_deleted_and_pins_stay(folder: RunFolder) -> None:
    partial, pinned = save(folder, 1), save(folder, 2)
    for path in (partial, pinned):
        (path / "manifest.json").unlink()
    pin_checkpoint(folder, 2, by="clone")
    pin_checkpoint(folder, 3, by="clone")
    whole = save(folder, 3)
    (whole / ".model.safetensors.0a1b2c3d.tmp").write_bytes(b"half")
    (whole / "part-0001-00001-00001.json").write_text("{}")
    save(folder, 4)
    prune_checkpoints(folder, keep_last=1)
    assert not partial.exists()
    assert [path.name for path in pinned.iterdir()] == ["pinned-clone"]
    assert sorted(path.name for path in whole.iterdir()) == ["manifest.json", MODEL_FILE, OPTIMIZER_FILE, "pinned-clone"]
    assert steps(folder) == [3, 4]


def test_a_copy_is_the_same_checkpoint_bit_by_bit(folder: RunFolder, tmp_path: Path) -> None:
    path = save(folder, 3)
    other = RunFolder(str(tmp_path / "other"))
    copy_checkpoint(list_checkpoints(folder)[0], other)
    copies = Path(other.path("checkpoints", "step_00000003"))
    assert {file.name: file.read_bytes() for file in copies.iterdir()} == {
        file.name: file.read_bytes() for file in path.iterdir()
    }


def checkpoint_of(config: RunConfig) -> Checkpoint:
    return Checkpoint("RUN/checkpoints/step_00000001", 1, {}, {}, saved_configuration(config))


def test_a_checkpoint_of_another_configuration_is_refused_with_the_keys_that_differ() -> None:
    mine = RunConfig.load("digits_crate_mae")
    theirs = RunConfig.load("digits_crate_mae", ["model.width=64", "train.seed=3", "optimizer.lr=1e-2"])
    check_same_run(checkpoint_of(mine), mine)
    with pytest.raises(ConfigError) as caught:
        check_same_run(checkpoint_of(theirs), mine)
    message = str(caught.value)
    assert "RUN/checkpoints/step_00000001 was made by another configuration" in message
    assert f"model.width: 64 there, {mine.model.width} here" in message
    assert f"train.seed: 3 there, {mine.train.seed} here" in message
    assert "optimizer.lr" not in message, "rates are not in the tensors"


@pytest.mark.parametrize(
    "override",
    ["train.steps=9999", "schedule.warmup_steps=1", "optimizer.lr=1e-2", "model.mask_ratio=0.5", "model.ista_step_size=0.2"],
)
def test_a_longer_run_and_a_clone_of_a_population_go_on_from_a_checkpoint(override: str) -> None:
    check_same_run(checkpoint_of(RunConfig.load("digits_crate_mae")), RunConfig.load("digits_crate_mae", [override]))


def test_a_file_is_byte_for_byte_what_safetensors_writes() -> None:
    tensors = {
        "b": torch.arange(15.0).reshape(3, 5).t(),
        "a": torch.tensor(4),
        "half": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True]),
        "größe": torch.tensor([0.1], dtype=torch.float64),
    }
    metadata = {"config": json.dumps({"name": "größe"})}
    ours = b"".join(file_pieces(HostCopy().take({"file": tensors})["file"], metadata))
    theirs = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()}, metadata)
    assert ours == theirs
    assert b"".join(file_pieces({}, {})) == safetensors.torch.save({})


def test_room_on_the_host_is_used_again_unless_a_tensor_has_changed_its_shape() -> None:
    host = HostCopy()
    first = host.take({"file": {"a": torch.ones(3), "b": torch.ones(2)}})["file"]
    second = host.take({"file": {"a": torch.zeros(3), "b": torch.zeros(4)}})["file"]
    assert first["a"].data_ptr() == second["a"].data_ptr()
    assert torch.equal(first["a"], torch.zeros(3))
    assert torch.equal(second["b"], torch.zeros(4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_gpu_changes_after_the_copy_was_queued_is_not_in_it() -> None:
    weights, host = torch.ones(64 << 20, device="cuda"), HostCopy()
    for value in (1.0, 2.0):
        weights.fill_(value)
        copy = host.take({"file": {"w": weights}})["file"]["w"]
        weights.fill_(-1.0)
        host.wait()
        assert copy.is_pinned()
        assert bool((copy == value).all())


def test_a_run_goes_on_from_a_checkpoint_of_the_first_format(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    shutil.copytree(GOLDEN, Path(folder.path("checkpoints", "step_00000007")))
    old = latest_checkpoint(folder)
    assert old is not None
    assert (old.step, old.cursor, old.configuration) == (7, 56, {})
    run_training(load_tiny(), folder, LocalContext(2))
    losses = [record.values["train/loss"] for record in read_records(folder) if "train/loss" in record.values]
    assert losses == pytest.approx(LOSSES_OF_STEPS_8_TO_12, rel=1e-5)
    newest = latest_checkpoint(folder)
    assert newest is not None
    assert (newest.step, newest.cursor) == (12, 96)
