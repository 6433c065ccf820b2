"""What a sweep will cost, against sums by hand and simulations of its schedulers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from crate_ray.config import ConfigError, RunConfig, SweepConfig
from crate_ray.config.prices import NO_PRICE, Price
from crate_ray.config.sweep import SchedulerConfig
from crate_ray.launch.sweeps.rungs import legs_of
from crate_ray.models.cost import forward_flops
from crate_ray.models.memory import activation_bytes, training_state_bytes
from crate_ray.runs import RunFolder
from crate_ray.space.arms import arm_config
from crate_ray.space.expected_steps import expected_steps, rungs, survivors
from crate_ray.space.forecast import (
    MEMORY_BASE_BYTES,
    MEMORY_MARGIN,
    Forecaster,
    Line,
    LiveError,
    Measured,
    PlannedTrial,
    Range,
    extremes,
    memory_reason,
    planned_trial,
    wall_seconds,
)
from crate_ray.space.plan import make_plan
from crate_ray.space.planned import planned_sweep

SMALL = Measured(1.0, (0.1, 0.2, 0.3), evaluation_s=1.0, frame_s=2.0)
LARGE = Measured(3.0, (0.5, 0.6, 0.9), evaluation_s=2.0, frame_s=2.0)


def sweep_of(**keys: object) -> SweepConfig:
    space = {"model.encoder_depth": {"grid": [1, 2, 4]}}
    return SweepConfig.parse({"name": "s", "base": "digits_crate_mae", "report_every_steps": 10, "space": space, **keys})


def simulate(
    judged_at: Sequence[float], factor: float, trials: int, total: int, generator: np.random.Generator
) -> tuple[float, float]:
    """Mean steps and share at the end of trials that come one by one to rungs that stop what is below their quantile."""
    steps, values = 0.0, [list[float]() for _ in judged_at]
    finished = 0
    for _ in range(trials):
        for rung, judged in zip(judged_at, values, strict=True):
            value = generator.random()
            stops = bool(judged) and value < np.percentile(judged, (1 - 1 / factor) * 100)
            judged.append(value)
            if stops:
                steps += rung
                break
        else:
            steps, finished = steps + total, finished + 1
    return steps / trials, finished / trials


@pytest.mark.parametrize(("factor", "trials"), [(3.0, 2), (3.0, 20), (2.0, 7)])
def test_trials_that_pass_a_rung_are_as_many_as_a_simulation_lets_pass(factor: float, trials: int) -> None:
    generator = np.random.default_rng(0)
    passed = [simulate([1], factor, trials, 2, generator)[1] * trials for _ in range(400)]
    assert survivors(trials, factor) == pytest.approx(np.mean(passed), abs=4 * np.std(passed) / len(passed) ** 0.5)


def test_steps_under_asha_are_those_of_a_simulation() -> None:
    scheduler = SchedulerConfig(type="asha", grace_steps=100, reduction_factor=3)
    found = expected_steps(scheduler, total_steps=1000, trials=20, report_every=50)
    generator = np.random.default_rng(1)
    runs = np.array([simulate([100, 300, 900], 3, 20, 1000, generator) for _ in range(200)])
    assert found.mean == pytest.approx(runs[:, 0].mean(), rel=0.05)
    assert found.finished == pytest.approx(runs[:, 1].mean(), rel=0.15)
    assert found.least == (1000 + 19 * 100) / 20
    assert found.most == 1000


def test_a_rung_between_two_reports_is_judged_at_the_later_one() -> None:
    scheduler = SchedulerConfig(type="asha", grace_steps=30, reduction_factor=3)
    by_50 = expected_steps(scheduler, total_steps=1000, trials=9, report_every=50)
    at_50_100_300_850 = 0.0
    left, reached = 9.0, 0
    for rung in (50, 100, 300, 850):  # 30, 90, 270, 810
        at_50_100_300_850, left, reached = at_50_100_300_850 + left * (rung - reached), survivors(left, 3), rung
    assert by_50.mean == pytest.approx((at_50_100_300_850 + left * (1000 - reached)) / 9)


def test_rungs_multiply_from_the_grace_period_and_leave_out_the_end() -> None:
    assert rungs(100, 3, 900) == [100, 300]
    assert rungs(100, 3, 901) == [100, 300, 900]
    assert rungs(100, 2, 100) == []
    assert rungs(3, 1.5, 8) == [3, 5, 7], "3, 4.5 and 6.75"


def test_hyperband_averages_over_its_brackets() -> None:
    """R = 9, factor 3: 9 trials of 1 + 2/3 + 6/9 units, 5 of 3 + 6/3, 3 of 9; 1, 5/3 and 3 of them come to the end."""
    scheduler = SchedulerConfig(type="hyperband", grace_steps=100, reduction_factor=3)
    found = expected_steps(scheduler, total_steps=900, trials=17, report_every=100)
    assert found.mean == pytest.approx(100 * (9 * 7 / 3 + 5 * 5 + 3 * 9) / 17)
    assert found.finished == pytest.approx((1 + 5 / 3 + 3) / 17)
    assert found.least == pytest.approx(100 * 7 / 3)


@pytest.mark.parametrize("kind", ["none", "pbt"])
def test_without_early_stops_every_step_is_trained(kind: str) -> None:
    keys = {"type": kind} | ({"interval_steps": 10} if kind == "pbt" else {})
    found = expected_steps(SchedulerConfig.parse(keys), total_steps=70, trials=9, report_every=10)
    assert (found.least, found.mean, found.most, found.finished) == (70, 70, 70, 1)


def test_a_median_rule_is_assumed_to_stop_half_of_the_trials_halfway() -> None:
    found = expected_steps(SchedulerConfig(type="median", grace_steps=20), total_steps=100, trials=10, report_every=10)
    assert found.mean == 0.5 * 100 + 0.5 * 60
    assert found.least == (100 + 9 * 20) / 10


def test_a_line_gives_back_its_points_and_the_middle_between_them() -> None:
    line = Line.through([(1.0, 0.2), (3.0, 0.6)])
    assert [line.at(x) for x in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.6])
    level = Line.through([(1.0, 0.6), (3.0, 0.2)])  # noise: the larger run was not slower
    assert (level.at(1), level.at(3)) == pytest.approx((0.4, 0.4))
    assert Line.through([(2.0, 0.7)]).at(2) == 0.7


def test_seconds_of_a_trial_are_the_sum_of_its_parts() -> None:
    forecaster = Forecaster(sweep_of(), {"crate": [SMALL, LARGE]}, overhead_s=4)
    found = forecaster.seconds(PlannedTrial("crate", 2.0, 100), steps=100)
    assert found.expected == pytest.approx(4 + 2 + 10 * 1.5 + 100 * 0.4)
    assert found.low == pytest.approx(4 + 2 + 10 * 1.5 + 100 * 0.3)
    assert found.high == pytest.approx(4 + 2 + 10 * 1.5 + 100 * 0.6)


def test_looks_at_layers_and_the_probe_are_counted_where_the_sweep_takes_them() -> None:
    measured = Measured(1.0, (0.1,), evaluation_s=0, whitebox_s=3, probe_s=7)
    trial = PlannedTrial("crate", 1.0, 100, whitebox_every=40)
    plain = Forecaster(sweep_of(), {"crate": [measured]}, overhead_s=0)
    probed = Forecaster(sweep_of(objective="probe_top1"), {"crate": [measured]}, overhead_s=0)
    assert plain.seconds(trial, steps=100).expected == pytest.approx(10 + 3 * (1 + 3))
    assert probed.seconds(trial, steps=100, is_finished=0.5).expected == pytest.approx(10 + 3 * 4 + 3.5)


def test_each_arm_has_a_line_of_its_own() -> None:
    dear = Measured(1.0, (1.0,), evaluation_s=0)
    forecaster = Forecaster(sweep_of(), {"crate": [SMALL], "vit": [dear]}, overhead_s=0)
    both = [forecaster.seconds(PlannedTrial(arm, 1.0, 10), steps=10).expected for arm in ("crate", "vit")]
    assert both == pytest.approx([2 + 1 + 2, 10])


def cooled_sweep(**keys: object) -> SweepConfig:
    """Rungs at 40 and 120 of 200 steps, each with a cooldown of a quarter: 10 and 30 steps."""
    keys = {"train.steps": 200, "schedule.cooldown_fraction": 0.25, "schedule.warmup_steps": 5, **keys}
    return sweep_of(set=keys, scheduler={"type": "asha", "grace_steps": 40}, report_every_steps=20)


def cooled_trial(sweep: SweepConfig) -> PlannedTrial:
    return planned_sweep(sweep, make_plan(sweep)).screen[0]


def test_a_trial_judged_on_cooled_branches_trains_evaluates_and_starts_each_of_them_besides() -> None:
    sweep = cooled_sweep(**{"eval.whitebox_every_steps": 50})
    trial = cooled_trial(sweep)
    measured = Measured(trial.gflops_per_step, (1.0,), evaluation_s=100.0, whitebox_s=1e4, frame_s=1e6)
    forecaster = Forecaster(sweep, {trial.arm: [measured]}, overhead_s=0)
    # Evaluated at 20, 40, ..., 200; on the branches from 30 and from 90 on once more at 40, and at 100 and 120.
    # The layers at 0, 50, ..., 200; once more at 40, an end, and at 100 and 120.
    expected = {40: 40 + 2e2 + 2e4 + 1e6, 120: 130 + 7e2 + 5e4 + 2e6, 200: 240 + 13e2 + 8e4 + 3e6}
    for steps, seconds in expected.items():
        assert forecaster.seconds(trial, steps=steps).expected == pytest.approx(seconds), steps


@pytest.mark.parametrize(("steps", "fraction", "factor"), [(200, 0.25, 3), (1000, 0.2, 1.7), (41, 0.01, 2)])
def test_the_branches_are_those_that_a_trial_trains(steps: int, fraction: float, factor: float) -> None:
    sweep = cooled_sweep(**{"train.steps": steps, "schedule.cooldown_fraction": fraction})
    scheduler = sweep.scheduler.model_copy(update={"reduction_factor": factor})
    config = arm_config(sweep, "crate")
    legs = legs_of(config, RunFolder("/nowhere"), scheduler, num_samples=1000)
    trial = planned_trial("crate", config, scheduler=scheduler)
    assert [(branch.start, branch.rung) for branch in trial.branches] == [(leg.cooldown, leg.total_steps) for leg in legs[:-1]]
    starts = [0, *(leg.cooldown or 0 for leg in legs[:-1])]
    trained = sum(leg.total_steps - start for leg, start in zip(legs, starts, strict=True))
    assert steps + sum(branch.steps for branch in trial.branches) == trained


def test_a_screening_on_cooled_branches_pays_for_those_that_go_on_from_a_rung() -> None:
    sweep = cooled_sweep()
    trial = replace(cooled_trial(sweep), whitebox_every=None)
    measured = Measured(trial.gflops_per_step, (1.0,), evaluation_s=0.0)
    found = Forecaster(sweep, {trial.arm: [measured]}, overhead_s=0).forecast([trial] * 9, concurrency=1).screen
    past_40 = survivors(9, 3)
    past_120 = survivors(past_40, 3)
    straight = 9 * 40 + past_40 * 80 + past_120 * 80
    assert found.steps.expected == pytest.approx(straight)
    assert found.trial_seconds.expected == pytest.approx(straight + past_40 * 10 + past_120 * 30)
    assert found.trial_seconds.low == pytest.approx(8 * 40 + 200 + 10 + 30)
    assert found.trial_seconds.high == pytest.approx(9 * (200 + 10 + 30))


def test_what_confirms_is_one_run_to_its_end_whatever_judged_the_screening() -> None:
    sweep = cooled_sweep().model_copy(update={"confirm": sweep_of(confirm={}).confirm})
    planned = planned_sweep(sweep, make_plan(sweep))
    assert all(len(trial.branches) == 2 for trial in planned.screen)
    assert {trial.branches for trial in planned.confirm} == {()}


def test_each_branch_of_several_workers_starts_them_anew() -> None:
    two = sweep_of(resources_per_trial={"num_workers": 2}).resources_per_trial
    sweep = cooled_sweep().model_copy(update={"resources_per_trial": two})
    trial = replace(cooled_trial(sweep), whitebox_every=None)
    measured = Measured(trial.gflops_per_step, (0.0,), evaluation_s=0.0)
    assert Forecaster(sweep, {trial.arm: [measured]}, overhead_s=7).seconds(trial, steps=200).expected == 3 * 7


def test_the_next_trial_takes_the_first_free_place() -> None:
    assert wall_seconds([3, 1, 1, 2], 2) == 4
    assert wall_seconds([3, 1, 1, 2], 1) == 7
    assert wall_seconds([3, 1, 1, 2], 9) == 3


def test_a_forecast_sums_hours_wall_time_and_cost_by_stage() -> None:
    sweep = sweep_of(resources_per_trial={"gpus": 0.5, "cpus": 2}, confirm={"top_k": 1, "seeds": 5})
    measured = Measured(1.0, (0.5, 1.0, 2.0), evaluation_s=0)
    forecaster = Forecaster(sweep, {"crate": [measured]}, overhead_s=10, start_s=20)
    trials = [PlannedTrial("crate", 1.0, 90)] * 4
    found = forecaster.forecast(
        trials, confirm=[PlannedTrial("crate", 1.0, 190)], num_confirm=5, concurrency=2, price=Price("x", 4.0, 1, 8)
    )
    assert found.screen.trial_seconds == Range(4 * 55, 4 * 100, 4 * 190)
    assert found.screen.wall_seconds == Range(110, 200, 380)
    assert found.confirm is not None
    assert found.confirm.trial_seconds.expected == 5 * 200
    assert found.confirm.wall_seconds.expected == 3 * 200
    body = found.as_dict()
    assert body["total"]["wall_hours"]["expected"] == pytest.approx((20 + 200 + 600) / 3600)
    assert body["total"]["gpu_hours"]["expected"] == pytest.approx(0.5 * 1400 / 3600)
    assert body["total"]["usd"]["expected"] == pytest.approx(4 * 0.5 * 1400 / 3600)
    assert body["stages"]["screen"]["trials"] == 4
    assert body["stages"]["confirm"]["trials"] == 5


def test_without_a_price_the_cost_is_not_zero_but_unknown() -> None:
    found = Forecaster(sweep_of(), {"crate": [SMALL]}).forecast([PlannedTrial("crate", 1.0, 10)], concurrency=1)
    body = found.as_dict()
    assert body["total"]["usd"] == NO_PRICE == body["price"]
    assert "cpu_hours" in body["total"]
    assert "gpu_hours" not in body["total"]


def test_trials_compete_only_within_their_class_of_size() -> None:
    trials = [PlannedTrial("crate", 1.0, 1000)] * 30
    keys = {"type": "asha", "grace_steps": 100}
    apart = sweep_of(scheduler={**keys, "bracket_by": "params", "num_brackets": 3})
    steps = {
        name: Forecaster(sweep, {"crate": [SMALL]}).forecast(trials, concurrency=1).screen.steps.expected
        for name, sweep in {"together": sweep_of(scheduler=keys), "apart": apart}.items()
    }
    assert steps["apart"] > steps["together"]


def test_the_second_stage_lies_between_its_cheapest_and_its_dearest_candidates() -> None:
    forecaster = Forecaster(sweep_of(), {"crate": [SMALL, LARGE]}, overhead_s=0)
    small, large = PlannedTrial("crate", 1.0, 10), PlannedTrial("crate", 3.0, 10)
    found = forecaster.forecast([small], confirm=[small, large], num_confirm=5, concurrency=1).confirm
    assert found is not None
    one = [forecaster.seconds(trial, steps=10) for trial in (small, large)]
    assert found.trial_seconds.low == pytest.approx(5 * one[0].low)
    assert found.trial_seconds.expected == pytest.approx(5 * (one[0].expected + one[1].expected) / 2)
    assert found.trial_seconds.high == pytest.approx(5 * one[1].high)


def test_what_goes_past_the_budget_is_named() -> None:
    sweep = sweep_of(budget={"hours": 0.001, "usd": 100, "price": 1.0})
    found = Forecaster(sweep, {"crate": [SMALL]}).forecast(
        [PlannedTrial("crate", 1.0, 100)], concurrency=1, price=Price("x", 1.0, 0, 1)
    )
    (line,) = found.beyond(sweep)
    assert line.startswith("budget.hours = 0.001, forecast 0.01")


def test_a_forecast_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 trials"):
        Forecaster(sweep_of(), {"crate": [SMALL]}).forecast([], concurrency=1)


def test_the_live_error_is_that_of_all_trials_together() -> None:
    error = LiveError()
    assert error.relative is None
    error = error.with_trial(10, 15).with_trial(30, 25)
    assert error.relative == pytest.approx(40 / 40 - 1)
    assert error.with_trial(40, 60).relative == pytest.approx(0.25)


def test_the_smallest_and_the_largest_run_of_every_arm_are_named() -> None:
    trials = [PlannedTrial("a", 2, 1), PlannedTrial("b", 5, 1), PlannedTrial("a", 1, 1), PlannedTrial("a", 3, 1)]
    assert extremes(trials) == {"a": (2, 3), "b": (1,)}


@pytest.fixture
def load() -> Callable[..., RunConfig]:
    return lambda *overrides: RunConfig.load("imagenet_mae_base", ["scale.num_workers=1", *overrides])


def test_a_planned_trial_counts_forward_and_backward_of_a_batch(load: Callable[..., RunConfig]) -> None:
    config = load("train.epochs=null", "train.steps=7", "train.global_batch=4")
    trial = planned_trial("vit", config)
    assert trial.gflops_per_step == pytest.approx(3 * 4 * forward_flops(config.model) / 1e9)
    assert trial.steps == 7


def test_a_length_in_epochs_needs_the_number_of_images(load: Callable[..., RunConfig]) -> None:
    config = load("train.steps=null", "train.epochs=2", "train.global_batch=100")
    assert planned_trial("vit", config, num_samples=1000).steps == 20
    with pytest.raises(ConfigError, match=r"set train\.steps"):
        planned_trial("vit", config)


def test_a_run_too_large_is_refused_with_a_micro_batch_that_fits(load: Callable[..., RunConfig]) -> None:
    config = load("train.global_batch=512", "train.micro_batch=null", "train.precision=bfloat16")
    state, image = training_state_bytes(config.model), activation_bytes(config.model, precision="bfloat16")
    device_bytes = 16 << 30
    reason = memory_reason(config, device_bytes=device_bytes)
    assert reason is not None
    assert "16.00 GiB" in reason
    assert f"{state / 2**30:.2f} GiB of weights" in reason
    assert "512 images" in reason
    fits = int(reason.rpartition("train.micro_batch = ")[2].split()[0])
    assert MEMORY_MARGIN * (state + fits * image) + MEMORY_BASE_BYTES <= device_bytes
    assert memory_reason(load("train.global_batch=512", f"train.micro_batch={fits}"), device_bytes=device_bytes) is None
    assert memory_reason(load("train.global_batch=512", f"train.micro_batch={fits + 1}"), device_bytes=device_bytes) is not None


def test_a_worker_holds_its_share_of_the_batch(load: Callable[..., RunConfig]) -> None:
    alone = load("train.global_batch=512", "train.micro_batch=null")
    shared = load("train.global_batch=512", "train.micro_batch=null", "scale.num_workers=8")
    assert memory_reason(alone, device_bytes=16 << 30) is not None
    assert memory_reason(shared, device_bytes=16 << 30) is None


def test_a_device_for_not_even_one_image_is_said_to_be_that(load: Callable[..., RunConfig]) -> None:
    reason = memory_reason(load(), device_bytes=1 << 30)
    assert reason is not None
    assert reason.endswith("not even one image at a time fits")


def planning(**keys: object) -> SweepConfig:
    return sweep_of(
        arms={"crate": {}, "vit": {"base": "digits_mae"}},
        tune={"optimizer.lr": {"grid": [1e-4, 1e-3]}},
        confirm={"top_k": 1, "seeds": 5, "set": {"train.steps": 900}, **keys},
    )


def test_both_stages_are_planned_with_the_runs_to_time() -> None:
    sweep = planning()
    found = planned_sweep(sweep, make_plan(sweep))
    assert [trial.arm for trial in found.screen] == ["crate", "vit"] * 6
    assert {trial.steps for trial in found.screen} == {600}
    assert {trial.steps for trial in found.confirm} == {900}
    assert found.num_confirm == 2 * 5
    depths = {arm: [config.model.encoder_depth for config in configs] for arm, configs in found.to_measure.items()}
    assert depths == {"crate": [1, 4], "vit": [1, 4]}


def test_every_point_of_the_space_is_confirmed_where_the_sweep_asks_for_that() -> None:
    sweep = planning(per="point")
    assert planned_sweep(sweep, make_plan(sweep)).num_confirm == 2 * 3 * 5


def test_the_screening_is_no_longer_than_its_budget() -> None:
    sweep = planning().model_copy(update={"budget": sweep_of(budget={"trials": 5}).budget})
    assert len(planned_sweep(sweep, make_plan(sweep)).screen) == 5
