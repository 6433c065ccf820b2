"""Width transfer: variances, rates and decays follow closed forms of the width, and at the base width nothing differs."""

import math
from pathlib import Path

import pytest
import torch

from crate_ray.config import ConfigError, ModelConfig
from crate_ray.models import Classifier, MaskedAutoencoder, create_model, load_weights
from crate_ray.models.parametrization import lr_factor, role_of, weight_decay_factor
from crate_ray.models.weight_files import encode_safetensors

CRATE = {"family": "crate", "width": 32, "num_heads": 2, "encoder_depth": 2, "image_size": 16, "patch_size": 4}
VISIBLE = {"encoder_tokens": "visible", "decoder_width": 16, "decoder_num_heads": 1, "decoder_depth": 1}
VIT = {**CRATE, "family": "vit", **VISIBLE}
MODELS = {
    "crate": CRATE,
    "crate-visible": {**CRATE, **VISIBLE},
    "vit": VIT,
    "published-classifier": {**CRATE, "num_classes": 5},
    "crate-classifier": {**CRATE, "num_classes": 5, "embedding": "linear"},
    "vit-classifier": {**VIT, "num_classes": 5},
}
SIZES = ("width", "num_heads", "decoder_width", "decoder_num_heads")


def mup(values: dict[str, object], times: int = 1) -> ModelConfig:
    """The model `times` as wide as these values, which are its base."""
    base = {f"mup_base_{key}": values[key] for key in SIZES if key in values}
    wide = {key: values[key] * times for key in SIZES if key in values}  # type: ignore[operator]
    return ModelConfig.parse({**values, **wide, **base, "parametrization": "mup"})


def build(config: ModelConfig, seed: int = 0) -> MaskedAutoencoder | Classifier:
    torch.manual_seed(seed)
    return create_model(config)


@pytest.mark.parametrize("name", MODELS)
def test_at_the_base_width_the_weights_are_the_published_ones_bit_for_bit(name: str) -> None:
    standard = build(ModelConfig.parse(MODELS[name])).state_dict()
    scaled = build(mup(MODELS[name])).state_dict()
    assert scaled.keys() == standard.keys()
    assert all(torch.equal(scaled[key], standard[key]) for key in standard)


@pytest.mark.parametrize("name", ["crate", "crate-visible", "vit"])
def test_initial_standard_deviations_have_mups_closed_forms(name: str) -> None:
    values = MODELS[name]
    config = mup(values, times=8)
    state = build(config).state_dict()
    n, m = config.width, config.decoder_width
    n0, m0, patch = n / 8, m / 8, 48
    hidden_n = {"decoder_embed.weight": math.sqrt(2 / (n + m))}
    for stack, size in (("blocks", n), ("decoder_blocks", m)):
        hidden_n |= {
            f"{stack}.0.attn.qkv.weight": math.sqrt(2 / (4 * size if values["family"] == "vit" else 2 * size)),
            f"{stack}.0.attn.proj.weight": math.sqrt(1 / size),
            f"{stack}.0.mlp.fc1.weight": math.sqrt(2 / (5 * size)),
            f"{stack}.0.mlp.fc2.weight": math.sqrt(2 / (5 * size)),
        }
    hidden_n |= {"blocks.0.ista.dictionary": math.sqrt(2 / n), "decoder_blocks.0.dictionary": math.sqrt(2 / m)}
    expected = {key: value for key, value in hidden_n.items() if key in state} | {
        "patch_embed.weight": math.sqrt(2 / (patch + n0)),
        "decoder_pred.weight": math.sqrt(2 / (patch + m0)) / 8,
        "cls_token": 0.02,
        "mask_token": 0.02,
    }
    for key, std in expected.items():
        values_of = state[key]
        # A sample of k uniform or normal values has its standard deviation within 5 / sqrt(2 k) of the true one.
        assert float(values_of.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * values_of.numel())), key
    checked = {key for key, value in state.items() if value.ndim == 2}
    assert {key for key in checked if ".1." not in key} <= expected.keys(), "every kind of matrix is checked"


