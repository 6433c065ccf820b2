"""Layers that are computed again in the backward pass give the same numbers, bit for bit, and compile without a break."""

from typing import Any

import pytest
import torch
from torch import Tensor

from crate_ray.config import ModelConfig
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.models.layers import distinct_layers, recompute_layers

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "num_heads": 3, "encoder_depth": 3, "decoder_depth": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "crate": {**SMALL, "family": "crate", "ista_learnable": "layer"},
    "crate_visible": {**SMALL, "family": "crate", "encoder_tokens": "visible"},
    "vit": {**SMALL, "family": "vit", "encoder_tokens": "visible", "decoder_width": 32, "decoder_num_heads": 4},
    "vit_shared": {**SMALL, "family": "vit", "share_layers": True},
    "classifier": {**SMALL, "family": "crate", "num_classes": 7},
}


def loss_of(model: torch.nn.Module, config: ModelConfig, precision: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, config.image_size, config.image_size, generator=generator)
    noise = torch.rand(4, config.num_patches, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        output = model.losses(images, noise) if isinstance(model, MaskedAutoencoder) else model(images).square()
    return output.float().mean()  # type: ignore[no-any-return]


def loss_and_gradients(model: torch.nn.Module, config: ModelConfig, precision: str) -> list[Tensor]:
    loss = loss_of(model, config, precision)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def build(name: str) -> tuple[ModelConfig, torch.nn.Module]:
    config = ModelConfig.parse(SHAPES[name])
    torch.manual_seed(0)
    return config, create_model(config)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_and_every_gradient_are_the_same_bits(name: str, precision: str) -> None:
    config, model = build(name)
    kept = loss_and_gradients(model, config, precision)
    recompute_layers(model)
    assert len(distinct_layers(model)) == config.num_encoder_layers + (0 if config.num_classes else config.decoder_depth)
    again = loss_and_gradients(model, config, precision)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, kept, strict=True))


def test_without_a_backward_pass_nothing_is_computed_twice() -> None:
    config, model = build("crate")
    recompute_layers(model)
    calls = []
    handles = [layer.norm1.register_forward_hook(lambda *_: calls.append(1)) for layer in distinct_layers(model)]
    with torch.no_grad():
        loss_of(model, config, "float32")
    assert len(calls) == 5
    loss_of(model, config, "float32").backward()  # type: ignore[no-untyped-call]
    assert len(calls) == 5 + 10
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crate", "vit"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiled_there_is_no_graph_break_and_the_loss_is_the_same(name: str, recompute: bool) -> None:
    config, model = build(name)
    expected = loss_and_gradients(model, config, "float32")
    if recompute:
        recompute_layers(model)
    torch._dynamo.reset()
    assert isinstance(model, MaskedAutoencoder)
    model.losses = torch.compile(model.losses, fullgraph=True)  # type: ignore[method-assign]
    found = loss_and_gradients(model, config, "float32")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
