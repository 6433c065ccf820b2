"""The driver of a sweep between its stages, without Ray."""

from pathlib import Path

import pytest

from crate_ray.config import SweepConfig
from crate_ray.launch.cluster import Capacity
from crate_ray.launch.sweeps.driver import Silent, _forget_unplanned, _Run
from crate_ray.launch.train import StopSignals
from crate_ray.runs import Lease, RunFolder, TrialRow, list_trials
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
    monkeypatch.setattr("crate_ray.launch.sweeps.driver.capacity", lambda: Capacity(({"CPU": 1.0},), {}))
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
