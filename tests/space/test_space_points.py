"""Which points a space has: all of a grid, dependents in any order, draws that depend on nothing but their number."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_ray.config import ConfigError, Domain, RunConfig, SweepConfig
from crate_ray.space import ArmSpace, Point, arm_config, arms, make_plan, make_planner, point_config, quantities
from crate_ray.space.domains import draw_value, list_values
from crate_ray.space.plan import draw

Make = Callable[..., SweepConfig]


def domain(**values: Any) -> Domain:
    return Domain.parse(values)


@pytest.mark.parametrize(
    ("given_domain", "values"),
    [
        ({"grid": [3, "a", None, [1, 2]]}, [3, "a", None, [1, 2]]),
        ({"choice": [True, False]}, [True, False]),
        ({"quantized": [64, 200, 64]}, [64, 128, 192]),
        ({"quantized": [0.1, 0.5, 0.2]}, [0.1, 0.3, 0.5]),
        ({"uniform": [0, 1], "num": 5}, [0, 0.25, 0.5, 0.75, 1]),
        ({"loguniform": [1e-4, 1e-2], "num": 3}, [1e-4, 1e-3, 1e-2]),
    ],
)
def test_a_domain_with_an_end_lists_its_values(given_domain: dict[str, Any], values: list[Any]) -> None:
    assert list_values(domain(**given_domain)) == values


def test_whole_numbers_stay_whole() -> None:
    assert all(isinstance(value, int) for value in list_values(domain(quantized=[64, 200, 64])))


@given(low=st.floats(1e-6, 1e3), factor=st.floats(1.01, 1e6), share=st.floats(0, 1, exclude_max=True), kind=st.booleans())
def test_a_drawn_number_lies_in_its_range(low: float, factor: float, share: float, kind: bool) -> None:
    drawn = draw_value(domain(**{"uniform" if kind else "loguniform": [low, low * factor]}), share)
    assert low <= drawn <= low * factor


def test_a_grid_is_every_combination_with_tune_running_fastest(sweep_of: Make) -> None:
    sweep = sweep_of(
        space={"model.width": {"grid": [64, 128]}, "model.encoder_depth": {"quantized": [1, 3, 1]}},
        tune={"optimizer.lr": {"grid": [1e-3, 3e-3]}},
    )
    expected = list(itertools.product([64, 128], [1, 2, 3], [1e-3, 3e-3]))
    for arm, points in make_plan(sweep).points.items():
        assert [tuple(point.values.values()) for point in points] == expected
        assert all(point.arm == arm and point.seed == 0 and point.stage == "screen" for point in points)


def test_an_arms_own_space_replaces_the_sweeps(sweep_of: Make) -> None:
    sweep = sweep_of(
        arms={"a": {}, "b": {"space": {"model.width": {"grid": [32]}, "model.decoder_depth": {"grid": [1, 2]}}}},
        space={"model.width": {"grid": [64, 128]}},
    )
    points = make_plan(sweep).points
    assert [dict(point.values) for point in points["a"]] == [{"model.width": 64}, {"model.width": 128}]
    assert [dict(point.values) for point in points["b"]] == [
        {"model.width": 32, "model.decoder_depth": 1},
        {"model.width": 32, "model.decoder_depth": 2},
    ]


@given(order=st.permutations(["model.width", "model.num_heads", "model.decoder_width", "model.decoder_num_heads"]))
@settings(max_examples=24)
def test_dependents_of_dependents_are_derived_in_whatever_order_they_are_written(sweep_of: Make, order: list[str]) -> None:
    domains = {
        "model.width": {"grid": [128]},
        "model.num_heads": {"of": "model.width", "times": 0.03125},
        "model.decoder_width": {"of": "model.num_heads", "map": {4: 96, 8: 64}},
        "model.decoder_num_heads": {"of": "model.num_heads"},
    }
    sweep = sweep_of(arms={"mae": {}}, space={key: domains[key] for key in order})
    values = dict(make_plan(sweep).points["mae"][0].values)
    assert values == {"model.width": 128, "model.num_heads": 4, "model.decoder_width": 96, "model.decoder_num_heads": 4}
    assert list(values) == order
    assert isinstance(values["model.num_heads"], int)


def test_a_shape_that_does_not_come_out_whole_is_refused_and_a_count_of_steps_is_rounded(sweep_of: Make) -> None:
    heads = {"of": "model.width", "times": 1 / 48}
    sweep = sweep_of(
        arms={"mae": {}},
        space={"model.width": {"grid": [48, 64]}, "model.num_heads": heads},
        tune={"optimizer.lr": {"grid": [1]}},
    )
    plan = make_plan(sweep)
    assert [point.values["model.width"] for point in plan.points["mae"]] == [48]
    assert sum(plan.refused.values()) == 1
    assert "model.num_heads" in next(iter(plan.refused))
    steps = {"train.steps": {"grid": [75]}, "schedule.warmup_steps": {"of": "train.steps", "times": 0.1}}
    (point,) = make_plan(sweep_of(arms={"mae": {}}, set={}, space=steps)).points["mae"]
    assert point.values["schedule.warmup_steps"] == 8


def test_a_map_without_the_value_refuses_that_point_alone(sweep_of: Make) -> None:
    space = {"model.width": {"grid": [64, 128]}, "model.num_heads": {"of": "model.width", "map": {64: 2}}}
    plan = make_plan(sweep_of(arms={"mae": {}}, space=space))
    assert len(plan.points["mae"]) == 1
    assert dict(plan.refused) == {"model.num_heads of model.width: its map has no value for 128; it has 64": 1}


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_equal_flops_are_equal_to_within_half_a_step(sweep_of: Make, ratio: float) -> None:
    sweep = sweep_of(
        set={"train.steps": 600},
        arms={"mae": {"space": {"train.steps": {"same_flops_as": {"model.mask_ratio": 0.75}}}}},
        space={"model.mask_ratio": {"grid": [ratio]}, "schedule.warmup_steps": {"of": "train.steps", "times": 0.1}},
    )
    (point,) = make_plan(sweep).points["mae"]
    steps = point.values["train.steps"]
    wanted = quantities(RunConfig.load("digits_mae", ["model.mask_ratio=0.75", "train.steps=600"]))["train_pflops"]
    got = quantities(point_config(sweep, point))["train_pflops"]
    assert abs(got - wanted) <= got / steps / 2 * (1 + 1e-9)
    assert (steps == 600) == (ratio == 0.75)
    assert point.values["schedule.warmup_steps"] == round(steps * 0.1)


def test_equal_flops_recompute_what_depends_on_the_replaced_keys(sweep_of: Make) -> None:
    width = {"model.width": {"grid": [64, 128]}, "model.num_heads": {"of": "model.width", "times": 1 / 64}}
    sweep = sweep_of(
        arms={"crate": {"base": "digits_crate_mae", "space": {"train.steps": {"same_flops_as": {"model.width": 192}}}}},
        space=width,
    )
    wanted = quantities(
        RunConfig.load("digits_crate_mae", ["model.width=192", "model.num_heads=3", "train.steps=60", "model.mask_ratio=0.75"])
    )["train_pflops"]
    for point in make_plan(sweep).points["crate"]:
        assert quantities(point_config(sweep, point))["train_pflops"] == pytest.approx(wanted, rel=0.01)


def test_equal_flops_of_a_length_in_epochs_need_the_number_of_images(sweep_of: Make) -> None:
    space = {"train.steps": {"same_flops_as": {"model.mask_ratio": 0.5}}}
    sweep = sweep_of(
        set={"train.epochs": 2, "model.mask_ratio": 0.75}, arms={"mae": {"space": space}}, tune={"optimizer.lr": {"grid": [1]}}
    )
    with pytest.raises(ConfigError, match=r"set train\.steps"):
        make_plan(sweep)
    (point,) = make_plan(sweep, num_samples=12800).points["mae"]
    assert 200 < point.values["train.steps"] < 400


DRAWN = {
    "search": {"method": "random", "seed": 3},
    "space": {"model.encoder_depth": {"quantized": [1, 6, 1]}},
    "tune": {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "optimizer.weight_decay": {"uniform": [0, 0.2]}},
}


@given(few=st.integers(1, 10), more=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_the_first_draws_of_many_are_the_draws_of_few(sweep_of: Make, few: int, more: int) -> None:
    short = make_plan(sweep_of(**DRAWN, budget={"trials": 2 * few})).points
    long = make_plan(sweep_of(**DRAWN, budget={"trials": 2 * (few + more)})).points
    assert all(len(short[arm]) == few and long[arm][:few] == short[arm] for arm in short)


@given(seed=st.integers(0, 2**32 - 1), index=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_paired_arms_draw_the_same_values_of_the_keys_that_they_share(sweep_of: Make, seed: int, index: int) -> None:
    own = {"mae": {"space": {"model.decoder_depth": {"quantized": [1, 3, 1]}}}, "crate": {"base": "digits_crate_mae"}}
    sweep = sweep_of(**{**DRAWN, "search": {"method": "random", "seed": seed}}, arms=own, budget={"trials": 4})
    mae, crate = (draw(sweep, ArmSpace(sweep, arm), index) for arm in ("mae", "crate"))
    assert {key: mae[key] for key in crate} == crate
    alone = sweep.model_copy(update={"pair": False})
    assert draw(alone, ArmSpace(alone, "crate"), index) != draw(alone, ArmSpace(alone, "mae"), index)


def test_a_random_search_never_draws_a_point_twice_and_ends_when_all_are_drawn(sweep_of: Make) -> None:
    sweep = sweep_of(
        search={"method": "random"}, arms={"mae": {}}, space={"model.width": {"choice": [32, 64, 96]}}, budget={"trials": 9}
    )
    assert sorted(point.values["model.width"] for point in make_plan(sweep).points["mae"]) == [32, 64, 96]


def test_constrained_points_are_refused_and_counted_by_reason(sweep_of: Make) -> None:
    sweep = sweep_of(
        arms={"mae": {}},
        space={"model.width": {"grid": [64, 128, 130, 256]}},
        constraints=["params_m <= 1", "model.width > 64"],
    )
    plan = make_plan(sweep)
    assert [point.values["model.width"] for point in plan.points["mae"]] == [128]
    assert plan.refused["not params_m <= 1"] == 1
    assert plan.refused["not model.width > 64"] == 1
    assert sum(count for reason, count in plan.refused.items() if "130" in reason) == 1


def test_a_space_in_which_nothing_is_feasible_is_refused_with_the_counts(sweep_of: Make) -> None:
    sweep = sweep_of(space={"model.width": {"grid": [64, 128]}}, constraints=["params_m <= 0.001"])
    with pytest.raises(ConfigError, match=r"no point of arm 'mae' is feasible; refused: 2 x not params_m <= 0.001"):
        make_planner(sweep)


@given(
    width=st.integers(1, 300),
    heads=st.integers(1, 8),
    ratio=st.floats(0.01, 0.99),
    lr=st.floats(1e-6, 1),
    epochs=st.none() | st.floats(0.1, 100),
)
@settings(max_examples=40, deadline=None)
def test_a_run_built_from_checked_sections_is_the_run_that_the_schema_builds(
    sweep_of: Make, width: int, heads: int, ratio: float, lr: float, epochs: float | None
) -> None:
    values = {"model.width": width, "model.num_heads": heads, "model.mask_ratio": ratio, "optimizer.lr": lr}
    values |= {} if epochs is None else {"train.epochs": epochs}
    space = ArmSpace(sweep_of(arms={"mae": {}}, set={}, tune={"optimizer.lr": {"grid": [1]}}), "mae")
    decided = {"eval.every_steps": 20, "scale.use_gpu": False, "tracking.experiment": "crate-mae/tested", "train.seed": 0}
    overrides = [f"{key}={str(value).lower()}" for key, value in {**values, **decided}.items()]
    try:
        expected = RunConfig.load("digits_mae", overrides)
    except ConfigError as error:
        with pytest.raises(ConfigError) as caught:
            space.config(values)
        assert str(caught.value).splitlines()[1:] == str(error).splitlines()[1:]
    else:
        built = space.config(values)
        assert built == expected
        assert built.model.model_fields_set == expected.model.model_fields_set


def test_an_arms_run_takes_cadence_scale_and_seed_from_the_sweep(sweep_of: Make) -> None:
    sweep = sweep_of(
        objective=["knn_top1"],
        resources_per_trial={"num_workers": 2, "cpus": 3, "gpus": 1},
        screen={"seed": 7},
        tune={"optimizer.lr": {"grid": [1]}},
    )
    config = arm_config(sweep, "crate")
    assert (config.eval.every_steps, config.eval.probe_every_steps) == (20, 20)
    assert (config.scale.num_workers, config.scale.cpus_per_worker, config.scale.use_gpu) == (2, 3, True)
    assert (config.name, config.train.seed, config.tracking.experiment) == (None, 7, "crate-mae/tested")
    assert config.model.family == "crate"
    with pytest.raises(ConfigError, match=r"'crat' is no arm of sweep tested \(did you mean 'crate'"):
        arm_config(sweep, "crat")


def test_without_arms_there_is_one_of_the_bases_family(sweep_of: Make) -> None:
    sweep = sweep_of(arms={}, base="digits_crate_mae", space={"model.width": {"grid": [64]}})
    assert list(arms(sweep)) == ["crate"]
    assert [point.arm for point in make_plan(sweep).points["crate"]] == ["crate"]


def test_a_preset_lies_below_every_other_key_of_its_arm(sweep_of: Make) -> None:
    sweep = sweep_of(
        base="imagenet_mae_base",
        set={"model.mask_ratio": 0.5, "train.steps": 10},
        arms={"crate": {"set": {"model.preset": "crate_mae_base"}}, "mae": {"set": {"model.preset": "mae_small"}}},
        tune={"optimizer.lr": {"grid": [1e-3]}},
    )
    crate, mae = arm_config(sweep, "crate"), arm_config(sweep, "mae")
    assert (crate.model.family, crate.model.width, crate.model.mask_ratio) == ("crate", 768, 0.5)
    assert (mae.model.width, mae.model.mask_ratio, mae.optimizer.base_lr) == (384, 0.5, 1.5e-4)
    assert point_config(sweep, Point("mae", {"optimizer.lr": 1e-3}, 0)).optimizer.base_lr is None


def test_a_point_survives_a_file() -> None:
    point = Point("mae", {"model.ista_lambda": (0.1, 0.2), "optimizer.lr": 1e-3}, 5, "confirm")
    copy = Point.of(point.as_dict() | {"state": "FINISHED"})
    assert copy.key == point.key
    assert Point("mae", {"model.ista_lambda": [0.1, 0.2], "optimizer.lr": 1e-3}, 5, "confirm").key == point.key


def test_a_grid_of_ten_thousand_points_is_planned_in_two_seconds(sweep_of: Make) -> None:
    sweep = sweep_of(
        space={
            "model.width": {"quantized": [32, 800, 32]},
            "model.encoder_depth": {"quantized": [1, 20, 1]},
            "model.num_heads": {"of": "model.width", "times": 0.03125},
        },
        tune={"optimizer.lr": {"loguniform": [1e-4, 1e-2], "num": 10}},
        constraints=["params_m <= 80"],
    )
    started = time.process_time()
    planner = make_planner(sweep)
    seconds = time.process_time() - started
    assert planner.total is not None
    assert planner.total + sum(planner.refused.values()) == 2 * 25 * 20 * 10
    assert seconds < 2
