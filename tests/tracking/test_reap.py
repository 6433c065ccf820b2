"""Runs whose drivers died are closed, with their folders or without; those that live are left alone or opened again."""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import ConfigError
from crate_ray.runs import Lease, RunFolder, read_status, write_status
from crate_ray.tracking import reap, sync
from crate_ray.tracking.client import open_client
from crate_ray.tracking.describe import FOLDER_TAG, HEARTBEAT_TAG
from crate_ray.tracking.replay import RunReplay, Session
from crate_ray.tracking.server import free_port

LONG_AGO = 1_600_000_000


class Started:
    """A run that goes on, as its folder and MLflow show it."""

    def __init__(self, folder: RunFolder, uri: str, experiment: str) -> None:
        self.folder = folder
        self.lease = Lease.take(folder)
        (result,) = sync([folder], uri, experiment)
        self.client = open_client(uri)
        self.run_id = str(result.run_id)

    @property
    def run(self) -> Any:
        return self.client.get_run(self.run_id)

    def silence(self) -> None:
        """MLflow has heard nothing of the driver for long."""
        self.client.set_tag(self.run_id, HEARTBEAT_TAG, str(LONG_AGO))

    def lose_folder(self) -> None:
        shutil.rmtree(Path(self.folder.uri.removeprefix("file://")))


@pytest.fixture
def started(uri: str, experiment: str, make_run: Any) -> Started:
    return Started(make_run(), uri, experiment)


def closed(uri: str, experiment: str) -> list[str]:
    results = reap(uri, experiment)
    assert [result.error for result in results] == [None] * len(results)
    return [str(result.run_id) for result in results]


def test_a_run_says_where_its_folder_is_and_when_its_driver_lived(started: Started) -> None:
    tags = started.run.data.tags
    assert RunFolder(tags[FOLDER_TAG]).uri == started.folder.uri
    assert abs(float(tags[HEARTBEAT_TAG]) - time.time()) < 60


def test_without_its_folder_an_old_heartbeat_closes_a_run_once(started: Started, uri: str, experiment: str) -> None:
    started.lose_folder()
    assert closed(uri, experiment) == []
    started.silence()
    assert closed(uri, experiment) == [started.run_id]
    run = started.run
    assert (run.info.status, run.info.end_time) == ("FAILED", LONG_AGO * 1000)
    assert run.data.tags["failure"] == "driver died: last heard of at 2020-09-13 12:26:40 UTC"
    assert closed(uri, experiment) == []


def test_a_run_that_beats_in_its_folder_is_left_alone(started: Started, uri: str, experiment: str) -> None:
    started.silence()
    assert closed(uri, experiment) == []
    assert started.run.info.status == "RUNNING"


def test_a_run_that_ended_in_its_folder_is_caught_up(started: Started, uri: str, experiment: str) -> None:
    started.lease.end("FINISHED")
    started.silence()
    assert closed(uri, experiment) == [started.run_id]
    assert started.run.info.status == "FINISHED"


def test_a_run_that_no_longer_beats_in_its_folder_is_closed_there_too(started: Started, uri: str, experiment: str) -> None:
    write_status(started.folder, replace(started.lease.status, heartbeat=LONG_AGO))
    started.silence()
    assert closed(uri, experiment) == [started.run_id]
    status = read_status(started.folder)
    assert status is not None
    assert (status.state, status.reason) == ("FAILED", "driver died")
    assert (started.run.info.status, started.run.data.tags["failure"]) == ("FAILED", "driver died")


def test_a_folder_of_another_run_at_the_same_place_says_nothing(started: Started, uri: str, experiment: str) -> None:
    started.silence()
    started.folder.write_json("run_meta.json", {**(started.folder.read_json("run_meta.json") or {}), "run_uid": "another"})
    assert closed(uri, experiment) == [started.run_id]


def test_runs_of_others_are_left_alone(started: Started, uri: str, experiment: str) -> None:
    other = started.client.create_run(started.run.info.experiment_id, start_time=LONG_AGO * 1000)
    assert closed(uri, experiment) == []
    assert started.client.get_run(other.info.run_id).info.status == "RUNNING"


def test_all_experiments_are_looked_through_where_none_is_named(started: Started, uri: str) -> None:
    started.lose_folder()
    started.silence()
    assert started.run_id in [result.run_id for result in reap(uri)]


def test_a_run_that_was_closed_while_its_driver_lived_is_opened_by_the_next_heartbeat(
    started: Started, uri: str, experiment: str
) -> None:
    session = Session(started.client, uri, started.run.info.experiment_id)
    replay = RunReplay(started.folder)
    replay.poll()
    replay.push(session)
    started.client.set_tag(started.run_id, "failure", "driver died")
    started.client.set_terminated(started.run_id, "FAILED")
    started.lease.beat(force=True)
    replay._next_beat = 0.0  # a minute later
    replay.poll()
    replay.push(session)
    assert (started.run.info.status, "failure" in started.run.data.tags) == ("RUNNING", False)
    started.lease.end("FINISHED")
    replay.poll()
    replay.push(session)
    assert started.run.info.status == "FINISHED"


def test_a_heartbeat_costs_one_tag_a_minute(started: Started, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tags: list[str] = []
    set_tag = started.client.set_tag

    def counting(run_id: str, key: str, value: Any) -> None:
        tags.append(key)
        set_tag(run_id, key, value)

    monkeypatch.setattr(started.client, "set_tag", counting)
    session = Session(started.client, uri, started.run.info.experiment_id)
    replay = RunReplay(started.folder)
    for _ in range(5):
        started.lease.beat(force=True)
        replay.poll()
        replay.push(session)
    assert tags.count(HEARTBEAT_TAG) == 1


def test_what_cannot_be_looked_through_is_an_error(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'nowhere' is not in the store; there are: .*unused"):
        reap(uri, "nowhere")
    with pytest.raises(ConfigError, match="does not answer"):
        reap(f"http://127.0.0.1:{free_port()}", timeout_s=2)
    assert reap(f"sqlite:///{tmp_path}/none.db") == []
    assert not (tmp_path / "none.db").exists()
