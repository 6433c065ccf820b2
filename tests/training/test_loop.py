"""The loop: what a stop, a crash or a diverging loss leaves behind, and that a resumed run is the undisturbed one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crate_ray.config import RunConfig
from crate_ray.models import create_model
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, copy_checkpoint, latest_checkpoint, list_checkpoints
from crate_ray.training.health import TrainingDivergedError
from crate_ray.training.loop import LocalContext, LoopResult, run_training

LoadTiny = Callable[..., RunConfig]
RECIPES = pytest.mark.parametrize("recipe", ["digits_crate_mae", "digits_mae"])


class DisturbedContext(LocalContext):
    """A worker that is asked to stop, or dies, after some step of this attempt."""

    def __init__(self, attempt: int, *, stop_after: int | None = None, die_after: int | None = None) -> None:
        super().__init__(attempt)
        self._stop_after, self._die_after = stop_after, die_after
        self.checkpoints: list[int] = []

    def heartbeat(self, step: int) -> None:
        if step == self._stop_after:
            self.stop()
        if step == self._die_after:
            raise MemoryError("the worker died")

    def checkpoint_written(self, step: int, uri: str) -> None:
        assert Path(uri, "manifest.json").is_file()
        self.checkpoints.append(step)


def series(folder: RunFolder, *keys: str) -> list[tuple[int, float]]:
    """Every number of the keys, by step, exactly as recorded."""
    return [(record.step, record.values[key]) for record in read_records(folder) for key in keys if key in record.values]


def state(folder: RunFolder) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return {**checkpoint.read(MODEL_FILE), **checkpoint.read(OPTIMIZER_FILE)}


def assert_same_run(folder: RunFolder, other: RunFolder) -> None:
    """Bit by bit: float32 on one thread."""
    for key in ("train/loss", "train/grad_norm", "train/lr", "data/epoch", "eval/loss"):
        assert series(folder, key) == series(other, key), key
    ours, theirs = state(folder), state(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@RECIPES
def test_a_stopped_run_that_goes_on_is_the_undisturbed_run_bit_by_bit(recipe: str, load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("eval.every_steps=4", recipe=recipe)
    whole, parts = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "parts"))
    assert run_training(config, whole, LocalContext()) == LoopResult("FINISHED", 12)

    context = DisturbedContext(1, stop_after=6)
    assert run_training(config, parts, context) == LoopResult("KILLED", 7)
    assert context.checkpoints == [7]
    assert parts.read_json("final.json") is None
    assert run_training(
        load_tiny("eval.every_steps=4", "data.num_loaders=0", recipe=recipe), parts, LocalContext(2)
    ) == LoopResult("FINISHED", 12)
    assert_same_run(whole, parts)


def test_a_run_that_died_repeats_the_steps_since_its_checkpoint_with_the_same_numbers(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    config = load_tiny("checkpoint.every_steps=5")
    whole, parts = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "parts"))
    run_training(config, whole, LocalContext())
    with pytest.raises(MemoryError):
        run_training(config, parts, DisturbedContext(1, die_after=8))
    before = series(parts, "train/loss")
    assert [c.step for c in list_checkpoints(parts)] == [5]
    run_training(config, parts, LocalContext(2))
    records = read_records(parts)
    assert [record.attempt for record in records] == [1] * 5 + [2] * 7
    assert series(parts, "train/loss")[:7] == before
    assert_same_run(whole, parts)


def test_a_run_that_died_before_its_final_numbers_only_writes_these(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("train.steps=4")
    folder = RunFolder(str(tmp_path / "run"))
    run_training(config, folder, LocalContext())
    first = folder.read_json("final.json")
    (tmp_path / "run" / "final.json").unlink()
    weights = state(folder)
    assert run_training(config, folder, LocalContext(2)) == LoopResult("FINISHED", 4)
    second = folder.read_json("final.json")
    assert first is not None
    assert second is not None
    assert all(torch.equal(weights[key], value) for key, value in state(folder).items())
    for key in ("final/eval_loss", "final/params_m", "final/train_pflops", "final/train_hours"):
        assert second["values"][key] == first["values"][key]


def test_a_diverging_run_is_ended_and_keeps_the_checkpoint_from_before(load_tiny: LoadTiny, tmp_path: Path) -> None:
    # A rate far beyond float32: one step of it makes the next forward pass overflow.
    config = load_tiny(
        "optimizer.lr=1e30",
        "schedule.warmup_steps=0",
        "train.clip_norm=null",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=9",
    )
    folder = RunFolder(str(tmp_path / "run"))
    with pytest.raises(TrainingDivergedError, match=r"at step 2; .* Lower optimizer\.lr or set train\.clip_norm"):
        run_training(config, folder, LocalContext())
    assert [c.step for c in list_checkpoints(folder)] == [1]
    assert all(torch.isfinite(value).all() for value in state(folder).values())
    assert [step for step, _ in series(folder, "train/loss")] == [1]
    assert folder.read_json("final.json") is None


def test_final_numbers_follow_from_the_configuration_and_the_last_evaluation(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny()
    folder = RunFolder(str(tmp_path / "run"))
    run_training(config, folder, LocalContext())
    final = folder.read_json("final.json")
    assert final is not None
    values = final["values"]
    trainable = sum(p.numel() for p in create_model(config.model).parameters())
    assert values["final/params_m"] == pytest.approx(trainable / 1e6, rel=5e-4)
    assert values["final/eval_loss"] == float(f"{series(folder, 'eval/loss')[-1][1]:.4g}")
    images = config.train.steps * config.train.global_batch  # type: ignore[operator]
    assert values["final/train_pflops"] == pytest.approx(3 * values["final/gflops"] * images / 1e6, rel=2e-3)
    assert 0 < values["final/train_hours"] < 1 / 60
    assert all(float(f"{value:.4g}") == value for value in values.values())
    last = read_records(folder)[-1]
    assert last.step == 12
    assert {key: last.values[key] for key in values} == values


def test_the_loss_falls(load_tiny: LoadTiny, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    run_training(load_tiny("train.steps=40", "optimizer.lr=1e-2"), folder, LocalContext())
    losses = [loss for _, loss in series(folder, "train/loss")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_only_the_last_checkpoints_are_kept_and_numbers_are_recorded_where_they_are_due(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    context = DisturbedContext(1)
    config = load_tiny(
        "checkpoint.every_steps=3",
        "checkpoint.keep_last=2",
        "eval.every_steps=5",
        "eval.probe_every_steps=8",
        "eval.log_every_steps=7",
        "train.steps=14",
    )
    run_training(config, folder, context)
    assert context.checkpoints == [3, 6, 9, 12, 14]
    assert [c.step for c in list_checkpoints(folder)] == [12, 14]
    assert [step for step, _ in series(folder, "train/loss")] == [7, 14]
    assert [step for step, _ in series(folder, "eval/loss")] == [5, 10, 14]
    assert [step for step, _ in series(folder, "eval/knn_top1")] == [8, 14]


def test_a_logged_loss_is_the_mean_since_the_last_one(load_tiny: LoadTiny, tmp_path: Path) -> None:
    every, fourth = RunFolder(str(tmp_path / "every")), RunFolder(str(tmp_path / "fourth"))
    run_training(load_tiny(), every, LocalContext())
    run_training(load_tiny("eval.log_every_steps=4"), fourth, LocalContext())
    losses = [loss for _, loss in series(every, "train/loss")]
    expected = [sum(losses[step - 4 : step]) / 4 for step in (4, 8, 12)]
    assert [loss for _, loss in series(fourth, "train/loss")] == pytest.approx(expected, rel=1e-12)


def test_up_to_the_cooldown_runs_of_any_length_are_one_run_and_its_checkpoint_there_is_kept(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    short, long = RunFolder(str(tmp_path / "short")), RunFolder(str(tmp_path / "long"))
    common = (
        "schedule.cooldown_fraction=0.25",
        "schedule.warmup_steps=3",
        "checkpoint.keep_last=1",
        "checkpoint.every_steps=5",
    )
    run_training(load_tiny(*common, "train.steps=12"), short, LocalContext())
    run_training(load_tiny(*common, "train.steps=20"), long, LocalContext())
    assert [c.step for c in list_checkpoints(short)] == [9, 12]
    assert [c.step for c in list_checkpoints(long)] == [15, 20]
    assert series(short, "train/loss")[:9] == series(long, "train/loss")[:9]
    assert series(short, "train/lr")[9:] != series(long, "train/lr")[9:12]

    grown = RunFolder(str(tmp_path / "grown"))
    copy_checkpoint(list_checkpoints(short)[0], grown)
    run_training(load_tiny(*common, "train.steps=20"), grown, LocalContext())
    ours, theirs = state(grown), state(long)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
