"""Our models against outputs of the published implementations (tests/golden/README.md)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from crate_ray.config import ModelConfig
from crate_ray.models import create_model, load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
AUTOENCODERS = ["crate_mae_a", "crate_mae_b_norm_pix", "vit_mae_all_tokens", "vit_mae_facebook"]
OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4

# The file's metadata says 1e-5, its tensors say 1e-6: with 1e-6 they are reproduced to the last bit, with 1e-5 the
# latent is off by 0.4%. The published class takes the layer of whichever timm is installed, and timm's default changed.
MEASURED_CONFIGURATION = {"vit_mae_all_tokens": {"block_norm_eps": 1e-6}}


def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    keys = {k: v for k, v in case.items() if k in ModelConfig.model_fields}
    return {**keys, **MEASURED_CONFIGURATION.get(name, {})}, tensors


def published_parameters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    keys, tensors = read_case(name)
    model = create_model(ModelConfig.parse(keys))
    load_weights(model, published_parameters(tensors))
    return model, tensors


def relative_error(ours: Tensor, published: Tensor) -> float:
    return float((ours.detach().double() - published.double()).abs().max() / published.double().abs().max())


def check_gradients(model: Any, name: str, tensors: dict[str, Tensor]) -> None:
    """Norms are compared through the loader: each published parameter's marker lands on our parameter."""
    published = {k.removeprefix("grad_norm."): float(v) for k, v in tensors.items() if k.startswith("grad_norm.")}
    markers = {
        key: torch.full_like(value, float(index)) for index, (key, value) in enumerate(published_parameters(tensors).items())
    }
    index_of = dict(enumerate(markers))
    keys, _ = read_case(name)
    marked = create_model(ModelConfig.parse(keys))
    load_weights(marked, markers)
    compared = set()
    for (ours, parameter), marker in zip(model.named_parameters(), marked.parameters(), strict=True):
        theirs = index_of[int(marker.flatten()[0])]
        assert float(parameter.grad.norm()) == pytest.approx(published[theirs], rel=GRADIENT_TOLERANCE), (ours, theirs)
        compared.add(theirs)
    assert compared == published.keys()


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_gives_the_published_outputs_and_gradients(name: str) -> None:
    model, tensors = build(name)
    output = model(tensors["images"], tensors["noise"])
    assert torch.equal(output.mask, tensors["mask"])
    for key in ("latent", "pred", "loss"):
        assert relative_error(getattr(output, key), tensors[key].reshape(getattr(output, key).shape)) <= OUTPUT_TOLERANCE, key
    output.loss.backward()
    check_gradients(model, name, tensors)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_training_path_gives_the_published_loss_and_gradients(name: str) -> None:
    model, tensors = build(name)
    loss = model.losses(tensors["images"], tensors["noise"]).mean()
    assert relative_error(loss, tensors["loss"].squeeze()) <= OUTPUT_TOLERANCE
    loss.backward()
    check_gradients(model, name, tensors)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_the_position_tables_are_the_published_ones(name: str) -> None:
    keys, _ = read_case(name)
    fresh = create_model(ModelConfig.parse(keys))
    loaded, _ = build(name)
    for (key, ours), published in zip(fresh.named_buffers(), loaded.buffers(), strict=True):
        assert relative_error(ours, published) <= 1e-6, key


def test_the_classifier_gives_the_published_logits_and_gradients() -> None:
    model, tensors = build("crate_classifier")
    logits = model(tensors["images"])
    assert relative_error(logits, tensors["logits"]) <= OUTPUT_TOLERANCE
    logits.square().mean().backward()
    check_gradients(model, "crate_classifier", tensors)


def test_the_all_token_vit_case_was_made_with_another_epsilon_than_its_metadata_says() -> None:
    keys, tensors = read_case("vit_mae_all_tokens")
    model = create_model(ModelConfig.parse({**keys, "block_norm_eps": 1e-5}))
    load_weights(model, published_parameters(tensors))
    assert relative_error(model(tensors["images"], tensors["noise"]).latent, tensors["latent"]) > 1e-3
