"""The driver of a sweep between its stages, without Ray."""

import logging
from pathlib import Path

import pytest

from crate_ray.config import ConfigError, SweepConfig
from crate_ray.launch.capacity import Capacity
from crate_ray.launch.sweeps.driver import Silent, _begin, _forget_unplanned, _Run, _settle
from crate_ray.launch.train import StopSignals
from crate_ray.runs import Lease, RunFolder, Status, TrialRow, list_trials, read_status, read_sweep, write_status
from crate_ray.runs.trials import write_trial

SWEEP = {
    "name": "tested",
    "base": "digits_mae",
    "set": {"train.steps": 60},
    "tune": {"optimizer.lr": {"grid": [1e-3, 3e-3]}},
    "scheduler": {"type": "asha", "grace_steps": 20},
    "report_every_steps": 20,
    "confirm": {"seeds": 5},
}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Run:
    monkeypatch.setattr("crate_ray.launch.sweeps.driver.capacity", lambda scale: Capacity(({"CPU": 1.0},)))
    folder = RunFolder(str(tmp_path / "tested"))
    sweep = SweepConfig.parse(SWEEP)
    lease = Lease.take(folder)
    return _Run(sweep, folder, lease, StopSignals(), Silent(), lambda: None, lambda number: None, 1000, "uid")


def test_an_arm_without_a_finished_trial_ends_the_sweep_with_a_reason_and_its_results(driver: _Run) -> None:
    row = TrialRow(id="vit-1", arm="vit", seed=0, state="STOPPED", values={"optimizer.lr": 1e-3}, objectives={"eval_loss": 1.0})
    write_trial(RunFolder(driver.folder.path("trials", row.id)), row)
    reason = driver._confirm()
    assert reason is not None
    assert "arm 'vit' has no finished screening trial with eval_loss" in reason
    assert driver._end_state([row], reason) == ("FAILED", reason)
    assert [kept["id"] for kept in (driver.folder.read_json("results.json") or {})["rows"]] == ["vit-1"]


def test_a_store_that_refuses_for_a_moment_does_not_end_a_sweep(driver: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: RunFolder, name: str, body: object) -> None:
        raise OSError("slow down")

    monkeypatch.setattr(RunFolder, "write_json", refuse)
    driver._look_around()
    monkeypatch.undo()
    assert driver.folder.read_json("spent.json") is None


def test_a_point_that_made_no_trial_is_asked_again_by_the_next_session(driver: _Run) -> None:
    rows = [
        TrialRow(id="mae-1", arm="mae", seed=0, state="FAILED", reason="no such data"),
        TrialRow(id="mae-2", arm="mae", seed=0, state="FAILED", reason="its process died again and again", total_steps=60),
    ]
    for row in rows:
        write_trial(RunFolder(driver.folder.path("trials", row.id)), row)
    assert [row.id for row in _forget_unplanned(driver.folder, rows)] == ["mae-2"]
    assert [row.id for row in list_trials(driver.folder.uri)] == ["mae-2"]


def test_a_cluster_that_shrinks_to_nothing_is_said_once_and_so_is_its_return(
    driver: _Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def looks(*nodes: dict[str, float]) -> list[str]:
        monkeypatch.setattr("crate_ray.launch.sweeps.driver.capacity", lambda scale: Capacity(nodes))
        caplog.clear()
        for _ in range(2):
            driver._looked_at = 0.0
            driver._look_around()
        return [record.message for record in caplog.records]

    with caplog.at_level(logging.WARNING):
        assert looks({"CPU": 0.5}) == [
            "no trial can start, the sweep waits for nodes: a trial takes 1 x 1 CPU and never fits: the cluster's nodes have "
            "0.5 CPU, room for 0 such workers"
        ]
        assert looks({"CPU": 0.5}, {"CPU": 2.0}) == ["there is room for 2 trials again"]


def test_runs_of_trials_that_are_over_are_settled_with_their_clones_and_rungs(driver: _Run) -> None:
    rows = [
        TrialRow(id="mae-1", arm="mae", seed=0, state="STOPPED"),
        TrialRow(id="mae-2", arm="mae", seed=0, state="KILLED"),
        TrialRow(id="mae-3", arm="mae", seed=0, state="FAILED", reason="its process died again and again"),
    ]
    running = Status("RUNNING", attempt=2, started=1.0, heartbeat=7.0)
    runs = {name: RunFolder(driver.folder.path("trials", *name.split("/"))) for name in ("mae-1/gen_01", "mae-1/rung_00000020")}
    runs |= {name: RunFolder(driver.folder.path("trials", name)) for name in ("mae-1", "mae-2", "mae-3")}
    for run in runs.values():
        write_status(run, running)
    write_status(runs["mae-1/rung_00000020"], Status("FINISHED", 1, 1.0, 5.0, ended=5.0))
    _settle(driver.folder, rows)
    found = {name: status for name, run in runs.items() if (status := read_status(run)) is not None}
    assert {name: (status.state, status.ended) for name, status in found.items()} == {
        "mae-1": ("KILLED", 7.0),
        "mae-1/gen_01": ("KILLED", 7.0),
        "mae-1/rung_00000020": ("FINISHED", 5.0),
        "mae-2": ("RUNNING", None),
        "mae-3": ("FAILED", 7.0),
    }
    failed = read_status(runs["mae-3"])
    assert failed is not None
    assert failed.reason == "its process died again and again"


def test_a_sweep_that_its_caller_refuses_leaves_the_sweep_yaml_that_was_there(driver: _Run) -> None:
    def refuse(folder: RunFolder) -> None:
        assert read_sweep(folder) is not None
        raise ConfigError("tracking.uri = 'nowhere' is not a tracking store")

    with pytest.raises(ConfigError, match="nowhere"):
        _begin(driver.folder, driver.sweep, refuse)
    assert read_sweep(driver.folder) is None
    _begin(driver.folder, driver.sweep, lambda folder: None)
    larger = driver.sweep.model_copy(update={"budget": driver.sweep.budget.model_copy(update={"trials": 9})})
    with pytest.raises(ConfigError, match="nowhere"):
        _begin(driver.folder, larger, refuse)
    assert read_sweep(driver.folder) == driver.sweep
