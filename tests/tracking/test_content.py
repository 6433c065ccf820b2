"""What a run shows beside its numbers: data sets, system metrics, model; each once, however often it is sent."""

import json
import logging
from typing import Any

import pytest

from crate_ray.runs import Lease, RecordWriter, RunFolder, system_stream
from crate_ray.tracking import content, sync
from crate_ray.tracking.describe import describe
from crate_ray.tracking.logged_model import find_model, newest_checkpoint

DIGEST = "0123456789abcdef" * 4
DATASETS = [
    {"split": "train", "url": "/data/digits/train", "digest": DIGEST, "images": 1200, "classes": 10},
    {"split": "eval", "url": "/data/digits/validation", "digest": DIGEST[::-1], "images": 300, "classes": 10},
    {"split": "test", "url": "s3://bucket/digits/test", "digest": DIGEST[5:] + DIGEST[:5], "images": 297, "classes": 10},
]


def finished(folder: RunFolder, *, step: int = 100, finals: dict[str, float] | None = None) -> RunFolder:
    """A run that ended with a checkpoint and final values."""
    lease = Lease.take(folder)
    save(folder, step)
    writer = RecordWriter(folder, lease.attempt)
    writer.write(step, {"train/loss": 0.5})
    writer.write(step, finals or {"final/eval_loss": 0.4, "final/probe_top1": 0.9, "final/params_m": 1.5})
    writer.close()
    lease.end("FINISHED")
    return folder


def save(folder: RunFolder, step: int) -> None:
    entry = {"bytes": 1, "sha256": f"{step:064x}"}
    folder.write_json(f"checkpoints/step_{step:08d}/manifest.json", {"step": step, "files": {"model.safetensors": entry}})


