"""Closed forms against the published figures and against counting what runs."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.published import PublishedClassifier, PublishedMaskedAutoencoder
from crate_ray.config import PRESETS, ModelConfig
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.models.cost import (
    count_parameters,
    encode_flops,
    forward_flops,
    published_forward_flops,
    training_flops_per_image,
)

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "num_heads": 3, "encoder_depth": 2, "decoder_depth": 3}
SHAPES: list[dict[str, Any]] = [
    {**SMALL, "family": "crate"},
    {**SMALL, "family": "crate", "num_heads": 1, "decoder_num_heads": 2, "ista_learnable": "layer"},
    {**SMALL, "family": "crate", "encoder_tokens": "visible", "decoder_width": 32, "decoder_num_heads": 1, "mask_ratio": 0.6},
    {**SMALL, "family": "vit"},
    {**SMALL, "family": "vit", "encoder_tokens": "visible", "decoder_width": 32, "decoder_num_heads": 4},
    {**SMALL, "family": "crate", "num_classes": 7},
    {**SMALL, "family": "crate", "num_classes": 7, "embedding": "linear"},
    {**SMALL, "family": "crate", "num_classes": 7, "embedding": "linear", "pool": "mean", "num_heads": 1},
    {**SMALL, "family": "vit", "num_classes": 7},
    {**SMALL, "family": "vit", "num_classes": 7, "pool": "cls", "qkv_bias": False},
]
ABLATIONS: list[dict[str, Any]] = [
    {**SMALL, "family": "crate", "attention": "untied"},
    {**SMALL, "family": "crate", "attention": "untied", "num_heads": 1, "ista_learnable": "layer"},
    {**SMALL, "family": "crate", "feedforward": "mlp", "mlp_ratio": 0.5},
    {**SMALL, "family": "crate", "attention": "untied", "feedforward": "mlp", "encoder_tokens": "visible"},
    {**SMALL, "family": "crate", "share_layers": True, "num_classes": 7},
    {**SMALL, "family": "vit", "attention": "tied"},
    {**SMALL, "family": "vit", "attention": "tied", "num_heads": 1, "feedforward": "ista", "encoder_tokens": "visible"},
    {**SMALL, "family": "vit", "feedforward": "ista", "qkv_bias": True},
    {**SMALL, "family": "vit", "mlp_ratio": 1.3, "encoder_tokens": "visible", "decoder_width": 32, "decoder_num_heads": 4},
    {**SMALL, "family": "vit", "share_layers": True, "mlp_ratio": 2, "num_classes": 7},
]


def preset(name: str, **overrides: Any) -> ModelConfig:
    return ModelConfig.parse({"preset": name, **overrides})


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("crate_mae_tiny", 11_555_328),
        ("crate_mae_small", 25_405_824),
        ("crate_mae_base", 44_638_464),
        ("crate_mae_large", 154_274_560),
        ("crate_mae_visible_small", 25_405_824),
        ("crate_mae_visible_base", 44_638_464),
        ("mae_all_tokens_base", 143_790_336),
        ("mae_all_tokens_large", 406_014_720),
        ("mae_small", 47_578_240),
        ("mae_base", 111_907_840),
        ("mae_large", 329_541_888),
        ("mae_huge", 657_074_508),
        ("crate_tiny", 6_090_856),
        ("crate_small", 13_116_328),
        ("crate_base", 22_796_008),
        ("crate_large", 77_641_192),
    ],
)
def test_parameters_as_published(name: str, paper: int) -> None:
    assert count_parameters(preset(name)).paper == paper


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("crate_mae_tiny", 5_627_904),
        ("crate_mae_small", 12_423_168),
        ("crate_mae_base", 21_872_640),
        ("crate_mae_large", 76_410_880),
        ("crate_mae_visible_base", 21_872_640),
        ("mae_base", 85_647_360),
    ],
)
def test_the_encoder_alone(name: str, encoder: int) -> None:
    assert count_parameters(preset(name)).encoder == encoder


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_those_of_the_built_model(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        check_counts(config)


@pytest.mark.parametrize("name", PRESETS)
def test_the_paper_count_is_that_of_the_published_class_and_says_what_ours_lacks(name: str) -> None:
    config, count = preset(name), count_parameters(preset(name))
    with torch.device("meta"):
        published = PublishedClassifier(config) if config.num_classes else PublishedMaskedAutoencoder(config)
    sizes = {key: parameter.numel() for key, parameter in published.named_parameters()}
    assert count.paper == sum(sizes.values())
    lacks_parts = config.num_classes is None and config.encoder_tokens == "all"
    assert count.dead_decoder_embed == (sizes["decoder_embed.weight"] + sizes["decoder_embed.bias"] if lacks_parts else 0)
    assert count.second_table == (sizes["pos_embed"] if lacks_parts else 0)
    assert count.paper - count.total == count.dead_decoder_embed + count.second_table


@pytest.mark.parametrize("shape", SHAPES + ABLATIONS)
def test_counts_of_small_models_are_those_of_the_built_model(shape: dict[str, Any]) -> None:
    check_counts(ModelConfig.parse(shape))


def check_counts(config: ModelConfig) -> None:
    model, count = create_model(config), count_parameters(config)
    own = ("patch_norm", "patch_embed", "embed_norm", "pos_embed", "cls_token", "blocks", "norm", "fc_norm")
    parameters = dict(model.named_parameters())
    assert count.trainable == sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert count.total == sum(value.numel() for value in model.state_dict().values())
    assert count.encoder == sum(p.numel() for key, p in parameters.items() if key.split(".")[0] in own)


@pytest.mark.parametrize(
    ("name", "published", "two_products"),
    [
        ("crate_mae_tiny", 7.24, None),
        ("crate_mae_small", 15.04, None),
        ("crate_mae_base", 25.63, 22.85),
        ("crate_mae_large", 87.57, None),
        ("mae_small", 13.01, 13.01),
        ("mae_base", 19.56, 19.56),
        ("mae_large", 41.51, 41.51),
        ("mae_huge", 97.12, 97.12),
        ("mae_all_tokens_base", 58.62, 58.62),
        ("mae_all_tokens_large", 164.35, 164.35),
        ("crate_base", 15.61, None),
    ],
)
def test_forward_gigaflops_as_published(name: str, published: float, two_products: float | None) -> None:
    config = preset(name)
    assert round(published_forward_flops(config) / 1e9, 2) == published
    if two_products is not None:
        assert round(forward_flops(config, predicted="all") / 1e9, 2) == two_products


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if ModelConfig.parse(shape).embedding != "linear"])
def test_the_published_form_is_what_torch_counts_in_the_published_computation(shape: dict[str, Any]) -> None:
    config = ModelConfig.parse(shape)
    images = torch.randn(1, 3, config.image_size, config.image_size)
    if config.num_classes is not None:
        assert count_flops(lambda: PublishedClassifier(config)(images)) == published_forward_flops(config)
        return
    published, noise = PublishedMaskedAutoencoder(config), torch.rand(1, config.num_patches)
    assert count_flops(lambda: published(images, noise)) == published_forward_flops(config)


@pytest.mark.parametrize("name", ["crate_mae_base", "mae_base"])
def test_a_presets_operations_are_those_that_torch_counts(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model, images = create_model(config), torch.empty(1, 3, config.image_size, config.image_size)
        noise = torch.empty(1, config.num_patches)
    assert count_flops(lambda: model.encode(images)) == encode_flops(config)
    if isinstance(model, MaskedAutoencoder):
        assert count_flops(lambda: model.losses(images, noise)) == forward_flops(config)
        assert count_flops(lambda: model(images, noise)) == forward_flops(config, predicted="all")


def count_flops(run: Any) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("shape", SHAPES + ABLATIONS)
def test_operations_are_those_that_torch_counts(shape: dict[str, Any]) -> None:
    config = ModelConfig.parse(shape)
    model = create_model(config)
    images = torch.randn(1, 3, config.image_size, config.image_size)
    if not isinstance(model, MaskedAutoencoder):
        assert count_flops(lambda: model(images)) == forward_flops(config)
        return
    noise = torch.rand(1, config.num_patches)
    assert count_flops(lambda: model.losses(images, noise)) == forward_flops(config)
    assert count_flops(lambda: model(images, noise)) == forward_flops(config, predicted="all")
    assert count_flops(lambda: model.encode(images)) == encode_flops(config)


def test_training_costs_three_forwards_on_the_masked_path() -> None:
    config = preset("crate_mae_base")
    assert training_flops_per_image(config) == 3 * forward_flops(config)
    images = 1_281_167 * 800
    assert 3 * published_forward_flops(config) * images == pytest.approx(7.9e19, rel=0.01)
    assert 3 * published_forward_flops(preset("mae_base")) * images == pytest.approx(6.0e19, rel=0.01)


def test_a_smaller_mask_costs_a_visible_encoder_more_and_an_all_token_encoder_only_its_tail() -> None:
    for name in ("crate_mae_visible_base", "mae_base"):
        assert forward_flops(preset(name, mask_ratio=0.5)) > forward_flops(preset(name))
    head, output, attention = 2 * 49 * 768 * 768, 2 * 49 * 768 * 768, 4 * 49 * 197 * 768  # 49 fewer hidden tokens at 0.5
    assert forward_flops(preset("crate_mae_base")) - forward_flops(preset("crate_mae_base", mask_ratio=0.5)) == (
        head + output + attention
    )


def test_costs_need_no_torch() -> None:
    code = "import sys, crate_ray.models.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
