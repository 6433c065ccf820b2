"""Every kind of store for real: SQLite, PostgreSQL, and a server over HTTP with the files that it keeps."""

import importlib.util
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import postgres
import pytest

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.runs import Lease, RecordWriter, RunFolder
from crate_ray.tracking import Mirror, initialise, serve, sync
from crate_ray.tracking.client import open_client
from crate_ray.tracking.replay import MARKER
from crate_ray.tracking.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
EXPERIMENT = "crate-mae/stores"
ODD = {"nan": math.nan, "high": math.inf, "low": -math.inf, "tiny": 5e-324, "large": 1.7e308, "negative zero": -0.0}


@pytest.fixture(scope="module")
def postgres_uri() -> Iterator[str]:
    """A fresh PostgreSQL database."""
    if postgres.binaries() is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("the driver of PostgreSQL is not installed (pip install 'crate-ray[postgresql]')")
    with postgres.cluster() as uri:
        yield uri


@pytest.fixture(scope="module")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on a database that it makes itself, with an artifact store."""
    with serve(f"sqlite:///{tmp_path_factory.mktemp('server')}/mlflow.db", port=free_port()) as server:
        yield server.url


@pytest.fixture(params=["sqlite", "postgresql", "server"])
def store(request: pytest.FixtureRequest) -> str:
    """The address of a store."""
    name = {"sqlite": "uri", "postgresql": "postgres_uri", "server": "server_uri"}[request.param]
    return str(request.getfixturevalue(name))


def runs_of(client: Any, experiment: str) -> dict[str, Any]:
    """The runs of an experiment by their kind, whatever became of them."""
    found = client.get_experiment_by_name(experiment)
    return {run.data.tags["kind"]: run for run in client.search_runs([found.experiment_id])}


def history(client: Any, run: Any) -> list[tuple[str, int, int, str]]:
    """Every point of a run, sorted; the value as text, since NaN is not equal to itself."""
    keys = client.get_run(run.info.run_id).data.metrics
    points = [point for key in keys for point in client.get_metric_history(run.info.run_id, key)]
    return sorted((point.key, point.step, point.timestamp, repr(point.value)) for point in points)


def write_run(folder: RunFolder, steps: range) -> None:
    writer = RecordWriter(folder, 1)
    for step in steps:
        writer.write(step, {"train/loss": 1 / (1 + step), "größe": step, **(ODD if step % 7 == 0 else {})})
    writer.close()


def test_a_sweep_with_all_its_kinds_arrives_and_a_replay_adds_nothing(
    store: str, make_run: Any, experiment: str, tmp_path: Path
) -> None:
    sweep = make_run(kind="sweep")
    uid = (sweep.read_json("run_meta.json") or {})["run_uid"]
    children = {kind: make_run(kind=kind, parent_uid=uid) for kind in ("trial", "control", "probe")}
    ends = {"trial": "FINISHED", "control": "FAILED", "probe": "KILLED"}
    leases = {kind: Lease.take(folder) for kind, folder in {"sweep": sweep, **children}.items()}
    for kind, folder in children.items():
        write_run(folder, range(40))
        leases[kind].end(ends[kind], "out of memory: Größe \0 zu viel" if kind == "control" else None)
    storage.write_atomic(children["trial"].path("pictures", "picture.png"), bytes(range(256)))
    leases["sweep"].end("FINISHED")
    with Mirror(store, experiment, artifact_root=tmp_path.as_uri()) as mirror:
        for folder in (sweep, *children.values()):
            mirror.follow(folder)
        summary = mirror.close(timeout_s=60)
    assert (summary.sent, summary.pending, summary.error) == (120, 0, None)
    client = open_client(store)
    runs = runs_of(client, experiment)
    assert {kind: run.info.status for kind, run in runs.items()} == {"sweep": "FINISHED", **ends}
    assert {runs[kind].data.tags["mlflow.parentRunId"] for kind in children} == {runs["sweep"].info.run_id}
    assert runs["control"].data.tags["failure"] == "out of memory: Größe  zu viel"
    before = {kind: history(client, run) for kind, run in runs.items()}
    assert [len(before[kind]) for kind in children] == [2 * 40 + 6 * len(ODD)] * 3
    lines = storage.read_text(children["trial"].path("metrics.jsonl")).splitlines()
    times = [round(float(line.split('"time":')[1].split(",")[0]) * 1000) for line in lines]
    assert [time_ms for key, _, time_ms, _ in before["trial"] if key == "train/loss"] == times
    stored = Path(client.download_artifacts(runs["trial"].info.run_id, "pictures/picture.png", str(tmp_path)))
    assert stored.read_bytes() == bytes(range(256))
    for folder in (sweep, *children.values()):
        storage.delete(folder.path(MARKER))
    assert [result.error for result in sync([sweep, *children.values()], store, experiment)] == [None] * 4
    assert {kind: history(client, run) for kind, run in runs_of(client, experiment).items()} == before


def test_a_run_goes_on_in_its_mlflow_run_after_every_restart(
    store: str, make_run: Any, experiment: str, tmp_path: Path
) -> None:
    folder = make_run()
    for attempt in range(1, 4):
        lease = Lease.take(folder)
        with Mirror(store, experiment, artifact_root=tmp_path.as_uri()) as mirror:
            mirror.follow(folder)
            writer = RecordWriter(folder, lease.attempt)
            for step in range(4 * attempt, 4 * attempt + 8):  # half of them are steps of the attempt before
                writer.write(step, {"train/loss": attempt})
            writer.close()
            lease.end("KILLED" if attempt < 3 else "FINISHED")
            assert mirror.close(timeout_s=60).error is None
    client = open_client(store)
    (run,) = runs_of(client, experiment).values()
    assert (run.info.status, run.data.tags["attempt"]) == ("FINISHED", "3")
    assert [step for _, step, _, _ in history(client, run)] == list(range(4, 20))


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "server"])
def test_drivers_that_start_together_share_a_fresh_store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name = "together"
    if kind == "sqlite":
        uri = f"sqlite:///{tmp_path}/mlflow.db"
    elif kind == "server":
        uri = request.getfixturevalue("server_uri")
    else:
        uri = fresh_database(request.getfixturevalue("postgres_uri"))
    code = f"from crate_ray.tracking import initialise; print(initialise({uri!r}, {name!r}, timeout_s=30))"
    drivers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        answers = {driver.communicate(timeout=200)[0].strip() for driver in drivers}
    finally:
        for driver in drivers:
            driver.kill()
    found = open_client(uri).get_experiment_by_name(name)
    assert found is not None
    assert answers == {found.experiment_id}


def fresh_database(uri: str) -> str:
    """Another database of the same cluster, without tables."""
    import psycopg

    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("CREATE DATABASE together")
    return f"{uri.rpartition('/')[0]}/together"


@pytest.mark.parametrize("trouble", ["refused", "silent"])
def test_a_postgresql_that_does_not_answer_is_a_warning_after_seconds(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if trouble == "silent":
            listener.listen(8)
        start = time.monotonic()
        assert initialise(f"postgresql://me:secret@127.0.0.1:{listener.getsockname()[1]}/mlflow", "any", timeout_s=2) is None
        assert time.monotonic() - start < 20
    assert "tracking sync" in caplog.text
    assert "secret" not in caplog.text


def test_a_database_without_its_driver_is_an_error_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"pip install 'crate-ray\[postgresql\]'"):
        initialise("postgresql://me@127.0.0.1:1/mlflow", "any")


def test_a_server_answers_to_the_names_that_it_was_told_and_lets_their_pages_work(tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    def status(host: str, origin: str | None = None) -> int:
        headers = {"Host": host, "Content-Type": "application/json"} | ({"Origin": origin} if origin else {})
        asked = urllib.request.Request(f"{server.url}/ajax-api/2.0/mlflow/runs/search", b'{"experiment_ids": ["0"]}', headers)
        try:
            with urllib.request.urlopen(asked, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with serve(uri, "0.0.0.0", free_port(), allowed_hosts=["mlflow.example.org"]) as server:
        port = server.url.rpartition(":")[2]
        for name in ("mlflow.example.org", socket.gethostname()):
            assert status(f"{name}:{port}") == 200
            assert status(f"{name}:{port}", f"http://{name}:{port}") == 200
        assert status("mlflow.example.org", "https://mlflow.example.org") == 200
        assert status(f"127.0.0.1:{port}") == 200
        assert status(f"10.1.2.3:{port}") == 200
        assert status(f"elsewhere.example.org:{port}") == 403
        assert status(f"127.0.0.1:{port}", "http://elsewhere.example.org") == 403


def test_a_server_that_does_not_know_its_name_is_told_how_to_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(f"sqlite:///{tmp_path}/mlflow.db", port=free_port()) as server:
        name = socket.gethostname()
        try:
            socket.create_connection((name, int(server.url.rpartition(":")[2])), timeout=2).close()
        except OSError:
            pytest.skip(f"the name {name} of this machine does not lead to its loopback address")
        assert initialise(server.url.replace("127.0.0.1", name), "any") is None
    assert "--allowed-hosts" in caplog.text


def test_tracking_ui_serves_others_and_leaves_nothing_behind(tmp_path: Path) -> None:
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "crate_ray",
        "tracking",
        "ui",
        str(tmp_path / "none"),
        "--uri",
        f"sqlite:///{tmp_path}/mlflow.db",
    ]
    command += ["--port", str(port), "--allowed-hosts", "mlflow.example.org", "--artifacts", str(tmp_path / "files"), "--json"]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert served.stdout is not None
        while "}" not in (line := served.stdout.readline()):
            assert line, "it ended before it served"
        client = open_client(f"http://127.0.0.1:{port}")
        run = client.create_run(client.create_experiment("files"))
        (tmp_path / "note.txt").write_text("kept")
        client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
        assert [path.read_text() for path in (tmp_path / "files").rglob("note.txt")] == ["kept"]
        served.send_signal(signal.SIGTERM)
        assert served.wait(30) == 128 + signal.SIGTERM
    finally:
        if served.poll() is None:
            os.killpg(served.pid, signal.SIGKILL)
        served.communicate()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
