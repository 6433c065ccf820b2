"""Sweeps on the session's cluster, in this process."""

from collections import Counter
from pathlib import Path

import pytest

from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder, read_status
from sweeps import MAE, attempts, results, run, study_states, write_population_file, write_sweep_file

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_grid_over_two_arms_finishes_with_a_row_for_every_point(digits: Path, tmp_path: Path) -> None:
    path = write_sweep_file(digits, tmp_path, arms={"crate": {}, "mae": {"base": "digits_mae", "set": MAE}})
    outcome, seen = run(path)
    assert (outcome.state, outcome.counts) == ("FINISHED", {"FINISHED": 6})
    assert sorted((row.arm, row.values["optimizer.lr"]) for row in outcome.rows) == [
        (arm, rate) for arm in ("crate", "mae") for rate in (1e-4, 3e-4, 1e-3)
    ]
    assert all(row.step == 20 and row.objectives["eval_loss"] > 0 for row in outcome.rows)
    assert Counter(seen.started) == Counter(row.id for row in seen.ended) == Counter(attempts(outcome.folder))
    assert set(attempts(outcome.folder).values()) == {1}
    written = results(outcome.folder)
    assert (len(written["rows"]), written["counts"], written["spent"]["trials"]) == (6, {"FINISHED": 6}, 6)
    assert not Path(outcome.folder.uri, ".tune").exists()

    again, seen = run(path)
    assert (again.was_finished, seen.started) == (True, [])

    more, seen = run(path, "tune.optimizer.lr={grid: [0.001, 0.0001, 0.0003]}", "max_concurrent=1")  # no change of identity
    assert (more.state, seen.started, len(seen.before)) == ("FINISHED", [], 6)
    with pytest.raises(ConfigError, match=r"report_every_steps: 5 there, 10 here[\s\S]*--set name=NEW"):
        run(path, "report_every_steps=10")


def test_asha_stops_trials_within_their_class_of_size(digits: Path, tmp_path: Path) -> None:
    path = write_sweep_file(
        digits,
        tmp_path,
        space={"model.width": {"grid": [32, 64]}},
        tune={"optimizer.lr": {"grid": [1e-3, 3e-4, 1e-4]}},
        scheduler={"type": "asha", "grace_steps": 5, "reduction_factor": 2, "bracket_by": "params", "num_brackets": 2},
        max_concurrent=1,
    )
    document = path.read_text().replace("  model.width: 32\n", "")
    path.write_text(document)
    outcome, _ = run(path)
    assert outcome.state == "FINISHED"
    by_size = {width: [row for row in outcome.rows if row.values["model.width"] == width] for width in (32, 64)}
    for rows in by_size.values():
        # One at a time, the best rate first: the second is worse than the first, the third worse than the middle of both.
        assert {row.values["optimizer.lr"]: (row.state, row.step) for row in rows} == {
            1e-3: ("FINISHED", 20),
            1e-4: ("STOPPED", 5),
            3e-4: ("STOPPED", 5),
        }


