"""Every measure against numpy in float64, written another way: loops over images and heads, three-product ISTA, SVDs."""

import copy
import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crate_ray.config import ModelConfig
from crate_ray.evaluation.coding_rate import coding_rate_ceiling, coding_rate_floor
from crate_ray.evaluation.spectrum import LatentMeasures
from crate_ray.evaluation.whitebox import (
    LayerMeasures,
    as_metrics,
    ista_descent_ratio,
    ista_objective_ratio,
    layer_states,
    max_singular_value,
    measure_layers,
    mutual_coherence,
    patch_latents,
    subspace_overlap,
)
from crate_ray.models import Classifier, MaskedAutoencoder, create_model
from crate_ray.models.blocks import IstaStep, SubspaceAttention

Array = NDArray[np.float64]
Model = MaskedAutoencoder | Classifier

SMALL: dict[str, Any] = {"family": "crate", "image_size": 16, "patch_size": 4, "width": 24, "num_heads": 3, "encoder_depth": 3}
KINDS: dict[str, dict[str, Any]] = {
    "all tokens": {"ista_step_size": (0.1, 0.5, 1.0), "ista_lambda": (0.5, 5.0, 0.1)},
    "visible tokens": {"encoder_tokens": "visible", "decoder_width": 16, "decoder_num_heads": 2},
    "learned steps": {"ista_learnable": "layer", "ista_step_size": 0.2},
    "classifier": {"num_classes": 5},
    "one head": {"num_heads": 1},
    "heads wider than tokens": {"image_size": 8, "width": 24, "num_heads": 2},
}


