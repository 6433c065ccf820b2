"""Which runs are one configuration, what it is called, and why a run is in none."""

import math
from dataclasses import replace

from synthetic_rows import Law, synthetic_row, synthetic_rows, synthetic_screening

from crate_ray.analysis.comparison.compare import compare
from crate_ray.analysis.comparison.configurations import sort_rows
from crate_ray.runs.rows import Estimate, RunRow

METRIC = "probe_top1"


def labels(rows: list[RunRow]) -> list[str]:
    return [item.label for item in sort_rows(rows, METRIC).configurations]


def seeds_of(model: str = "crate_mae", count: int = 3, **how: object) -> list[RunRow]:
    return [synthetic_row(model, seed=seed, value=0.9 + 0.01 * seed, **how) for seed in range(count)]


def test_seeds_of_one_configuration_give_its_mean_with_a_t_interval() -> None:
    item = sort_rows(seeds_of(count=3), METRIC).configurations[0]
    assert item.seeds == (0, 1, 2)
    # mean .91, s = .01, t(2) = 4.3027
    half = 4.302652729911275 * 0.01 / math.sqrt(3)
    assert math.isclose(item.metric.value, 0.91)
    assert math.isclose(item.metric.low, 0.91 - half)
    assert math.isclose(item.metric.high, 0.91 + half)
    assert math.isclose(item.control or 0, 0.4)
    assert item.positions["params"] == 1_000_000


def test_one_seed_has_a_value_and_no_interval() -> None:
    metric = sort_rows(seeds_of(count=1), METRIC).configurations[0].metric
    assert metric.value == 0.9
    assert math.isnan(metric.low)
    assert math.isnan(metric.high)


def test_labels_are_the_model_and_its_shape_and_tell_the_two_baselines_apart() -> None:
    rows = [*seeds_of("crate_mae"), *seeds_of("mae"), *seeds_of("mae_all_tokens")]
    assert labels(rows) == ["CRATE-MAE 4x128", "MAE (CRATE repository) 4x128", "MAE (facebook) 4x128"]
    assert labels([*seeds_of("crate_mae"), *seeds_of("mae")]) == ["CRATE-MAE 4x128", "MAE 4x128"]
    assert labels(seeds_of("crate_mae", settings={"arch": "crate_mae untied mlp 4x128"})) == ["CRATE-MAE untied mlp 4x128"]


def test_configurations_of_one_shape_are_told_apart_by_the_fewest_settings() -> None:
    rows = [row for mask in (0.5, 0.75) for row in seeds_of(settings={"mask_ratio": mask})]
    assert labels(rows) == ["CRATE-MAE 4x128, mask 0.5", "CRATE-MAE 4x128, mask 0.75"]
    rows = [row for lr in (1e-3, 2e-3) for mask in (0.5, 0.75) for row in seeds_of(settings={"mask_ratio": mask, "lr": lr})]
    assert "CRATE-MAE 4x128, mask 0.5, lr 0.002" in labels(rows)
    rows = [*seeds_of(), *(replace(row, configuration="ffffffff", run_uid=f"u{row.seed}") for row in seeds_of())]
    assert len(set(labels(rows))) == 2, "what no setting tells apart is told apart all the same"


def test_every_run_is_in_a_configuration_or_excluded_with_its_reason() -> None:
    rows = [
        *seeds_of(),
        *seeds_of("mae"),
        synthetic_row(seed=10, is_complete=False, state="KILLED", incomplete="killed"),
        synthetic_row(seed=11, is_complete=False, incomplete="stopped by the scheduler at step 10 of 90", values={}),
        synthetic_row(seed=12, value=math.nan),
        synthetic_row(seed=13, value=math.inf),
        synthetic_row(seed=14, values={"eval_loss": 0.1}),
        synthetic_row(seed=15, judged_split="validation"),
        synthetic_row(seed=16, probe_protocol=2),
        synthetic_row(seed=17, kind="control"),
        synthetic_row(seed=0, run_uid="again", name="again", created=9.0),
    ]
    found = sort_rows(rows, METRIC)
    held = {row.name for item in found.configurations for row in item.rows}
    assert held | found.excluded.keys() == {row.name for row in rows}
    assert not held & found.excluded.keys()
    reasons = [next(reason for name, reason in found.excluded.items() if name.endswith(f"s{seed}")) for seed in range(10, 18)]
    assert reasons == [
        "killed",
        "stopped by the scheduler at step 10 of 90",
        "probe_top1 is NaN",
        "probe_top1 is infinite",
        "probe_top1 was not measured (`crate-ray probe` measures it)",
        "judged on validation, and the comparison is on test",
        "judged by protocol house/2, and the comparison by house/1",
        "a control, not a trained model",
    ]
    assert found.excluded["again"].startswith("the same configuration and seed as crate_mae-")
    crate = found.configurations[0]
    assert crate.missing[12] == "probe_top1 is NaN"
    assert crate.missing[10] == "killed"


def test_runs_that_are_called_alike_are_excluded_by_where_they_lie() -> None:
    killed = {"is_complete": False, "incomplete": "killed", "name": "same"}
    rows = [*seeds_of(), *(synthetic_row(seed=9, run_uid=f"uid{i}", uri=f"/place{i}", **killed) for i in range(2))]
    assert sorted(sort_rows(rows, METRIC).excluded) == ["/place0 (uid0)", "/place1 (uid1)"]


def test_the_same_run_named_twice_counts_once() -> None:
    rows = seeds_of()
    assert sort_rows([*rows, *rows], METRIC) == sort_rows(rows, METRIC)


