"""What may not be compared is refused by the key in which it differs."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from synthetic_rows import COMPARE, Law, synthetic_row, synthetic_rows

from crate_ray.analysis.comparison.compare import compare
from crate_ray.analysis.comparison.result import Comparison, Finding
from crate_ray.runs.rows import RunRow

LAWS = {"crate_mae": Law(b=0.08), "mae": Law()}


def made(change: Callable[[RunRow], RunRow] | None = None, **how: Any) -> Comparison:
    """Two sizes of each family, five seeds; `change` is made to every CRATE run."""
    rows = synthetic_rows(LAWS, widths=(128, 256), **how)
    return compare([change(row) if change and row.family == "crate" else row for row in rows], name="made")


def finding(comparison: Comparison, key: str) -> Finding:
    found = [item for item in comparison.findings if item.key == key]
    assert len(found) == 1, [item.key for item in comparison.findings]
    return found[0]


def with_part(key: str, value: Any) -> Callable[[RunRow], RunRow]:
    return lambda row: replace(row, compare={**row.compare, key: value})


def test_runs_that_share_everything_have_no_finding_and_a_verdict_on_every_axis() -> None:
    comparison = made()
    assert comparison.findings == ()
    assert {item.axis for item in comparison.differences if item.why_no_verdict is None} == {"params", "flops", "time", "best"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.digest", "e" * 64),
        ("data.augment", "none"),
        ("evaluation.probe", 2),
        ("evaluation.weights", "ema"),
        ("schedule.warmup_epochs", 20.0),
        ("schedule.cooldown_fraction", 0.2),
        ("precision", "float32"),
        ("task", "classify"),
    ],
)
def test_each_part_of_the_compare_digest_refuses_every_verdict_by_its_key(key: str, value: Any) -> None:
    comparison = made(with_part(key, value))
    refused = finding(comparison, key)
    assert refused.severity == "refused"
    assert set(refused.values.values()) == {
        ("CRATE-MAE 4x128", "CRATE-MAE 4x256"),
        ("MAE 4x128", "MAE 4x256"),
    }
    assert key in refused.text
    assert comparison.differences
    for item in comparison.differences:
        assert key in str(item.why_no_verdict)
        assert item.interval is None
        assert item.p_value is None
    assert all(item.ratio is None for item in comparison.ratios)
    assert key in comparison.headline


def test_of_a_difference_both_values_are_named_and_digests_by_their_beginning() -> None:
    refused = finding(made(with_part("data.digest", "e" * 64)), "data.digest")
    assert list(refused.values) == ["eeeeeeee...", COMPARE["data.digest"]]


def test_unequal_tuning_gives_no_verdict_however_large_the_difference() -> None:
    comparison = made(lambda row: replace(row, tuning_trials=48))
    assert finding(comparison, "tuning_trials").severity == "refused"
    assert all(
        "unequal tuning budgets (48 trials and 24 trials)" in str(item.why_no_verdict) for item in comparison.differences
    )
    assert {item.why_not for item in comparison.ratios} == {"unequal tuning budgets"}
    assert comparison.headline.startswith("No verdict")


def test_an_unrecorded_budget_is_flagged_in_the_verdict_and_beside_a_recorded_one_refuses_it() -> None:
    plain = made(sweep=None, tuning_trials=None)
    assert finding(plain, "tuning_budget").severity == "flagged"
    told = [item for item in plain.differences if item.why_no_verdict is None]
    assert told
    assert all("tuning budget not recorded" in item.verdict for item in told)
    mixed = made(lambda row: replace(row, sweep=None, stage=None, place=None, kind="train", tuning_trials=None))
    assert all("unequal tuning budgets (not recorded and 24 trials)" in str(item.why_no_verdict) for item in mixed.differences)


def test_another_commit_is_flagged_with_the_runs_that_have_it_and_refuses_nothing() -> None:
    comparison = made(lambda row: replace(row, commit="beef" * 10))
    code = finding(comparison, "code")
    assert code.severity == "flagged"
    assert len(code.values["beef" * 10]) == len(code.values["c0ffee"]) == 10
    told = [item for item in comparison.differences if item.why_no_verdict is None]
    assert told
    assert all("different versions of the code" in item.verdict for item in told)


def test_runs_judged_on_another_split_or_by_another_protocol_are_refused_by_that_key() -> None:
    def otherwise(row: RunRow) -> RunRow:
        changes: dict[int, dict[str, Any]] = {1001: {"judged_split": "validation"}, 1002: {"probe_protocol": 2}}
        return replace(row, **changes.get(row.seed, {}))

    comparison = made(otherwise)
    split, protocol = finding(comparison, "judged_split"), finding(comparison, "protocol")
    assert (split.severity, protocol.severity) == ("refused", "refused")
    assert {value: len(names) for value, names in split.values.items()} == {"test": 18, "validation": 2}
    assert {value: len(names) for value, names in protocol.values.items()} == {"house/1": 18, "house/2": 2}
    assert {comparison.excluded[name] for name in split.values["validation"]} == {
        "judged on validation, and the comparison is on test"
    }


def test_a_sweep_that_tuned_no_learning_rate_is_flagged_in_its_verdicts() -> None:
    comparison = made(lambda row: replace(row, untuned="at one fixed learning rate"))
    assert finding(comparison, "learning_rate").values == {"at one fixed learning rate": ("CRATE-MAE 4x128", "CRATE-MAE 4x256")}
    told = [item.verdict for item in comparison.differences if item.why_no_verdict is None]
    assert told
    assert all("learning rates not tuned alike" in verdict for verdict in told)


def test_other_hardware_refuses_the_axis_of_time_alone() -> None:
    comparison = made(lambda row: replace(row, hardware="1 x Other"))
    assert finding(comparison, "hardware").severity == "refused"
    by_axis = {item.axis: item.why_no_verdict for item in comparison.differences}
    assert "hardware differs" in str(by_axis["time"])
    assert by_axis["params"] is None
    assert by_axis["flops"] is None


def test_speeds_of_runs_that_shared_a_machine_are_no_hours() -> None:
    comparison = made(lambda row: replace(row, timing="shared"))
    assert finding(comparison, "timing").severity == "noted"
    assert not [item for item in comparison.differences if item.axis == "time"]
    assert "crate-ray time" in comparison.verdicts["time"]
    assert all(item.positions["time"] is None for item in comparison.configurations if item.family == "crate")


def test_the_axis_of_parameters_asks_for_equally_many_images() -> None:
    comparison = made(lambda row: replace(row, images=2 * row.images))
    on_parameters = [item for item in comparison.differences if item.axis == "params"]
    assert on_parameters
    assert all("images seen differ (2,560,000 and 1,280,000)" in str(item.why_no_verdict) for item in on_parameters)
    assert [
        item for item in made(lambda row: replace(row, images=row.images + 10_000)).differences if item.why_no_verdict is None
    ]


def test_losses_are_compared_only_where_they_ask_the_same() -> None:
    asking = lambda row: replace(row, loss_target={**row.loss_target, "mask_ratio": 0.5})  # noqa: E731
    rows = [asking(row) if row.family == "crate" else row for row in synthetic_rows(LAWS, widths=(128,))]
    by_loss = compare(rows, name="made", metric="eval_loss")
    assert finding(by_loss, "loss_target.mask_ratio").severity == "refused"
    assert all("loss_target.mask_ratio differs" in str(item.why_no_verdict) for item in by_loss.differences)
    assert not by_loss.is_larger_better
    assert by_loss.judged_split is None
    assert compare(rows, name="made").findings == ()


def test_the_smaller_loss_is_the_better_one() -> None:
    comparison = compare(synthetic_rows(LAWS, widths=(128,)), name="made", metric="eval_loss")
    verdict = next(item for item in comparison.differences if item.axis == "params").verdict
    assert "CRATE-MAE 4x128 is better than MAE 4x128" in verdict


def test_runs_that_were_helped_or_came_from_a_changed_checkout_are_named() -> None:
    comparison = made(lambda row: replace(row, rollbacks=1, is_dirty=True))
    assert finding(comparison, "interventions").severity == "flagged"
    assert finding(comparison, "dirty").severity == "noted"
    assert "helped past steps without finite numbers" in comparison.differences[0].verdict


def test_runs_that_ended_without_a_number_are_named_for_the_rest_is_the_luckier_part() -> None:
    def broken(row: RunRow) -> RunRow:
        value = {1001: math.nan, 1002: math.inf}.get(row.seed, row.values["probe_top1"])
        return replace(row, values={**row.values, "probe_top1": value})

    comparison = made(broken)
    finals = finding(comparison, "finals")
    assert finals.severity == "flagged"
    assert {word: len(names) for word, names in finals.values.items()} == {"NaN": 2, "infinite": 2}
    assert {name: comparison.excluded[name] for name in finals.values["NaN"]} == dict.fromkeys(
        finals.values["NaN"], "probe_top1 is NaN"
    )


def test_a_model_that_is_not_shown_to_beat_its_untrained_control_is_flagged_and_in_the_headline() -> None:
    comparison = made(lambda row: replace(row, values={**row.values, "control_top1": row.values["probe_top1"]}, intervals={}))
    assert finding(comparison, "control").values == {"no gain shown": ("CRATE-MAE 4x128", "CRATE-MAE 4x256")}
    assert comparison.headline.endswith("Not shown to beat its own untrained control: CRATE-MAE 4x128, CRATE-MAE 4x256.")


def test_refusals_stand_before_flags_and_flags_before_notes() -> None:
    comparison = made(lambda row: replace(row, is_dirty=True, commit="b", tuning_trials=2))
    severities = [item.severity for item in comparison.findings]
    assert severities == sorted(severities, key=["refused", "flagged", "noted"].index)
    assert len(set(severities)) == 3


def test_a_part_that_differs_within_one_configuration_splits_it() -> None:
    """As where one seed was trained on a card with bfloat16 and another on one without."""
    rows = [synthetic_row("crate_mae", seed=seed, value=0.9) for seed in range(3)]
    rows += [replace(synthetic_row("crate_mae", seed=3), compare={**COMPARE, "precision": "float32"})]
    rows += [synthetic_row("mae", seed=seed) for seed in range(4)]
    labels = [item.label for item in compare(rows, name="made").configurations]
    assert labels == ["CRATE-MAE 4x128, precision bfloat16", "CRATE-MAE 4x128, precision float32", "MAE 4x128"]
