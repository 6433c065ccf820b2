"""The average of the weights: its formula, what it is used for, and that a resumed run has the same one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from crate_ray.config import ConfigError, RunConfig
from crate_ray.models import create_model
from crate_ray.runs import RunFolder, read_records
from crate_ray.training.checkpoint import MODEL_FILE, Checkpoint, latest_checkpoint
from crate_ray.training.ema import EMA_FILE, Ema, weights_file
from crate_ray.training.evaluate import Evaluator
from crate_ray.training.export import export_run
from crate_ray.training.loop import LocalContext, LoopResult, run_training
from crate_ray.training.probes import judge_classifier

LoadTiny = Callable[..., RunConfig]
AVERAGED = ("train.ema=0.8", "eval.use_ema=true", "eval.every_steps=4")


def test_the_average_is_the_sum_of_all_weights_so_far_each_with_its_share() -> None:
    decay, steps = 0.9, 30
    model = nn.Linear(3, 2, dtype=torch.float64)
    seen = [model.weight.detach().clone()]
    ema = Ema(model, decay)
    for step in range(steps):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step)))
        ema.update(torch.tensor(True))
        seen.append(model.weight.detach().clone())
    shares = [decay**steps] + [(1 - decay) * decay ** (steps - t) for t in range(1, steps + 1)]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    expected = sum(share * weights for share, weights in zip(shares, seen, strict=True))
    # The share of the newest, 1 - decay, reaches the device in float32.
    torch.testing.assert_close(ema.state_dict()["weight"], expected, rtol=1e-6, atol=1e-7)


def test_a_skipped_step_is_not_averaged_and_a_swap_puts_every_bit_back() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    before = ema.state_dict()["weight"].clone()
    ema.update(torch.tensor(False))
    assert torch.equal(ema.state_dict()["weight"], before)
    weights, address = model.weight.detach().clone(), model.weight.data_ptr()
    with pytest.raises(KeyError), ema.swapped():
        assert torch.equal(model.weight, before)
        assert model.weight.data_ptr() == address, "what holds the tensor, a compiled graph say, sees the average"
        raise KeyError("an evaluation that fails")
    assert torch.equal(model.weight, weights)
    assert torch.equal(ema.state_dict()["weight"], before)


def last(folder: RunFolder) -> Checkpoint:
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def evaluations(folder: RunFolder) -> list[tuple[int, float]]:
    return [(record.step, record.values["eval/loss"]) for record in read_records(folder) if "eval/loss" in record.values]


class StoppedContext(LocalContext):
    """Asks to stop after step 6."""

    def heartbeat(self, step: int) -> None:
        if step == 6:
            self.stop()


@pytest.mark.parametrize("recipe", ["digits_crate_mae", "digits_mae"])
def test_a_resumed_run_has_the_average_and_the_evaluations_of_the_undisturbed_one(
    recipe: str, load_tiny: LoadTiny, tmp_path: Path
) -> None:
    config = load_tiny(*AVERAGED, recipe=recipe)
    whole, parts = RunFolder(str(tmp_path / "whole")), RunFolder(str(tmp_path / "parts"))
    run_training(config, whole, LocalContext())
    assert run_training(config, parts, StoppedContext()) == LoopResult("KILLED", 7)
    run_training(config, parts, LocalContext(2))
    for name in (MODEL_FILE, EMA_FILE):
        ours, theirs = last(parts).read(name), last(whole).read(name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert evaluations(parts) == evaluations(whole)


def test_evaluation_measures_the_average_and_training_does_not_notice(load_tiny: LoadTiny, tmp_path: Path) -> None:
    plain, averaged = RunFolder(str(tmp_path / "plain")), RunFolder(str(tmp_path / "averaged"))
    run_training(load_tiny("eval.every_steps=4"), plain, LocalContext())
    config = load_tiny(*AVERAGED)
    run_training(config, averaged, LocalContext())
    ours, theirs = last(averaged).read(MODEL_FILE), last(plain).read(MODEL_FILE)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    model = create_model(config.model)
    model.load_state_dict(last(averaged).read(EMA_FILE))
    expected = Evaluator(config, rank=0, world_size=1, precision="float32").metrics(model)["eval/loss"]
    assert evaluations(averaged)[-1] == (12, expected)
    assert evaluations(averaged)[-1] != evaluations(plain)[-1]


def test_export_and_probe_take_the_average_where_evaluation_does_or_where_they_are_told(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    config = load_tiny(*AVERAGED, "task=classify", "model.num_classes=10")
    folder = RunFolder(str(tmp_path / "run"))
    folder.write_config(config)
    run_training(config, folder, LocalContext())
    for use_ema, name in ((None, EMA_FILE), (True, EMA_FILE), (False, MODEL_FILE)):
        out = str(tmp_path / f"{use_ema}.safetensors")
        report = export_run(folder, out, format="safetensors", use_ema=use_ema)
        assert ("average" in report.holds) == (name == EMA_FILE)
        assert torch.equal(load_file(out)["head.weight"], last(folder).read(name)["head.weight"])
    judged = {use_ema: judge_classifier(config, last(folder), split="validation", use_ema=use_ema) for use_ema in (None, True)}
    assert judged[None] == judged[True]


def test_an_average_that_is_not_there_is_refused(load_tiny: LoadTiny, tmp_path: Path) -> None:
    config = load_tiny("train.steps=2")
    folder = RunFolder(str(tmp_path / "run"))
    run_training(config, folder, LocalContext())
    with pytest.raises(ConfigError, match=r"holds no average of the weights: .* trained without train\.ema"):
        weights_file(config, last(folder), use_ema=True)
    with pytest.raises(ConfigError, match=r"eval\.use_ema needs train\.ema"):
        load_tiny("eval.use_ema=true")
