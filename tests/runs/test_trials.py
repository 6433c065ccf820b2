"""The trials of a sweep as rows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import RunConfig
from crate_ray.runs import RunFolder, TrialRow, list_trials, loss_target, objective_values, read_trial, write_trial


def trial(name: str = "crate-0a1b2c3d", **changes: Any) -> TrialRow:
    values: dict[str, Any] = {
        "id": name,
        "arm": "crate",
        "seed": 7,
        "state": "RUNNING",
        "values": {"model.width": 64, "optimizer.lr": 1e-3, "model.ista_lambda": [0.1, 0.2]},
        "quantities": {"params_m": 1.5, "gflops": 0.2},
        "objectives": {"eval_loss": 0.512345, "knn_top1": 0.8},
        "loss_target": {"mask_ratio": 0.75, "patch_size": 4, "norm_pix_loss": False},
        "step": 100,
        "total_steps": 300,
        "seconds": 12.5,
        "placement_group": "ab12",
    }
    return TrialRow(**{**values, **changes})


def folder_of(sweep: Path, row: TrialRow, *, final: dict[str, float] | None = None) -> RunFolder:
    folder = RunFolder(str(sweep / "trials" / row.id))
    write_trial(folder, row)
    if final is not None:
        folder.write_json("final.json", {"values": final, "cost": {}})
    return folder


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    row = trial()
    assert read_trial(folder_of(tmp_path, row)) == row
    assert TrialRow.of(json.loads(json.dumps(row.as_dict(), allow_nan=False))) == row


def test_a_loss_that_is_no_number_is_json_all_the_same(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, trial(objectives={"eval_loss": math.nan, "images_per_s": math.inf}))
    text = Path(folder.path("trial.json")).read_text()
    assert '"NaN"' in text
    assert '"Infinity"' in text
    back = read_trial(folder)
    assert back is not None
    assert math.isnan(back.objectives["eval_loss"])
    assert back.objectives["images_per_s"] == math.inf


def test_only_a_finished_trial_takes_what_training_wrote_at_its_end(tmp_path: Path) -> None:
    final = {"final/eval_loss": 0.4, "final/params_m": 1.501, "final/images_per_s": 90.0}
    stopped = read_trial(folder_of(tmp_path, trial(state="STOPPED"), final=final))
    assert stopped is not None
    assert stopped.objectives == {"eval_loss": 0.512345, "knn_top1": 0.8}
    finished = read_trial(folder_of(tmp_path, trial(state="FINISHED"), final=final))
    assert finished is not None
    assert finished.objectives == {"eval_loss": 0.4, "knn_top1": 0.8, "params_m": 1.501, "images_per_s": 90.0}


def test_a_judgement_on_test_never_reaches_a_choice(tmp_path: Path) -> None:
    judged_on_test = {"final/probe_top1": 0.99, "final/knn_top1": 0.98, "final/top1": 0.97, "final/eval_loss": 0.4}
    folder = folder_of(tmp_path, trial(state="FINISHED"), final=judged_on_test)
    row = read_trial(folder)
    assert row is not None
    assert row.objectives == {"eval_loss": 0.4, "knn_top1": 0.8}
    folder.write_json("probe_validation.json", {"values": {"final/probe_top1": 0.91, "final/knn_top1": 0.85}})
    row = read_trial(folder)
    assert row is not None
    assert row.objectives == {"eval_loss": 0.4, "probe_top1": 0.91, "knn_top1": 0.8}


def test_trials_are_listed_by_id_and_other_folders_passed_over(tmp_path: Path) -> None:
    for name in ("vit-02", "crate-01"):
        folder_of(tmp_path, trial(name))
    (tmp_path / "trials" / "notes").mkdir()
    assert [row.id for row in list_trials(str(tmp_path))] == ["crate-01", "vit-02"]
    assert list_trials(str(tmp_path / "none")) == []


def test_five_hundred_trials_open_two_files_each_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        folder_of(tmp_path, trial(f"crate-{index:02d}", state="FINISHED"), final={"final/eval_loss": 0.1})
    opened = []
    read = RunFolder.read_json
    monkeypatch.setattr(RunFolder, "read_json", lambda self, name: opened.append(name) or read(self, name))
    assert len(list_trials(str(tmp_path))) == 20
    assert sorted(set(opened)) == ["final.json", "trial.json"]
    assert len(opened) == 40


def test_an_objective_is_what_was_measured_or_else_what_was_known_before() -> None:
    row = trial(objectives={"eval_loss": 0.5, "gflops": 0.21})
    assert (row.value_of("eval_loss"), row.value_of("gflops"), row.value_of("params_m")) == (0.5, 0.21, 1.5)
    assert row.value_of("probe_top1") is None


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("eval/loss", "eval_loss"),
        ("eval/knn_top1", "knn_top1"),
        ("perf/images_per_s", "images_per_s"),
        ("final/eval_loss", "eval_loss"),
        ("final/encoder_params_m", "encoder_params_m"),
    ],
)
def test_records_and_final_values_get_the_names_of_objectives(key: str, name: str) -> None:
    assert objective_values({key: 1.0, "train/loss": 2.0, "perf/step_s": 3.0}) == {name: 1.0}


@pytest.mark.parametrize(
    ("state", "is_over"),
    [("FINISHED", True), ("STOPPED", True), ("INFEASIBLE", True), ("RUNNING", False), ("FAILED", False), ("KILLED", False)],
)
def test_a_later_session_leaves_alone_what_ended_by_itself(state: str, is_over: bool) -> None:
    assert trial(state=state).is_over is is_over


def test_losses_ask_the_same_where_mask_patch_and_target_agree() -> None:
    mae = RunConfig.load("digits_mae", [])
    target = {"mask_ratio": mae.model.mask_ratio, "patch_size": mae.model.patch_size, "norm_pix_loss": mae.model.norm_pix_loss}
    target["image_size"] = mae.model.image_size
    assert loss_target(mae) == target
    assert loss_target(RunConfig.load("digits_mae", ["model.encoder_depth=2", "optimizer.lr=1e-3"])) == target
    assert loss_target(RunConfig.load("digits_mae", ["model.mask_ratio=0.4"])) == target | {"mask_ratio": 0.4}
