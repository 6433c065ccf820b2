"""An experiment read back from MLflow: the same rows that went in, and in words what has none."""

import dataclasses
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import ConfigError
from crate_ray.runs import Lease, NullSink, RunFolder
from crate_ray.runs.rows import Estimate, RunRow, Split, read_run_row
from crate_ray.tracking import initialise, sync
from crate_ray.tracking.limits import MAX_TAG
from crate_ray.tracking.query import rows_of_experiment
from crate_ray.tracking.row_tag import ROW_TAG, pack_rows, unpack_row
from crate_ray.tracking.server import free_port
from crate_ray.training.final import write_result


def make_row(number: int = 0, **changes: Any) -> RunRow:
    values = {"eval_loss": 0.1 + number, "probe_top1": 0.9, "knn_top1": float("nan")}
    fixed: dict[str, Any] = {
        "run_uid": f"{number:032x}",
        "name": f"run-{number}",
        "uri": f"s3://bucket/out/run-{number}",
        "kind": "trial",
        "family": "crate",
        "model": "crate_mae",
        "recipe": "digits_crate_mae",
        "seed": number,
        "state": "FINISHED",
        "is_complete": True,
        "configuration": "0123abcd",
        "settings": {"depth": 12, "ista_lambda": [0.5, 0.25]},
        "compare": {"data.digest": "f" * 64},
        "params_total": 411_568,
        "params_encoder": 205_000,
        "params_paper": 410_000,
        "train_flops_per_image": 1.5e9,
        "images": 1_000_000,
        "train_pflops": 1.5,
        "train_hours": 0.25,
        "values": values,
        "intervals": {"probe_top1": Estimate(0.9, 0.88, 0.92)},
        "judged_split": "test",
    }
    return RunRow(**{**fixed, **changes})


def put(client: Any, experiment_id: str, row: RunRow, **tags: str) -> None:
    validation = dataclasses.replace(row, judged_split="validation", values={"probe_top1": 0.5}, intervals={})
    packed = {ROW_TAG: pack_rows({"test": row, "validation": validation})}
    client.create_run(experiment_id, tags={"kind": row.kind, **packed, **tags}, run_name=row.name)


def test_rows_come_back_as_they_went_in_judged_on_the_split_that_is_asked_for(uri: str, client: Any, experiment: str) -> None:
    experiment_id = initialise(uri, experiment)
    sent = [make_row(number) for number in range(3)]
    for row in sent:
        put(client, str(experiment_id), row)
    found = rows_of_experiment(uri, experiment, split="test")
    assert [row.as_dict() for row in sorted(found.rows, key=lambda row: row.seed)] == [row.as_dict() for row in sent]
    assert found.unread == {}
    validation = rows_of_experiment(uri, experiment, split="validation").rows
    assert {(row.judged_split, row.values["probe_top1"]) for row in validation} == {("validation", 0.5)}


def test_runs_without_a_row_are_named_with_the_reason_and_the_fix(uri: str, client: Any, experiment: str) -> None:
    experiment_id = initialise(uri, experiment)
    old = client.create_run(experiment_id, tags={"kind": "train"}, run_name="old")
    client.set_terminated(old.info.run_id)
    client.create_run(experiment_id, tags={"kind": "trial"}, run_name="young")
    client.create_run(experiment_id, tags={"kind": "train", ROW_TAG: "deflate;bm90aGluZw=="}, run_name="spoilt")
    for kind in ("sweep", "compare"):
        client.create_run(experiment_id, tags={"kind": kind})
    found = rows_of_experiment(uri, experiment, split="test")
    assert found.rows == []
    assert found.unread.keys() == {"old", "young", "spoilt"}
    assert found.unread["young"] == "still running"
    for name in ("old", "spoilt"):
        assert "crate-ray tracking sync" in found.unread[name]


def test_an_unknown_experiment_is_an_error_that_lists_the_known_ones(uri: str, experiment: str) -> None:
    initialise(uri, experiment)
    with pytest.raises(ConfigError, match=rf"no experiment 'crate-mae/other' .* there are: .*{experiment}"):
        rows_of_experiment(uri, "crate-mae/other", split="test")


def test_a_deleted_experiment_is_none(uri: str, client: Any, experiment: str) -> None:
    client.delete_experiment(initialise(uri, experiment))
    with pytest.raises(ConfigError, match="no experiment"):
        rows_of_experiment(uri, experiment, split="test")


def test_a_database_that_is_not_there_is_an_error_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no MLflow database"):
        rows_of_experiment(f"sqlite:///{tmp_path}/mlflow.db", "any", split="test")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_store_that_never_answers_is_an_error_in_the_stated_time(scheme: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started = time.monotonic()
        with pytest.raises(ConfigError, match="does not answer within 2 s"):
            rows_of_experiment(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/x", "any", split="test", timeout_s=2)
        assert time.monotonic() - started < 20  # the import of MLflow is not the store's time


def test_a_server_that_is_down_is_an_error_that_names_it_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"MLflow at http://127\.0\.0\.1:\d+ does not answer within 2 s") as error:
        rows_of_experiment(f"http://me:secret@127.0.0.1:{free_port()}", "any", split="test", timeout_s=2)
    assert "secret" not in str(error.value)


def test_a_row_far_larger_than_any_real_one_fits_a_tag_and_a_larger_one_is_refused() -> None:
    keys = {f"measure_{number}": number / 7 for number in range(150)}
    row = make_row(values=keys, intervals={key: Estimate(value, value, value) for key, value in keys.items()})
    packed = pack_rows({"test": row, "validation": row})
    assert len(packed) < MAX_TAG
    assert unpack_row(packed, "validation") == row
    with pytest.raises(ConfigError, match="takes 8,000"):
        pack_rows({"test": make_row(values={f"{number * 7919:x}": number / 7 for number in range(2000)})})


def judge(folder: RunFolder, split: str, accuracy: float) -> None:
    body = {"values": {"final/probe_top1": accuracy}, "probe_top1": [accuracy, 0.8, 1.0], "protocol": 1, "split": split}
    folder.write_json(f"probe_{split}.json", body)


def test_a_mirrored_run_tells_its_row_and_tells_it_anew_when_it_was_judged_or_timed(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = make_run()
    lease = Lease.take(folder)
    write_result(
        folder.read_config(),
        folder,
        NullSink(),
        step=100,
        train_seconds=3.0,
        precision="float32",
        measured={"final/eval_loss": 0.5},
    )
    lease.end("FINISHED")

    def told(split: Split) -> RunRow:
        assert [result.error for result in sync([folder], uri, experiment)] == [None]
        (row,) = rows_of_experiment(uri, experiment, split=split).rows
        assert row == read_run_row(folder, split=split)
        return row

    row = told("test")
    assert (row.is_complete, row.images, row.judged_split, row.values["eval_loss"]) == (True, 6400, None, 0.5)
    judge(folder, "validation", 0.91)
    judge(folder, "test", 0.89)
    assert (told("test").values["probe_top1"], told("validation").values["probe_top1"]) == (0.89, 0.91)
    folder.write_json("timing.json", {"images_per_s": 640.0, "hardware": "1 x CPU", "exclusive": True})
    assert told("test").exclusive_hours == pytest.approx(10 / 3600)
