"""Encoders between the two families: tied or untied attention, ISTA or a perceptron, one layer for all."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.evaluation.attention import view_layers
from crate_ray.evaluation.whitebox import layer_states, measure_layers
from crate_ray.models import Classifier, MaskedAutoencoder, create_model, load_weights
from crate_ray.models.blocks import CrateEncoderLayer, TransformerLayer
from crate_ray.models.export import export_program, published_state
from crate_ray.models.matching import fitting_presets
from crate_ray.models.weight_files import encode_safetensors, read_weights

SMALL: dict[str, Any] = {"image_size": 16, "patch_size": 4, "width": 24, "num_heads": 3, "encoder_depth": 3, "decoder_depth": 2}
ATTENTION, FEEDFORWARD = ("tied", "untied"), ("ista", "mlp")
SQUARE = list(itertools.product(("crate", "vit"), ATTENTION, FEEDFORWARD))
SHARED: list[dict[str, Any]] = [{"family": family, "share_layers": True} for family in ("crate", "vit")]


def build(**keys: Any) -> MaskedAutoencoder | Classifier:
    torch.manual_seed(0)
    return create_model(ModelConfig.parse({**SMALL, **keys}))


def draw(model: MaskedAutoencoder | Classifier) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 16, 16, generator=generator), torch.rand(2, model.num_patches, generator=generator)


def encode_by_hand(model: MaskedAutoencoder | Classifier, images: Tensor, *, tied: bool, ista: bool, depth: int) -> Tensor:
    """Every layer from its tensors, one head at a time."""
    state, config = dict(model.state_dict()), model.config
    z = model.embed(images)
    for number in range(depth):
        layer = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"blocks.{number if depth == 3 else 0}.")}

        def norm(x: Tensor, name: str, layer: dict[str, Tensor] = layer) -> Tensor:
            return functional.layer_norm(x, (24,), layer[f"{name}.weight"], layer[f"{name}.bias"], config.block_norm_eps)

        projected = norm(z, "norm1") @ layer["attn.qkv.weight"].T + layer.get("attn.qkv.bias", 0)
        q, k, v = (projected,) * 3 if tied else projected.split(24, dim=-1)
        heads = [
            (a @ b.mT / math.sqrt(8)).softmax(-1) @ c
            for a, b, c in zip(q.split(8, -1), k.split(8, -1), v.split(8, -1), strict=True)
        ]
        half = z + torch.cat(heads, dim=-1) @ layer["attn.proj.weight"].T + layer["attn.proj.bias"]
        y = norm(half, "norm2")
        if ista:
            d = layer["ista.dictionary"]
            z = (y + 0.1 * (y @ d - y @ d.T @ d) - 0.1 * 0.5).clamp(min=0)
        else:
            hidden = functional.gelu(y @ layer["mlp.fc1.weight"].T + layer["mlp.fc1.bias"])
            z = half + hidden @ layer["mlp.fc2.weight"].T + layer["mlp.fc2.bias"]
    return functional.layer_norm(z, (24,), state["norm.weight"], state["norm.bias"], config.final_norm_eps)


@pytest.mark.parametrize(("family", "attention", "feedforward"), SQUARE)
def test_every_corner_of_the_square_computes_its_formula(family: str, attention: str, feedforward: str) -> None:
    model = build(family=family, attention=attention, feedforward=feedforward)
    images, noise = draw(model)
    expected = encode_by_hand(model, images, tied=attention == "tied", ista=feedforward == "ista", depth=3)
    torch.testing.assert_close(model.encode(images), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(model, MaskedAutoencoder)
    model.losses(images, noise).mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("keys", SHARED)
def test_a_shared_layer_is_a_stack_of_equal_layers(keys: dict[str, Any]) -> None:
    shared, stack = build(**keys), build(family=keys["family"])
    assert len(shared.blocks) == 1
    assert len(shared.encoder_layers) == 3
    for block in stack.blocks:
        block.load_state_dict(shared.blocks[0].state_dict())
    rest = {key: value for key, value in shared.state_dict().items() if not key.startswith("blocks.")}
    stack.load_state_dict(rest, strict=False)
    images, noise = draw(shared)
    torch.testing.assert_close(shared.encode(images), stack.encode(images), rtol=0, atol=0)
    assert isinstance(shared, MaskedAutoencoder)
    assert isinstance(stack, MaskedAutoencoder)
    for model in (shared, stack):
        model.losses(images, noise).mean().backward()
    for name, parameter in shared.blocks[0].named_parameters():
        gradients = [dict(block.named_parameters())[name].grad for block in stack.blocks]
        torch.testing.assert_close(parameter.grad, sum(g for g in gradients if g is not None), rtol=1e-4, atol=1e-6)


def test_what_the_family_has_anyway_is_no_other_model() -> None:
    for family, own in (("crate", ("tied", "ista")), ("vit", ("untied", "mlp"))):
        plain = ModelConfig.parse({**SMALL, "family": family})
        said = ModelConfig.parse({**SMALL, "family": family, "attention": own[0], "feedforward": own[1], "share_layers": False})
        assert said == plain
        assert said.ablation == ()
    assert ModelConfig.parse({**SMALL, "family": "vit", "mlp_ratio": 4}) == plain


def test_a_configuration_survives_being_written_and_read() -> None:
    for family, attention, feedforward in SQUARE:
        config = ModelConfig.parse({**SMALL, "family": family, "attention": attention, "feedforward": feedforward})
        assert ModelConfig.parse(config.model_dump(mode="json")) == config


def test_the_decoder_stays_the_familys() -> None:
    plain, changed = build(family="crate"), build(family="crate", attention="untied", feedforward="mlp", mlp_ratio=0.5)
    assert str(plain.decoder_blocks) == str(changed.decoder_blocks)
    assert changed.blocks[0].mlp.fc1.weight.shape == (12, 24)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"family": "crate", "mlp_ratio": 2}, "mlp_ratio = 2 is of a perceptron, and this encoder has ISTA steps"),
        ({"family": "vit", "feedforward": "ista", "mlp_ratio": 4}, "mlp_ratio = 4 is of a perceptron"),
        ({"family": "vit", "mlp_ratio": 0.01}, "mlp_ratio = 0.01 of width = 24 is no hidden unit"),
        ({"family": "crate", "feedforward": "mlp", "ista_learnable": "layer"}, "feedforward = mlp has none"),
        ({"family": "vit", "attention": "tied", "qkv_bias": True}, "attention = tied has one, without a bias"),
        ({"family": "vit", "share_layers": True, "encoder_depth": 1}, "encoder_depth = 1 has one layer"),
        ({"family": "crate", "share_layers": True, "ista_lambda": [1, 2, 3]}, "ista_lambda has a value for each layer"),
    ],
)
def test_keys_that_say_nothing_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        ModelConfig.parse({**SMALL, **keys})
    assert message in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 2  # one problem under its heading


ABLATIONS: list[dict[str, Any]] = [
    {"family": "crate", "attention": "untied"},
    {"family": "crate", "feedforward": "mlp", "mlp_ratio": 0.5},
    {"family": "crate", "attention": "untied", "feedforward": "mlp"},
    {"family": "vit", "attention": "tied"},
    {"family": "vit", "share_layers": True},
]


@pytest.mark.parametrize("keys", ABLATIONS)
def test_a_file_of_ours_holds_an_ablation_and_loads_into_nothing_else(keys: dict[str, Any], tmp_path: Path) -> None:
    model = build(**keys)
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode_safetensors(model.state_dict(), model.config))
    assert read_weights(str(path)).config == model.config
    torch.manual_seed(1)
    copy = create_model(model.config)
    load_weights(copy, str(path))
    images, _ = draw(model)
    assert torch.equal(copy.encode(images), model.encode(images))
    with pytest.raises(ConfigError, match="nothing was loaded"):
        load_weights(build(family=keys["family"]), str(path))


def test_a_shared_layer_is_not_applied_another_number_of_times(tmp_path: Path) -> None:
    model = build(family="vit", share_layers=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode_safetensors(model.state_dict(), model.config))
    with pytest.raises(ConfigError, match="encoder_depth: 3 in the file, 5 in the model"):
        load_weights(build(family="vit", share_layers=True, encoder_depth=5), str(path))


def test_an_encoder_of_the_other_family_is_held_to_its_configuration(tmp_path: Path) -> None:
    """Untied attention and a perceptron: the same names in both families, but another epsilon of the norms."""
    model = build(family="crate", attention="untied", feedforward="mlp")
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode_safetensors(model.state_dict(), model.config))
    with pytest.raises(ConfigError, match=r"model\.block_norm_eps: 1e-05 in the file, 1e-06 in the model"):
        load_weights(build(family="vit", encoder_tokens="visible", qkv_bias=False), str(path), part="encoder")
    load_weights(build(family="vit"), str(path), part="encoder")


@pytest.mark.parametrize("keys", ABLATIONS)
def test_no_published_layout_is_written_and_no_preset_fits(keys: dict[str, Any]) -> None:
    model = build(**keys)
    with pytest.raises(ConfigError, match=r"encoder layers are an ablation \(.+\), which no published class has"):
        published_state(model, "crate" if keys["family"] == "crate" else "mae")
    file = read_weights({**model.state_dict()})
    assert file.architecture.family == keys["family"]
    data = encode_safetensors(model.state_dict(), model.config)
    assert safetensors.torch.load(data).keys() == model.state_dict().keys()


def test_a_base_size_ablation_fits_no_preset(tmp_path: Path) -> None:
    config = ModelConfig.parse({"preset": "mae_small", "mlp_ratio": 2, "image_size": 32})
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode_safetensors(create_model(config).state_dict(), config))
    assert fitting_presets(read_weights(str(path))) == []


@pytest.mark.parametrize(
    "keys", [{"family": "vit", "share_layers": True}, {"family": "crate", "attention": "untied", "num_classes": 5}]
)
def test_an_exported_program_computes_the_same(keys: dict[str, Any], tmp_path: Path) -> None:
    model = build(**keys)
    path = tmp_path / "encoder.pt2"
    path.write_bytes(export_program(model, {}))
    images, _ = draw(model)
    program = torch.export.load(path).module()
    torch.testing.assert_close(program(images), model.encode(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("family", "attention", "feedforward"), SQUARE)
def test_what_a_layer_has_is_measured_and_the_rest_is_left_out(family: str, attention: str, feedforward: str) -> None:
    model = build(family=family, attention=attention, feedforward=feedforward)
    images, _ = draw(model)
    z = model.embed(images)
    for layer in model.encoder_layers:
        assert isinstance(layer, CrateEncoderLayer | TransformerLayer)
        torch.testing.assert_close(layer_states(layer, z).code_BND, layer(z), rtol=0, atol=0)
        z = layer(z)
    for measures in measure_layers(model, images):
        assert (measures.coding_rate_pre_nats is not None) == (attention == "tied")
        assert (measures.subspace_overlap is not None) == (attention == "tied")
        assert (measures.nonzero_fraction is not None) == (feedforward == "ista")
        assert (measures.ista_objective_ratio is not None) == (feedforward == "ista")


def test_layers_that_share_their_weights_are_each_seen() -> None:
    model = build(family="crate", share_layers=True)
    images, _ = draw(model)
    rates = [measures.coding_rate_pre_nats for measures in measure_layers(model, images)]
    assert len(set(rates)) == 3
    assert [view.number for view in view_layers(model, images)] == [1, 2, 3]
