"""The solver finds what trying everything finds: as large or as costly as the target, its depth nearest the target's."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_ray.config import ModelConfig, RunConfig, SweepConfig
from crate_ray.models.cost import count_parameters
from crate_ray.space import make_plan, make_planner, point_config, quantities

Make = Callable[..., SweepConfig]
HEADS = {"of": "model.width", "times": 0.125}
SAME = ("model.mask_ratio=0.75", "train.steps=60")


def over(widths: list[int], depths: list[int]) -> dict[str, Any]:
    return {"model.width": {"quantized": widths}, "model.encoder_depth": {"quantized": depths}, "model.num_heads": HEADS}


@functools.cache
def maes() -> dict[tuple[int, int], dict[str, float]]:
    """Quantities of every MAE of the solver's widths and depths, each built alone."""
    return {
        (width, depth): quantities(RunConfig.load("digits_mae", [*SAME, *shape(width, depth)]))
        for width in range(16, 129, 8)
        for depth in range(1, 7)
    }


def shape(width: int, depth: int) -> list[str]:
    return [f"model.width={width}", f"model.encoder_depth={depth}", f"model.num_heads={width // 8}"]


def brute_force(target: float, depth: int, within: float, quantity: str) -> tuple[int, int] | None:
    """Width and depth of the MAE that is within, its depth nearest, then its quantity."""
    errors = {key: abs(known[quantity] / target - 1) for key, known in maes().items()}
    found = [(abs(key[1] - depth), error, key) for key, error in errors.items() if error <= within]
    return min(found)[2] if found else None


@given(
    width=st.sampled_from([64, 96, 128, 160]),
    depth=st.integers(1, 6),
    within=st.sampled_from([0.02, 0.05, 0.2]),
    quantity=st.sampled_from(["params_m", "encoder_params_m", "gflops", "train_pflops"]),
)
@settings(max_examples=12, deadline=None)
def test_the_solver_agrees_with_trying_everything(sweep_of: Make, width: int, depth: int, within: float, quantity: str) -> None:
    sweep = sweep_of(
        arms={"mae": {}, "crate": {"base": "digits_crate_mae"}},
        space={"model.width": {"grid": [width]}, "model.encoder_depth": {"grid": [depth]}, "model.num_heads": HEADS},
        match={"quantity": quantity, "to": "crate", "within": within, "over": over([16, 128, 8], [1, 6, 1])},
    )
    target = quantities(RunConfig.load("digits_crate_mae", [*SAME, *shape(width, depth)]))[quantity]
    expected = brute_force(target, depth, within, quantity)
    if expected is None:
        with pytest.raises(ValueError, match=f"no mae of {quantity} near .*: the nearest has"):
            make_plan(sweep)
        return
    plan = make_plan(sweep)
    (point,) = plan.points["mae"]
    assert (point.values["model.width"], point.values["model.encoder_depth"]) == expected
    (match,) = plan.matches
    achieved = quantities(point_config(sweep, point))[quantity]
    assert match.difference == pytest.approx(achieved / target - 1)
    assert abs(match.difference) <= within


def test_every_target_has_its_partner_with_the_same_tuning(sweep_of: Make) -> None:
    sweep = sweep_of(
        space={"model.width": {"grid": [64, 128]}, "model.num_heads": {"of": "model.width", "times": 0.03125}},
        tune={"optimizer.lr": {"grid": [1e-3, 3e-3]}},
        match={"quantity": "encoder_params_m", "to": "crate", "within": 0.1, "over": over([16, 128, 8], [1, 8, 1])},
    )
    planner = make_planner(sweep)
    points = make_plan(sweep).points
    assert [point.values["optimizer.lr"] for point in points["mae"]] == [1e-3, 3e-3, 1e-3, 3e-3]
    assert [match.target for match in planner.matches] == points["crate"]
    for crate, mae in zip(points["crate"], points["mae"], strict=True):
        sizes = [count_parameters(point_config(sweep, point).model).encoder for point in (crate, mae)]
        assert abs(sizes[1] / sizes[0] - 1) <= 0.1


def test_a_target_without_a_partner_is_left_out_and_counted_with_the_nearest(sweep_of: Make) -> None:
    sweep = sweep_of(
        space={"model.width": {"grid": [64, 512]}, "model.num_heads": {"of": "model.width", "times": 0.03125}},
        match={"quantity": "encoder_params_m", "to": "crate", "over": over([32, 64, 32], [1, 4, 1])},
    )
    plan = make_plan(sweep)
    assert [point.values["model.width"] for point in plan.points["crate"] + plan.points["mae"]] == [64, 32]
    reason, alone = plan.refused
    assert (plan.refused[reason], plan.refused[alone]) == (1, 1)
    assert alone == "without a partner in every arm"
    assert reason.startswith("no mae of encoder_params_m near 3.183: the nearest has 0.2033")
    assert "model.width = 64" in reason
    assert [match.is_within for match in plan.matches] == [True, False]


def test_random_targets_have_partners_too(sweep_of: Make) -> None:
    sweep = sweep_of(
        search={"method": "random"},
        budget={"trials": 6},
        space={"model.width": {"quantized": [64, 128, 32]}, "model.num_heads": {"of": "model.width", "times": 0.03125}},
        tune={"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
        match={"quantity": "params_m", "to": "crate", "within": 0.2, "over": over([8, 128, 8], [1, 8, 1])},
    )
    points = make_plan(sweep).points
    rates = [[point.values["optimizer.lr"] for point in points[arm]] for arm in ("crate", "mae")]
    assert rates[0] == rates[1]
    assert len(rates[0]) == 3


def test_the_published_pair_of_equal_encoders_is_within_five_percent_and_the_totals_are_not() -> None:
    crate, mae = (count_parameters(ModelConfig.parse({"preset": name})) for name in ("crate_mae_base", "mae_small"))
    assert (round(crate.encoder / 1e6, 1), round(mae.encoder / 1e6, 1)) == (21.9, 21.6)
    assert (round(crate.paper / 1e6, 1), round(mae.paper / 1e6, 1)) == (44.6, 47.6)
    assert abs(mae.encoder / crate.encoder - 1) < 0.05
    assert 0.05 < mae.paper / crate.paper - 1 < 0.07


@pytest.mark.parametrize(
    ("constraint", "feasible"), [("encoder_params_m within 5% of 21.9", 2), ("params_m within 5% of 43.7", 1)]
)
def test_ready_made_presets_are_compared_through_a_constraint(sweep_of: Make, constraint: str, feasible: int) -> None:
    sweep = sweep_of(
        base="imagenet_mae_base",
        arms={"all": {"space": {"model.preset": {"grid": ["crate_mae_base", "mae_small"]}}}},
        constraints=[constraint],
    )
    assert len(make_plan(sweep).points["all"]) == feasible


def test_the_solver_finds_an_mae_of_equal_total_for_the_published_crate(sweep_of: Make) -> None:
    sweep = sweep_of(
        base="imagenet_mae_base",
        arms={"mae": {"set": {"model.preset": "mae_small"}}, "crate": {"set": {"model.preset": "crate_mae_base"}}},
        tune={"optimizer.lr": {"grid": [1e-3]}},
        match={
            "quantity": "params_m",
            "to": "crate",
            "over": {
                "model.width": {"quantized": [320, 384, 32]},
                "model.encoder_depth": {"grid": [12]},
                "model.num_heads": {"of": "model.width", "times": 0.03125},
            },
        },
    )
    (match,) = make_plan(sweep).matches
    assert match.wanted == pytest.approx(43.745, abs=0.001)
    assert match.values["model.width"] == 352
    assert abs(match.difference) < 0.05
