"""Validation numbers depend on model and images alone."""

from collections.abc import Callable

import pytest
import torch
from finished_runs import train

from crate_ray.config import ConfigError, RunConfig
from crate_ray.data import read_all
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.runs import read_records
from crate_ray.training.evaluate import Evaluator

LoadTiny = Callable[..., RunConfig]


def build(config: RunConfig) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = create_model(config.model)
    assert isinstance(model, MaskedAutoencoder)
    return model


def evaluator(config: RunConfig) -> Evaluator:
    return Evaluator(config, rank=0, world_size=1, precision="float32")


def test_the_loss_is_the_published_one_over_the_validation_images(load_tiny: LoadTiny) -> None:
    config = load_tiny()
    model = build(config)
    (batch,) = read_all(config.data.eval or "", batch_size=100, image_size=16, noise_size=16)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
    with torch.no_grad():
        expected = float(model((batch.images_BCHW / 255 - mean) / std, batch.noise_BN).loss)
    assert evaluator(config).metrics(model)["eval/loss"] == pytest.approx(expected, rel=1e-5)  # float32, another order of sums


def test_loader_threads_do_not_change_a_number(load_tiny: LoadTiny) -> None:
    results = []
    for num_loaders in (0, 1, 3):
        config = load_tiny(f"data.num_loaders={num_loaders}")
        model = build(config)
        judge = evaluator(config)
        results.append((judge.metrics(model), judge.knn(model)))
    assert results[0] == results[1] == results[2]


def test_masks_are_the_same_for_every_seed_and_every_time(load_tiny: LoadTiny) -> None:
    config = load_tiny()
    model = build(config)
    first, other_seed, again = (evaluator(c).metrics(model) for c in (config, load_tiny("train.seed=7"), config))
    assert first == other_seed == again


def test_a_limit_takes_that_many_images_spread_over_all(load_tiny: LoadTiny) -> None:
    config = load_tiny("eval.max_images=2")
    model = build(config)
    first_and_last = list(read_all(config.data.eval or "", batch_size=1, image_size=16, noise_size=16, sample_ids=[0, 5]))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.data.mean, config.data.std))
    with torch.no_grad():
        losses = [float(model((b.images_BCHW / 255 - mean) / std, b.noise_BN).loss) for b in first_and_last]
    assert evaluator(config).metrics(model)["eval/loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_model_is_given_back_ready_to_train(load_tiny: LoadTiny) -> None:
    config = load_tiny()
    model = build(config).train()
    judge = evaluator(config)
    judge.metrics(model)
    judge.knn(model)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_final_loss_at_other_mask_ratios_is_that_of_the_model_with_that_ratio(load_tiny: LoadTiny) -> None:
    for recipe in ("digits_crate_mae", "digits_mae"):
        config = load_tiny("eval.mask_ratios=[0.25, 0.5, 0.75]", recipe=recipe)
        model = build(config)
        own = evaluator(config).metrics(model)
        found = evaluator(config).losses_by_mask_ratio(model)
        for name, ratio in (("eval/loss_m25", 0.25), ("eval/loss_m50", 0.5), ("eval/loss_m75", 0.75)):
            other = create_model(config.model, mask_ratio=ratio)
            other.load_state_dict(model.state_dict())
            expected = evaluator(load_tiny(f"model.mask_ratio={ratio}", recipe=recipe)).metrics(other)
            assert found[name] == pytest.approx(expected["eval/loss"], rel=1e-6)
        assert len(set(found.values())) == len(found) == 3
        assert evaluator(config).metrics(model) == own
        assert own["eval/loss"] in [pytest.approx(loss, rel=1e-6) for loss in found.values()]  # its own ratio is among them


def test_a_finished_run_has_these_losses_among_its_final_numbers_and_no_other_does(load_tiny: LoadTiny) -> None:
    finals = {}
    for override in ("eval.mask_ratios=[0.5]", "eval.mask_ratios=null"):
        config = load_tiny("train.steps=2", override, f"train.seed={len(finals)}")
        folder = train(config)
        finals[override] = (folder.read_json("final.json") or {})["values"]
        assert not any(key.startswith("eval/loss_m") for record in read_records(folder) for key in record.values)
    assert "final/eval_loss_m50" in finals["eval.mask_ratios=[0.5]"]
    assert not any("loss_m" in key for key in finals["eval.mask_ratios=null"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.mask_ratios=[0.5, 0.99]"], "eval.mask_ratios holds 0.99, which hides none or all of 16 patches"),
        (["eval.mask_ratios=[0.5]", "task=classify", "model.num_classes=5"], "task = classify hides none"),
    ],
)
def test_a_ratio_that_cannot_be_evaluated_is_refused_before_the_run(
    load_tiny: LoadTiny, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_tiny(*overrides)
