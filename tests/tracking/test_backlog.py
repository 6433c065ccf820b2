"""A mirror that is far behind: bounded memory, turns, one MLflow run whatever happens, and nothing sent twice."""

import time
from pathlib import Path
from typing import Any

import pytest

from crate_ray import storage
from crate_ray.runs import Record, RunFolder
from crate_ray.tracking import Mirror, backlog, sync
from crate_ray.tracking.backlog import Backlog
from crate_ray.tracking.describe import RUN_UID_TAG
from crate_ray.tracking.replay import MARKER, RunReplay
from crate_ray.tracking.server import free_port


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of about forty records."""
    monkeypatch.setattr(backlog, "CHUNK_BYTES", 4096)


def write(folder: RunFolder, steps: range) -> None:
    records = [Record(step, 1_700_000_000 + step, 1, {"train/loss": 1 / (1 + step), "train/lr": float(step)}) for step in steps]
    with Path(folder.path("metrics.jsonl").removeprefix("file://")).open("a") as file:
        file.writelines(record.to_line() for record in records)


def steps_of(client: Any, experiment: str, key: str = "train/loss") -> list[list[int]]:
    """Of each run, the steps of a curve."""
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    return [[point.step for point in client.get_metric_history(run.info.run_id, key)] for run in runs]


class Points:
    """A client that keeps what it is sent."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_batch(self, run_id: str, *, metrics: Any, synchronous: bool) -> None:
        self.steps += [metric.step for metric in metrics if metric.key == "train/loss"]


@pytest.mark.parametrize("sent_before", [1, 39, 200, 999, 1000])
def test_what_an_earlier_process_sent_is_passed_over_in_pieces(sent_before: int, make_run: Any, small_pieces: None) -> None:
    folder = make_run()
    write(folder, range(sent_before))
    first, client = Backlog(folder), Points()
    while first.poll() or first.is_behind:
        first.push(client, "run", expired=lambda: False)  # type: ignore[arg-type]
    write(folder, range(sent_before, 1000))
    second = Backlog(folder)
    second.poll()
    second.resume(first.marker())
    while second.is_behind:
        second.poll()
        assert len(second) < 100
        second.push(client, "run", expired=lambda: False)  # type: ignore[arg-type]
    assert client.steps == list(range(1000))
    assert (first.sent, second.sent, second.points) == (sent_before, 1000 - sent_before, 0)


def test_a_dead_server_fills_memory_up_to_its_bound_and_no_further(make_run: Any, experiment: str, small_pieces: None) -> None:
    folders = [make_run() for _ in range(5)]
    for folder in folders:
        write(folder, range(1000))
    mirror = Mirror(f"http://127.0.0.1:{free_port()}", experiment, timeout_s=1, max_points=300)
    for folder in folders:
        mirror.follow(folder)
    deadline = time.monotonic() + 20
    while mirror._server_error is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    summary = mirror.close(timeout_s=2)
    held = sum(replay.pending_points for replay in mirror._replays.values())
    assert 0 < held < 300 + 200
    assert summary.pending == held / 2


def test_a_mirror_far_behind_sends_everything_of_all_runs(
    uri: str, client: Any, make_run: Any, experiment: str, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crate_ray.tracking.mirror._TURN_SECONDS", 0.0)  # a batch a turn
    folders = [make_run() for _ in range(3)]
    for folder in folders:
        write(folder, range(600))
    with Mirror(uri, experiment, max_points=300) as mirror:
        for folder in folders:
            mirror.follow(folder)
        summary = mirror.close(timeout_s=60)
    assert (summary.sent, summary.pending, summary.error) == (1800, 0, None)
    assert steps_of(client, experiment) == [list(range(600))] * 3


def test_a_mirror_that_is_closed_too_soon_says_so(uri: str, make_run: Any, experiment: str, small_pieces: None) -> None:
    folder = make_run()
    write(folder, range(600))
    mirror = Mirror(uri, experiment, max_points=100)
    mirror.follow(folder)
    summary = mirror.close(timeout_s=0)
    assert "did not take everything" in (summary.error or "")
    (result,) = sync([folder], uri, experiment)
    assert summary.sent + result.sent >= 600


def test_a_run_that_the_server_fails_over_does_not_keep_the_others_from_being_sent(
    uri: str, client: Any, make_run: Any, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    poison, good = make_run(), make_run()
    for folder in (poison, good):
        write(folder, range(3))
    push = RunReplay.push

    def failing(self: RunReplay, session: Any, **how: Any) -> None:
        if self.folder.uri == poison.uri:
            raise MlflowException("the server fails over this run")
        push(self, session, **how)

    monkeypatch.setattr(RunReplay, "push", failing)
    with Mirror(uri, experiment) as mirror:
        mirror.follow(poison)
        mirror.follow(good)
        deadline = time.monotonic() + 30
        while good.name not in mirror.links()["runs"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        summary = mirror.close()
    assert (summary.sent, summary.pending) == (3, 3)
    assert steps_of(client, experiment) == [[0, 1, 2]]


@pytest.mark.parametrize("marker", ["kept", "lost"])
def test_of_two_mlflow_runs_of_one_run_one_stays_with_every_point_once(
    marker: str, uri: str, client: Any, make_run: Any, experiment: str
) -> None:
    folder = make_run()
    write(folder, range(5))
    (first,) = sync([folder], uri, experiment)
    held = client.get_run(first.run_id)
    twin = client.create_run(
        held.info.experiment_id, start_time=held.info.start_time - 1000, tags={RUN_UID_TAG: held.data.tags[RUN_UID_TAG]}
    )
    if marker == "lost":
        storage.delete(folder.path(MARKER))
    write(folder, range(5, 8))
    (second,) = sync([folder], uri, experiment)
    assert second.error is None
    assert second.run_id == (first.run_id if marker == "kept" else twin.info.run_id)
    assert steps_of(client, experiment) == [list(range(8))]