def only_run(client: Any, experiment: str) -> Any:
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def test_data_sets_are_inputs_with_digest_source_and_context_once(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = make_run()
    folder.write_json("datasets.json", {"datasets": DATASETS})
    Lease.take(folder)
    for _ in range(2):
        assert sync([folder], uri, experiment)[0].error is None
        folder.write_json("tracking.json", {})  # a replay that knows of nothing
    inputs = {item.dataset.name: item for item in only_run(client, experiment).inputs.dataset_inputs}
    assert {name: item.tags[0].value for name, item in inputs.items()} == {
        "digits/train": "pretraining",
        "digits/eval": "evaluation",
        "digits/test": "test",
    }
    trained = inputs["digits/train"].dataset
    assert (trained.digest, json.loads(trained.profile)) == (DIGEST[:32], {"num_rows": 1200, "num_classes": 10})
    import mlflow.data

    assert mlflow.data.get_source(trained).uri == "/data/digits/train"
    assert mlflow.data.get_source(inputs["digits/test"].dataset).uri == "s3://bucket/digits/test"
    assert len(client.search_runs([only_run(client, experiment).info.experiment_id], "dataset.name = 'digits/train'")) == 1


@pytest.mark.parametrize(("marker", "chunk_bytes"), [("kept", 2**20), ("lost", 2**20), ("kept", 900), ("lost", 900)])
def test_what_the_nodes_do_arrives_under_mlflows_own_names_once(
    marker: str, chunk_bytes: int, uri: str, client: Any, experiment: str, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "CHUNK_BYTES", chunk_bytes)
    folder = make_run()
    Lease.take(folder)
    keys = {0: "system/cpu_utilization_percentage", 4: "system/node_4/cpu_utilization_percentage"}
    for start in (0, 500):
        for rank, key in keys.items():
            writer = RecordWriter(folder, 1, stream=system_stream(rank))
            for second in range(start, start + 500, 10):
                writer.write(second, {key: rank + second / 1000})
            writer.close()
        assert sync([folder], uri, experiment)[0].error is None
        if marker == "lost":
            folder.write_json("tracking.json", {})
    run = only_run(client, experiment)
    for rank, key in keys.items():
        history = client.get_metric_history(run.info.run_id, key)
        assert [(point.step, point.value) for point in history] == [(s, rank + s / 1000) for s in range(0, 1000, 10)]


def test_a_run_that_ended_has_one_model_that_points_at_its_checkpoint_with_its_metrics(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = finished(make_run(kind="trial"))
    folder.write_json("datasets.json", {"datasets": DATASETS})
    folder.write_json("probe_test.json", {})
    for _ in range(2):
        assert sync([folder], uri, experiment)[0].error is None
        folder.write_json("tracking.json", {})
    run = only_run(client, experiment)
    (model,) = client.search_logged_models([run.info.experiment_id])
    saved = newest_checkpoint(folder)
    assert saved is not None
    assert (model.source_run_id, str(model.status)) == (run.info.run_id, "READY")
    expected = {"crate_ray.checkpoint": saved.uri, "crate_ray.step": "100", "crate_ray.digest": saved.digest, "family": "crate"}
    assert expected.items() <= model.tags.items()
    assert (model.params["arch"], model.tags["mlflow.model.isExternal"]) == ("crate_mae 12x384", "true")
    metrics = {metric.key: (metric.value, metric.dataset_name) for metric in model.metrics}
    assert metrics == {
        "final/eval_loss": (0.4, "digits/eval"),
        "final/probe_top1": (0.9, "digits/test"),
        "final/params_m": (1.5, None),
    }
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    assert len(client.get_metric_history(run.info.run_id, "final/probe_top1")) == 1


def test_a_resumed_run_keeps_its_model_which_moves_to_the_newer_checkpoint(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = finished(make_run())
    sync([folder], uri, experiment)
    finished(folder, step=200, finals={"final/probe_top1": 0.95})
    sync([folder], uri, experiment)
    run = only_run(client, experiment)
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert model.tags["crate_ray.step"] == "200"
    found = find_model(client, run.info.experiment_id, folder.read_json("run_meta.json")["run_uid"])
    assert found is not None
    assert found.model_id == model.model_id


def test_a_run_without_a_checkpoint_or_one_that_goes_on_has_no_model(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    going_on, empty = make_run(), make_run()
    Lease.take(going_on)
    save(going_on, 10)
    Lease.take(empty).end("FAILED", "out of memory")
    sync([going_on, empty], uri, experiment)
    assert client.search_logged_models([client.get_experiment_by_name(experiment).experiment_id]) == []


def test_what_a_store_does_not_know_costs_one_warning_and_no_number(
    uri: str, client: Any, experiment: str, make_run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    def unknown(*_: Any, **__: Any) -> None:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    monkeypatch.setattr("mlflow.MlflowClient.search_logged_models", unknown)
    with caplog.at_level(logging.WARNING, logger="crate_ray"):
        assert sync([finished(make_run())], uri, experiment)[0].error is None
    assert [record.message for record in caplog.records if "does not take the model" in record.message]
    run = only_run(client, experiment)
    assert (run.info.status, run.data.metrics["final/probe_top1"]) == ("FINISHED", 0.9)


def test_a_run_says_who_made_it_how_and_from_which_code(uri: str, client: Any, experiment: str, make_run: Any) -> None:
    folder = make_run()
    Lease.take(folder)
    sync([folder], uri, experiment)
    run, meta, identity = only_run(client, experiment), folder.read_json("run_meta.json"), folder.read_json("fingerprint.json")
    assert run.data.tags["mlflow.user"] == meta["user"]
    assert run.data.tags["mlflow.source.name"] == meta["command"]
    assert run.data.tags.get("mlflow.source.git.commit") == meta["git_commit"]
    assert run.data.tags.get("crate_ray.git_dirty") == {True: "true", False: "false", None: None}[meta["git_dirty"]]
    assert run.data.tags["crate_ray.resume_digest"] == identity["resume"]["digest"][:16]
    assert run.data.tags["crate_ray.data_digest"] == "data"
    assert run.data.params["configuration"].startswith("12x384 crate ")
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names == {"config.yaml", "fingerprint.json"}
    assert run.info.status == "RUNNING"


def test_runs_that_differ_in_their_seed_alone_share_the_configuration(make_run: Any) -> None:
    config = make_run().read_config()
    seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 200})})
    names = [describe(make_run(config=each)).params["configuration"] for each in (config, seeded, longer)]
    assert names[0] == names[1] != names[2]
