"""Opening a run: new, resumed or refused; and how it stands."""

import time
from pathlib import Path

import pytest

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig, fingerprint
from crate_ray.runs import (
    LEASE_SECONDS,
    Lease,
    RunFolder,
    Status,
    is_finished,
    list_runs,
    open_run,
    read_status,
    sweep_of,
    write_status,
)

DATA = "d" * 64


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    return RunConfig.load("digits_mae", [f"storage.path={tmp_path}", *overrides])


def opened(config: RunConfig, **options: str) -> RunFolder:
    return open_run(config, fingerprint(config, DATA, "float32"), **options)


def test_a_new_run_says_what_it_is_and_how_it_came_about(tmp_path: Path) -> None:
    config = load(tmp_path)
    folder = opened(config, kind="probe", study="first", parent_uid="ab")
    meta = folder.read_json("run_meta.json")
    assert meta is not None
    assert (meta["kind"], meta["study"], meta["parent_uid"], meta["family"]) == ("probe", "first", "ab", "vit")
    assert len(meta["run_uid"]) == 32
    assert {"python", "torch", "numpy"} <= meta["versions"].keys()
    assert folder.read_config() == config
    assert all((folder.read_json(name) or {})["schema_version"] == 1 for name in ("run_meta.json", "fingerprint.json"))


def test_the_same_configuration_finds_the_same_run(tmp_path: Path) -> None:
    first = opened(load(tmp_path))
    again = opened(load(tmp_path, "scale.num_workers=2", "eval.every_steps=9"))
    assert again.uri == first.uri
    assert again.read_json("run_meta.json") == first.read_json("run_meta.json")
    assert again.read_config().scale.num_workers == 2


def test_a_changed_configuration_without_a_name_is_a_new_run(tmp_path: Path) -> None:
    assert opened(load(tmp_path)).uri != opened(load(tmp_path, "optimizer.lr=1e-3")).uri


def test_a_changed_configuration_under_a_taken_name_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    folder = opened(load(tmp_path, "name=mine"))
    before = folder.read_config()
    with pytest.raises(ConfigError) as caught:
        opened(load(tmp_path, "name=mine", "optimizer.lr=1e-3", "model.encoder_depth=2"))
    message = str(caught.value)
    assert "optimizer.lr: 0.0005 there, 0.001 here" in message
    assert "model.encoder_depth: 4 there, 2 here" in message
    assert "weight_decay" not in message
    assert folder.read_config() == before


def test_runs_and_trials_are_listed_and_other_folders_are_not(tmp_path: Path) -> None:
    runs = [opened(load(tmp_path, "name=b")), opened(load(tmp_path, "name=a"))]
    trial = opened(load(tmp_path), uri=str(tmp_path / "trials" / "0123"))
    (tmp_path / "notes").mkdir()
    assert [f.uri for f in list_runs(str(tmp_path))] == [runs[1].uri, runs[0].uri, trial.uri]


def test_the_trials_of_sweeps_below_a_root_are_listed_and_know_their_sweep(tmp_path: Path) -> None:
    run = opened(load(tmp_path, "name=run"))
    sweep = RunFolder(str(tmp_path / "depth"))
    sweep.write_json("run_meta.json", {"kind": "sweep"})
    trials = [opened(load(tmp_path), uri=sweep.path("trials", name)) for name in ("crate-01", "crate-02")]
    assert [f.uri for f in list_runs(str(tmp_path))] == [run.uri]  # a folder like any other, until it says that it is a sweep
    assert sweep_of(trials[0]) is None
    storage.write_atomic(sweep.path("sweep.yaml"), "name: depth\n")
    assert [f.uri for f in list_runs(str(tmp_path))] == [*(f.uri for f in trials), run.uri]
    assert [f.uri for f in list_runs(sweep.uri)] == [f.uri for f in trials]
    assert [above.uri for f in trials if (above := sweep_of(f)) is not None] == [sweep.uri] * 2
    assert sweep_of(run) is None


def test_a_trial_says_which_stage_it_is_of_and_another_run_says_nothing(tmp_path: Path) -> None:
    trial = opened(load(tmp_path), kind="trial", stage="confirm", uri=str(tmp_path / "trial"))
    assert (trial.read_json("run_meta.json") or {})["stage"] == "confirm"
    assert "stage" not in (opened(load(tmp_path)).read_json("run_meta.json") or {})


def test_a_run_is_finished_only_when_its_status_says_so(tmp_path: Path) -> None:
    folder = opened(load(tmp_path))
    assert read_status(folder) is None
    assert not is_finished(folder)
    lease = Lease.take(folder)
    assert not is_finished(folder)
    lease.end("KILLED", "SIGTERM")
    assert not is_finished(folder)
    Lease.take(folder).end("FINISHED")
    assert is_finished(folder)


@pytest.mark.parametrize(
    ("state", "age_s", "stale"),
    [("RUNNING", 1, False), ("RUNNING", LEASE_SECONDS + 5, True), ("FINISHED", 1e6, False), ("KILLED", 1e6, False)],
)
def test_a_run_is_stale_when_it_claims_to_run_and_nothing_beats(state: str, age_s: float, stale: bool, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    then = time.time() - age_s
    write_status(folder, Status(state, 1, then, then))  # type: ignore[arg-type]
    status = read_status(folder)
    assert status is not None
    assert status.is_stale is stale