def test_a_trial_that_can_never_fit_is_refused_before_anything_is_written(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 x 2 CPU and never fits: the cluster's nodes have 4 CPU, room for 2"):
        run(write_sweep_file(digits, tmp_path, resources_per_trial={"num_workers": 3, "cpus": 2}))
    assert not (tmp_path / "out").exists()


def test_a_clone_of_a_population_starts_at_its_donors_step(digits: Path, tmp_path: Path) -> None:
    path = write_population_file(digits, tmp_path, steps=60, interval_steps=20, report_every_steps=10)
    outcome, _ = run(path)
    assert outcome.counts == {"FINISHED": 4}
    assert_clones_start_where_their_donors_were(outcome.folder)


def test_hyperband_finishes_and_stops_some(digits: Path, tmp_path: Path) -> None:
    path = write_sweep_file(
        digits,
        tmp_path,
        tune={"optimizer.lr": {"loguniform": [1e-4, 1e-2], "num": 5}},
        scheduler={"type": "hyperband", "grace_steps": 5, "reduction_factor": 3},
        more={"train.steps": 15},
    )
    outcome, _ = run(path)
    # Two brackets: two trials that run to the end, and three of which one goes on.
    assert (outcome.state, outcome.counts) == ("FINISHED", {"FINISHED": 3, "STOPPED": 2})
    assert {row.step for row in outcome.rows if row.state == "STOPPED"} == {5}


def test_a_budget_of_trials_is_shared_by_the_search_and_a_larger_one_goes_on(digits: Path, tmp_path: Path) -> None:
    path = write_sweep_file(
        digits,
        tmp_path,
        tune={"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
        search={"method": "tpe"},
        budget={"trials": 2},
    )
    outcome, seen = run(path)
    assert (outcome.counts, len(seen.started)) == ({"FINISHED": 2}, 2)
    more, seen = run(path, "budget.trials=4")
    assert (more.counts, len(seen.started), len(seen.before)) == ({"FINISHED": 4}, 2, 2)
    assert study_states(more.folder) == {"COMPLETE": 4}


def test_a_budget_of_hours_that_is_used_up_starts_no_trial(digits: Path, tmp_path: Path) -> None:
    path = write_sweep_file(digits, tmp_path)
    first, _ = run(path, "tune.optimizer.lr={grid: [0.001]}", "name=hours")
    Path(first.folder.uri, "status.json").unlink()
    outcome, seen = run(path, "tune.optimizer.lr={grid: [0.001]}", "name=hours", "budget.hours=0.00001")
    assert (seen.started, outcome.counts) == ([], {"FINISHED": 1})
    assert outcome.cut_short is not None
    assert "budget.hours" in outcome.cut_short


def test_the_best_of_each_arm_is_confirmed_with_fresh_seeds(digits: Path, tmp_path: Path) -> None:
    path = write_sweep_file(digits, tmp_path, tune={"optimizer.lr": {"grid": [1e-4, 1e-3]}}, confirm={"seeds": 5})
    outcome, _ = run(path, "train.steps=10")
    confirmed = [row for row in outcome.rows if row.stage == "confirm"]
    assert sorted(row.seed for row in confirmed) == [1000, 1001, 1002, 1003, 1004]
    assert {(row.values["optimizer.lr"], row.state) for row in confirmed} == {(1e-3, "FINISHED")}
    assert Counter(row.stage for row in outcome.rows) == {"screen": 2, "confirm": 5}


def assert_clones_start_where_their_donors_were(folder: RunFolder) -> None:
    clones = sorted(Path(folder.uri, "trials").glob("*/gen_*"))
    assert clones
    for clone in clones:
        body = RunFolder(str(clone)).read_json("generation.json")
        assert body is not None
        first = min(int(folder.name.removeprefix("step_")) for folder in (clone / "checkpoints").iterdir())
        assert first >= body["step"] > 0
        assert body["set"]["optimizer.lr"] <= 1e-2


@pytest.mark.slow
def test_trials_of_two_workers_leave_nothing_behind(digits: Path, tmp_path: Path) -> None:
    path = write_sweep_file(
        digits,
        tmp_path,
        scheduler={"type": "asha", "grace_steps": 5, "reduction_factor": 2},
        resources_per_trial={"num_workers": 2, "cpus": 1},
    )
    outcome, _ = run(path)
    assert outcome.state == "FINISHED", [(row.id, row.state, row.reason) for row in outcome.rows]
    assert set(outcome.counts) <= {"FINISHED", "STOPPED"}
    assert groups_left() == []


@pytest.mark.slow
def test_a_clone_of_two_workers_starts_at_its_donors_step(digits: Path, tmp_path: Path) -> None:
    path = write_population_file(
        digits,
        tmp_path,
        steps=40,
        interval_steps=20,
        report_every_steps=10,
        scheduler={"population": 2, "quantile": 0.5},
        resources_per_trial={"num_workers": 2, "cpus": 1},
    )
    outcome, _ = run(path)
    assert outcome.counts == {"FINISHED": 2}, [(row.id, row.state, row.reason) for row in outcome.rows]
    assert_clones_start_where_their_donors_were(outcome.folder)
    assert groups_left() == []


def groups_left() -> list[str]:
    """Placement groups that hold or await resources."""
    import ray

    return [key for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"]


def test_the_sweep_has_a_status_and_an_identity_of_its_own(digits: Path, tmp_path: Path) -> None:
    outcome, _ = run(write_sweep_file(digits, tmp_path), "tune.optimizer.lr={grid: [0.001]}", "name=one", "train.steps=5")
    status = read_status(outcome.folder)
    assert status is not None
    assert (status.state, status.attempt) == ("FINISHED", 1)
    meta = outcome.folder.read_json("run_meta.json")
    trial = RunFolder(outcome.folder.path("trials", outcome.rows[0].id)).read_json("run_meta.json")
    assert meta is not None
    assert trial is not None
    assert (meta["kind"], trial["kind"], trial["parent_uid"]) == ("sweep", "trial", meta["run_uid"])
