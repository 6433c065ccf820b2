"""The whole comparison: what it says of a truth that is known, in any order of rows, and what it refuses."""

import math
import random
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_rows import (
    COMPARE,
    Law,
    synthetic_comparison,
    synthetic_layers,
    synthetic_row,
    synthetic_rows,
    synthetic_screening,
)

from crate_ray.analysis.comparison.compare import compare
from crate_ray.analysis.comparison.result import Comparison
from crate_ray.config import ConfigError
from crate_ray.runs.rows import Estimate, RunRow

LAWS = {"crate_mae": Law().needing(0.42), "mae": Law()}


@pytest.fixture(scope="module")
def whole() -> Comparison:
    return synthetic_comparison(noise=0.002)


def one_seed() -> list[RunRow]:
    """As the quickstart has them: three runs, judged on test."""

    def run(model: str, width: int, params: int, value: float) -> RunRow:
        half = 0.015
        return synthetic_row(
            model,
            params,
            value=value,
            width=width,
            train_flops_per_image=params * 100.0,
            timing="shared",
            intervals={
                "probe_top1": Estimate(value, value - half, value + half),
                "gain": Estimate(value - 0.4, value - 0.43, value - 0.37),
            },
        )

    return [run("crate_mae", 128, 400_000, 0.931), run("mae", 128, 800_000, 0.944), run("mae", 96, 410_000, 0.925)]


def test_the_headline_is_the_ratio_of_parameters_and_its_interval_holds_the_truth(whole: Comparison) -> None:
    ratio = next(item for item in whole.ratios if (item.axis, item.baseline) == ("params", "mae"))
    assert ratio.ratio is not None
    assert ratio.ratio.low <= 0.42 <= ratio.ratio.high
    assert whole.headline.startswith(ratio.sentence)
    assert "CRATE-MAE needs" in whole.headline
    assert "of the encoder parameters of MAE (facebook) at" in whole.headline
    assert "MAE (CRATE repository)" in whole.headline


def test_the_first_axis_makes_the_headline() -> None:
    comparison = compare(synthetic_rows(LAWS), name="made", axes=("flops", "params", "time"))
    assert "training FLOPs" in comparison.headline
    assert list(comparison.verdicts) == ["flops", "params", "time", "best"]


def test_every_baseline_has_a_curve_and_a_ratio_of_its_own_on_every_axis(whole: Comparison) -> None:
    models = ("crate_mae", "mae", "mae_all_tokens")
    assert {(curve.axis, curve.model) for curve in whole.curves} == {
        (axis, model) for axis in ("params", "flops", "time") for model in models
    }
    assert {(item.axis, item.baseline) for item in whole.ratios} == {
        (axis, model) for axis in ("params", "flops", "time") for model in models[1:]
    }


def test_the_ratio_of_all_parameters_stands_beside_that_of_the_encoder(whole: Comparison) -> None:
    assert [item.baseline for item in whole.total_ratios] == ["mae", "mae_all_tokens"]
    encoder = next(item for item in whole.ratios if (item.axis, item.baseline) == ("params", "mae"))
    assert whole.total_ratios[0].ratio == pytest.approx(encoder.ratio), "twice the encoder in either family here"
    assert "of the trainable parameters, decoder included, of MAE (facebook) at" in whole.total_ratios[0].sentence


def test_a_configuration_with_few_seeds_is_left_out_of_the_ratio_and_flagged() -> None:
    rows = synthetic_rows(LAWS, noise=0.002)
    lacking = [row for row in rows if not (row.settings["width"] == 768 and row.model == "crate_mae" and row.seed > 1002)]
    comparison = compare(lacking, name="made")
    assert [item.values for item in comparison.findings if item.key == "seeds"] == [{"3 seeds": ("CRATE-MAE 4x768",)}]
    without = [row for row in rows if not (row.settings["width"] == 768 and row.model == "crate_mae")]
    assert comparison.ratios == compare(without, name="made").ratios


def test_each_baseline_has_its_ratio_at_the_number_of_images_that_it_shares() -> None:
    short = synthetic_rows({**LAWS}, noise=0.002, images=1_000_000)
    long = synthetic_rows({"crate_mae": LAWS["crate_mae"], "mae_all_tokens": Law()}, noise=0.002, images=2_000_000)
    long = [replace(row, configuration=f"long{row.configuration[:4]}", run_uid=f"long{row.run_uid}") for row in long]
    found = {item.baseline: item for item in compare([*short, *long], name="made", axes=("params",)).ratios}
    assert all(item.ratio is not None for item in found.values())
    assert "of MAE (facebook) at" in found["mae"].sentence
    apart = [row for row in [*short, *long] if row.model == "mae_all_tokens" or row in short]
    [_, none] = compare(apart, name="made", axes=("params",)).ratios
    assert none.why_not == "no configurations of CRATE-MAE and MAE (CRATE repository) saw as many images"


