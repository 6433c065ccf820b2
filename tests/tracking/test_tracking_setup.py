"""The database, its experiment and saved views, and the local server."""

import base64
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from crate_ray.config import ConfigError
from crate_ray.tracking import CURVES, EFFICIENCY, initialise, serve, view_links, write_views
from crate_ray.tracking.server import free_port


def view_of(client: Any, experiment_id: str, view_id: str) -> tuple[str, dict[str, Any]]:
    tag = client.get_experiment(experiment_id).tags[f"mlflow.sharedViewState.{view_id}"]
    assert len(tag) <= 20_000
    packed = json.loads(tag)["state"].removeprefix("deflate;")
    return tag, json.loads(zlib.decompress(base64.b64decode(packed)))


def test_an_experiment_is_made_once_with_both_views_and_its_artifacts_beside_the_database(
    uri: str, client: Any, experiment: str
) -> None:
    experiment_id = initialise(uri, experiment)
    assert experiment_id is not None
    before = view_of(client, experiment_id, EFFICIENCY)
    assert initialise(uri, experiment) == experiment_id
    assert view_of(client, experiment_id, EFFICIENCY) == before
    charts = before[1]["compareRunCharts"]
    axes = [(chart["xaxis"]["key"], chart["yaxis"]["key"]) for chart in charts if chart["type"] == "SCATTER"]
    assert axes[:2] == [("final/encoder_params_m", "final/probe_top1"), ("final/gflops", "final/probe_top1")]
    sections = {section["uuid"] for section in before[1]["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in charts} <= sections
    assert "train/loss" in [chart["metricKey"] for chart in view_of(client, experiment_id, CURVES)[1]["compareRunCharts"]]
    location = Path(client.get_experiment(experiment_id).artifact_location.removeprefix("file://"))
    assert location.parent == Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"


def test_the_filter_of_the_view_shows_trained_runs_and_no_others(uri: str, client: Any, experiment: str) -> None:
    experiment_id = initialise(uri, experiment)
    assert experiment_id is not None
    for kind in ("sweep", "trial", "train", "control", "probe", "compare"):
        client.create_run(experiment_id, tags={"kind": kind})
    shown = client.search_runs([experiment_id], filter_string=view_of(client, experiment_id, EFFICIENCY)[1]["searchFilter"])
    assert {run.data.tags["kind"] for run in shown} == {"trial", "train"}


def test_an_untested_mlflow_gets_no_views_and_one_warning(
    uri: str, client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mlflow.__version__", "4.0.0")
    with caplog.at_level(logging.WARNING, logger="crate_ray"):
        assert write_views(client, "0") == []
    assert ["4.0.0" in record.message for record in caplog.records] == [True]


def test_a_deleted_experiment_is_an_error_that_says_so(uri: str, client: Any, experiment: str) -> None:
    client.delete_experiment(initialise(uri, experiment))
    with pytest.raises(ConfigError, match="was deleted in MLflow"):
        initialise(uri, experiment)


def test_a_database_that_cannot_be_written_is_an_error_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "mlflow.db", tmp_path):
        with pytest.raises(ConfigError, match=r"--set tracking\.uri"):
            initialise(f"sqlite:///{path}", "any")


def test_a_file_that_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match="file is not a database"):
        initialise(f"sqlite:///{tmp_path}/mlflow.db", "any")


def test_a_taken_port_is_an_error_that_names_a_free_one(uri: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ConfigError, match=r"--port \d+"):
            serve(uri, port=listener.getsockname()[1])


def test_a_server_is_not_served_again() -> None:
    with pytest.raises(ConfigError, match="is a server already"):
        serve("http://me:secret@host:5000")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_drivers_that_start_together_share_a_fresh_database(tmp_path: Path) -> None:
    code = f"from crate_ray.tracking import initialise; print(initialise('sqlite:///{tmp_path}/mlflow.db', 'shared'))"
    drivers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [driver.communicate(timeout=150)[0].strip() for driver in drivers] == ["1", "1"]
    finally:
        for driver in drivers:
            driver.kill()


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_server_answers_takes_runs_and_leaves_no_process_behind(uri: str, experiment: str, make_run: Any) -> None:
    from crate_ray.runs import Lease
    from crate_ray.tracking import sync

    folder = make_run()
    Lease.take(folder).end("FINISHED")
    with serve(uri, port=free_port()) as server:
        assert server.is_healthy()
        (result,) = sync([folder], server.url, experiment)
        assert result.error is None
    assert not server.is_healthy()
    with pytest.raises(ProcessLookupError):
        os.killpg(server.pid, 0)


def test_the_pages_of_a_server_of_another_version_get_no_views_and_links_to_the_bare_charts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from mlflow import MlflowClient

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"4.1.0")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with caplog.at_level(logging.WARNING, logger="crate_ray"):
            for _ in range(2):
                assert write_views(MlflowClient(address), "0") == []
        server.shutdown()
    assert ["4.1.0" in record.message for record in caplog.records] == [True]
    assert view_links(address, address, "7") == {
        "Runs": f"{address}/#/experiments/7/runs?compareRunsMode=CHART&workflowType=machine_learning"
    }
    assert set(view_links("http://host:1", "http://host:1", "7")) == {
        "Parameter efficiency",
        "By configuration",
        "Training curves",
        "White box",
    }
