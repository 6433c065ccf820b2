"""What is trained again: the best of each arm by the first objective, with the same fresh seeds for every arm."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from crate_ray.config import ConfigError, RunConfig, SweepConfig
from crate_ray.space import Point, confirm_points, make_plan, point_config

Make = Callable[..., SweepConfig]
NUMBERS = itertools.count()
KEYS: dict[str, Any] = {
    "space": {"model.width": {"grid": [32, 64]}, "model.num_heads": {"of": "model.width", "times": 0.03125}},
    "tune": {"optimizer.lr": {"grid": [1e-3, 3e-3]}},
}


@dataclass
class Row:
    arm: str
    values: Mapping[str, Any]
    measured: dict[str, float]
    stage: str = "screen"
    state: str = "FINISHED"
    id: str = field(default_factory=lambda: f"{next(NUMBERS):04d}")

    def value_of(self, objective: str) -> float | None:
        return self.measured.get(objective)


def rows_of(sweep: SweepConfig) -> list[Row]:
    """Loss falls with the width for MAE and rises for CRATE; the higher rate is better where the model is narrow."""
    rows = []
    for arm, points in make_plan(sweep).points.items():
        for point in points:
            width, rate = point.values["model.width"], point.values["optimizer.lr"]
            sign = -1 if arm == "mae" else 1
            rows.append(Row(arm, point.values, {"eval_loss": 10 + sign * width / 100 + abs(rate - 0.1 / width)}))
    return rows


def chosen(points: list[Point], arm: str) -> list[tuple[int, float]]:
    seen = {(point.values["model.width"], point.values["optimizer.lr"]): None for point in points if point.arm == arm}
    return list(seen)


def test_the_best_of_each_arm_gets_the_same_fresh_seeds(sweep_of: Make) -> None:
    sweep = sweep_of(**KEYS, confirm={"seeds": 6, "first_seed": 50})
    points = confirm_points(sweep, rows_of(sweep))
    assert chosen(points, "mae") == [(64, 1e-3)]
    assert chosen(points, "crate") == [(32, 3e-3)]
    assert [(point.arm, point.seed) for point in points] == [(arm, seed) for seed in range(50, 56) for arm in ("mae", "crate")]
    assert all(point.stage == "confirm" for point in points)


def test_the_best_of_tune_at_every_point_of_the_space(sweep_of: Make) -> None:
    sweep = sweep_of(**KEYS, confirm={"per": "point"})
    points = confirm_points(sweep, rows_of(sweep))
    assert chosen(points, "mae") == [(64, 1e-3), (32, 3e-3)]
    assert len(points) == 2 * 2 * 5


def test_several_of_each_arm_in_the_order_of_their_rank(sweep_of: Make) -> None:
    sweep = sweep_of(**KEYS, confirm={"top_k": 2})
    assert chosen(confirm_points(sweep, rows_of(sweep)), "mae") == [(64, 1e-3), (64, 3e-3)]


def test_an_accuracy_counts_the_other_way(sweep_of: Make) -> None:
    sweep = sweep_of(**KEYS, confirm={}, objective=["knn_top1"])
    rows = [Row(row.arm, row.values, {"knn_top1": row.measured["eval_loss"]}) for row in rows_of(sweep)]
    assert chosen(confirm_points(sweep, rows), "crate") == [(64, 3e-3)]


def test_of_equal_trials_the_smaller_encoder_is_confirmed_then_the_first_by_name(sweep_of: Make) -> None:
    sweep = sweep_of(**KEYS, confirm={}, objective=["knn_top1"])
    equal = [
        Row(row.arm, row.values, {"knn_top1": 0.5, "encoder_params_m": row.values["model.width"] / 100}, id=f"{i:02d}")
        for i, row in enumerate(rows_of(sweep))
    ]
    first = next(row.values["optimizer.lr"] for row in equal if row.arm == "mae" and row.values["model.width"] == 32)
    for rows in (equal, equal[::-1]):
        assert chosen(confirm_points(sweep, rows), "mae") == [(32, first)]


def population_of(sweep_of: Make, **confirm: Any) -> SweepConfig:
    perturb = {"optimizer.lr": {"loguniform": [1e-4, 1e-2]}, "train.clip_norm": {"uniform": [0.5, 2.0]}}
    scheduler = {"type": "pbt", "interval_steps": 20, "population": 4, "perturb": perturb}
    return sweep_of(**KEYS, confirm=confirm, scheduler=scheduler)


def test_what_a_population_ended_with_is_confirmed_also_of_keys_that_are_not_in_the_space(sweep_of: Make) -> None:
    sweep = population_of(sweep_of)
    rows = rows_of(sweep)
    best = next(row for row in rows if row.arm == "mae" and row.values["model.width"] == 64)
    best.values = {**best.values, "optimizer.lr": 2.5e-3, "train.clip_norm": 0.7}
    best.measured["eval_loss"] = 0.0
    points = [point for point in confirm_points(sweep, rows) if point.arm == "mae"]
    configs = [point_config(sweep, point) for point in points]
    assert {(c.optimizer.lr, c.train.clip_norm, c.model.width) for c in configs} == {(2.5e-3, 0.7, 64)}
    (other,) = {point_config(sweep, p).train.clip_norm for p in confirm_points(sweep, rows) if p.arm == "crate"}
    assert other == RunConfig.load("digits_crate_mae").train.clip_norm, "of a trial that copied nobody"


def test_the_second_stage_may_set_a_perturbed_key_itself(sweep_of: Make) -> None:
    sweep = population_of(sweep_of, set={"train.clip_norm": 3.0})
    rows = rows_of(sweep)
    for row in rows:
        row.values = {**row.values, "train.clip_norm": 0.7}
    assert {point_config(sweep, point).train.clip_norm for point in confirm_points(sweep, rows)} == {3.0}


def test_what_a_population_perturbs_makes_no_points_of_its_own(sweep_of: Make) -> None:
    sweep = population_of(sweep_of, per="point")
    rows = rows_of(sweep)
    for i, row in enumerate(rows):
        row.values = {**row.values, "train.clip_norm": 1 + i / 10}
    assert len(confirm_points(sweep, rows)) == 2 * 2 * 5


@pytest.mark.parametrize(
    ("state", "stage", "value"),
    [("STOPPED", "screen", 0.0), ("FINISHED", "confirm", 0.0), ("FINISHED", "screen", float("nan"))],
)
def test_stopped_unmeasured_and_confirmed_rows_are_no_candidates(sweep_of: Make, state: str, stage: str, value: float) -> None:
    sweep = sweep_of(**KEYS, confirm={})
    rows = rows_of(sweep)
    rows.append(Row("mae", {**rows[0].values, "optimizer.lr": 9.0}, {"eval_loss": value}, stage, state))
    assert chosen(confirm_points(sweep, rows), "mae") == [(64, 1e-3)]


def test_an_arm_that_finished_nothing_is_refused_with_its_states(sweep_of: Make) -> None:
    sweep = sweep_of(**KEYS, confirm={})
    rows = rows_of(sweep)
    for row in rows:
        row.state = "STOPPED" if row.arm == "crate" else "FINISHED"
    with pytest.raises(ConfigError, match=r"arm 'crate' has no finished screening trial with eval_loss.*4 STOPPED"):
        confirm_points(sweep, rows)
    with pytest.raises(ConfigError, match="its trials: none"):
        confirm_points(sweep, [])


def test_nothing_is_confirmed_that_was_not_asked_for(sweep_of: Make) -> None:
    assert confirm_points(sweep_of(**KEYS), []) == []


def test_a_longer_second_stage_keeps_equal_flops_equal(sweep_of: Make) -> None:
    sweep = sweep_of(
        set={"train.steps": 60},
        objective=["knn_top1"],
        arms={"images": {}, "flops": {"space": {"train.steps": {"same_flops_as": {"model.mask_ratio": 0.75}}}}},
        space={"model.mask_ratio": {"grid": [0.5]}},
        confirm={"set": {"train.steps": 600}},
    )
    rows = [Row(arm, points[0].values, {"knn_top1": 0.5}) for arm, points in make_plan(sweep).points.items()]
    steps = {point.arm: point_config(sweep, point).train.steps for point in confirm_points(sweep, rows)}
    screened = rows[1].values["train.steps"]
    assert steps["images"] == 600
    assert abs(steps["flops"] - 10 * screened) <= 5