def build(**changes: Any) -> Model:
    """A model with every weight moved away from its initial value, biases and norms too."""
    torch.manual_seed(0)
    model = create_model(ModelConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def draw_images(model: Model, count: int = 4) -> torch.Tensor:
    size = model.config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def softmax(x: Array) -> Array:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def rate(tokens_ND: Array, bases: list[Array]) -> float:
    total = 0.0
    for u_DP in bases:
        x = tokens_ND @ u_DP
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        singular = np.linalg.svd(x, compute_uv=False)
        total += 0.5 * np.log1p(x.shape[1] / (x.shape[0] * 0.01) * singular**2).sum()
    return total


def reference(model: Model, images: torch.Tensor) -> list[dict[str, float | None]]:
    """All measures of all layers, token by token where that is simplest."""
    config = model.config
    z = model.embed(images).detach().double().numpy()
    heads, width = config.num_heads, config.width
    measures = []
    for layer in model.blocks:
        w = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
        eta = float(np.exp(w["ista.log_step_size"][0])) if "ista.log_step_size" in w else layer.ista.step_size
        lam = float(np.exp(w["ista.log_lambda"][0])) if "ista.log_lambda" in w else layer.ista.lam
        d = w["ista.dictionary"]
        bases = [rows.T for rows in np.split(w["attn.qkv.weight"], heads)]
        pre = layer_norm(z, w["norm1.weight"], w["norm1.bias"], config.block_norm_eps)
        attended = []
        for image in pre:
            columns = []
            for u in bases:
                v = image @ u
                columns.append(softmax(v @ v.T / np.sqrt(v.shape[1])) @ v)
            attended.append(np.concatenate(columns, axis=1))
        update = np.stack(attended)
        if heads > 1:
            update = update @ w["attn.proj.weight"].T + w["attn.proj.bias"]
        half = z + update
        post = layer_norm(half, w["norm1.weight"], w["norm1.bias"], config.block_norm_eps)
        y = layer_norm(half, w["norm2.weight"], w["norm2.bias"], config.block_norm_eps)
        code = np.maximum(0, y + eta * (y @ d - y @ d.T @ d) - eta * lam)

        def objective(codes: Array, d: Array = d, y: Array = y, lam: float = lam) -> float:
            return sum(
                0.5 * np.sum((target - d @ c) ** 2) + lam * np.sum(np.abs(c))
                for target, c in zip(y.reshape(-1, width), codes.reshape(-1, width), strict=True)
            )

        unit = d / np.linalg.norm(d, axis=0)
        orthonormal = [np.linalg.svd(u, full_matrices=False)[0] for u in bases]
        cosines = [np.linalg.svd(a.T @ b, compute_uv=False) for a, b in itertools.combinations(orthonormal, 2)]
        measures.append(
            {
                "coding_rate_pre_nats": float(np.mean([rate(image, bases) for image in pre])),
                "coding_rate_post_nats": float(np.mean([rate(image, bases) for image in post])),
                "nonzero_fraction": np.count_nonzero(code) / code.size,
                "ista_descent_ratio": eta * np.linalg.svd(d, compute_uv=False)[0] ** 2,
                "ista_objective_ratio": objective(code) / objective(np.maximum(0, y)),
                "dictionary_coherence": max(abs(unit[:, i] @ unit[:, j]) for i, j in itertools.combinations(range(width), 2)),
                "subspace_overlap": float(np.mean([(c**2).mean() for c in cosines])) if cosines else None,
            }
        )
        z = code
    return measures


@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_of_every_layer_equals_the_float64_reference(kind: str) -> None:
    model = build(**KINDS[kind])
    images = draw_images(model)
    measured = [dataclasses.asdict(measures) for measures in measure_layers(model, images)]
    expected = reference(model, images)
    assert len(measured) == model.config.encoder_depth
    for ours, theirs in zip(measured, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == (None if value is None else pytest.approx(value, rel=2e-5)), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_walk_is_the_models_own_forward_pass(kind: str) -> None:
    model = build(**KINDS[kind])
    images = draw_images(model)
    with torch.no_grad():
        z = model.embed(images)
        for layer in model.blocks:
            code = layer_states(layer, z).code_BND
            assert torch.equal(code, layer(z))
            z = code
        assert torch.equal(model.norm(z), model.encode(images))
        assert torch.equal(patch_latents(model, images), model.encode(images)[:, 1:].reshape(-1, model.config.width))


def test_an_untrained_encoder_lies_between_floor_and_ceiling_and_away_from_both() -> None:
    torch.manual_seed(0)
    model = create_model(ModelConfig(**{**SMALL, "width": 32, "num_heads": 4, "encoder_depth": 6}))
    floor, ceiling = coding_rate_floor(4, 8), coding_rate_ceiling(4, 17, 8)
    for measures in measure_layers(model, draw_images(model, 8)):
        for nats in (measures.coding_rate_pre_nats, measures.coding_rate_post_nats):
            assert nats is not None
            assert floor < nats < ceiling
        assert 0.2 < (measures.nonzero_fraction or 0) < 0.6
        assert 0 < (measures.ista_descent_ratio or 0) < 2
        assert 0 < (measures.ista_objective_ratio or 0) < 1
        assert 0 < (measures.dictionary_coherence or 0) < 1
        assert 0 < (measures.subspace_overlap or 0) < 1


def test_rates_that_fall_with_depth_are_no_sign_of_learning() -> None:
    """An encoder that has learned nothing compresses layer by layer as well: the baseline of every such curve."""
    torch.manual_seed(0)
    model = create_model(ModelConfig(**{**SMALL, "width": 64, "num_heads": 4, "encoder_depth": 8, "image_size": 32}))
    rates = [measures.coding_rate_post_nats or 0 for measures in measure_layers(model, draw_images(model, 8))]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.6 * rates[0]


def test_a_transformer_has_latents_but_none_of_the_layer_measures() -> None:
    torch.manual_seed(0)
    model = create_model(ModelConfig(**{**SMALL, "family": "vit"}))
    layers = measure_layers(model, draw_images(model))
    assert layers == [LayerMeasures()] * 3
    assert as_metrics(layers, LatentMeasures(3.5, 1.25)) == {"whitebox/latent/rankme": 3.5, "whitebox/latent/alpha_req": 1.25}


def test_names_count_layers_from_one_and_leave_out_what_is_not_defined() -> None:
    layers = [LayerMeasures(coding_rate_pre_nats=1.5)] * 9 + [LayerMeasures(nonzero_fraction=0.25)]
    metrics = as_metrics(layers, LatentMeasures(2.0, None))
    assert metrics["whitebox/layer01/coding_rate_pre_nats"] == 1.5
    assert metrics["whitebox/layer10/nonzero_fraction"] == 0.25
    assert metrics["whitebox/latent/rankme"] == 2.0
    assert len(metrics) == 11


def test_bfloat16_around_the_measurement_changes_nothing() -> None:
    model = build()
    images = draw_images(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, latents = measure_layers(model, images), patch_latents(model, images)
    assert inside == measure_layers(model, images)
    assert torch.equal(latents, patch_latents(model, images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_type_is_measured_in_float32_and_left_as_it_is(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    images = draw_images(model)
    expected = measure_layers(copy.deepcopy(model).float(), images)
    assert measure_layers(model, images) == expected
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}


@pytest.mark.parametrize("training", [True, False])
def test_a_measurement_leaves_no_trace(training: bool) -> None:
    model = build(ista_learnable="layer").train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    measure_layers(model, draw_images(model))
    patch_latents(model, draw_images(model))
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_diverged_model_gives_numbers_that_are_none_instead_of_an_error(value: float) -> None:
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    assert len(measure_layers(model, draw_images(model))) == 3


def matrix_with(singular_values: torch.Tensor) -> torch.Tensor:
    size = len(singular_values)
    left, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(3)))
    right, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(4)))
    return left @ torch.diag(singular_values) @ right.T


def initial(width: int) -> torch.Tensor:
    return torch.nn.init.kaiming_uniform_(torch.empty(width, width), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("matrix", "tolerance"),
    [
        (torch.eye(5), 1e-6),
        (torch.diag(torch.arange(1.0, 41)), 1e-6),
        (torch.zeros(4, 4), 0),
        (torch.ones(20, 1) @ torch.arange(20.0).unsqueeze(0), 1e-6),
        (initial(96) * 1e-6, 1e-4),
        (initial(384), 1e-4),
        (matrix_with(torch.linspace(1, 0, 60)), 1e-4),
        (matrix_with(torch.linspace(1, 0.9, 60)), 2e-3),  # nothing stands out
        (matrix_with(torch.cat([torch.tensor([1.0, 0.9999]), torch.full((40,), 0.999)])), 2e-3),
    ],
)
def test_power_iteration_reaches_the_largest_singular_value_from_below(matrix: torch.Tensor, tolerance: float) -> None:
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    found = max_singular_value(matrix)
    assert found == max_singular_value(matrix)
    assert found == pytest.approx(exact, rel=tolerance)
    assert found <= exact * (1 + 1e-6)


def ista(dictionary: torch.Tensor, *, step_size: float, lam: float = 0.1) -> IstaStep:
    step = IstaStep(len(dictionary), step_size=step_size, lam=lam)
    with torch.no_grad():
        step.dictionary.copy_(dictionary)
    return step


@pytest.mark.parametrize("ratio", [0.1, 1.0, 1.9])
@pytest.mark.parametrize("seed", range(5))
def test_below_a_descent_ratio_of_two_a_step_from_a_feasible_point_never_ascends(ratio: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(12, 12, generator=generator)
    step = ista(dictionary, step_size=ratio / float(torch.linalg.svdvals(dictionary)[0]) ** 2, lam=0.3)
    assert ista_descent_ratio(step) == pytest.approx(ratio, rel=1e-4)
    feasible = torch.randn(4, 7, 12, generator=generator).relu()
    with torch.no_grad():
        objective = ista_objective_ratio(step, feasible, step(feasible))
    assert objective is not None
    assert objective <= 1 + 1e-6


def test_above_a_descent_ratio_of_two_a_step_can_ascend() -> None:
    step = ista(torch.full((1, 1), 0.5), step_size=10.0, lam=0.0)
    y = torch.ones(1, 1, 1)
    assert ista_descent_ratio(step) == pytest.approx(2.5)
    # z^+ = y + 10 * 0.5 * (1 - 0.5) = 3.5; F goes from (1 - 0.5)^2 / 2 to (1 - 1.75)^2 / 2.
    assert ista_objective_ratio(step, y, step(y).detach()) == pytest.approx(0.75**2 / 0.5**2)


def test_a_learned_step_size_is_the_one_that_counts() -> None:
    step = IstaStep(6, step_size=0.1, lam=0.5, learnable=True)
    before = ista_descent_ratio(step)
    with torch.no_grad():
        step.log_step_size += np.log(3.0)
    assert ista_descent_ratio(step) == pytest.approx(3 * before)


def test_a_step_from_zero_has_no_objective_ratio() -> None:
    zero = torch.zeros(1, 2, 3)
    assert ista_objective_ratio(ista(torch.eye(3), step_size=0.1), zero, zero) is None


def test_atoms_are_the_columns_of_the_dictionary() -> None:
    dictionary = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])  # columns 1 and 2 are parallel, no rows are
    assert mutual_coherence(dictionary) == pytest.approx(1)
    assert mutual_coherence(dictionary.T) == pytest.approx(0)
    assert mutual_coherence(torch.eye(4) * 5) == pytest.approx(0)
    assert mutual_coherence(torch.tensor([[1.0, -1.0], [0.0, 1.0]])) == pytest.approx(0.5**0.5)


def attention(*bases_DP: torch.Tensor) -> SubspaceAttention:
    layer = SubspaceAttention(bases_DP[0].shape[0], len(bases_DP))
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat([basis.T for basis in bases_DP]))
    return layer


def test_overlap_is_one_for_equal_spans_and_zero_for_orthogonal_ones() -> None:
    axes = torch.eye(6)
    other_basis = axes[:, :3] @ torch.tensor([[1.0, 1, 0], [0, 2, 0], [5, 0, 3]])
    assert subspace_overlap(attention(axes[:, :3], other_basis)) == pytest.approx(1, rel=1e-5)
    assert subspace_overlap(attention(axes[:, :3], axes[:, 3:])) == pytest.approx(0, abs=1e-6)
    assert subspace_overlap(attention(axes[:, :3], axes[:, 2:5])) == pytest.approx(1 / 3, rel=1e-5)
    assert subspace_overlap(attention(axes)) is None


def test_random_subspaces_overlap_by_their_share_of_the_width() -> None:
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(96, 12, generator=generator) for _ in range(8)]
    assert subspace_overlap(attention(*bases)) == pytest.approx(12 / 96, rel=0.03)
