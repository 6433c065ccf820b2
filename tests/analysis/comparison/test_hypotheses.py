"""Pairs are declared before outcomes, paired by seed, and corrected for their number."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from synthetic_rows import Law, synthetic_row, synthetic_rows

from crate_ray.analysis.comparison.compare import compare
from crate_ray.analysis.comparison.configurations import sort_rows
from crate_ray.analysis.comparison.hypotheses import declare, is_distinguished
from crate_ray.analysis.comparison.result import AXES, Comparison
from crate_ray.runs.rows import RunRow

EQUAL = {"crate_mae": Law(), "mae": Law()}


def pair(first: list[float], second: list[float], *, params: tuple[int, int] = (1_000_000, 1_000_000)) -> list[RunRow]:
    """Runs of one configuration of each family, by seed."""
    return [
        synthetic_row(model, size, value=value, seed=seed, tuning_trials=5)
        for model, size, values in (("crate_mae", params[0], first), ("mae", params[1], second))
        for seed, value in enumerate(values)
    ]


def on(comparison: Comparison, axis: str = "params"):  # type: ignore[no-untyped-def]
    return [item for item in comparison.differences if item.axis == axis]


def test_the_difference_is_crate_minus_mae_over_the_seeds_that_both_have() -> None:
    crate, mae = [0.91, 0.93, 0.92, 0.95, 0.92, 0.9], [0.9, 0.9, 0.91, 0.92, 0.9]
    [item] = on(compare(pair(crate, mae), name="made"))
    expected = stats.ttest_rel(crate[:5], mae)
    interval = expected.confidence_interval(0.95)
    assert item.seeds == (0, 1, 2, 3, 4)
    assert item.dropped == {5: "MAE 4x128 has no such seed"}
    assert item.interval is not None
    np.testing.assert_allclose(item.interval, (np.mean(np.subtract(crate[:5], mae)), interval.low, interval.high))
    assert math.isclose(item.p_value or 0, expected.pvalue)
    assert "CRATE-MAE 4x128 is better than MAE 4x128 by 2.0 [" in item.verdict
    assert "over 5 paired seeds" in item.verdict


def test_a_pair_that_stands_on_several_axes_is_one_hypothesis() -> None:
    comparison = compare(pair([0.91, 0.93, 0.92, 0.95, 0.92], [0.9, 0.9, 0.91, 0.92, 0.9]), name="made")
    assert {item.axis for item in comparison.differences} == {"params", "flops", "time", "best"}
    assert {item.p_holm for item in comparison.differences} == {comparison.differences[0].p_value}


def test_holm_counts_all_pairs_of_the_comparison() -> None:
    rows = synthetic_rows({"crate_mae": Law(b=0.119), "mae": Law()}, widths=(64, 128, 256, 512), random=3)
    found = {(item.first.label, item.second.label): item for item in compare(rows, name="made").differences}
    raw = sorted(item.p_value or 0 for item in found.values())
    expected = np.minimum(1, np.maximum.accumulate([p * (len(raw) - i) for i, p in enumerate(raw)]))
    np.testing.assert_allclose(sorted(item.p_holm or 0 for item in found.values()), expected)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fewer_than_five_pairs_give_no_verdict_however_clear(count: int) -> None:
    rows = pair([0.9 + 0.001 * i for i in range(count)], [0.5 + 0.0011 * i for i in range(count)])
    comparison = compare(rows, name="made")
    assert all("and a verdict needs 5" in str(item.why_no_verdict) for item in comparison.differences)
    assert not any(is_distinguished(item) for item in comparison.differences)
    assert all(item.verdict.startswith("No verdict on CRATE-MAE 4x128 and MAE 4x128") for item in comparison.differences)
    assert all(item.ratio is None for item in comparison.ratios)
    assert (on(comparison)[0].interval is None) == (count < 2)
    assert comparison.headline.startswith(f"No verdict: {count} seed")


def test_differences_that_do_not_exclude_zero_are_not_distinguishable() -> None:
    [item] = on(compare(pair([0.9, 0.91, 0.92, 0.9, 0.93], [0.91, 0.9, 0.93, 0.91, 0.92]), name="made"))
    assert "are not distinguishable: " in item.verdict
    assert not is_distinguished(item)


def test_an_interval_without_zero_is_no_verdict_once_its_number_is_allowed_for() -> None:
    for random in range(40):
        rows = synthetic_rows(EQUAL, random=random)
        told = [item for item in on(compare(rows, name="made")) if item.p_value is not None and item.p_value < 0.05]
        if told and (told[0].p_holm or 0) >= 0.05:
            assert "not distinguishable, once all comparisons made are allowed for" in told[0].verdict
            assert not is_distinguished(told[0])
            return
    pytest.fail("no draw had such a pair")


def test_a_winner_is_named_with_what_it_wins_by_whichever_family_it_is() -> None:
    crate, mae = [0.91, 0.93, 0.92, 0.95, 0.92], [0.9, 0.9, 0.91, 0.92, 0.9]
    [won], [lost] = on(compare(pair(crate, mae), name="made")), on(compare(pair(mae, crate), name="made"))
    assert won.interval is not None
    assert lost.interval == (-won.interval.value, -won.interval.high, -won.interval.low)
    swap = {"CRATE-MAE 4x128": "MAE 4x128", "MAE 4x128": "CRATE-MAE 4x128"}
    first, second = (item.verdict.partition(" is better than ") for item in (won, lost))
    assert (
        second[0].removeprefix("At equal encoder parameters, ") == swap[first[0].removeprefix("At equal encoder parameters, ")]
    )
    assert first[2].partition(" by ")[2] == second[2].partition(" by ")[2] != ""


def test_between_the_choices_the_verdict_says_what_they_cost() -> None:
    rows = pair([0.91, 0.93, 0.92, 0.95, 0.92], [0.9, 0.9, 0.91, 0.92, 0.9], params=(500_000, 2_000_000))
    [best] = on(compare(rows, name="made"), "best")
    assert best.verdict.startswith("With one configuration of each, CRATE-MAE 4x128 is better than MAE 4x128 by ")
    assert "CRATE-MAE 4x128 has 0.25 times the encoder parameters and 0.25 times the training FLOPs" in best.verdict
    chosen = compare([replace(row, place=1) for row in rows], name="made")
    assert on(chosen, "best")[0].verdict.startswith("Each as its screening chose it, CRATE-MAE 4x128 is better")


def test_a_seed_without_an_end_is_dropped_from_the_pairs_and_named() -> None:
    rows = pair([0.9] * 6, [0.8, 0.81, 0.8, 0.82, 0.8, 0.81])
    rows = [
        replace(row, values={**row.values, "probe_top1": math.nan}) if (row.model, row.seed) == ("mae", 2) else row
        for row in rows
    ]
    [item] = on(compare(rows, name="made"))
    assert item.seeds == (0, 1, 3, 4, 5)
    assert item.dropped == {2: "MAE 4x128: probe_top1 is NaN"}
    assert "1 seed without a pair" in item.verdict


def test_each_configuration_meets_the_nearest_within_five_percent_of_each_baseline() -> None:
    def runs(model: str, size: int) -> list[RunRow]:
        return [synthetic_row(model, size, seed=seed, width=size // 1000, tuning_trials=5) for seed in range(5)]

    sizes = {"crate_mae": (100_000, 200_000), "mae": (96_000, 103_000, 220_000), "mae_all_tokens": (104_000, 190_500)}
    rows = [row for model, of_model in sizes.items() for size in of_model for row in runs(model, size)]
    found = declare(sort_rows(rows, "probe_top1").configurations, "probe_top1", ("params",))
    assert [(item.first.rows[0].params_encoder, item.second.model, item.second.rows[0].params_encoder) for item in found] == [
        (100_000, "mae", 103_000),
        (100_000, "mae_all_tokens", 104_000),
        (200_000, "mae_all_tokens", 190_500),
    ]


def test_the_nearest_that_may_be_compared_is_preferred_to_the_nearest() -> None:
    near = [synthetic_row("mae", 1_000_000, seed=seed, compare={"precision": "float32"}) for seed in range(5)]
    next_best = [synthetic_row("mae", 1_020_000, seed=seed, width=130) for seed in range(5)]
    crate = [synthetic_row("crate_mae", 1_000_000, seed=seed) for seed in range(5)]
    [item] = on(compare([*near, *next_best, *crate], name="made"))
    assert item.second.rows[0].params_encoder == 1_020_000


def test_hypotheses_do_not_depend_on_outcomes() -> None:
    rows = synthetic_rows({**EQUAL, "mae_all_tokens": Law()}, random=1)
    generator = np.random.default_rng(0)
    shuffled = [replace(row, values={**row.values, "probe_top1": float(generator.random())}) for row in rows]
    one, two = (
        [
            (i.axis, i.first.label, i.second.label)
            for i in declare(sort_rows(r, "probe_top1").configurations, "probe_top1", AXES)
        ]
        for r in (rows, shuffled)
    )
    assert one == two
    assert len(one) == 3 * 8 * 2 + 2


def test_the_best_of_each_family_is_what_its_screening_chose_not_what_did_best() -> None:
    rows = synthetic_rows(EQUAL, widths=(128, 256))
    swapped = {1: 2, 2: 1}
    rows = [replace(row, place=swapped[row.place or 0]) if row.model == "mae" else row for row in rows]
    [best] = on(compare(rows, name="made"), "best")
    assert (best.first.label, best.second.label) == ("CRATE-MAE 4x256", "MAE 4x128")
    plain = synthetic_rows(EQUAL, widths=(128, 256), sweep=None)
    assert not on(compare(plain, name="made"), "best"), "nobody chose among plain runs"


def test_each_arm_of_a_sweep_has_its_choice_and_meets_those_of_its_own_sweep() -> None:
    def confirmed(model: str, arm: str, sweep: str, width: int) -> list[RunRow]:
        how = {"arm": arm, "sweep": sweep, "stage": "confirm", "place": 1, "tuning_trials": 5, "width": width}
        return [synthetic_row(model, 10_000 * width, seed=seed, **how) for seed in range(5)]

    rows = [
        *confirmed("crate_mae", "crate", "one", 64),
        *confirmed("crate_mae", "untied", "one", 96),
        *confirmed("mae", "mae", "one", 128),
        *confirmed("crate_mae", "crate", "two", 192),
        *confirmed("mae", "mae", "two", 256),
    ]
    pairs = {(item.first.label, item.second.label) for item in on(compare(rows, name="made"), "best")}
    assert pairs == {
        ("CRATE-MAE 4x64", "MAE 4x128"),
        ("CRATE-MAE 4x96", "MAE 4x128"),
        ("CRATE-MAE 4x192", "MAE 4x256"),
    }


def test_noise_of_the_test_set_is_that_of_source_images_with_the_models_held_fixed() -> None:
    rows = pair([0.75] * 5, [0.5] * 5)
    sources = ["a", "b", "c", "d"]
    bodies = {
        row.run_uid: {
            "sources": sources,
            "rows": [1, 1, 1, 1],
            "correct": {"probe_top1": [1, 1, 1, 0] if row.family == "crate" else [1, 0, 1, 0]},
        }
        for row in rows
    }
    [item] = on(compare(rows, name="made", answers=bodies))
    assert item.test_noise is not None
    assert item.test_noise.value == 0.25
    # differences 0, 1, 0, 0: mean .25, s = .5, t(3) = 3.1824
    half = 3.182446305284263 * 0.5 / 2
    np.testing.assert_allclose(item.test_noise, (0.25, 0.25 - half, 0.25 + half))
    reordered = {
        uid: {"sources": sources[::-1], "rows": [1] * 4, "correct": {"probe_top1": body["correct"]["probe_top1"][::-1]}}
        for uid, body in bodies.items()
    }
    mixed = {uid: (reordered if index % 2 else bodies)[uid] for index, uid in enumerate(bodies)}
    assert on(compare(rows, name="made", answers=mixed))[0].test_noise == item.test_noise
    other_images = {**bodies, rows[0].run_uid: {**bodies[rows[0].run_uid], "sources": ["a", "b", "c", "e"]}}
    assert on(compare(rows, name="made", answers=other_images))[0].test_noise is None
    assert on(compare(rows, name="made", answers=dict(list(bodies.items())[:9])))[0].test_noise is None


def test_answers_of_a_pair_that_stands_on_several_axes_are_looked_at_once() -> None:
    class Counted(dict[str, dict[str, Any]]):
        asked = 0

        def get(self, *key: Any) -> Any:
            self.asked += 1
            return super().get(*key)

    rows = pair([0.75] * 5, [0.5] * 5)
    body = {"sources": ["a", "b"], "rows": [1, 1], "correct": {"probe_top1": [1, 0]}}
    answers = Counted({row.run_uid: body for row in rows})
    comparison = compare(rows, name="made", answers=answers)
    assert len(comparison.differences) == 4
    assert all(item.test_noise is not None for item in comparison.differences)
    assert answers.asked == 10


@pytest.mark.slow
@pytest.mark.timeout(400)  # 25 s of CPU
def test_under_the_null_a_winner_is_named_no_more_often_than_stated() -> None:
    """8 sizes against two baselines, 3 axes: the chance that any verdict names a winner is to be at most 5%."""
    draws = 250
    laws = {**EQUAL, "mae_all_tokens": Law()}
    named = 0
    for random in range(draws):
        comparison = compare(synthetic_rows(laws, random=random), name="null", axes=("params",))
        named += any(is_distinguished(item) for item in comparison.differences)
    assert named / draws <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / draws)


def test_under_the_null_few_draws_name_a_winner() -> None:
    draws = 40
    found = (
        compare(synthetic_rows(EQUAL, widths=(64, 128, 256, 512), random=random), name="null", axes=("params",))
        for random in range(draws)
    )
    named = sum(any(is_distinguished(item) for item in comparison.differences) for comparison in found)
    assert named <= 5, "of 40 draws at 5%, more than 5 come once in 100 times"
