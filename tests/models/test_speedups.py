"""The fast paths against the plain ones: the same loss and the same gradients, with less computed or by another library."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crate_ray.config import ModelConfig
from crate_ray.models import MaskedAutoencoder, create_model
from crate_ray.models import linear as linear_module
from crate_ray.models.blocks import CrateDecoderLayer, TransformerLayer
from crate_ray.models.linear import Linear
from crate_ray.models.patches import take_tokens

SMALL: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 48, "num_heads": 3, "encoder_depth": 2, "decoder_depth": 2}
VISIBLE: dict[str, Any] = {"encoder_tokens": "visible", "decoder_width": 32, "decoder_num_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {
    "crate_all": {**SMALL, "family": "crate"},
    "crate_all_norm_pix": {**SMALL, "family": "crate", "norm_pix_loss": True, "mask_ratio": 0.5},
    "crate_visible": {**SMALL, **VISIBLE, "family": "crate"},
    "crate_one_layer_one_head": {**SMALL, "family": "crate", "decoder_depth": 1, "decoder_num_heads": 1},
    "crate_learned": {**SMALL, "family": "crate", "ista_learnable": "layer"},
    "vit_all": {**SMALL, "family": "vit"},
    "vit_visible": {**SMALL, **VISIBLE, "family": "vit"},
    "vit_visible_no_bias": {**SMALL, **VISIBLE, "family": "vit", "qkv_bias": False, "mask_ratio": 0.9},
}


def loss_and_gradients(model: MaskedAutoencoder, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.autograd.backward(loss)
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: Tensor, plain: Tensor, label: str) -> None:
    difference = float((ours - plain).norm() / plain.norm())
    assert difference <= 1e-6, f"{label}: {difference:.2e}"


@pytest.mark.parametrize("name", SHAPES)
def test_hidden_tokens_alone_give_the_loss_and_every_gradient_of_the_full_pass(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.parse(SHAPES[name])
    model = create_model(config)
    assert isinstance(model, MaskedAutoencoder)
    images, noise = torch.randn(5, 3, 32, 32), torch.rand(5, config.num_patches)
    fast, fast_gradients = loss_and_gradients(model, model.losses(images, noise).mean())
    plain, plain_gradients = loss_and_gradients(model, model(images, noise).loss)
    assert_close(fast, plain, "loss")
    assert fast_gradients.keys() == plain_gradients.keys() == dict(model.named_parameters()).keys()
    for key, gradient in plain_gradients.items():
        assert_close(fast_gradients[key], gradient, key)


@pytest.mark.parametrize(
    "layer",
    [CrateDecoderLayer(32, 4, eps=1e-6), TransformerLayer(32, 4, eps=1e-6, qkv_bias=True)],
    ids=["crate", "transformer"],
)
def test_a_layer_asked_for_some_tokens_gives_those_of_all(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer = layer.double()
    x, wanted = torch.randn(3, 11, 32, dtype=torch.float64), torch.stack([torch.randperm(11)[:4] for _ in range(3)])
    torch.testing.assert_close(layer(x, wanted), take_tokens(layer(x), wanted), rtol=1e-12, atol=1e-13)
    with FlopCounterMode(display=False) as some:
        layer(x, wanted)
    with FlopCounterMode(display=False) as every:
        layer(x)
    assert some.get_total_flops() < every.get_total_flops()


@pytest.mark.parametrize("name", ["crate_all", "vit_visible"])
def test_the_training_path_repeats_bit_by_bit(name: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig.parse(SHAPES[name])
    model = create_model(config)
    assert isinstance(model, MaskedAutoencoder)
    images, noise = torch.randn(5, 3, 32, 32), torch.rand(5, config.num_patches)
    first, first_gradients = loss_and_gradients(model, model.losses(images, noise).mean())
    second, second_gradients = loss_and_gradients(model, model.losses(images, noise).mean())
    assert torch.equal(first, second)
    assert all(torch.equal(gradient, second_gradients[key]) for key, gradient in first_gradients.items())


needs_onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the choice of an AMD processor with AVX-512 wherever the test runs."""
    monkeypatch.setattr(linear_module, "ONEDNN_IS_FASTER", True)


@needs_onednn
@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 33, 192), (700, 192)])
def test_onednn_gives_the_product_and_gradients_of_float64(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(192, 384, bias=bias), torch.randn(shape, requires_grad=True)
    assert linear_module.takes_onednn(x, layer.weight)
    exact, exact_x = nn.Linear(192, 384, bias=bias).double(), x.detach().double().requires_grad_()
    exact.load_state_dict(layer.state_dict())
    weighting = torch.randn(*shape[:-1], 384)
    torch.autograd.backward(layer(x), weighting)
    torch.autograd.backward(exact(exact_x), weighting.double())
    assert_close(layer(x).detach().double(), exact(exact_x).detach(), "output")
    assert x.grad is not None
    assert exact_x.grad is not None
    assert_close(x.grad.double(), exact_x.grad, "input")
    for (name, ours), theirs in zip(layer.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close(ours.grad.double(), theirs.grad, name)


@needs_onednn
@pytest.mark.usefixtures("onednn")
def test_onednn_is_left_to_large_float32_products_that_are_not_exported() -> None:
    layer, x = Linear(192, 384), torch.randn(700, 192)
    assert not linear_module.takes_onednn(x[:2], layer.weight)
    assert not linear_module.takes_onednn(x.double(), layer.weight.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not linear_module.takes_onednn(x, layer.weight)
        assert layer(x).dtype == torch.bfloat16
    exported = torch.export.export(layer, (x,))
    assert [str(node.target) for node in exported.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]


@needs_onednn
@pytest.mark.usefixtures("onednn")
def test_torch_counts_the_operations_of_onednn() -> None:
    layer, x = Linear(192, 384), torch.randn(700, 192, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 700 * 192 * 384
