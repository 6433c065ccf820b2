"""Runs of a sweep come and go: what is released is sent whole, then forgotten; its address stays known."""

import time
from typing import Any

import pytest

from crate_ray.runs import Lease, RecordWriter, RunFolder, State
from crate_ray.tracking import Mirror
from crate_ray.tracking.server import free_port

pytestmark = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's own, with a newer SQLAlchemy


def end_run(folder: RunFolder, state: State, *, step: int) -> None:
    lease = Lease.take(folder)
    writer = RecordWriter(folder, lease.attempt)
    writer.write(step, {"train/loss": 1 / step})
    writer.close()
    lease.end(state)


def wait_for(condition: Any, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


@pytest.mark.parametrize("state", ["FINISHED", "KILLED"])
def test_a_released_run_is_sent_whole_with_late_files_and_then_forgotten(
    state: State, uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    parent, folder = make_run(kind="sweep"), make_run(kind="trial")
    uid = parent.read_json("run_meta.json")["run_uid"]
    with Mirror(uri, experiment) as mirror:
        mirror.follow(parent)
        mirror.follow(folder, parent_uid=uid)
        end_run(folder, state, step=4)
        wait_for(lambda: folder.name in mirror.links()["runs"])
        folder.write_json("trial.json", {"state": "STOPPED"})
        mirror.release(folder)
        wait_for(lambda: len(mirror._replays) == 1)
        found = mirror.links()["runs"]
    run = client.get_run(found[folder.name].split("/")[-1].partition("?")[0])
    assert (run.info.status, run.data.metrics["train/loss"]) == (state, 0.25)
    assert run.data.tags["mlflow.parentRunId"] == found[parent.name].split("/")[-1].partition("?")[0]
    assert "trial.json" in [item.path for item in client.list_artifacts(run.info.run_id)]
    assert mirror.close().sent == 1


def test_a_released_run_that_starts_again_is_followed_again(uri: str, client: Any, experiment: str, make_run: Any) -> None:
    folder = make_run(kind="trial")
    with Mirror(uri, experiment) as mirror:
        mirror.follow(folder)
        end_run(folder, "KILLED", step=2)
        mirror.release(folder)
        wait_for(lambda: not mirror._replays and mirror.links()["runs"])
        mirror.follow(folder)
        end_run(folder, "FINISHED", step=4)
    run = client.get_run(mirror.links()["runs"][folder.name].split("/")[-1].partition("?")[0])
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 0.25)


def test_runs_released_to_a_dead_server_are_read_once_and_stay_pending(experiment: str, make_run: Any) -> None:
    folder = make_run(kind="trial")
    mirror = Mirror(f"http://127.0.0.1:{free_port()}", experiment, timeout_s=1)
    mirror.follow(folder)
    end_run(folder, "FINISHED", step=1)
    mirror.release(folder)
    wait_for(lambda: mirror._released == {folder.uri: True})
    summary = mirror.close(timeout_s=0.5)
    assert summary.pending == 1
    assert summary.error
