"""A trial and its folder, without a cluster: what is trained, what is only reported again, and what is left behind."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.train.v2.api.exceptions import WorkerGroupError
from trials import MakeTrial, mark_stopped, trial_of

from crate_ray.config import RunConfig, SchedulerConfig
from crate_ray.launch.causes import Cure, cure_of
from crate_ray.launch.sweeps.driver import past_reports
from crate_ray.launch.sweeps.generations import Pointer
from crate_ray.launch.sweeps.rungs import legs_of
from crate_ray.launch.sweeps.trial_attempt import infeasible_reason
from crate_ray.launch.sweeps.trial_session import TrialSession, TrialSpec
from crate_ray.runs import Lease, RunFolder, read_interventions, read_records, read_status
from crate_ray.runs.trials import read_trial
from crate_ray.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, latest_checkpoint, list_checkpoints
from crate_ray.training.health import TrainingDivergedError
from crate_ray.training.loop import LocalContext, run_training


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A trial has one CPU; what it is compared with, in this thread, must sum in the same order."""
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)


@pytest.fixture
def make_trial(overrides: list[str], tmp_path: Path) -> MakeTrial:
    def make(*more: str, sweep: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
        tiny = ["train.steps=12", "eval.every_steps=3", "checkpoint.every_steps=3", "checkpoint.keep_last=9"]
        config = RunConfig.load("digits_crate_mae", [*overrides, *tiny, *more])
        return trial_of(config, str(tmp_path / "sweep"), sweep=sweep or {}, **keys)

    return make


def session_of(trial: dict[str, Any], pointer: Pointer | None = None) -> TrialSession:
    return TrialSession(TrialSpec.parse(trial), pointer)


def results_of(session: TrialSession, most: int = 99) -> list[dict[str, Any]]:
    results = []
    while len(results) < most:
        results.append(session.next_result())
        if results[-1]["done"]:
            break
    return results


def weights(folder: str | RunFolder) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(RunFolder(folder) if isinstance(folder, str) else folder)
    assert checkpoint is not None
    return {**checkpoint.read(MODEL_FILE), **checkpoint.read(OPTIMIZER_FILE)}


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def reported(results: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(result["step"], result["eval_loss"]) for result in results]


def test_a_trial_reports_every_evaluation_and_its_end_with_the_final_numbers(make_trial: MakeTrial, tmp_path: Path) -> None:
    trial = make_trial()
    session = session_of(trial)
    results = results_of(session)
    session.close(reason="over")
    assert [(r["step"], r["state"], r["done"]) for r in results] == [
        (3, "RUNNING", False),
        (6, "RUNNING", False),
        (9, "RUNNING", False),
        (12, "FINISHED", True),
    ]
    folder = RunFolder(trial["folder"])
    plain = RunFolder(str(tmp_path / "plain"))
    run_training(RunConfig.parse(json.loads(trial["run"])), plain, LocalContext())
    assert_same_weights(weights(folder), weights(plain))
    row, status = read_trial(folder), read_status(folder)
    assert row is not None
    assert status is not None
    assert (row.state, row.step, row.total_steps, status.state) == ("FINISHED", 12, 12, "FINISHED")
    assert row.objectives["eval_loss"] == pytest.approx(results[-1]["eval_loss"], rel=1e-3)
    assert row.seconds > 0
    assert row.loss_target["mask_ratio"] == 0.75


def test_a_finished_trial_repeats_its_reports_and_its_end_without_training(make_trial: MakeTrial) -> None:
    trial = make_trial()
    first = session_of(trial)
    expected = results_of(first)
    first.close(reason="over")
    files = {path: path.stat().st_mtime_ns for path in Path(trial["folder"]).rglob("*") if path.name != "trial.json"}
    again = session_of(trial)
    results = results_of(again)
    again.close(reason="over")
    assert reported(results) == reported(expected)
    assert {key: results[-1][key] for key in ("state", "done", "gflops")} == {
        "state": "FINISHED",
        "done": True,
        "gflops": expected[-1]["gflops"],
    }
    assert {path: path.stat().st_mtime_ns for path in Path(trial["folder"]).rglob("*") if path.name != "trial.json"} == files


def test_a_half_done_trial_repeats_its_reports_then_goes_on_from_its_checkpoint(make_trial: MakeTrial, tmp_path: Path) -> None:
    trial = make_trial()
    first = session_of(trial)
    before = results_of(first, 2)
    assert first.close(reason="given up by the test")
    folder = RunFolder(trial["folder"])
    row, status = read_trial(folder), read_status(folder)
    assert row is not None
    assert status is not None
    assert (row.state, row.reason, row.step) == ("KILLED", "given up by the test", 6)
    assert status.state == "KILLED"
    assert not (Path(folder.uri) / "lease.json").exists()
    assert [c.step for c in list_checkpoints(folder)] == [3, 6]  # and not one step was trained past the last report

    again = session_of(trial)
    results = results_of(again)
    again.close(reason="over")
    assert reported(results)[:2] == reported(before)
    assert [r.attempt for r in read_records(folder) if "train/loss" in r.values] == [1] * 6 + [2] * 6
    plain = RunFolder(str(tmp_path / "plain"))
    run_training(RunConfig.parse(json.loads(trial["run"])), plain, LocalContext())
    assert_same_weights(weights(folder), weights(plain))


def test_a_stopped_trial_repeats_its_reports_and_ends(make_trial: MakeTrial) -> None:
    trial = make_trial()
    first = session_of(trial)
    results_of(first, 2)
    mark_stopped(trial["folder"])
    first.close(reason="not known")
    again = session_of(trial)
    results = results_of(again)
    assert [(r["step"], r["state"], r["done"]) for r in results] == [
        (3, "RUNNING", False),
        (6, "RUNNING", False),
        (6, "STOPPED", True),
    ]
    assert latest_checkpoint(RunFolder(trial["folder"])).step == 6  # type: ignore[union-attr]


def test_a_loss_that_is_no_number_makes_a_trial_infeasible_for_good(make_trial: MakeTrial) -> None:
    trial = make_trial("optimizer.lr=1e30", "schedule.warmup_steps=0", "train.clip_norm=null")
    for _ in range(2):  # the second time from what the folder says
        session = session_of(trial)
        (result,) = results_of(session)
        session.close(reason="over")
        assert (result["state"], result["done"]) == ("INFEASIBLE", True)
        assert "gradient norm" in result["infeasible"]
    row = read_trial(RunFolder(trial["folder"]))
    assert row is not None
    assert row.state == "INFEASIBLE"
    assert read_interventions(RunFolder(trial["folder"])) == (), "it spends nothing on rollbacks"
    status = read_status(RunFolder(trial["folder"]))
    assert status is not None
    assert (status.state, status.attempt) == ("FAILED", 1)


def test_what_the_user_can_correct_is_a_failed_result_with_the_message(make_trial: MakeTrial, tmp_path: Path) -> None:
    trial = make_trial()
    values = json.loads(trial["run"])
    trial["run"] = json.dumps({**values, "data": {**values["data"], "eval": str(tmp_path / "nothing")}})
    session = session_of(trial)
    (result,) = results_of(session)
    assert (result["state"], result["done"]) == ("FAILED", True)
    assert "nothing" in result["reason"]


def test_a_trial_that_is_not_asked_for_its_next_report_gives_its_folder_back_and_goes_on_later(
    make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crate_ray.launch.sweeps.trial_attempt.IDLE_S", 0.2)
    trial = make_trial()
    idle = session_of(trial)
    results_of(idle, 1)
    deadline = time.monotonic() + 10
    while (Path(trial["folder"]) / "lease.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    other = session_of(trial)
    assert [r["step"] for r in results_of(other, 2)] == [3, 6]
    other.close(reason="over")
    assert [r["step"] for r in results_of(idle)] == [6, 9, 12]


def test_a_lease_of_a_dead_trial_is_taken_over(make_trial: MakeTrial) -> None:
    trial = make_trial()
    folder = RunFolder(trial["folder"])
    lease = Lease.take(folder)
    held = folder.read_json("lease.json")
    assert held is not None
    folder.write_json("lease.json", {**held, "pid": 2**22 + 1})  # beyond the largest process id
    session = session_of(trial)
    assert len(results_of(session)) == 4
    del lease


def test_a_clone_goes_on_from_the_whole_state_of_its_donor_under_other_hyperparameters(make_trial: MakeTrial) -> None:
    pbt = {"scheduler": {"type": "pbt", "interval_steps": 3}}
    donor = session_of(make_trial("optimizer.lr=2e-3", sweep=pbt))
    results_of(donor, 2)
    pointer = donor.pointer
    trial = make_trial(sweep=pbt, set={"optimizer.lr": 1e-4})
    own = session_of({**trial, "set": {}})
    results_of(own, 1)
    own.close(reason="exploited")
    session = session_of(trial, pointer)
    results = results_of(session)
    session.close(reason="over")
    assert pointer.step == 6
    assert [r["step"] for r in results] == [9, 12]
    clone = RunFolder(trial["folder"] + "/gen_01")
    first = list_checkpoints(clone)[0]
    donated = next(c for c in list_checkpoints(RunFolder(pointer.run)) if c.step == 6)
    assert first.files == donated.files
    assert (first.step, first.cursor) == (6, donated.cursor)
    assert clone.read_config().optimizer.lr == 1e-4
    row = read_trial(RunFolder(trial["folder"]))
    assert row is not None
    assert row.values == {"optimizer.lr": 1e-4}
    again = session_of({**trial, "set": {}})  # a later session knows its clone, and what was changed, from the folder
    assert [r["step"] for r in results_of(again)] == [9, 12]
    donor.close(reason="over")


def test_a_checkpoint_that_was_pointed_at_outlives_the_pruning(make_trial: MakeTrial) -> None:
    trial = make_trial("checkpoint.keep_last=1", "train.steps=18", sweep={"scheduler": {"type": "pbt", "interval_steps": 3}})
    session = session_of(trial)
    results_of(session, 1)
    assert session.pointer.step == 3
    results_of(session, 3)
    folder = RunFolder(trial["folder"])
    assert [c.step for c in list_checkpoints(folder)] == [3, 12]
    assert session.pointer.step == 12
    results_of(session, 1)
    assert session.pointer.step == 15
    results_of(session)
    assert [c.step for c in list_checkpoints(folder)] == [12, 15, 18]
    session.close(reason="over")


def test_a_probed_trial_reports_its_probe_at_the_end(make_trial: MakeTrial) -> None:
    trial = make_trial(sweep={"objective": ["probe_top1", "eval_loss"]})
    session = session_of(trial)
    last = results_of(session)[-1]
    session.close(reason="over")
    assert 0.05 < last["probe_top1"] < 1
    row = read_trial(RunFolder(trial["folder"]))
    assert row is not None
    assert row.objectives["probe_top1"] == pytest.approx(last["probe_top1"], rel=1e-3)


def test_under_asha_with_a_cooldown_each_rung_is_the_end_of_a_cooled_run(make_trial: MakeTrial, tmp_path: Path) -> None:
    asha = {"scheduler": SCHEDULER.model_dump()}
    keys = ("train.steps=16", "schedule.cooldown_fraction=0.25", "schedule.warmup_steps=2")
    trial = make_trial(*keys, sweep=asha)
    session = session_of(trial)
    before = results_of(session, 1)
    session.close(reason="given up by the test")
    again = session_of(trial)
    results = results_of(again)
    again.close(reason="over")
    assert [(r["step"], r["done"]) for r in results] == [(4, False), (8, False), (16, True)]
    assert reported(results)[:1] == reported(before)
    for steps, result in zip((4, 8, 16), results, strict=True):  # each is the run of that length, made by itself
        plain = RunFolder(str(tmp_path / f"plain-{steps}"))
        values = json.loads(trial["run"])
        overrides = {**values, "train": {**values["train"], "steps": steps}}
        run_training(RunConfig.parse(overrides), plain, LocalContext())
        folder = RunFolder(trial["folder"] if steps == 16 else f"{trial['folder']}/rung_{steps:08d}")
        assert_same_weights(weights(folder), weights(plain))
        losses = [r.values["eval/loss"] for r in read_records(plain) if "eval/loss" in r.values]
        assert result["eval_loss"] == losses[-1]
    row = read_trial(RunFolder(trial["folder"]))
    assert row is not None
    legs = legs_of(RunConfig.parse(json.loads(trial["run"])), RunFolder(trial["folder"]), SCHEDULER, num_samples=1000)
    past = past_reports(row, legs, SCHEDULER)  # what rungs of a later session are filled with: nothing of the way to them
    assert reported(past[:2]) == reported(results[:2])
    assert [report["step"] for report in past] == [4, 8, 16]
    trained = [len([r for r in read_records(RunFolder(trial["folder"] + tail)) if "train/loss" in r.values]) for tail in RUNGS]
    assert trained == [4, 8 - 3, 16 - 6]


RUNGS = ("/rung_00000004", "/rung_00000008", "")
SCHEDULER = SchedulerConfig(type="asha", grace_steps=4, reduction_factor=2)


def test_a_trial_that_was_stopped_at_a_cooled_rung_repeats_its_rungs_and_ends(make_trial: MakeTrial) -> None:
    asha = {"scheduler": {"type": "asha", "grace_steps": 4, "reduction_factor": 2}}
    trial = make_trial("train.steps=16", "schedule.cooldown_fraction=0.25", "schedule.warmup_steps=2", sweep=asha)
    first = session_of(trial)
    results_of(first, 2)
    mark_stopped(trial["folder"])
    first.close(reason="not known")
    results = results_of(session_of(trial))
    assert [(r["step"], r["state"]) for r in results] == [(4, "RUNNING"), (8, "RUNNING"), (8, "STOPPED")]


def test_an_allocation_that_fails_makes_a_trial_infeasible_and_other_errors_do_not() -> None:
    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(2**52)
    with pytest.raises(MemoryError) as numpy_error:
        np.empty(2**52)
    for error in (torch_error.value, numpy_error.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        reason = infeasible_reason(error)
        assert reason is not None
        assert reason.startswith("out of memory: ")
        assert cure_of(WorkerGroupError("a rank failed", {0: error})) is Cure.NONE  # nor do its workers start again
    assert infeasible_reason(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert infeasible_reason(TrainingDivergedError("loss nan")) == "loss nan"


def test_a_sweep_that_is_stopping_interrupts_a_trial_between_two_reports_with_a_checkpoint(
    make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crate_ray.launch.sweeps.trial_attempt.LOOK_S", 0.05)
    stop_file = tmp_path / "stop.json"
    long = ("train.steps=100000", "eval.every_steps=50000", "checkpoint.every_steps=50000")
    trial = make_trial(*long, stop_file=str(stop_file))
    session = session_of(trial)
    folder = RunFolder(trial["folder"])
    threading.Timer(3, stop_file.touch).start()
    for _ in range(2):  # asked again, it does not start again
        result = session.next_result()
        assert (result["state"], result["done"]) == ("KILLED", False)
    session.close(reason="SIGTERM")
    row, saved = read_trial(folder), latest_checkpoint(folder)
    assert row is not None
    assert saved is not None
    assert (row.state, row.reason) == ("KILLED", "SIGTERM")
    assert 0 < saved.step < 50000
    assert saved.step == [r.step for r in read_records(folder) if "train/loss" in r.values][-1]
