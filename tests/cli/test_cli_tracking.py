import json
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from crate_ray.runs import RunFolder, Status, read_status, write_status
from crate_ray.tracking.server import free_port


def test_sync_sends_runs_once_and_reap_closes_dead_ones(invoke, make_run, tmp_path):
    make_run("done", train__loss=0.3)
    dead = make_run("dead", "RUNNING", beat_s_ago=600, train__loss=0.5)
    alive = make_run("alive", "RUNNING", beat_s_ago=5)
    store, root = f"sqlite:///{tmp_path / 'db' / 'mlflow.db'}", tmp_path / "out"

    reaped = json.loads(invoke("tracking", "reap", root, "--uri", store, "--json").out)
    assert [row["name"] for row in reaped] == ["dead"]
    status = read_status(dead)
    assert (status.state, status.reason, status.ended) == ("FAILED", "driver died", status.heartbeat)
    assert read_status(alive).state == "RUNNING"

    first = json.loads(invoke("tracking", "sync", root, "--uri", store, "--json").out)
    again = json.loads(invoke("tracking", "sync", root, "--uri", store, "--json").out)
    assert {row["name"]: row["error"] for row in first} == {"done": None, "dead": None, "alive": None}
    assert [row["run_id"] for row in first] == [row["run_id"] for row in again]
    assert sum(row["sent"] for row in again) == 0
    from mlflow import MlflowClient

    runs = MlflowClient(store).search_runs([MlflowClient(store).get_experiment_by_name("crate-mae/default").experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED", "RUNNING"]


def test_reap_closes_runs_whose_folders_are_gone(invoke, make_run, tmp_path):
    store, root = f"sqlite:///{tmp_path / 'db' / 'mlflow.db'}", tmp_path / "out"
    make_run("lost", "RUNNING", beat_s_ago=30)
    assert invoke("tracking", "sync", root, "--uri", store).code == 0
    shutil.rmtree(root / "lost")
    reap = ("tracking", "reap", tmp_path / "elsewhere", "--uri", store)
    assert "nothing to close" in invoke(*reap).out
    (row,) = json.loads(invoke(*reap, "--silent-for", "20", "--json").out)
    assert (row["experiment"], row["error"]) == ("crate-mae/default", None)
    assert "nothing to close" in invoke(*reap, "--silent-for", "20").out
    result = invoke(*reap, "--experiment", "nowhere")
    assert (result.code, "'nowhere' is not in the store" in result.err) == (2, True)


def test_reap_closes_a_sweep_whose_trials_have_ended(invoke, make_run, tmp_path):
    store, root = f"sqlite:///{tmp_path / 'db' / 'mlflow.db'}", tmp_path / "out"
    trial, sweep = make_run("one"), RunFolder(str(root / "study"))
    (root / "study" / "trials").mkdir(parents=True)
    (root / "study" / "sweep.yaml").write_text("name: study")
    sweep.write_json("run_meta.json", {**trial.read_json("run_meta.json"), "run_uid": "parent", "kind": "sweep"})
    (root / "one").rename(root / "study" / "trials" / "one")
    long_ago = time.time() - 600
    write_status(sweep, Status("RUNNING", 1, long_ago, long_ago))
    rows = json.loads(invoke("tracking", "reap", root, "--uri", store, "--json").out)
    assert {row["name"] for row in rows} == {"study", "one"}
    assert read_status(sweep).state == "FAILED"


def test_sync_says_when_the_server_does_not_answer(invoke, make_run, tmp_path):
    make_run("done", train__loss=0.3)
    result = invoke("tracking", "sync", tmp_path / "out", "--uri", f"http://127.0.0.1:{free_port()}")
    assert result.code == 1
    assert "done: MLflow at http://127.0.0.1" in result.out


def test_sync_and_reap_of_nothing_say_so(invoke, make_run, tmp_path):
    assert "nothing to send" in invoke("tracking", "sync", tmp_path).out
    make_run("done")
    assert "nothing to close" in invoke("tracking", "reap", tmp_path / "out").out


@pytest.mark.parametrize("verb", ["sync", "reap", "ui"])
def test_a_missing_root_is_an_error(invoke, tmp_path, verb):
    result = invoke("tracking", verb, tmp_path / "nowhere")
    assert result.code == 2
    assert "nowhere' does not exist" in result.err


def test_ui_of_runs_in_several_stores_asks_for_one(invoke, make_run, tmp_path):
    for name in ("one", "two"):
        folder = make_run(name)
        config = folder.read_config()
        tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path / name}.db"})
        folder.write_config(config.model_copy(update={"tracking": tracking}))
    result = invoke("tracking", "ui", tmp_path / "out")
    assert result.code == 2
    assert "choose one with --uri" in result.err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_ui_prints_the_saved_view_and_ends_its_server_when_stopped(make_run, tmp_path, number, code):
    make_run("done", train__loss=0.3)
    port = free_port()
    command = [sys.executable, "-m", "crate_ray", "tracking", "ui", str(tmp_path / "out"), "--port", str(port), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.rstrip() == "}":
                    break
            body = json.loads("".join(lines))
            assert body["url"] == f"http://127.0.0.1:{port}"
            assert "viewStateShareKey=parameter-efficiency" in body["views"]["crate-mae/default"]["Parameter efficiency"]
            process.send_signal(number)
            assert process.wait(60) == code
        finally:
            if process.poll() is None:
                for started in [*psutil.Process(process.pid).children(recursive=True), process]:
                    started.kill()
    assert _is_free(port)


def _is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
