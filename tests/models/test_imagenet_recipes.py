"""The ImageNet recipes say what they cost and hold the published hyperparameters."""

import re
from importlib import resources

import pytest

from crate_ray.config import RunConfig, preset_values
from crate_ray.models.cost import forward_flops, training_flops_per_image

IMAGENET_IMAGES = 1_281_167
RECIPES = ["imagenet_crate_mae_base", "imagenet_mae_base"]


def header(recipe: str) -> str:
    text = resources.files("crate_ray.recipes").joinpath(f"{recipe}.yaml").read_text()
    return text.split("\ntask:")[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_printed_cost_is_the_computed_one(recipe: str) -> None:
    model = RunConfig.load(recipe).model
    printed = re.search(
        r"Cost: ([\d.]+) GFLOPs forward and ([\d.]+) GFLOPs of training an image, ([\d.e]+) FLOPs", header(recipe)
    )
    assert printed is not None
    total = training_flops_per_image(model) * IMAGENET_IMAGES * 800
    assert printed.group(1) == f"{forward_flops(model) / 1e9:.2f}"
    assert printed.group(2) == f"{training_flops_per_image(model) / 1e9:.2f}"
    assert printed.group(3) == f"{total:.2e}".replace("e+", "e")
    assert header(recipe).count(printed.group(3)) == 2, "once as the cost, once in the formula of hours"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_header_has_command_cost_and_expectation(recipe: str) -> None:
    assert f"crate-ray train {recipe}" in header(recipe)
    for part in ("Command:", "Cost:", "Expect:"):
        assert part in header(recipe)


@pytest.mark.parametrize(
    ("recipe", "preset", "peak_lr", "weight_decay", "norm_pix"),
    [
        ("imagenet_crate_mae_base", "crate_mae_base", 4.8e-4, 0.1, False),
        ("imagenet_mae_base", "mae_base", 2.4e-3, 0.05, True),
    ],
)
def test_the_values_are_the_published_ones(
    recipe: str, preset: str, peak_lr: float, weight_decay: float, norm_pix: bool
) -> None:
    config = RunConfig.load(recipe)
    expected = preset_values(preset)
    assert {key: getattr(config.model, key) for key in expected} == expected
    assert config.optimizer.peak_lr(config.train.global_batch) == pytest.approx(peak_lr)
    assert config.optimizer.weight_decay == weight_decay
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.model.norm_pix_loss is norm_pix
    assert (config.train.epochs, config.schedule.warmup_epochs, config.train.global_batch) == (800, 40, 4096)
    assert config.data.augment == "random_resized_crop"


def test_crate_mae_takes_the_ista_of_the_published_code() -> None:
    model = RunConfig.load("imagenet_crate_mae_base").model
    assert set(model.per_layer("ista_step_size")) == {0.1}
    assert set(model.per_layer("ista_lambda")) == {0.5}
