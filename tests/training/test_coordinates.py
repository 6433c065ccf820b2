"""The coordinate check: its slopes by hand, its updates real, and what it says of both parametrizations."""

import numpy as np
import pytest
import torch

from crate_ray.config import ConfigError, ModelConfig, RunConfig
from crate_ray.models import create_model
from crate_ray.training.coordinates import (
    OWN_PART,
    CoordinateRow,
    _row,
    at_width,
    coordinate_changes,
    coordinate_check,
    default_widths,
    observe,
)

SHAPE = {"image_size": 16, "patch_size": 4, "width": 32, "num_heads": 4, "encoder_depth": 1, "decoder_depth": 1}
VISIBLE = {"encoder_tokens": "visible", "decoder_width": 16, "decoder_num_heads": 2, "mask_ratio": 0.5}
MODELS = {"crate": {**SHAPE, "family": "crate"}, "vit": {**SHAPE, **VISIBLE, "family": "vit"}}


def run_config(model: dict[str, object], lr: float) -> RunConfig:
    values = {
        "model": model,
        "task": "classify" if "num_classes" in model else "pretrain",
        "data": {"train": "unread"},
        "optimizer": {"lr": lr},
        "train": {"steps": 1, "global_batch": 64, "clip_norm": 1.0},
    }
    return RunConfig.parse(values)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[CoordinateRow]]:
    """Of each family, at a rate ten times as large as the recipes'."""
    return {
        family: coordinate_check(run_config(model, 5e-3), widths=(16, 32, 64, 128), seeds=(0, 1), steps=(1,))
        for family, model in MODELS.items()
    }


def slopes(rows: list[CoordinateRow], parametrization: str, step: int) -> dict[str, float]:
    return {row.name: row.slope for row in rows if (row.parametrization, row.step) == (parametrization, step)}


@pytest.mark.parametrize("family", MODELS)
def test_hidden_coordinates_change_more_in_wide_models_of_the_standard_parametrization_alone(
    family: str, rows: dict[str, list[CoordinateRow]]
) -> None:
    hidden = {"crate": ["blocks.0.attn", "blocks.0.ista"], "vit": ["blocks.0.attn", "blocks.0.mlp", "blocks.0"]}[family]
    standard, mup = slopes(rows[family], "standard", 1), slopes(rows[family], "mup", 1)
    for name in [*hidden, OWN_PART]:
        assert standard[name] > 0.5, name
        assert abs(mup[name]) < 0.2, name
    assert abs(standard["patch_embed"]) < 0.1, "its rate transfers as it is"
    assert abs(mup["patch_embed"]) < 0.1
    assert mup["norm"] < 0.2 < standard["norm"]


def test_the_rows_name_what_the_families_have_in_the_order_of_the_forward_pass(rows: dict[str, list[CoordinateRow]]) -> None:
    encoder = ["patch_embed", "blocks.0.attn.logits", "blocks.0.attn"]
    of_crate = [*encoder, "blocks.0.ista", "norm", "decoder_blocks.0.synthesis", "decoder_blocks.0.attn.logits"]
    of_crate += ["decoder_blocks.0.attn", "decoder_blocks.0", "decoder_norm", "decoder_pred", OWN_PART]
    of_vit = [*encoder, "blocks.0.mlp", "blocks.0", "norm", "decoder_embed", "decoder_blocks.0.attn.logits"]
    of_vit += ["decoder_blocks.0.attn", "decoder_blocks.0.mlp", "decoder_blocks.0", "decoder_norm", "decoder_pred", OWN_PART]
    for family, names in (("crate", of_crate), ("vit", of_vit)):
        for parametrization in ("standard", "mup"):
            assert list(slopes(rows[family], parametrization, 1)) == names
        assert len(rows[family]) == 2 * len(names)


WIDTHS = (8, 16, 32, 64)


@pytest.mark.parametrize("exponent", [-0.3, 0.05, 1.0])
def test_a_power_of_the_width_has_its_exponent_as_slope_whatever_the_seeds_scale(exponent: float) -> None:
    row = _row("x", "mup", 1, [[scale * width**exponent for width in WIDTHS] for scale in (1.0, 3.0, 7.0)], WIDTHS)
    assert (row.slope, row.low, row.high) == pytest.approx((exponent, exponent, exponent), abs=1e-6)
    assert row.passes == (abs(exponent) < 0.1)
    assert row.verdict == {-0.3: "shrinks", 0.05: "passes", 1.0: "grows"}[exponent]


def test_two_seeds_have_the_interval_of_a_difference() -> None:
    """With two, the jackknife's halves are the seeds' own slopes; t of one degree of freedom is 12.706 at 0.975."""
    first, second = [w**0.1 for w in WIDTHS], [w**0.3 for w in WIDTHS]
    row = _row("x", "mup", 1, [first, second], WIDTHS)
    assert row.slope == pytest.approx(np.polyfit(np.log(WIDTHS), np.log(np.add(first, second)), 1)[0])
    assert row.high - row.slope == pytest.approx(12.7062 * (0.3 - 0.1) / 2, abs=1e-4)
    assert row.verdict == "unclear"


