"""`crate_mae_visible_*`, sentence by sentence: the forward pass of facebook's MAE with CRATE layers.

That the whole of it computes what an independent writing does is in test_published_grid.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.published import PublishedMaskedAutoencoder
from crate_ray.config import PRESETS, ModelConfig
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.models.blocks import CrateDecoderLayer, CrateEncoderLayer
from crate_ray.models.cost import count_parameters
from crate_ray.models.layouts import to_published
from crate_ray.models.patches import patchify, sincos_positions, unpatchify

VISIBLE = [name for name in PRESETS if name.startswith("crate_mae_visible_")]
SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "num_heads": 3, "encoder_depth": 2, "decoder_depth": 2}
NARROW: dict[str, Any] = {"decoder_width": 32, "decoder_num_heads": 2}


def build(**overrides: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = create_model("crate_mae_visible_tiny", **{**SMALL, **overrides})
    assert isinstance(model, MaskedAutoencoder)
    return model


def draw(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 32, 32, generator=generator), torch.rand(2, 16, generator=generator)


def entering(layer: nn.Module, run: Any) -> Tensor:
    """The tokens that a layer is given."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    run()
    handle.remove()
    return seen[0]


def test_the_encoder_is_given_the_class_token_and_visible_patches_with_their_positions() -> None:
    model, (images, noise) = build(), draw()
    given = entering(model.blocks[0], lambda: model(images, noise))
    table = sincos_positions(48, 4)
    patches = model.patch_embed(patchify(images, 8)) + table[:, 1:]
    kept = noise.argsort(dim=1)[:, :4]
    assert given.shape == (2, 5, 48)
    torch.testing.assert_close(given[:, 0], model.cls_token[0].expand(2, -1), msg="the class token's position row is zero")
    for image in range(2):
        torch.testing.assert_close(given[image, 1:], patches[image, kept[image]])


@pytest.mark.parametrize("decoder", [{}, NARROW], ids=["equal", "narrow"])
def test_the_decoder_is_given_every_token_embedded_or_masked_with_its_table(decoder: dict[str, Any]) -> None:
    model, (images, noise) = build(**decoder), draw()
    nn.init.normal_(model.decoder_embed.bias)
    latent = model(images, noise).latent
    given = entering(model.decoder_blocks[0], lambda: model(images, noise))
    width = model.config.decoder_width
    kept = noise.argsort(dim=1)[:, :4]
    embedded = latent @ model.decoder_embed.weight.T + model.decoder_embed.bias
    for image in range(2):
        tokens = model.mask_token[0].repeat(17, 1)
        tokens[0] = embedded[image, 0]
        tokens[1 + kept[image]] = embedded[image, 1:]
        torch.testing.assert_close(given[image], tokens + sincos_positions(width, 4)[0])


def test_the_decoders_table_is_added_to_the_class_token_too() -> None:
    model, (images, noise) = build(), draw()
    before = entering(model.decoder_blocks[0], lambda: model(images, noise))
    model.decoder_pos_embed[:, 0] += 1
    after = entering(model.decoder_blocks[0], lambda: model(images, noise))
    torch.testing.assert_close(after[:, 0] - before[:, 0], torch.ones(2, 48))
    assert torch.equal(after[:, 1:], before[:, 1:])


@pytest.mark.parametrize("decoder", [{}, NARROW], ids=["equal", "narrow"])
def test_decoder_embed_is_live_with_a_bias_at_equal_widths_too(decoder: dict[str, Any]) -> None:
    model = build(**decoder)
    model.losses(*draw()).mean().backward()
    for parameter in (model.decoder_embed.weight, model.decoder_embed.bias):
        assert parameter.grad is not None
        assert bool(parameter.grad.any())
    assert model.decoder_embed.weight.shape == (model.config.decoder_width, 48)


@pytest.mark.parametrize("decoder", [{}, NARROW], ids=["equal", "narrow"])
def test_the_mask_token_and_the_decoders_table_are_of_decoder_width(decoder: dict[str, Any]) -> None:
    model = build(**decoder)
    assert model.mask_token.shape == (1, 1, model.config.decoder_width)
    assert model.decoder_pos_embed.shape == (1, 17, model.config.decoder_width)
    assert model.pos_embed.shape == (1, 17, 48)


def test_both_tables_are_fixed_and_zero_for_the_class_token() -> None:
    model = build(**NARROW)
    assert {"pos_embed", "decoder_pos_embed"} == {name for name, _ in model.named_buffers()}
    assert not model.pos_embed[:, 0].any()
    assert not model.decoder_pos_embed[:, 0].any()


def test_the_prediction_drops_the_class_token() -> None:
    model, (images, noise) = build(), draw()
    decoded = entering(model.decoder_norm, lambda: model(images, noise))
    expected = model.decoder_pred(model.decoder_norm(decoded))[:, 1:]
    assert torch.equal(model(images, noise).pred, expected)


def test_hidden_pixels_reach_neither_latent_nor_prediction() -> None:
    model, (images, noise) = build(), draw()
    output, other = model(images, noise), draw(seed=2)[0]
    hidden = output.mask.bool().unsqueeze(-1)
    changed = unpatchify(torch.where(hidden, patchify(other, 8), patchify(images, 8)), 8)
    again = model(changed, noise)
    assert torch.equal(again.latent, output.latent)
    assert torch.equal(again.pred, output.pred)
    assert not torch.equal(again.loss, output.loss)


def test_the_layers_are_those_of_crate() -> None:
    model = build()
    assert {type(layer) for layer in model.blocks} == {CrateEncoderLayer}
    assert {type(layer) for layer in model.decoder_blocks} == {CrateDecoderLayer}


@pytest.mark.parametrize("name", VISIBLE)
def test_only_the_visibility_of_tokens_differs_from_crate_mae(name: str) -> None:
    visible = ModelConfig.parse({"preset": name})
    published = ModelConfig.parse({"preset": name.replace("_visible", "")})
    assert visible.model_dump() == {**published.model_dump(), "encoder_tokens": "visible"}
    assert (visible.decoder_width, visible.decoder_depth, visible.decoder_num_heads) == (
        visible.width,
        visible.encoder_depth,
        visible.num_heads,
    )


@pytest.mark.parametrize(("name", "total"), [("crate_mae_visible_small", 25_405_824), ("crate_mae_visible_base", 44_638_464)])
def test_state_dict_and_total_are_those_of_the_published_class(name: str, total: int) -> None:
    with torch.device("meta"):
        ours = create_model(name)
        published = PublishedMaskedAutoencoder(ModelConfig.parse({"preset": name.replace("_visible", "")}))
    shapes = {key: value.shape for key, value in published.state_dict().items()}
    assert {key: value.shape for key, value in to_published(ours.state_dict(), "crate").items()} == shapes
    assert sum(value.numel() for value in ours.state_dict().values()) == total
    assert count_parameters(ModelConfig.parse({"preset": name})).total == total


def test_a_decoder_of_512_by_8_is_an_override() -> None:
    decoder = {"decoder_width": 512, "decoder_depth": 8, "decoder_num_heads": 16}
    with torch.device("meta"):
        model = create_model("crate_mae_visible_base", **decoder)
    assert isinstance(model, MaskedAutoencoder)
    assert len(model.decoder_blocks) == 8
    assert model.decoder_embed.weight.shape == (512, 768)
    count = count_parameters(model.config)
    expected = 21_872_640 + (768 * 512 + 512) + 512 + 8 * (3 * 512**2 + 5 * 512) + 2 * 512 + (512 * 768 + 768)
    assert count.trainable == expected
    assert count.total == count.trainable + 197 * (768 + 512)
