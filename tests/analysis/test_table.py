import json

from crate_ray.analysis import Estimate, comparison_to_json, incomparable, losses_comparable


def test_a_model_beats_its_control_only_when_the_whole_interval_is_above_zero(make_row):
    assert make_row(gain=Estimate(0.05, 0.001, 0.1)).beats_control
    assert not make_row(gain=Estimate(0.05, 0.0, 0.1)).beats_control


def test_json_is_strict_and_writes_what_was_not_measured_as_a_string(make_row):
    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(comparison_to_json([make_row(eval_loss=float("inf"))], title="T"), parse_constant=refuse)
    (row,) = content["rows"]
    assert content["schema_version"] == 1
    assert content["title"] == "T"
    assert row["knn_top1"] == "NaN"
    assert row["eval_loss"] == "Infinity"
    assert row["probe_top1"] == {"value": 0.9, "low": 0.89, "high": 0.91}
    assert row["beats_control"] is True


def test_incomparable_names_the_keys_that_differ_or_are_missing():
    parts = {"a": {"precision": "float32", "probe": 1, "lr": 2}, "b": {"precision": "bfloat16", "probe": 1}}
    assert incomparable(parts) == [
        ("lr", {"a": 2, "b": None}),
        ("precision", {"a": "float32", "b": "bfloat16"}),
    ]
    assert incomparable({"a": parts["a"]}) == []
    assert incomparable({}) == []


def test_losses_compare_only_for_one_mask_ratio_patch_size_and_target(make_row):
    assert losses_comparable([make_row(), make_row("other")])
    for change in ({"mask_ratio": 0.5}, {"patch_size": 8}, {"norm_pix_loss": True}):
        assert not losses_comparable([make_row(), make_row("other", **change)])