def test_of_a_sweep_only_confirmed_runs_count_and_a_planned_seed_without_a_run_is_missed() -> None:
    law = Law()
    rows = synthetic_rows({"crate_mae": law, "mae": law}, widths=(128, 256))
    rows = [row for row in rows if not (row.model == "mae" and row.seed == 1002)]
    screened = synthetic_screening("crate_mae", law, widths=(128, 192))
    found = sort_rows([*rows, *screened], METRIC)
    assert all(row.stage == "confirm" for item in found.configurations for row in item.rows)
    assert {item.label: item.missing for item in found.configurations if item.missing} == {
        "MAE 4x128": {1002: "never started"},
        "MAE 4x256": {1002: "never started"},
    }
    assert len(found.excluded) == len(found.screening) == 2
    assert all("screening trial" in reason for reason in found.excluded.values())


def test_a_screening_without_the_metric_is_no_run_to_be_probed() -> None:
    rows = synthetic_rows({"crate_mae": Law(), "mae": Law()}, widths=(128,))
    screened = [
        replace(row, values={"eval_knn_top1": 0.5, "probe_top1": math.nan} if row.settings["width"] == 64 else {})
        for row in synthetic_screening("crate_mae", Law(), widths=(64, 128))
    ]
    comparison = compare([*rows, *screened], name="made")
    assert set(comparison.excluded.values()) == {
        "a screening trial: it chose what was confirmed, and tells of sensitivities alone"
    }
    assert comparison.findings == (), "a diverged screening trial takes nothing from the means"


def test_a_sweep_that_confirmed_nothing_gives_its_best_of_each_size_and_no_verdict() -> None:
    grid = [{"lr": 1e-3, "penalty": 0.01}, {"lr": 2e-3, "penalty": 0.0}, {"lr": 4e-3, "penalty": 0.02}]
    rows = [
        row for model in ("crate_mae", "mae") for row in synthetic_screening(model, Law(), widths=(128, 256), settings=grid)
    ]
    comparison = compare(rows, name="screened")
    assert [item.label for item in comparison.configurations] == [
        "CRATE-MAE 4x128",
        "CRATE-MAE 4x256",
        "MAE 4x128",
        "MAE 4x256",
    ]
    assert all(row.settings["lr"] == 2e-3 for item in comparison.configurations for row in item.rows)
    assert not any(item.is_confirmed for item in comparison.configurations)
    assert comparison.differences == ()
    assert comparison.headline.startswith("No verdict: the sweep screened and confirmed nothing")
    assert [item.key for item in comparison.findings if item.severity == "refused"] == ["confirm"]
    assert len(comparison.excluded) == 8


def test_the_control_of_a_metric_is_that_of_its_own_protocol() -> None:
    row = synthetic_row(
        values={"probe_top1": 0.9, "control_top1": 0.4, "knn_top1": 0.8},
        intervals={"control_knn_top1": Estimate(0.3, 0.2, 0.4)},
    )
    assert sort_rows([row], "probe_top1").configurations[0].control == 0.4
    assert sort_rows([row], "knn_top1").configurations[0].control == 0.3
    assert sort_rows([replace(row, values={"eval_loss": 0.2})], "eval_loss").configurations[0].control is None


def test_the_gain_is_over_seeds_or_of_one_seed_over_images_and_of_the_metric_that_is_compared() -> None:
    rows = [synthetic_row(seed=seed, value=0.5 + 0.01 * seed) for seed in range(3)]
    several = sort_rows(rows, METRIC).configurations[0]
    assert several.gain is not None
    assert math.isclose(several.gain.value, 0.11)
    assert several.beats_control
    one = sort_rows(rows[:1], METRIC).configurations[0]
    assert one.gain == rows[0].intervals["gain"]
    by_knn = sort_rows(rows[:1], "knn_top1").configurations[0]
    assert by_knn.gain is None
    assert by_knn.beats_control is None


def test_numbers_on_other_shards_have_their_own_control_gain_and_data() -> None:
    def row(model: str, digest: str) -> RunRow:
        return synthetic_row(
            model,
            values={"probe_top1": 0.9, "cifar10_probe_top1": 0.7},
            intervals={"cifar10_control_top1": Estimate(0.5, 0.4, 0.6), "cifar10_gain": Estimate(0.2, 0.1, 0.3)},
            judged_data={"": "own", "cifar10": digest},
        )

    metric = "cifar10_probe_top1"
    item = sort_rows([row("mae", "a")], metric).configurations[0]
    assert (item.control, item.gain) == (0.5, Estimate(0.2, 0.1, 0.3))
    other = compare([row("crate_mae", "a"), row("mae", "b")], name="made", metric=metric)
    assert [finding.key for finding in other.findings if finding.severity == "refused"] == ["judged_data"]
    assert not [f for f in compare([row("crate_mae", "a"), row("mae", "b")], name="made").findings if f.severity == "refused"]


def test_seeds_that_were_judged_on_other_shards_than_most_are_excluded() -> None:
    metric = "cifar10_probe_top1"
    rows = [
        synthetic_row(model, seed=seed, values={metric: 0.7}, judged_data={"cifar10": data})
        for model, versions in (("crate_mae", "aaaab"), ("mae", "aaaaa"))
        for seed, data in enumerate(versions)
    ]
    found = sort_rows(rows, metric)
    assert list(found.excluded.values()) == ["judged on shards b, and most seeds of its configuration on a"]
    assert [item.seeds for item in found.configurations] == [(0, 1, 2, 3), (0, 1, 2, 3, 4)]


def test_of_as_many_runs_by_two_protocols_those_of_the_newer_one_are_compared() -> None:
    rows = [synthetic_row(seed=seed, probe_protocol=protocol) for seed, protocol in enumerate((9, 9, 10, 10))]
    assert sort_rows(rows, METRIC).configurations[0].seeds == (2, 3)
