"""What a run folder becomes in MLflow, and that sending it again changes nothing."""

import math
from pathlib import Path
from typing import Any

import pytest

from crate_ray import storage
from crate_ray.runs import Lease, RecordWriter, RunFolder
from crate_ray.runs.create import run_meta
from crate_ray.runs.rows import configuration_of
from crate_ray.tracking import sync
from crate_ray.tracking.replay import MARKER


def write(folder: RunFolder, steps: range, *, attempt: int = 1, key: str = "train/loss") -> None:
    writer = RecordWriter(folder, attempt)
    for step in steps:
        writer.write(step, {key: attempt + step / 1000})
    writer.close()


def only_run(client: Any, experiment: str) -> Any:
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    assert len(runs) == 1
    return runs[0]


def points(client: Any, run: Any, key: str = "train/loss") -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key)]


def test_a_run_arrives_with_flat_parameters_its_tags_and_the_times_of_measurement(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = make_run(study="study", kind="trial")
    lease = Lease.take(folder)
    write(folder, range(3))
    lease.end("FINISHED")
    assert [(result.sent, result.error) for result in sync([folder], uri, experiment)] == [(3, None)]
    run = only_run(client, experiment)
    meta = folder.read_json("run_meta.json")
    assert run.info.status == "FINISHED"
    assert run.info.start_time == round(meta["created"] * 1000)
    assert run.info.end_time == round((lease.status.ended or 0) * 1000)
    assert run.data.params == {
        "model": "crate_mae",
        "arch": "crate_mae 12x384",
        "depth": "12",
        "width": "384",
        "heads": "6",
        "patch": "8",
        "mask_ratio": "0.75",
        "ista_step_size": "0.1",
        "ista_lambda": "0.5",
        "dataset": "digits",
        "global_batch": "64",
        "lr": "0.00025",
        "wd": "0.05",
        "seed": "3",
        "precision": "float32",
        "configuration": f"12x384 crate {configuration_of(folder.read_json('fingerprint.json')['resume']['parts'])}",
    }
    expected = {"kind": "trial", "family": "crate", "study": "study", "seed": "3", "attempt": "1", "mlflow.runColor": "#d55e00"}
    assert expected.items() <= run.data.tags.items()
    assert run.data.tags["crate_ray.run_uid"] == meta["run_uid"]
    assert {"mlflow.user", "mlflow.source.name"} <= run.data.tags.keys()
    history = client.get_metric_history(run.info.run_id, "train/loss")
    times = [line.split('"time":')[1].split(",")[0] for line in storage.read_text(folder.path("metrics.jsonl")).splitlines()]
    assert [metric.timestamp for metric in history] == [round(float(time) * 1000) for time in times]


@pytest.mark.parametrize("marker", ["kept", "lost", "wrong count", "wrong record", "another store"])
def test_a_replay_sends_nothing_twice_whatever_became_of_its_marker(
    marker: str, uri: str, client: Any, make_run: Any, experiment: str
) -> None:
    folder = make_run()
    Lease.take(folder)
    write(folder, range(5))
    sync([folder], uri, experiment)
    spoilt: dict[str, dict[str, Any]] = {
        "wrong count": {"records": 4000},
        "wrong record": {"records": 2, "last": {"step": 1, "time": 0.0, "attempt": 9}},
        "another store": {"uri": "http://elsewhere:5000"},
    }
    if marker == "lost":
        storage.delete(folder.path(MARKER))
    elif marker in spoilt:
        folder.write_json(MARKER, {**folder.read_json(MARKER), **spoilt[marker]})
    write(folder, range(5, 8))
    (result,) = sync([folder], uri, experiment)
    assert (result.sent, result.error) == (3 if marker == "kept" else 8, None)
    run = only_run(client, experiment)
    assert points(client, run) == [(step, 1 + step / 1000) for step in range(8)]


def test_steps_that_a_resumed_attempt_repeats_are_points_once(uri: str, client: Any, experiment: str, make_run: Any) -> None:
    folder = make_run()
    Lease.take(folder).end("KILLED")
    write(folder, range(6))
    sync([folder], uri, experiment)
    assert only_run(client, experiment).info.status == "KILLED"
    Lease.take(folder)
    write(folder, range(4, 9), attempt=2)
    sync([folder], uri, experiment)
    run = only_run(client, experiment)
    assert (run.info.status, run.data.tags["attempt"]) == ("RUNNING", "2")
    assert [step for step, _ in points(client, run)] == list(range(9))
    assert points(client, run)[6:] == [(step, 2 + step / 1000) for step in range(6, 9)]


def test_a_failure_is_told_and_forgotten_when_a_later_attempt_ends_well(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = make_run()
    Lease.take(folder).end("FAILED", "CUDA out of memory")
    sync([folder], uri, experiment)
    run = only_run(client, experiment)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "CUDA out of memory")
    Lease.take(folder).end("FINISHED")
    sync([folder], uri, experiment)
    run = only_run(client, experiment)
    assert (run.info.status, "failure" in run.data.tags) == ("FINISHED", False)


def test_final_values_and_small_files_are_there_once_with_four_digits(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = make_run()
    lease = Lease.take(folder)
    write(folder, range(3))
    write(folder, range(2, 3), key="final/probe_top1")
    folder.write_json("final.json", {"values": {"final/probe_top1": 1.002, "final/gflops": 12.34567}})
    storage.write_atomic(folder.path("pictures", "reconstruction.png"), b"not really a picture")
    lease.end("FINISHED")
    for _ in range(2):
        sync([folder], uri, experiment)
    run = only_run(client, experiment)
    assert points(client, run, "final/gflops") == [(2, 12.35)]
    assert points(client, run, "final/probe_top1") == [(2, 1.002)]
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "fingerprint.json",
        "final.json",
        "pictures",
    }
    assert Path(run.info.artifact_uri.removeprefix("file://")).parents[2].name == "mlartifacts"


def test_a_trial_hangs_below_its_sweep_in_whatever_order_they_are_given(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    sweep = make_run(kind="sweep")
    trial = make_run(kind="trial", parent_uid=sweep.read_json("run_meta.json")["run_uid"])
    parent, child = sync([trial, sweep], uri, experiment)
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_non_finite_values_odd_keys_and_records_larger_than_a_batch_arrive(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = make_run()
    writer = RecordWriter(folder, 1)
    writer.write(1, {"train/loss": math.nan, "odd=key@(1)": 1.0, **{f"whitebox/layer{i:04d}/x": float(i) for i in range(1201)}})
    writer.close()
    assert sync([folder], uri, experiment)[0].error is None
    run = only_run(client, experiment)
    assert len(run.data.metrics) == 1203
    assert run.data.metrics["odd_key__1_"] == 1.0
    assert math.isnan(run.data.metrics["train/loss"])


def test_a_folder_that_is_no_run_is_named_and_the_others_are_sent(
    uri: str, experiment: str, make_run: Any, tmp_path: Path
) -> None:
    folder = RunFolder(str(tmp_path / "stray"))
    write(folder, range(3))
    stray, sent = sync([make_run(), folder], uri, experiment)
    assert "not a run folder" in (stray.error or "")
    assert sent.error is None


def test_a_sweep_is_a_parent_with_its_name_its_state_and_the_counts_of_its_trials(
    uri: str, client: Any, experiment: str, make_run: Any, tmp_path: Path
) -> None:
    sweep = RunFolder(str(tmp_path / "depth_width"))
    sweep.write_json("run_meta.json", run_meta(family="crate vit", kind="sweep", study="depth_width", parent_uid=None))
    storage.write_atomic(sweep.path("sweep.yaml"), "name: depth_width\n")
    uid = (sweep.read_json("run_meta.json") or {})["run_uid"]
    lease = Lease.take(sweep)
    trials = [make_run(kind="trial", study="depth_width", parent_uid=uid, stage=stage) for stage in ("screen", "confirm")]
    for trial in trials:
        Lease.take(trial).end("FINISHED")
    assert [result.error for result in sync([*trials, sweep], uri, experiment)] == [None] * 3
    assert find_only(client, experiment, "sweep").info.status == "RUNNING"
    sweep.write_json("results.json", {"rows": [], "counts": {"FINISHED": 2, "INFEASIBLE": 1}})
    lease.end("FINISHED")
    sync([sweep], uri, experiment)
    parent = find_only(client, experiment, "sweep")
    assert (parent.info.run_name, parent.info.status) == ("depth_width", "FINISHED")
    assert parent.data.metrics == {"trials/finished": 2, "trials/infeasible": 1}
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} >= {"sweep.yaml", "results.json"}
    for stage in ("screen", "confirm"):
        tags = find_only(client, experiment, "trial", stage).data.tags
        assert tags["mlflow.parentRunId"] == parent.info.run_id


def find_only(client: Any, experiment: str, kind: str, stage: str | None = None) -> Any:
    text = f"tags.kind = '{kind}'" + (f" and tags.stage = '{stage}'" if stage else "")
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], filter_string=text)
    return run
