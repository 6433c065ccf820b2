"""The layers against their formulas."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from crate_ray.models.blocks import CrateDecoderLayer, CrateEncoderLayer, IstaStep, SelfAttention, SubspaceAttention, attend


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def published_ista(y: Tensor, dictionary: Tensor, eta: float, lam: float) -> Tensor:
    """The three products of the published code: D y, D^T (D y), D^T y."""
    synthesis = functional.linear(functional.linear(y, dictionary), dictionary.t())
    return functional.relu(y + eta * (functional.linear(y, dictionary.t()) - synthesis) - eta * lam)


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("width", [4, 48])
def test_two_products_equal_the_published_three(eta: float, lam: float, width: int) -> None:
    step = IstaStep(width, step_size=eta, lam=lam)
    y = torch.randn(3, 17, width)
    expected = published_ista(y, step.dictionary, eta, lam)
    torch.testing.assert_close(step(y), expected, rtol=0, atol=2e-6 * float(expected.detach().abs().max() + 1))


def test_two_products_stay_with_three_through_24_layers() -> None:
    layers = [CrateEncoderLayer(64, 4, eps=1e-5, step_size=0.1, lam=0.5) for _ in range(24)]
    ours = theirs = torch.randn(2, 17, 64)
    with torch.no_grad():
        for layer in layers:
            ours = layer(ours)
            half = theirs + layer.attn(layer.norm1(theirs))
            theirs = published_ista(layer.norm2(half), layer.ista.dictionary, 0.1, 0.5)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_an_ista_step_descends_the_objective_it_is_derived_from() -> None:
    step = IstaStep(32, step_size=0.05, lam=0.5).double()
    dictionary = step.dictionary.detach()
    y = torch.randn(5, 7, 32, dtype=torch.float64).relu()

    def objective(x: Tensor) -> Tensor:
        residual = y - functional.linear(x, dictionary)
        return 0.5 * residual.square().sum(-1) + 0.5 * x.abs().sum(-1)

    assert torch.all(objective(step(y)) <= objective(y))


def test_a_code_is_never_negative_and_a_large_lambda_silences_it() -> None:
    y = torch.randn(2, 9, 16)
    assert bool((IstaStep(16, step_size=0.1, lam=0.5)(y) >= 0).all())
    assert not IstaStep(16, step_size=0.1, lam=1e4)(y).any()


def test_trained_scalars_start_at_the_configured_values_and_get_gradients() -> None:
    torch.manual_seed(1)
    fixed = IstaStep(16, step_size=0.1, lam=0.5)
    trained = IstaStep(16, step_size=0.1, lam=0.5, learnable=True)
    trained.dictionary.data.copy_(fixed.dictionary.data)
    y = torch.randn(2, 9, 16)
    torch.testing.assert_close(trained(y), fixed(y))
    trained(y).square().sum().backward()
    for scalar in (trained.log_step_size, trained.log_lambda):
        assert scalar.grad is not None
        assert float(scalar.grad) != 0


@pytest.mark.parametrize(("width", "heads"), [(16, 2), (48, 3), (16, 16)])
def test_subspace_attention_is_the_sum_over_heads_of_the_formula(width: int, heads: int) -> None:
    attention = SubspaceAttention(width, heads).double()
    z = torch.randn(2, 9, width, dtype=torch.float64)
    head_width = width // heads
    stacked = []
    for h in range(heads):
        v = z @ attention.qkv.weight[h * head_width : (h + 1) * head_width].t()
        stacked.append(torch.softmax(v @ v.transpose(1, 2) / head_width**0.5, dim=-1) @ v)
    torch.testing.assert_close(attention(z), attention.proj(torch.cat(stacked, dim=-1)))


def test_one_head_has_no_output_projection_as_published() -> None:
    names = [name for name, _ in SubspaceAttention(16, 1).named_parameters()]
    assert names == ["qkv.weight"]


def test_self_attention_agrees_with_torch() -> None:
    ours = SelfAttention(48, 3, qkv_bias=True)
    theirs = torch.nn.MultiheadAttention(48, 3, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.proj.weight.data, ours.proj.bias.data
    x = torch.randn(2, 9, 48)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_the_decoder_layer_subtracts_attention_from_a_synthesis() -> None:
    layer = CrateDecoderLayer(16, 2, eps=1e-5)
    y = torch.randn(2, 9, 16)
    synthesis = layer.norm1(y) @ layer.dictionary.t()
    torch.testing.assert_close(layer(y), synthesis - layer.attn(layer.norm2(synthesis)))


def test_both_attention_kernels_compute_the_same() -> None:
    q, k, v = torch.randn(3, 2, 4, 33, 16).unbind(0)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), attend(q, k, v), rtol=0, atol=3e-2)