@pytest.mark.parametrize(("name", "head"), [("published-classifier", 3**-0.5 * 32**-0.5), ("vit-classifier", 2e-5)])
def test_a_classifiers_head_shrinks_with_the_width_and_its_embedding_does_not(name: str, head: float) -> None:
    narrow, wide = build(mup(MODELS[name])).state_dict(), build(mup(MODELS[name], times=8)).state_dict()
    assert float(wide["head.weight"].std()) == pytest.approx(head / 8, rel=0.1)
    assert float(wide["patch_embed.weight"].std()) == pytest.approx(float(narrow["patch_embed.weight"].std()), rel=0.1)
    biases = {key: value for key, value in wide.items() if key.endswith("bias") and "norm" not in key and value.any()}
    assert ("blocks.0.attn.proj.bias" in biases) == (name == "published-classifier"), "the others start at zero"
    for key, value in biases.items():  # torch's default: uniform within 1 / sqrt(fan-in), the base's fan-in at every width
        bound = 48**-0.5 if key == "patch_embed.bias" else 32**-0.5
        assert 0.5 * bound < float(value.abs().max()) <= bound * (1 + 1e-6), key


def test_every_parameter_of_both_families_has_its_role() -> None:
    expected = {
        "patch_embed.weight": "input",
        "decoder_pred.weight": "output",
        "head.weight": "output",
    }
    for values in MODELS.values():
        for name, parameter in build(ModelConfig.parse(values)).named_parameters():
            is_hidden = name.split(".")[-1] in ("weight", "dictionary") and "norm" not in name
            assert role_of(name, parameter) == expected.get(name, "hidden" if is_hidden else "vector"), name


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_rates_fall_where_fan_in_grows_and_rate_times_decay_stays(ratio: float) -> None:
    assert [lr_factor(role, ratio) for role in ("input", "hidden", "output", "vector")] == [1, 1 / ratio, 1 / ratio, 1]
    for role in ("input", "hidden", "output", "vector"):
        assert lr_factor(role, ratio) * weight_decay_factor(role, ratio) == 1


def test_a_preset_is_the_base_of_its_family_and_everything_grows_with_the_width() -> None:
    half = ModelConfig.parse({"preset": "mae_base", "parametrization": "mup", "width": 384})
    assert (half.num_heads, half.decoder_width, half.decoder_num_heads, half.width_ratio) == (6, 256, 8, 0.5)
    assert ModelConfig.parse(half.model_dump()) == half, "what a run records needs no preset"
    whole = ModelConfig.parse({"preset": "crate_mae_base", "parametrization": "mup"})
    assert (whole.width_ratio, whole.mup_base_decoder_width, whole.mup_base_decoder_num_heads) == (1, 768, 12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"parametrization = mup needs mup_base_width, mup_base_num_heads"),
        ({"mup_base_width": 16}, r"parametrization = mup needs mup_base_num_heads"),
        ({"mup_base_width": 16, "mup_base_num_heads": 2}, r"num_heads = 2 at width = 32.*set num_heads to 4"),
        ({"mup_base_width": 20, "mup_base_num_heads": 2}, r"width = 32 is 1.6 times.*use a width of 30 or 40"),
        (
            {**VISIBLE, "mup_base_width": 16, "mup_base_num_heads": 1},
            r"needs mup_base_decoder_width, mup_base_decoder_num_heads",
        ),
        (
            {**VISIBLE, "mup_base_width": 16, "mup_base_num_heads": 1, "mup_base_decoder_width": 16}
            | {"mup_base_decoder_num_heads": 1},
            r"decoder_width = 16 at width = 32.*set decoder_width to 32",
        ),
    ],
    ids=["no-base", "no-heads", "heads-that-grow", "heads-between", "no-decoder", "decoder-that-stays"],
)
def test_a_model_that_is_no_wider_copy_of_its_base_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.parse({**CRATE, **values, "parametrization": "mup"})


def test_weights_trained_with_mup_are_plain_tensors_for_a_standard_model(tmp_path: Path) -> None:
    config = mup(CRATE, times=2)
    trained = build(config)
    (tmp_path / "model.safetensors").write_bytes(encode_safetensors(trained.state_dict(), config))
    standard = build(config.model_copy(update={"parametrization": "standard"}), seed=1)
    load_weights(standard, str(tmp_path / "model.safetensors"))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(standard.encode(images), trained.encode(images))


def test_the_base_keys_say_nothing_in_the_standard_parametrization() -> None:
    standard = ModelConfig.parse({**CRATE, "mup_base_width": 20})
    assert standard.width_ratio == 1
