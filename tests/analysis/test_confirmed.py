"""Confirmed configurations: intervals over seeds, pairs, and what is missing."""

import math
from statistics import mean, stdev

import pytest

from crate_ray.analysis.confirmed import confirmed, differences
from crate_ray.analysis.ranking import rank

T4, T3 = 2.776445, 3.182446  # t(0.975) with 4 and 3 degrees of freedom, printed tables
SEEDS = range(1000, 1005)


def analysed(rows, sweep):
    found = confirmed(rows, sweep, rank(rows, sweep))
    return found, differences(found, sweep)


def runs(make_trial, arm, accuracies, **changes):
    return [make_trial(arm, top1, seed=seed, stage="confirm", **changes) for seed, top1 in zip(SEEDS, accuracies, strict=True)]


def test_means_and_paired_differences_are_those_of_the_textbook(make_sweep, make_trial):
    a, b = [0.80, 0.82, 0.81, 0.83, 0.84], [0.79, 0.80, 0.81, 0.81, 0.82]
    sweep = make_sweep(confirm={"top_k": 1})
    found, (difference,) = analysed([*runs(make_trial, "crate", a), *runs(make_trial, "mae", b)], sweep)
    half = T4 * stdev(a) / math.sqrt(5)
    interval = found[0].interval
    assert (interval.mean, interval.low, interval.high) == pytest.approx((mean(a), mean(a) - half, mean(a) + half), abs=1e-7)
    paired = [x - y for x, y in zip(a, b, strict=True)]
    half = T4 * stdev(paired) / math.sqrt(5)
    low, high = 100 * (mean(paired) - half), 100 * (mean(paired) + half)
    assert (
        difference.sentence() == f"crate minus mae: +1.4 [{low:.1f}, {high:.1f}] points over 5 paired seeds; crate is better."
    )
    assert difference.dropped == {}


def test_an_interval_with_zero_in_it_does_not_tell_the_arms_apart(make_sweep, make_trial):
    rows = [*runs(make_trial, "crate", [0.8, 0.9, 0.7, 0.8, 0.8]), *runs(make_trial, "mae", [0.9, 0.7, 0.8, 0.8, 0.8])]
    _, (difference,) = analysed(rows, make_sweep(confirm={}))
    assert not difference.excludes_zero
    assert difference.sentence().endswith("the interval holds 0, so these seeds do not tell them apart.")


def test_a_smaller_loss_is_the_better_one(make_sweep, make_trial):
    losses = {"crate": [0.50, 0.51, 0.49, 0.50, 0.50], "mae": [0.40, 0.42, 0.41, 0.40, 0.41]}
    rows = [
        make_trial(arm, seed=seed, stage="confirm", objectives={"eval_loss": loss})
        for arm, values in losses.items()
        for seed, loss in zip(SEEDS, values, strict=True)
    ]
    _, (difference,) = analysed(rows, make_sweep(confirm={}, objective="eval_loss"))
    assert difference.sentence().startswith("crate minus mae: +0.0920 [")
    assert difference.sentence().endswith("of validation loss over 5 paired seeds; mae is better.")


def test_missing_seeds_are_named_and_their_pairs_dropped(make_sweep, make_trial):
    crate = runs(make_trial, "crate", [0.80, 0.82, 0.81, 0.83, 0.84])
    mae = runs(make_trial, "mae", [0.79, 0.80, 0.81, 0.81, 0.99])[:4]
    mae[1] = make_trial("mae", None, seed=1001, stage="confirm", state="FAILED", reason="worker lost")
    crate[3] = make_trial("crate", math.nan, seed=1003, stage="confirm")
    found, (difference,) = analysed([*crate, *mae], make_sweep(confirm={}))
    assert found[0].missing == {1003: "finished without a finite knn_top1"}
    assert found[1].missing == {1001: "failed (worker lost)", 1004: "never started"}
    assert difference.interval.n == 2
    assert difference.interval.mean == pytest.approx(mean([0.80 - 0.79, 0.81 - 0.81]))
    assert difference.dropped == {
        1001: "mae failed (worker lost)",
        1003: "crate finished without a finite knn_top1",
        1004: "mae never started",
    }


