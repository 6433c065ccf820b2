"""Who decays, and an optimizer that goes on from its saved state as if it had never stopped."""

import pytest
import torch

from crate_ray.config import ModelConfig, OptimizerConfig
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.training.optimizer import create_optimizer, optimizer_tensors, parameter_groups, restore_optimizer

SHAPE = {"image_size": 16, "patch_size": 4, "width": 16, "num_heads": 2, "encoder_depth": 2, "decoder_depth": 1}
CRATE = {"family": "crate", **SHAPE}
VIT = {"family": "vit", "encoder_tokens": "visible", **SHAPE}


def build(values: dict[str, object]) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(ModelConfig.parse(values))


@pytest.mark.parametrize("values", [CRATE, VIT, {**CRATE, "ista_learnable": "layer"}], ids=["crate", "vit", "learnable-ista"])
def test_matrices_decay_and_norms_biases_tokens_and_scalars_do_not(values: dict[str, object]) -> None:
    model = build(values)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    decayed_names = [names[id(p)] for p in decayed["params"]]  # type: ignore[attr-defined]
    free_names = [names[id(p)] for p in free["params"]]  # type: ignore[attr-defined]
    assert sorted(decayed_names + free_names) == sorted(names.values())
    assert {"cls_token", "mask_token"} <= set(free_names)
    assert all(dict(model.named_parameters())[name].ndim == 2 for name in decayed_names)
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)


# What facebookresearch/mae (util/lr_decay.py) gives the 14 levels of a 12-layer model at layer decay 0.65, to 6 digits.
SCALES_12 = [
    0.003697, 0.005688, 0.008751, 0.013463, 0.020712, 0.031864, 0.049022,
    0.075419, 0.116029, 0.178506, 0.274625, 0.4225, 0.65, 1.0,
]  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        {**CRATE, "encoder_depth": 12, "num_classes": 3},
        {**CRATE, "encoder_depth": 12, "num_classes": 3, "embedding": "linear"},
        {**VIT, "encoder_depth": 12, "num_classes": 3},
    ],
    ids=["published-crate", "crate", "vit"],
)
def test_the_learning_rate_decays_from_head_to_embedding_as_in_facebooks_fine_tuning(values: dict[str, object]) -> None:
    model = Classifier(ModelConfig.parse(values))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.05, 0.65)
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert scales.keys() == set(names.values())
    levels = {"cls_token": 0, "pos_embed": 0, "patch_embed": 0, "patch_norm": 0, "embed_norm": 0}
    levels |= {"norm": 13, "fc_norm": 13, "head": 13}
    for name, scale in scales.items():
        first, _, rest = name.partition(".")
        level = int(rest.split(".")[0]) + 1 if first == "blocks" else levels[first]
        assert scale == pytest.approx(SCALES_12[level], abs=5e-7), name
    decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}  # type: ignore[attr-defined]
    assert all(
        (decay == 0.05) == (name.endswith(("weight", "dictionary")) and "norm" not in name) for name, decay in decays.items()
    )


def test_without_layer_decay_every_parameter_has_the_whole_learning_rate() -> None:
    assert [group["lr_scale"] for group in parameter_groups(build(CRATE), 0.05)] == [1.0, 1.0]


def factors(groups: list[dict[str, object]], model: MaskedAutoencoder | Classifier) -> dict[str, tuple[object, object]]:
    """Rate factor and weight decay of every parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}  # type: ignore[attr-defined]


BASE = {"mup_base_width": 8, "mup_base_num_heads": 1, "parametrization": "mup"}


@pytest.mark.parametrize(
    "values", [{**CRATE, **BASE}, {**VIT, "decoder_width": 16, **BASE, "mup_base_decoder_width": 8}], ids=["crate", "vit"]
)
def test_with_mup_matrices_whose_fan_in_grew_train_slower_and_decay_as_before(values: dict[str, object]) -> None:
    model = build(values)
    found = factors(parameter_groups(model, 0.05), model)
    assert found.pop("patch_embed.weight") == (1.0, 0.05), "its fan-in is the patch at every width"
    for name, (lr_scale, weight_decay) in found.items():
        is_matrix = name.endswith(("weight", "dictionary")) and "norm" not in name
        assert (lr_scale, weight_decay) == ((0.5, 0.1) if is_matrix else (1.0, 0.0)), name


def test_the_factors_of_mup_and_of_layer_decay_multiply() -> None:
    shape = {**CRATE, "num_classes": 3}
    standard, scaled = Classifier(ModelConfig.parse(shape)), Classifier(ModelConfig.parse({**shape, **BASE}))
    without, with_mup = (factors(parameter_groups(model, 0.05, 0.65), model) for model in (standard, scaled))
    roles = factors(parameter_groups(scaled, 0.05), scaled)
    for name, (lr_scale, _) in without.items():
        assert with_mup[name] == (pytest.approx(lr_scale * roles[name][0]), roles[name][1]), name  # type: ignore[operator]


@pytest.mark.parametrize(
    "values",
    [CRATE, {**VIT, "decoder_width": 8, "decoder_num_heads": 1}, {**CRATE, "ista_learnable": "layer"}],
    ids=["crate", "vit", "learnable"],
)
def test_at_the_base_width_mup_takes_the_published_steps_bit_for_bit(values: dict[str, object]) -> None:
    base = {
        f"mup_base_{key}": values[key] for key in ("width", "num_heads", "decoder_width", "decoder_num_heads") if key in values
    }
    standard, scaled = build(values), build({**values, **base, "parametrization": "mup"})
    for model in (standard, scaled):
        optimizer = create_optimizer(model, OptimizerConfig(lr=1e-2), lr=1e-2)
        assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 1.0]
        train(model, optimizer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(standard.parameters(), scaled.parameters(), strict=True))


def train(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 16, 16, generator=generator)
        model.losses(images, torch.rand(4, 16, generator=generator)).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("values", [CRATE, VIT], ids=["crate", "vit"])
def test_a_restored_optimizer_goes_on_bit_by_bit(values: dict[str, object]) -> None:
    config = OptimizerConfig(lr=1e-2)
    model = build(values)
    optimizer = create_optimizer(model, config, lr=1e-2)
    train(model, optimizer, range(3))
    tensors = {key: value.clone() for key, value in optimizer_tensors(model, optimizer).items()}
    assert tensors.keys() == {
        f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name, _ in model.named_parameters()
    }
    other = build(values)
    other.load_state_dict(model.state_dict())
    restored = create_optimizer(other, config, lr=1e-2)
    restore_optimizer(other, restored, tensors)
    train(model, optimizer, range(3, 6))
    train(other, restored, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_state_of_another_model_is_refused_by_name() -> None:
    model = build(CRATE)
    optimizer = create_optimizer(model, OptimizerConfig(lr=1e-2), lr=1e-2)
    with pytest.raises(ValueError, match=r"lacks: blocks\.9\.weight"):
        restore_optimizer(model, optimizer, {"exp_avg.blocks.9.weight": torch.zeros(1)})