def test_a_baseline_is_called_alike_in_ratios_and_labels_where_the_other_one_cannot_be_compared() -> None:
    rows = synthetic_rows(LAWS, noise=0.002)
    other = synthetic_rows({"mae_all_tokens": Law()}, widths=(128,), compare={**COMPARE, "precision": "float32"})
    [ratio] = compare([*rows, *other], name="made", axes=("params",)).ratios
    assert "of MAE (facebook) at" in ratio.sentence


def test_a_budget_that_is_not_recorded_is_not_counted_from_the_trials_that_are_named() -> None:
    rows = synthetic_rows(LAWS, widths=(128,), tuning_trials=None)
    screened = synthetic_screening("crate_mae", Law(), widths=(64, 128)) + synthetic_screening("mae", Law(), widths=(64, 128))
    assert {item.tuning_trials for item in compare([*rows, *screened], name="made").configurations} == {None}


def test_a_ratio_whose_interval_holds_one_is_called_no_difference() -> None:
    comparison = compare(synthetic_rows({"crate_mae": Law(), "mae": Law()}, random=2), name="made")
    ratio = comparison.ratios[0].ratio
    assert ratio is not None
    assert ratio.low <= 1 <= ratio.high
    assert comparison.headline.endswith("The interval holds 1, so the two are not distinguishable there.")


def test_a_ratio_of_plain_runs_says_that_their_tuning_is_not_recorded() -> None:
    comparison = compare(synthetic_rows(LAWS, sweep=None, tuning_trials=None), name="made")
    assert "CRATE-MAE needs" in comparison.headline
    assert comparison.headline.endswith("How much each was tuned is not recorded.")


def test_where_no_ratio_can_be_had_the_verdict_of_the_axis_is_the_headline() -> None:
    comparison = compare(synthetic_rows({"crate_mae": Law(b=0.05), "mae": Law()}, widths=(128,)), name="made")
    assert all(item.ratio is None for item in comparison.ratios)
    assert comparison.headline == comparison.verdicts["params"]
    assert comparison.headline.startswith("At equal encoder parameters, CRATE-MAE 4x128 is better than MAE 4x128 by ")


def test_one_seed_reads_as_what_was_measured_and_why_that_is_no_verdict() -> None:
    assert compare(one_seed(), name="quickstart").headline == (
        "No verdict: 1 seed, and it takes 5 to tell the luck of training from the model. Measured linear probe top-1 on test: "
        "MAE 4x128 94.4% [92.9, 95.9] with 0.8M encoder parameters and 0.102 PFLOPs; "
        "CRATE-MAE 4x128 93.1% [91.6, 94.6] with 0.4M encoder parameters and 0.0512 PFLOPs; "
        "MAE 4x96 92.5% [91.0, 94.0] with 0.41M encoder parameters and 0.0525 PFLOPs. Each beats its own untrained control."
    )


def test_a_model_that_learned_nothing_is_said_to_have_learned_nothing() -> None:
    crate, *others = one_seed()
    crate = replace(crate, intervals={**crate.intervals, "gain": Estimate(0.0, -0.01, 0.01)})
    headline = compare([crate, *others], name="quickstart").headline
    assert headline.endswith("Not shown to beat its own untrained control: CRATE-MAE 4x128.")


def test_one_pair_for_each_baseline_is_told_with_its_numbers() -> None:
    rows = synthetic_rows({"crate_mae": Law(b=0.05), "mae": Law(), "mae_all_tokens": Law()}, widths=(128,))
    sentence = compare(rows, name="made").verdicts["params"]
    assert sentence.startswith("At equal encoder parameters: CRATE-MAE 4x128 is better than MAE (facebook) 4x128 by ")
    assert "; CRATE-MAE 4x128 is better than MAE (CRATE repository) 4x128 by " in sentence


def test_without_a_pair_on_an_axis_the_nearest_are_named() -> None:
    rows = [*synthetic_rows({"crate_mae": Law()}, widths=(128,)), *synthetic_rows({"mae": Law()}, widths=(192,))]
    comparison = compare(rows, name="made")
    assert comparison.verdicts["params"] == (
        "No verdict at equal encoder parameters: no two are within 5%; the nearest are CRATE-MAE 4x128 and MAE 4x192, with 0.44"
        " times the encoder parameters."
    )
    assert comparison.headline.startswith("Each as its screening chose it, MAE 4x192 is better than CRATE-MAE 4x128")