def test_one_pair_has_no_interval(make_sweep, make_trial):
    rows = [make_trial(arm, seed=1000, stage="confirm") for arm in ("crate", "mae")]
    found, (difference,) = analysed(rows, make_sweep(confirm={}))
    assert found[0].interval is None
    assert found[0].value_of("knn_top1") == 0.8
    assert difference.sentence() == "crate minus mae: no interval, 1 paired seed(s), and it needs at least 2."


def test_the_configuration_is_chosen_on_the_screening_not_on_the_confirmed_values(make_sweep, make_trial):
    screened = [make_trial("crate", 0.9, lr=1e-3), make_trial("crate", 0.8, lr=1e-2), make_trial("mae", 0.85)]
    lucky = runs(make_trial, "crate", [0.95] * 5, lr=1e-2)
    rows = [*lucky, *runs(make_trial, "crate", [0.70] * 5, lr=1e-3), *runs(make_trial, "mae", [0.75] * 5), *screened]
    found, (difference,) = analysed(rows, make_sweep(confirm={"top_k": 2}))
    assert [(item.arm, item.place) for item in found] == [("crate", 1), ("crate", 2), ("mae", 1)]
    assert difference.interval.mean == pytest.approx(-0.05)


def test_points_are_compared_where_both_arms_have_them(make_sweep, make_trial):
    rows = [
        run
        for arm, base in (("crate", 0.8), ("mae", 0.7))
        for depth in (2, 4)
        for run in runs(make_trial, arm, [base + 0.01 * depth] * 5, depth=depth)
        if (arm, depth) != ("mae", 4)
    ]
    _, found = analysed(rows, make_sweep(confirm={"per": "point"}))
    assert [(item.point, item.first.arm, item.second.arm) for item in found] == [({"model.encoder_depth": 2}, "crate", "mae")]
    assert found[0].interval.mean == pytest.approx(0.1)


def test_arms_that_a_solver_matched_are_compared_with_what_they_were_matched_to(make_sweep, make_trial):
    sweep = make_sweep(
        arms={"crate": {"base": "digits_crate_mae", "space": {"model.width": {"grid": [64, 128]}}}, "mae": {}},
        space={},
        match={"quantity": "encoder_params_m", "to": "crate", "over": {"model.width": {"quantized": [16, 256, 16]}}},
        confirm={"per": "point"},
    )
    sizes = [("crate", 64, 1.00, 0.8), ("crate", 128, 4.00, 0.9), ("mae", 32, 1.03, 0.7), ("mae", 48, 3.90, 0.6)]
    rows = [
        run
        for arm, width, size, top1 in sizes
        for run in runs(
            make_trial,
            arm,
            [top1] * 5,
            values={"model.width": width, "optimizer.lr": 1e-3},
            quantities={"encoder_params_m": size},
        )
    ]
    _, found = analysed(rows, sweep)
    assert [(item.point, item.second.values["model.width"]) for item in found] == [
        ({"model.width": 64}, 32),
        ({"model.width": 128}, 48),
    ]
    assert [item.interval.mean for item in found] == pytest.approx([0.1, 0.3])


def test_losses_that_answer_different_questions_have_no_difference(make_sweep, make_trial):
    rows = [
        make_trial(arm, seed=seed, stage="confirm", objectives={"eval_loss": 0.5}, loss_target={"mask_ratio": ratio})
        for arm, ratio in (("crate", 0.5), ("mae", 0.75))
        for seed in SEEDS
    ]
    _, (difference,) = analysed(rows, make_sweep(confirm={}, objective="eval_loss"))
    assert difference.interval is None
    assert "different questions" in difference.sentence()


def test_a_confirm_stage_of_another_length_finds_its_screening_trial(make_sweep, make_trial):
    sweep = make_sweep(
        space={"model.mask_ratio": {"grid": [0.5, 0.75]}, "train.steps": {"same_flops_as": {"model.mask_ratio": 0.75}}},
        confirm={"set": {"schedule.warmup_steps": 5}},
    )
    values = {"model.mask_ratio": 0.5, "train.steps": 200, "optimizer.lr": 1e-3}
    longer = [make_trial("crate", seed=seed, stage="confirm", values=values | {"train.steps": 800}) for seed in SEEDS]
    found, _ = analysed([make_trial("crate", values=values), *longer], sweep)
    assert [item.place for item in found] == [1]


def test_without_a_confirm_stage_nothing_is_confirmed(make_sweep, make_trial):
    assert analysed([make_trial()], make_sweep()) == ([], [])
