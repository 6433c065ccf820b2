"""Who decays, and an optimizer that goes on from its saved state as if it had never stopped."""

import pytest
import torch

from crate_ray.config import ConfigError, ModelConfig, OptimizerConfig, RunConfig
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.training.lion import Lion
from crate_ray.training.optimizer import (
    create_optimizer,
    optimizer_tensors,
    parameter_groups,
    restore_optimizer,
    step_where_finite,
)

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


def train(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, steps: range, *, guarded: bool = False) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 16, 16, generator=generator)
        model.losses(images, torch.rand(4, 16, generator=generator)).mean().backward()  # type: ignore[no-untyped-call]
        if guarded:
            step_where_finite(optimizer, torch.tensor(True))
        else:
            optimizer.step()
        optimizer.zero_grad()


STATE = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "lion": {"exp_avg"}}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("values", [CRATE, VIT], ids=["crate", "vit"])
def test_a_restored_optimizer_goes_on_bit_by_bit(values: dict[str, object], name: str) -> None:
    config = OptimizerConfig(lr=1e-2, name=name)  # type: ignore[arg-type]
    model = build(values)
    optimizer = create_optimizer(model, config, lr=1e-2)
    train(model, optimizer, range(3))
    tensors = {key: value.clone() for key, value in optimizer_tensors(model, optimizer).items()}
    hidden = {id(p) for group in optimizer.param_groups if group.get("is_hidden") for p in group["params"]}
    assert tensors.keys() == {
        f"{kind}.{key}"
        for key, parameter in model.named_parameters()
        for kind in ({"momentum_buffer"} if id(parameter) in hidden else STATE.get(name, STATE["adamw"]))
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


def lion_in_float64(
    weights: torch.Tensor, gradients: list[torch.Tensor], *, lr: float, betas: tuple[float, float], decay: float
) -> torch.Tensor:
    """Program 1 of arXiv:2302.06675, a coordinate at a time."""
    result = weights.double().clone()
    for i in range(result.numel()):
        w, m = float(result.view(-1)[i]), 0.0
        for gradient in gradients:
            g = float(gradient.view(-1)[i])
            c = betas[0] * m + (1 - betas[0]) * g
            w -= lr * ((c > 0) - (c < 0) + decay * w)
            m = betas[1] * m + (1 - betas[1]) * g
        result.view(-1)[i] = w
    return result


def test_lion_follows_its_published_program() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=generator)
    gradients = [torch.randn(5, 3, generator=generator) for _ in range(20)]
    for dtype, tolerance, is_guarded in (
        (torch.float64, 1e-14, False),
        (torch.float32, 1e-6, False),
        (torch.float32, 1e-6, True),
    ):
        weights = torch.nn.Parameter(start.to(dtype, copy=True))
        optimizer = Lion([{"params": [weights], "weight_decay": 0.5}], lr=0.01, betas=(0.9, 0.99))
        for gradient in gradients:
            weights.grad = gradient.to(dtype)
            step_where_finite(optimizer, torch.tensor(True)) if is_guarded else optimizer.step()
        expected = lion_in_float64(start, gradients, lr=0.01, betas=(0.9, 0.99), decay=0.5)
        torch.testing.assert_close(weights.detach().double(), expected, rtol=tolerance, atol=tolerance)


def test_muon_moves_a_matrix_along_its_orthogonal_part_and_the_rest_as_adamw_does() -> None:
    model = build(CRATE)
    config = OptimizerConfig(lr=1e-2, name="muon", weight_decay=0.1)
    optimizer = create_optimizer(model, config, lr=1e-2)
    hidden = {id(p) for group in optimizer.param_groups if group["is_hidden"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in hidden}
    assert names == {
        name
        for name, p in model.named_parameters()
        if "blocks" in name and name.endswith(("dictionary", "qkv.weight", "proj.weight"))
    }
    other = build(CRATE)
    adamw = create_optimizer(other, OptimizerConfig(lr=1e-2, weight_decay=0.1), lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) for name, p in model.named_parameters()}
    for network, its_optimizer in ((model, optimizer), (other, adamw)):
        for name, parameter in network.named_parameters():
            parameter.grad = gradients[name].clone()
        its_optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if name not in names:
            assert torch.equal(ours, theirs), name
            continue
        # Five iterations bring singular values near 1, to between 0.6 and 1.2; torch's momentum scales the gradient only.
        update = (before[name] * (1 - 1e-2 * 0.1) - ours.detach()) / (1e-2 * 0.2 * max(ours.shape) ** 0.5)
        left, _, right = torch.linalg.svd(gradients[name])
        diagonal = (left.T @ update @ right.T).diagonal()
        assert float(diagonal[:-1].min()) > 0.4, name
        assert float(torch.linalg.matrix_norm(update, ord=2)) < 1.35, name


NAMES = pytest.mark.parametrize("name", ["adamw", "lion", "muon"])


@NAMES
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_weights_and_state_as_they_are(name: str, bad: float) -> None:
    model, undisturbed = build(CRATE), build(CRATE)
    config = OptimizerConfig(lr=1e-2, name=name)  # type: ignore[arg-type]
    optimizer, its_optimizer = (create_optimizer(m, config, lr=1e-2) for m in (model, undisturbed))
    for step in range(4):
        if step in (0, 2):  # before there is any state, and after
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, bad)
            step_where_finite(optimizer, torch.tensor(False))
            optimizer.zero_grad()
        train(model, optimizer, range(step, step + 1), guarded=True)
        train(undisturbed, its_optimizer, range(step, step + 1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), undisturbed.parameters(), strict=True))
    ours, theirs = optimizer_tensors(model, optimizer), optimizer_tensors(undisturbed, its_optimizer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@NAMES
def test_the_step_that_may_be_skipped_is_the_plain_step(name: str) -> None:
    plain, guarded = build(VIT), build(VIT)
    config = OptimizerConfig(lr=1e-2, name=name)  # type: ignore[arg-type]
    first, second = (create_optimizer(m, config, lr=1e-2) for m in (plain, guarded))
    train(plain, first, range(3))
    train(guarded, second, range(3), guarded=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), guarded.parameters(), strict=True))


def test_torch_without_muon_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"needs torch\.optim\.Muon, which torch .* lacks; install torch"):
        create_optimizer(build(CRATE), OptimizerConfig(lr=1e-2, name="muon"), lr=1e-2)


def test_what_an_optimizer_would_not_use_or_has_no_rule_for_is_refused() -> None:
    assert OptimizerConfig(lr=1e-2, name="lion").betas == (0.9, 0.99)
    assert OptimizerConfig.parse(OptimizerConfig(lr=1e-2, name="lion", betas=(0.8, 0.9)).model_dump()).betas == (0.8, 0.9)
    with pytest.raises(ConfigError, match=r"optimizer\.eps = 1e-06 has no effect: lion"):
        OptimizerConfig.parse({"lr": 1e-2, "name": "lion", "eps": 1e-6})
    mup = ["model.parametrization=mup", "model.mup_base_width=64", "model.mup_base_num_heads=2"]
    with pytest.raises(ConfigError, match="its rule for muon's orthogonal ones is not known"):
        RunConfig.load("digits_crate_mae", ["optimizer.name=muon", *mup])
