"""Classifiers with the encoder of an autoencoder: the same function of the same weights, and the published counts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models import Classifier, MaskedAutoencoder, create_model, load_weights
from crate_ray.models.cost import count_parameters
from crate_ray.models.patches import sincos_positions

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "num_heads": 3, "encoder_depth": 2, "decoder_depth": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "crate": {**SMALL, "family": "crate"},
    "crate_visible": {**SMALL, "family": "crate", "encoder_tokens": "visible"},
    "vit_visible": {**SMALL, "family": "vit", "encoder_tokens": "visible", "decoder_width": 32, "decoder_num_heads": 4},
    "vit_all": {**SMALL, "family": "vit", "qkv_bias": True, "block_norm_eps": 1e-6},
}
FAMILIES = pytest.mark.parametrize("encoder", ENCODERS)


def autoencoder(encoder: str) -> MaskedAutoencoder:
    torch.manual_seed(1)
    model = create_model(ModelConfig.parse(ENCODERS[encoder]))
    assert isinstance(model, MaskedAutoencoder)
    for parameter in model.parameters():  # trained biases and norms are not 0 and 1
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def classifier(encoder: str, **overrides: Any) -> Classifier:
    torch.manual_seed(2)
    model = create_model(ModelConfig.parse({**ENCODERS[encoder], "num_classes": 5, "embedding": "linear", **overrides}))
    assert isinstance(model, Classifier)
    return model


def draw_images(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@FAMILIES
def test_a_classifier_on_the_class_token_computes_the_autoencoders_features(encoder: str) -> None:
    source, model = autoencoder(encoder), classifier(encoder, pool="cls")
    load_weights(model, source.state_dict(), part="encoder")
    images = draw_images()
    assert torch.equal(model.embed(images), source.embed(images))
    assert torch.equal(model.encode(images), source.encode(images))
    torch.testing.assert_close(model(images), model.head(source.encode(images)[:, 0]))


@FAMILIES
def test_a_classifier_on_the_mean_token_norms_after_averaging(encoder: str) -> None:
    source, model = autoencoder(encoder), classifier(encoder, pool="mean")
    load_weights(model, source.state_dict(), part="encoder")
    torch.nn.init.normal_(model.fc_norm.weight)
    z_BND = source.embed(draw_images())
    for block in source.blocks:
        z_BND = block(z_BND)
    mean_BD = z_BND[:, 1:].mean(dim=1)
    centred = mean_BD - mean_BD.mean(dim=1, keepdim=True)
    normed = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * model.fc_norm.weight
    torch.testing.assert_close(model(draw_images()), normed @ model.head.weight.T, rtol=1e-4, atol=1e-7)
    assert not hasattr(model, "norm")


@FAMILIES
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_its_parameters_are_those_of_facebooks_fine_tuning(encoder: str, pool: str) -> None:
    names = {name.split(".")[0] for name, _ in classifier(encoder, pool=pool).named_parameters()}
    assert names == {"patch_embed", "cls_token", "pos_embed", "blocks", "head", "norm" if pool == "cls" else "fc_norm"}


def test_positions_start_from_the_sincos_table_and_are_trained() -> None:
    model = classifier("vit_visible")
    assert torch.equal(model.pos_embed, sincos_positions(48, 4))
    assert model.pos_embed.requires_grad
    model(draw_images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_fresh_head_gives_every_class_the_same_odds() -> None:
    odds = classifier("crate")(draw_images()).softmax(dim=1)
    torch.testing.assert_close(odds, torch.full_like(odds, 1 / 5), atol=1e-3, rtol=0)


def test_a_classifier_of_larger_images_takes_an_encoder_with_its_positions_resized() -> None:
    model = classifier("vit_visible", image_size=64)
    loaded = load_weights(model, autoencoder("vit_visible").state_dict(), part="encoder")
    assert loaded.interpolated == ("pos_embed",)
    assert model(draw_images(64)).shape == (3, 5)


def test_the_published_vit_b_classifier_has_86_567_656_parameters() -> None:
    """timm's `vit_base_patch16_224`, which facebookresearch/mae fine-tunes; head and positions included."""
    assert count_parameters(ModelConfig.parse({"preset": "mae_base", "num_classes": 1000})).total == 86_567_656


def test_a_crate_classifier_is_the_published_one_unless_another_embedding_is_asked_for() -> None:
    published = ModelConfig.parse({"preset": "crate_base"})
    assert (published.embedding, published.pool, published.ista_lambda) == ("normed", "cls", 0.1)
    fine_tuned = ModelConfig.parse({"preset": "crate_mae_base", "num_classes": 10, "embedding": "linear"})
    pretrained = ModelConfig.parse({"preset": "crate_mae_base"})
    for key in ("ista_lambda", "ista_step_size", "block_norm_eps", "final_norm_eps", "qkv_bias"):
        assert getattr(fine_tuned, key) == getattr(pretrained, key)


def test_a_vit_classifier_has_the_encoder_of_facebooks_mae() -> None:
    fine_tuned = ModelConfig.parse({**SMALL, "family": "vit", "num_classes": 10})
    assert (fine_tuned.embedding, fine_tuned.pool) == ("linear", "mean")
    assert (fine_tuned.qkv_bias, fine_tuned.block_norm_eps, fine_tuned.final_norm_eps) == (True, 1e-6, 1e-6)


def test_no_classifier_without_a_number_of_classes() -> None:
    with pytest.raises(ConfigError, match="num_classes is not set"):
        Classifier(ModelConfig.parse(ENCODERS["crate"]))


def test_what_the_recipe_said_is_told_from_what_was_filled_in() -> None:
    config = ModelConfig.parse({"preset": "crate_mae_base", "ista_lambda": 0.5})
    assert config.model_fields_set == {"ista_lambda"}
    assert ModelConfig.parse(config.model_dump()).model_fields_set == set(ModelConfig.model_fields)
