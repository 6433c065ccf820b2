"""Closed forms of memory against what autograd keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from crate_ray.config import PRESETS, ModelConfig
from crate_ray.models import MaskedAutoencoder, blocks, create_model
from crate_ray.models.cost import count_hidden_parameters, count_parameters
from crate_ray.models.layers import recompute_layers
from crate_ray.models.memory import activation_bytes, largest_layer_bytes, training_state_bytes
from crate_ray.models.parametrization import role_of

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "num_heads": 3, "encoder_depth": 2, "decoder_depth": 3}
NARROW: dict[str, Any] = {"encoder_tokens": "visible", "decoder_width": 32, "decoder_num_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "crate_all": {**SMALL, "family": "crate"},
    "crate_all_shallow_decoder": {**SMALL, "family": "crate", "decoder_depth": 1, "norm_pix_loss": True},
    "crate_one_head_trained_ista": {**SMALL, "family": "crate", "num_heads": 1, "ista_learnable": "layer"},
    "crate_visible": {**SMALL, "family": "crate", "encoder_tokens": "visible"},
    "crate_visible_narrow": {**SMALL, **NARROW, "family": "crate", "mask_ratio": 0.6},
    "crate_many_tokens": {**SMALL, "family": "crate", "patch_size": 2, "encoder_depth": 1, "decoder_depth": 1},
    "vit_all": {**SMALL, "family": "vit"},
    "vit_visible": {**SMALL, **NARROW, "family": "vit"},
    "vit_visible_small_patches": {**SMALL, **NARROW, "family": "vit", "patch_size": 4, "mask_ratio": 0.9},
    "classifier": {**SMALL, "family": "crate", "num_classes": 7},
    "classifier_linear": {**SMALL, "family": "crate", "num_classes": 7, "embedding": "linear"},
    "classifier_vit_mean": {**SMALL, "family": "vit", "num_classes": 7, "embedding": "linear", "pool": "mean"},
    "classifier_vit_cls": {**SMALL, "family": "vit", "num_classes": 7, "embedding": "linear", "pool": "cls"},
    "crate_untied": {**SMALL, "family": "crate", "attention": "untied"},
    "crate_mlp": {**SMALL, "family": "crate", "feedforward": "mlp", "mlp_ratio": 0.5},
    "crate_untied_mlp_visible": {**SMALL, **NARROW, "family": "crate", "attention": "untied", "feedforward": "mlp"},
    "crate_untied_trained_ista": {**SMALL, "family": "crate", "attention": "untied", "ista_learnable": "layer"},
    "vit_tied": {**SMALL, "family": "vit", "attention": "tied", "mlp_ratio": 1.5},
    "vit_tied_ista_one_head": {**SMALL, "family": "vit", "attention": "tied", "feedforward": "ista", "num_heads": 1},
    "vit_shared": {**SMALL, **NARROW, "family": "vit", "share_layers": True},
    "classifier_vit_ista_mean": {**SMALL, "family": "vit", "num_classes": 7, "feedforward": "ista", "pool": "mean"},
    "classifier_crate_mlp_mean": {
        **SMALL,
        "family": "crate",
        "num_classes": 7,
        "feedforward": "mlp",
        "embedding": "linear",
        "pool": "mean",
    },
    "classifier_crate_mean": {**SMALL, "family": "crate", "num_classes": 7, "embedding": "linear", "pool": "mean"},
}


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward of what `run` returns, weights included."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def bytes_of_one_more_image(config: ModelConfig, precision: str, *, recompute: bool = False) -> int:
    """The difference of two batch sizes: what does not grow, as weights and their bfloat16 copies, drops out."""
    torch.manual_seed(0)
    model = create_model(config)
    if recompute:
        recompute_layers(model)
    totals = []
    for batch in (2, 3):
        images, noise = torch.randn(batch, 3, config.image_size, config.image_size), torch.rand(batch, config.num_patches)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            is_autoencoder = isinstance(model, MaskedAutoencoder)
            totals.append(kept_bytes(lambda: model.losses(images, noise) if is_autoencoder else model(images)))  # noqa: B023
    return totals[1] - totals[0]


def run_layer_norm_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autocast does on a GPU, and does not on a CPU."""
    layer_norm = functional.layer_norm
    monkeypatch.setattr(functional, "layer_norm", lambda x, *rest, **more: layer_norm(x.float(), *rest, **more))


@pytest.mark.parametrize("name", SHAPES)
def test_activations_in_float32_are_to_the_byte_what_autograd_keeps(name: str) -> None:
    config = ModelConfig.parse(SHAPES[name])
    assert activation_bytes(config) == bytes_of_one_more_image(config, "float32")


@pytest.mark.parametrize("name", SHAPES)
def test_activations_in_bfloat16_are_what_autograd_keeps_by_a_gpus_rules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with what a GPU does differently: its attention is fused, and autocast runs its LayerNorm in float32."""
    run_layer_norm_in_float32(monkeypatch)
    monkeypatch.setattr(blocks, "attend", functional.scaled_dot_product_attention)
    config = ModelConfig.parse(SHAPES[name])
    assert activation_bytes(config, precision="bfloat16") == bytes_of_one_more_image(config, "bfloat16")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputed_layers_keep_their_inputs_to_the_byte(name: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_layer_norm_in_float32(monkeypatch)
    config = ModelConfig.parse(SHAPES[name])
    kept = activation_bytes(config, precision=precision, recompute=True) - largest_layer_bytes(config, precision=precision)
    assert kept == bytes_of_one_more_image(config, precision, recompute=True)


@pytest.mark.parametrize("name", SHAPES)
def test_hidden_matrices_are_those_whose_role_is_hidden(name: str) -> None:
    config = ModelConfig.parse(SHAPES[name])
    matrices = [p.numel() for key, p in create_model(config).named_parameters() if role_of(key, p) == "hidden"]
    assert count_hidden_parameters(config) == sum(matrices)


def test_plain_attention_of_a_cpu_in_bfloat16_keeps_its_weights_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    run_layer_norm_in_float32(monkeypatch)
    config = ModelConfig.parse({**SHAPES["crate_all"], "patch_size": 2})
    tokens, hidden = 1 + config.num_patches, config.num_patches - config.num_kept
    rows = (config.encoder_depth + config.decoder_depth - 1) * tokens + hidden
    weights = 2 * config.num_heads * tokens * rows
    copies = 2 * 2 * config.width * tokens * (config.encoder_depth + config.decoder_depth)
    measured = bytes_of_one_more_image(config, "bfloat16") - activation_bytes(config, precision="bfloat16")
    assert weights <= measured <= weights + copies


@pytest.mark.parametrize("name", PRESETS)
def test_state_is_four_float32_values_a_trained_parameter(name: str) -> None:
    config = ModelConfig.parse({"preset": name})
    assert training_state_bytes(config) == 4 * 4 * count_parameters(config).trainable
