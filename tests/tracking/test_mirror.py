"""The mirror follows runs while they are written, and costs its caller nothing when MLflow is down."""

import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from crate_ray.runs import Lease, RecordWriter
from crate_ray.tracking import Mirror, initialise, sync
from crate_ray.tracking.server import free_port

pytestmark = pytest.mark.filterwarnings("ignore:.*noload:DeprecationWarning")  # MLflow's own, with a newer SQLAlchemy


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that accepts connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def dead_server() -> str:
    """An address that refuses connections."""
    return f"http://127.0.0.1:{free_port()}"


def wait_for(condition: Any, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.05)


def test_runs_are_followed_while_they_are_written_and_finished_on_close(
    uri: str, client: Any, experiment: str, make_run: Any
) -> None:
    folder = make_run()
    lease = Lease.take(folder)
    writer = RecordWriter(folder, lease.attempt)
    with Mirror(uri, experiment) as mirror:
        mirror.follow(folder)
        mirror.follow(folder)
        writer.write(1, {"train/loss": 0.5})
        wait_for(lambda: mirror.links()["runs"])
        run_id = mirror.links()["runs"][folder.name].split("/")[-1].partition("?")[0]
        wait_for(lambda: client.get_run(run_id).data.metrics.get("train/loss") == 0.5)
        assert client.get_run(run_id).info.status == "RUNNING"
        writer.write(2, {"train/loss": 0.25})
        writer.close()
        lease.end("FINISHED")
        summary = mirror.close()
    assert (summary.sent, summary.pending, summary.error) == (2, 0, None)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics["train/loss"]) == ("FINISHED", 0.25)
    assert "viewStateShareKey=parameter-efficiency" in mirror.links()["experiment"]


def test_a_second_mirror_goes_on_where_the_first_was_killed(uri: str, client: Any, experiment: str, make_run: Any) -> None:
    folder = make_run()
    writer = RecordWriter(folder, 1)
    writer.write(1, {"train/loss": 0.5})
    first = Mirror(uri, experiment)
    first.follow(folder)
    assert first.close().sent == 1
    writer.write(2, {"train/loss": 0.25})
    second = Mirror(uri, experiment)
    second.follow(folder)
    assert second.close().sent == 1
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert [len(client.get_metric_history(run.info.run_id, "train/loss")) for run in runs] == [2]
    writer.close()


@pytest.mark.parametrize("kind", ["dead_server", "black_hole"])
def test_a_server_that_is_down_costs_the_caller_nothing_and_sync_sends_the_rest(
    kind: str, request: pytest.FixtureRequest, uri: str, experiment: str, make_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_run()
    writer = RecordWriter(folder, 1)
    with caplog.at_level(logging.WARNING, logger="crate_ray"):
        mirror = Mirror(request.getfixturevalue(kind), experiment, timeout_s=1)
        waits_s = []
        for _ in range(9):
            start = time.monotonic()
            mirror.follow(folder)
            assert mirror.links() == {"experiment": None, "views": {}, "runs": {}}
            waits_s.append(time.monotonic() - start)
        for step in range(10):
            writer.write(step, {"train/loss": float(step)})
        start = time.monotonic()
        summary = mirror.close(timeout_s=0.8)
        closed_s = time.monotonic() - start
    writer.close()
    assert sorted(waits_s)[4] < 0.05  # the median: a busy machine may stop anybody for a moment
    assert closed_s < 2.0
    assert (summary.sent, summary.pending) == (0, 10)
    assert summary.error
    assert len(caplog.records) <= 1
    (result,) = sync([folder], uri, experiment)
    assert (result.sent, result.error) == (10, None)


def test_a_run_that_mlflow_refuses_does_not_hold_up_the_others(
    uri: str, client: Any, experiment: str, make_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = make_run(), make_run()
    bad.write_json("run_meta.json", {"run_uid": "x", "kind": "train"})  # a folder that something else damaged
    for folder in (bad, good):
        writer = RecordWriter(folder, 1)
        writer.write(1, {"train/loss": 0.5})
        writer.close()
    with caplog.at_level(logging.WARNING, logger="crate_ray"):
        mirror = Mirror(uri, experiment)
        mirror.follow(bad)
        mirror.follow(good)
        summary = mirror.close()
    assert summary.sent == 1
    assert "created" in (summary.error or "")
    assert len([record for record in caplog.records if bad.name in record.message]) == 1


def test_an_unreachable_server_is_a_warning_when_a_run_starts(
    dead_server: str, caplog: pytest.LogCaptureFixture, experiment: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="crate_ray"):
        assert initialise(dead_server, experiment) is None
    assert "tracking sync" in caplog.text