def test_sensitivities_are_the_best_over_the_rest_and_say_whether_they_are_confirmed(whole: Comparison) -> None:
    found = {(item.key, item.model): item for item in whole.sensitivities}
    assert set(found) == {
        ("mask_ratio", "crate_mae"),
        ("mask_ratio", "mae"),
        ("ista_step_size", "crate_mae"),
        ("ista_threshold", "crate_mae"),
    }
    masks = found["mask_ratio", "crate_mae"]
    assert masks.values == (0.5, 0.65, 0.75, 0.85)
    assert masks.counts == (6, 6, 6, 6)
    assert not masks.is_confirmed
    best = LAWS["crate_mae"].at(48 * 128**2 / 1e6)
    for value, estimate in zip(masks.values, masks.metric, strict=True):
        assert math.isclose(estimate.value, best - abs(value - 0.75) / 5)
        assert math.isnan(estimate.low)
    assert found["ista_threshold", "crate_mae"].values == (0.025, 0.05, 0.1)


def test_confirmed_values_of_a_setting_stand_apart_with_intervals() -> None:
    rows = [
        synthetic_row("crate_mae", seed=seed, value=0.9 - abs(mask - 0.75) + 0.001 * seed, settings={"mask_ratio": mask})
        for mask in (0.6, 0.75)
        for seed in range(5)
    ]
    [item] = compare([*rows, *synthetic_rows({"mae": Law()}, sweep=None)], name="made").sensitivities
    assert (item.key, item.is_confirmed, item.counts) == ("mask_ratio", True, (5, 5))
    assert item.metric[0].low < item.metric[0].value < item.metric[0].high


def test_a_screening_without_the_metric_tells_of_sensitivity_by_knn() -> None:
    def screened(mask: float) -> RunRow:
        row = synthetic_screening("crate_mae", Law(), widths=(128,), settings=[{"mask_ratio": mask}])[0]
        return replace(row, values={"eval_knn_top1": mask, "eval_loss": 0.2})

    rows = [*synthetic_rows(LAWS, widths=(128,)), *(screened(mask) for mask in (0.5, 0.75))]
    [item] = compare(rows, name="made").sensitivities
    assert (item.measure, [estimate.value for estimate in item.metric]) == ("eval_knn_top1", [0.5, 0.75])


def test_a_setting_is_followed_within_the_sweep_that_varied_it() -> None:
    """Another sweep with larger models all at one mask ratio says nothing of mask ratios."""
    settings_ = [{"mask_ratio": mask} for mask in (0.5, 0.75)]
    rows = synthetic_screening("crate_mae", Law(), widths=(64,), settings=settings_, sweep="masks")
    rows += synthetic_screening("crate_mae", Law(), widths=(128, 256, 512), settings=settings_[:1], sweep="sizes")
    [item] = compare([*rows, *synthetic_rows(LAWS, widths=(128,))], name="made").sensitivities
    assert item.counts == (1, 1)
    assert item.metric[0].value == item.metric[1].value == Law().at(48 * 64**2 / 1e6)


def test_the_loss_has_no_sensitivity_to_the_mask_ratio_which_changes_its_question() -> None:
    rows = synthetic_screening("crate_mae", Law(), widths=(128,), settings=[{"mask_ratio": mask} for mask in (0.5, 0.75)])
    rows = [replace(row, values={"eval_loss": 0.1, "probe_top1": 0.9}) for row in rows]
    assert compare([*rows, *synthetic_rows(LAWS, widths=(128,))], name="made", metric="eval_loss").sensitivities == ()


def test_layers_of_the_choices_are_averaged_over_seeds_beside_the_initialisation(whole: Comparison) -> None:
    assert {curve.label for curve in whole.layers} == {
        "CRATE-MAE 4x768",
        "MAE (facebook) 4x768",
        "MAE (CRATE repository) 4x768",
    }
    rates = next(curve for curve in whole.layers if curve.measure == "coding_rate_post_nats")
    assert rates.trained == (300.0, 260.0, 220.0, 180.0)
    assert rates.initial == (300.0,) * 4
    assert {curve.family for curve in whole.layers if curve.measure == "nonzero_fraction"} == {"crate"}


def test_only_the_layers_of_the_choices_are_read() -> None:
    asked: list[str] = []

    def read(row: RunRow) -> Any:
        asked.append(row.name)
        return synthetic_layers(row) if row.family == "crate" else None

    comparison = compare(synthetic_rows(LAWS), name="made", layers=read)
    assert len(asked) == 10
    assert {curve.family for curve in comparison.layers} == {"crate"}


def test_label_free_measures_correlate_with_the_probe_family_by_family(whole: Comparison) -> None:
    for family in ("crate", "vit"):
        assert whole.correlations[family]["rankme"] == pytest.approx(1)
        assert whole.correlations[family]["alpha_req"] == pytest.approx(-1)
        assert whole.correlations[family]["eval_loss"] == pytest.approx(-1)


