"""The recipes of classifiers say what they cost, and hold the published values where there are any."""

import re
from importlib import resources

import pytest

from crate_ray.config import RunConfig, recipe_names
from crate_ray.models.cost import count_parameters, forward_flops, training_flops_per_image

IMAGENET_IMAGES = 1_281_167
CLASSIFIERS = [name for name in recipe_names() if RunConfig.load(name).task == "classify"]


def header(recipe: str) -> str:
    text = resources.files("crate_ray.recipes").joinpath(f"{recipe}.yaml").read_text()
    return text.split("\ntask:")[0]


def test_there_is_one_for_each_way_to_a_classifier() -> None:
    digits = {"digits_crate_classify", "digits_finetune_crate", "digits_finetune_mae"}
    assert {*digits, "imagenet_crate_base", "imagenet_finetune_mae_base"} <= set(CLASSIFIERS)


@pytest.mark.parametrize("recipe", CLASSIFIERS)
def test_a_header_has_command_cost_and_expectation(recipe: str) -> None:
    assert f"crate-ray train {recipe}" in header(recipe)
    for part in ("Command:", "Cost:", "Expect:"):
        assert part in header(recipe)


@pytest.mark.parametrize(("recipe", "epochs"), [("imagenet_crate_base", 150), ("imagenet_finetune_mae_base", 100)])
def test_the_printed_cost_on_imagenet_is_the_computed_one(recipe: str, epochs: int) -> None:
    config = RunConfig.load(recipe)
    printed = re.search(
        r"Cost: ([\d.]+) GFLOPs forward and ([\d.]+) GFLOPs of training an image, ([\d.e]+) FLOPs", header(recipe)
    )
    assert printed is not None
    total = training_flops_per_image(config.model) * IMAGENET_IMAGES * epochs
    assert config.train.epochs == epochs
    assert printed.group(1) == f"{forward_flops(config.model) / 1e9:.2f}"
    assert printed.group(2) == f"{training_flops_per_image(config.model) / 1e9:.2f}"
    assert printed.group(3) == f"{total:.2e}".replace("e+", "e")
    assert header(recipe).count(printed.group(3)) == 2, "once as the cost, once in the formula of hours"


@pytest.mark.parametrize("recipe", [name for name in CLASSIFIERS if name.startswith("digits")])
def test_the_printed_cost_on_digits_is_the_computed_one(recipe: str) -> None:
    config = RunConfig.load(recipe)
    parameters, flops = count_parameters(config.model).trainable, training_flops_per_image(config.model)
    assert f"{parameters:,} parameters, {flops / 1e9:.3f} GFLOPs of training an image" in header(recipe)


def test_the_published_values_of_fine_tuning() -> None:
    config = RunConfig.load("imagenet_finetune_mae_base")
    assert config.optimizer.peak_lr(config.train.global_batch) == pytest.approx(2e-3)
    assert config.schedule.final_lr_fraction * 2e-3 == pytest.approx(1e-6)
    assert (config.optimizer.weight_decay, config.optimizer.layer_decay) == (0.05, 0.65)
    assert (config.data.mixup_alpha, config.data.cutmix_alpha, config.train.label_smoothing) == (0.8, 1.0, 0.1)
    assert (config.train.epochs, config.train.global_batch, config.schedule.warmup_epochs) == (100, 1024, 5)
    assert (config.model.embedding, config.model.pool, config.model.qkv_bias) == ("linear", "mean", True)


def test_the_supervised_crate_is_the_published_model() -> None:
    config = RunConfig.load("imagenet_crate_base")
    assert count_parameters(config.model).paper == 22_796_008
    assert (config.model.ista_lambda, config.model.ista_step_size) == (0.1, 0.1)
    assert (config.train.epochs, config.train.global_batch, config.train.label_smoothing) == (150, 2048, 0.1)


@pytest.mark.parametrize(
    ("recipe", "source"), [("digits_finetune_crate", "digits_crate_mae"), ("digits_finetune_mae", "digits_mae")]
)
def test_the_encoder_to_fine_tune_is_that_of_the_pretraining_recipe(recipe: str, source: str) -> None:
    ours, theirs = RunConfig.load(recipe).model, RunConfig.load(source).model
    for key in ("family", "image_size", "patch_size", "width", "num_heads", "encoder_depth", "qkv_bias", "block_norm_eps"):
        assert getattr(ours, key) == getattr(theirs, key)
    for key in ("ista_lambda", "ista_step_size", "final_norm_eps"):
        assert getattr(ours, key) == getattr(theirs, key)