def test_the_interval_covers_the_slope_of_the_expectation_as_often_as_it_says() -> None:
    """Gamma noise that is larger in narrow models, as that of a mean over few heads is; 300 checks of 8 seeds."""
    generator = np.random.default_rng(0)
    shape = np.array(WIDTHS) / 4
    noise = generator.gamma(shape, 1 / shape, size=(300, 8, len(WIDTHS)))
    rows = [_row("x", "mup", 1, values.tolist(), WIDTHS) for values in noise]
    covered = sum(row.low <= 0 <= row.high for row in rows) / 300
    assert 0.92 < covered < 0.98
    of_single_seeds = np.polyfit(np.log(WIDTHS), np.log(noise.reshape(-1, 4)).T, 1)[0].mean()
    assert abs(np.mean([row.slope for row in rows])) < 0.03 < of_single_seeds, "whose mean would be biased"


def test_the_same_arguments_give_the_same_changes_and_leave_the_callers_random_numbers_alone() -> None:
    config = run_config(MODELS["crate"], 1e-3)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = coordinate_changes(config, config.model, seed=3, steps=(1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert coordinate_changes(config, config.model, seed=3, steps=(1, 2)) == first
    assert coordinate_changes(config, config.model, seed=4, steps=(1, 2)) != first


def test_an_update_changes_the_patch_embedding_by_as_much_as_adams_first_step_can() -> None:
    """Its first step moves every weight by the rate, so a coordinate by at most rate times the sum of |pixels| and one."""
    config = run_config(MODELS["crate"], 1e-3)
    change = coordinate_changes(config, config.model, seed=0, steps=(1,))[1]["patch_embed"]
    largest_pixel = (1 - 0.406) / 0.225 + 0.5
    assert 0 < change <= 1e-3 * (48 * largest_pixel + 1)


@pytest.mark.parametrize("family", MODELS)
def test_attention_logits_are_those_that_attention_takes_the_softmax_of(family: str) -> None:
    network = create_model(ModelConfig.parse(MODELS[family]))
    attention, entered = network.blocks[0].attn, []
    attention.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    seen = observe(network, torch.randn(2, 3, 16, 16), torch.rand(2, 16))
    with torch.no_grad():
        values = attention.qkv(entered[0])[..., -32:].unflatten(-1, (4, 8)).transpose(1, 2)
        mixed = seen["blocks.0.attn.logits"].softmax(dim=-1) @ values
        assert torch.allclose(attention.proj(mixed.transpose(1, 2).flatten(2)), seen["blocks.0.attn"], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (32, 64, 128)}, "at least four widths"),
        ({"seeds": (0,)}, "two seeds"),
        ({"steps": (0,)}, "one step of 1 or more"),
        ({"widths": (16, 32, 36, 64)}, "width = 36 is 1.125 times.*use a width of 32 or 40"),
    ],
)
def test_a_check_that_can_show_nothing_is_refused(arguments: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        coordinate_check(run_config(MODELS["crate"], 1e-3), **arguments)


def test_the_base_is_the_model_as_configured_or_the_one_it_names() -> None:
    as_configured = at_width(ModelConfig.parse(MODELS["vit"]), 64, "mup")
    assert (as_configured.num_heads, as_configured.decoder_width, as_configured.decoder_num_heads) == (8, 32, 4)
    assert as_configured.width_ratio == 2
    standard = at_width(as_configured, 128, "standard")
    assert (standard.num_heads, standard.decoder_width, standard.width_ratio) == (16, 64, 1)
    assert at_width(as_configured, 128, "mup").width_ratio == 4


def test_a_classifier_is_checked_too() -> None:
    config = run_config({**MODELS["vit"], "num_classes": 3}, 1e-3)
    changes = coordinate_changes(config, config.model, seed=0, steps=(2,))[2]
    assert {"patch_embed", "blocks.0.mlp", "fc_norm", "head", OWN_PART} <= changes.keys()
    assert all(value > 0 for value in changes.values())


@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ({"preset": "crate_mae_base"}, (64, 128, 256, 512)),
        # 12 heads and a decoder of 512 with 16 at 768: heads of 64 ask for 64 k, a decoder of heads of 32 for 48 k.
        ({"preset": "mae_base"}, (192, 384, 576, 768)),
        ({"preset": "mae_base", "parametrization": "mup", "mup_base_width": 192}, (192, 384, 576, 768)),
        ({"preset": "crate_mae_base", "width": 600}, (100, 200, 300, 400)),  # 50 has heads, but positions have four parts
        ({"preset": "crate_mae_base", "width": 480}, (80, 120, 240, 520)),  # of 40, nearest to 64, 128, 256 and 512
    ],
)
def test_the_default_widths_are_those_at_which_the_model_is_whole(shape: dict[str, object], widths: tuple[int, ...]) -> None:
    if "mup_base_width" in shape:
        shape |= {"mup_base_num_heads": 3, "mup_base_decoder_width": 128, "mup_base_decoder_num_heads": 4}
    model = ModelConfig.parse(shape)
    assert default_widths(model) == widths
    heads = {at_width(model, width, "mup").num_heads * model.width == width * model.num_heads for width in widths}
    assert heads == {True}