def test_controls_are_in_no_correlation() -> None:
    rows = synthetic_rows(LAWS, widths=(64, 128))
    controls = [synthetic_row("mae", seed=seed, kind="control", value=0.1 * seed, width=32) for seed in range(5)]
    controls = [replace(row, values={**row.values, "rankme": -row.values["probe_top1"]}) for row in controls]
    assert compare([*rows, *controls], name="made").correlations == compare(rows, name="made").correlations


def test_raw_pixels_stand_beside_the_probe_and_no_other_metric(whole: Comparison) -> None:
    assert whole.raw_pixels == 0.35
    assert compare(synthetic_rows(LAWS, widths=(128,)), name="made", metric="knn_top1").raw_pixels is None


def test_what_was_not_read_and_what_is_not_compared_stand_together() -> None:
    comparison = compare(one_seed(), name="made", unread={"begun": "being created"})
    assert comparison.excluded == {"begun": "being created"}


def test_what_was_not_read_and_an_excluded_run_of_its_name_are_both_there() -> None:
    killed = synthetic_row(seed=9, name="same", is_complete=False, incomplete="killed")
    comparison = compare([*one_seed(), killed], name="made", unread={"same": "being created"})
    assert comparison.excluded == {"same (not read)": "being created", "same": "killed"}


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(shuffle: random.Random) -> None:
    rows = synthetic_rows({**LAWS, "mae_all_tokens": Law()}, widths=(64, 128, 256))
    rows += synthetic_screening("crate_mae", Law(), settings=[{"mask_ratio": mask} for mask in (0.5, 0.75)], widths=(64, 128))
    rows += [synthetic_row(seed=70 + i, value=math.nan, run_uid=f"nan{i}") for i in range(3)]
    rows += [replace(rows[0], run_uid="twice", name="twice")]
    first = compare(rows, name="made")
    mixed = list(rows)
    shuffle.shuffle(mixed)
    assert repr(compare(mixed, name="made")) == repr(first)


def test_a_thousand_runs_are_compared_in_under_three_seconds() -> None:
    widths = tuple(64 + 16 * index for index in range(20))
    rows = synthetic_rows({**LAWS, "mae_all_tokens": Law()}, widths=widths)
    grid = [{"mask_ratio": 0.5 + 0.01 * a, "ista_step_size": 0.05 * (1 + b)} for a in range(7) for b in range(5)]
    rows += synthetic_screening("crate_mae", Law(), widths=widths, settings=grid)
    assert len(rows) == 1000
    began = time.process_time()
    comparison = compare(rows, name="made")
    assert time.process_time() - began < 3
    assert len(comparison.configurations) == 60


@pytest.mark.parametrize(
    ("rows", "how", "words"),
    [
        ([], {}, ["'made' holds no runs"]),
        (
            [
                synthetic_row(is_complete=False, incomplete="killed"),
                synthetic_row("mae", is_complete=False, incomplete="still running"),
            ],
            {},
            ["2 runs and none that has come to its end", "killed; still running"],
        ),
        ([synthetic_row(), synthetic_row(seed=1)], {}, ["one family alone with probe_top1, CRATE"]),
        (
            [synthetic_row(), synthetic_row("mae", is_complete=False, incomplete="killed")],
            {},
            ["one family alone with probe_top1, CRATE", "killed"],
        ),
        (
            [synthetic_row(), synthetic_row("mae")],
            {"metric": "finetune_top1"},
            ["no finished run of 'made' has finetune_top1", "measured were: alpha_req, cls_top1", "crate-ray probe"],
        ),
        (
            [synthetic_row(), synthetic_row("mae")],
            {"metric": "rankme"},
            ["rankme says of no family that it is better", "compare one of: cls_top1, control_top1, eval_loss"],
        ),
        (
            [synthetic_row(value=math.nan), synthetic_row("mae", value=math.nan)],
            {},
            ["no run of 'made' can be compared by probe_top1: probe_top1 is NaN"],
        ),
        (
            [synthetic_row("crate_mae", value=math.nan), synthetic_row("mae")],
            {},
            ["one family alone", "ViT", "probe_top1 is NaN"],
        ),
    ],
)
def test_what_holds_no_comparison_is_refused_in_one_message(rows: list[RunRow], how: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        compare(rows, name="made", **how)
    for word in words:
        assert word in str(refused.value)


def test_runs_without_the_metric_are_listed_and_the_others_compared() -> None:
    rows = [*one_seed(), synthetic_row("mae", 700_000, width=120, values={"eval_loss": 0.2})]
    comparison = compare(rows, name="made")
    assert list(comparison.excluded.values()) == ["probe_top1 was not measured (`crate-ray probe` measures it)"]
    assert len(comparison.rows) == 4
