"""Properties every masked autoencoder has, over families, token modes and shapes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.models.patches import draw_masking, patchify, sincos_positions, unpatchify

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "num_heads": 3, "encoder_depth": 2, "decoder_depth": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "crate_all": {**SMALL, "family": "crate"},
    "crate_all_uneven": {**SMALL, "family": "crate", "decoder_depth": 1, "decoder_num_heads": 4, "norm_pix_loss": True},
    "crate_visible": {**SMALL, "family": "crate", "encoder_tokens": "visible"},
    "crate_visible_narrow": {
        **SMALL,
        "family": "crate",
        "encoder_tokens": "visible",
        "decoder_width": 32,
        "decoder_num_heads": 2,
    },
    "crate_one_head": {**SMALL, "family": "crate", "num_heads": 1, "mask_ratio": 0.5},
    "crate_lambda_a_layer": {**SMALL, "family": "crate", "ista_lambda": [0.1, 5.0], "ista_step_size": [0.1, 0.2]},
    "crate_trained_ista": {**SMALL, "family": "crate", "encoder_tokens": "visible", "ista_learnable": "layer"},
    "vit_all": {**SMALL, "family": "vit"},
    "vit_visible": {**SMALL, "family": "vit", "encoder_tokens": "visible", "decoder_width": 32, "decoder_num_heads": 4},
    "vit_visible_small_patches": {**SMALL, "family": "vit", "encoder_tokens": "visible", "patch_size": 4, "mask_ratio": 0.9},
}


def build(name: str, **overrides: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    model = create_model(ModelConfig.parse({**SHAPES[name], **overrides}))
    assert isinstance(model, MaskedAutoencoder)
    return model


def draw(model: MaskedAutoencoder, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    side = model.config.image_size
    return torch.randn(batch, 3, side, side, generator=generator), torch.rand(batch, model.num_patches, generator=generator)


@pytest.mark.parametrize("name", SHAPES)
def test_the_mean_of_the_losses_is_the_loss_of_the_full_pass(name: str) -> None:
    model = build(name)
    images, noise = draw(model)
    losses = model.losses(images, noise)
    assert losses.shape == (3,)
    torch.testing.assert_close(losses.mean(), model(images, noise).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_an_image_has_the_same_loss_alone_as_in_a_batch(name: str) -> None:
    model = build(name)
    images, noise = draw(model)
    torch.testing.assert_close(model.losses(images, noise)[1:2], model.losses(images[1:2], noise[1:2]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SHAPES)
def test_a_gradient_reaches_every_parameter(name: str) -> None:
    model = build(name)
    torch.autograd.backward(model.losses(*draw(model)).mean())
    without = [key for key, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_configuration(name: str) -> None:
    model = build(name)
    config = model.config
    images, noise = draw(model)
    loss, pred, mask, latent = model(images, noise)
    encoded = config.num_patches if config.encoder_tokens == "all" else config.num_kept
    assert loss.shape == ()
    assert pred.shape == (3, config.num_patches, 3 * config.patch_size**2)
    assert latent.shape == (3, 1 + encoded, config.width)
    assert model.encode(images).shape == (3, 1 + config.num_patches, config.width)
    assert mask.sum(dim=1).tolist() == [config.num_patches - config.num_kept] * 3


@pytest.mark.parametrize("name", ["crate_all", "crate_visible", "vit_all", "vit_visible"])
def test_hidden_pixels_do_not_change_the_latent(name: str) -> None:
    model = build(name)
    images, noise = draw(model)
    mask = model(images, noise).mask
    patches = patchify(images, model.config.patch_size)
    changed = unpatchify(torch.where(mask.bool().unsqueeze(-1), torch.randn_like(patches), patches), model.config.patch_size)
    assert torch.equal(model(changed, noise).latent, model(images, noise).latent)


@pytest.mark.parametrize("name", ["crate_visible", "vit_visible"])
def test_the_order_of_the_kept_tokens_changes_nothing_but_their_order(name: str) -> None:
    model = build(name, mask_ratio=1 / 16)
    images, _ = draw(model)
    noise = torch.arange(16.0).expand(3, -1)
    kept = model(images, noise).latent
    shuffled = noise[:, [*torch.randperm(15).tolist(), 15]]
    order = torch.argsort(shuffled[0])[:15]
    torch.testing.assert_close(model(images, shuffled).latent[:, 1:], kept[:, 1:][:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["crate_all", "vit_visible"])
def test_features_are_the_encoder_over_every_patch_with_its_position(name: str) -> None:
    model = build(name)
    images, _ = draw(model)
    tokens = model.patch_embed(patchify(images, model.config.patch_size))
    z = torch.cat([model.cls_token.expand(3, -1, -1), tokens], dim=1) + sincos_positions(48, 4)
    for block in model.blocks:
        z = block(z)
    torch.testing.assert_close(model.encode(images), model.norm(z))


@pytest.mark.parametrize("name", ["crate_all", "crate_trained_ista", "vit_visible"])
def test_losses_run_under_bfloat16_autocast_and_stay_float32(name: str) -> None:
    model = build(name)
    images, noise = draw(model)
    full = model.losses(images, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.losses(images, noise)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.03, atol=0)
    torch.autograd.backward(half.mean())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["crate_all", "crate_trained_ista", "vit_visible"])
def test_losses_compile_into_one_graph(name: str) -> None:
    model = build(name)
    images, noise = draw(model)
    compiled = torch.compile(model.losses, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, noise), model.losses(images, noise))


@pytest.mark.parametrize(("num_patches", "num_kept"), [(16, 4), (196, 49), (7, 1), (7, 6)])
def test_a_masking_keeps_the_smallest_noise_and_exactly_as_many(num_patches: int, num_kept: int) -> None:
    noise = torch.rand(5, num_patches)
    kept, masked, mask = draw_masking(noise, num_kept)
    assert kept.shape == (5, num_kept)
    assert torch.equal(mask.sum(1), torch.full((5,), num_patches - num_kept))
    assert bool((noise.gather(1, kept).amax(1) < noise.gather(1, masked).amin(1)).all())
    assert not mask.gather(1, kept).any()
    assert mask.gather(1, masked).all()


def test_equal_noise_still_keeps_exactly_as_many() -> None:
    kept, _, mask = draw_masking(torch.zeros(2, 16), 4)
    assert kept.tolist() == [[0, 1, 2, 3]] * 2
    assert int(mask.sum()) == 24


def test_patches_go_back_to_the_image_they_came_from() -> None:
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(unpatchify(patchify(images, 8), 8), images)
    assert torch.equal(patchify(images, 8)[1, 5].reshape(8, 8, 3), images[1, :, 8:16, 16:24].permute(1, 2, 0))


def test_the_position_table_names_the_column_first_and_gives_the_class_token_zeros() -> None:
    table = sincos_positions(8, 3)
    assert table.shape == (1, 10, 8)
    assert not table[0, 0].any()
    row, column = 2.0, 1.0
    waves = [f(p * w) for p in (column, row) for f in (torch.sin, torch.cos) for w in torch.tensor([1.0, 0.01])]
    torch.testing.assert_close(table[0, 1 + 2 * 3 + 1], torch.stack(waves))


def test_initialisation_follows_the_published_code() -> None:
    model = build("crate_visible", width=192, decoder_width=192, num_heads=3)
    xavier = (6 / (192 + 192)) ** 0.5
    kaiming = (6 / 192) ** 0.5
    state = model.state_dict()
    bounds = {"blocks.0.attn.qkv.weight": xavier, "blocks.0.ista.dictionary": kaiming, "decoder_blocks.0.dictionary": kaiming}
    for key, bound in bounds.items():
        assert float(state[key].abs().max()) == pytest.approx(bound, rel=1e-3), key
    assert float(state["mask_token"].std()) == pytest.approx(0.02, rel=0.3)
    assert not model.decoder_pred.bias.any()
    assert model.patch_embed.bias.any(), "a convolution's bias in the published code, never zeroed"


def test_images_and_noise_of_another_shape_are_refused_by_name() -> None:
    model = build("crate_all")
    images, noise = draw(model)
    with pytest.raises(ConfigError, match=r"image_size = 32 needs \(batch, 3, 32, 32\)"):
        model.encode(images[..., :24])
    with pytest.raises(ConfigError, match=r"noise has shape \(3, 15\).*\(3, 16\)"):
        model.losses(images, noise[:, :15])


def test_a_model_comes_from_a_preset_with_changed_keys() -> None:
    model = create_model("mae_small", image_size=32, patch_size=4, encoder_depth=1, decoder_depth=1)
    assert isinstance(model, MaskedAutoencoder)
    assert (model.config.width, model.num_patches) == (384, 64)
    assert create_model(model.config, mask_ratio=0.5).config.mask_ratio == 0.5
    with pytest.raises(ConfigError, match="mae_smal"):
        create_model("mae_smal")


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio = 1.0 keeps 0 of 16 patches; at least one must be kept and one masked"),
        ({"mask_ratio": 0.0}, "mask_ratio = 0.0 keeps 16 of 16 patches"),
        ({"mask_ratio": 0.95}, "keeps 0 of 16 patches.*up to 0.9374"),
        ({"mask_ratio": -0.5}, "mask_ratio = -0.5"),
        ({"mask_ratio": NAN}, "mask_ratio = nan: input should be a finite number"),
        ({"image_size": 4}, "image_size = 4 is smaller than one patch of patch_size = 8; use an image size of at least 16"),
        ({"image_size": 8}, "image_size = 8 is one patch of patch_size = 8.*at least 16"),
        ({"image_size": 12}, "image_size = 12 is not a multiple of patch_size = 8; use an image size of 16"),
        ({"image_size": -8}, "image_size = -8: input should be greater than or equal to 1"),
        ({"patch_size": 0}, "patch_size = 0: input should be greater than or equal to 1"),
        ({"num_heads": 5}, "width = 48 is not divisible by num_heads = 5; valid head counts: 1, 2, 3, 4, 6, 8"),
        ({"decoder_num_heads": 5}, "decoder_width = 48 is not divisible by decoder_num_heads = 5"),
        ({"width": 50, "num_heads": 2}, "width = 50 must be a multiple of 4"),
        ({"decoder_width": 32, "decoder_num_heads": 2}, "decoder_width = 32 must equal width = 48 when encoder_tokens = all"),
        ({"width": 0}, "width = 0: input should be greater than or equal to 1"),
        ({"num_heads": -3}, "num_heads = -3: input should be greater than or equal to 1"),
        ({"encoder_depth": 0}, "encoder_depth = 0: input should be greater than or equal to 1"),
        ({"ista_lambda": [0.1]}, "ista_lambda has 1 values; give one, or one for each of the 2 layers"),
        ({"ista_step_size": [0.1] * 3}, "ista_step_size has 3 values"),
        ({"ista_lambda": []}, "ista_lambda has 0 values"),
        ({"ista_lambda": -0.1}, "ista_lambda = -0.1: give a finite number of at least 0, or a list"),
        ({"ista_step_size": [0.1, NAN]}, r"ista_step_size = \[0.1, nan\]: give a finite number"),
        ({"ista_step_size": INFINITY}, "ista_step_size = inf: give a finite number"),
        ({"ista_lambda": "small"}, "ista_lambda = 'small': give a finite number"),
        ({"ista_learnable": "token"}, "ista_learnable = 'token': input should be 'none' or 'layer'"),
        ({"block_norm_eps": 0.0}, "block_norm_eps = 0.0: input should be greater than 0"),
        ({"family": "resnet"}, "family = 'resnet': input should be 'crate' or 'vit'"),
        ({"hedas": 3}, "hedas: unknown key.*valid keys here: "),
    ],
)
def test_a_shape_that_cannot_be_is_one_error_with_key_value_and_fix(keys: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        create_model("crate_mae_tiny", **{**SMALL, **keys})
    heading, *problems = str(caught.value).splitlines()
    assert heading == "invalid configuration in model crate_mae_tiny:"
    assert len(problems) == 1


def test_a_zero_cannot_be_trained_as_a_logarithm() -> None:
    with pytest.raises(ConfigError, match="ista_learnable"):
        build("crate_trained_ista", ista_lambda=0.0)


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = build("vit_visible").state_dict(), build("vit_visible").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
