"""`crate-ray sweep` as a person runs it: stopped, resumed, its JSON, its report and its runs in MLflow."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crate_ray.runs import list_trials
from sweeps import MAE, write_sweep_file

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_stopped_sweep_resumes_and_leaves_json_report_and_runs(
    digits: Path, tmp_path: Path, drive: Callable[..., Any]
) -> None:
    path = write_sweep_file(
        digits,
        tmp_path,
        arms={"crate": {}, "mae": {"base": "digits_mae", "set": MAE}},
        objective=["knn_top1", "params_m"],
        max_concurrent=2,
        more={"train.steps": 60, "eval.knn_images": 64},
    )
    folder = tmp_path / "out" / "tiny"
    driver = drive("sweep", str(path))
    deadline = time.monotonic() + 150
    while not any(row.is_over for row in list_trials(str(folder))):
        assert time.monotonic() < deadline, driver.output()
        assert driver.process.poll() is None, driver.output()
        time.sleep(0.1)
    driver.process.send_signal(signal.SIGINT)
    assert driver.wait(90) == 130, driver.output()
    assert "the same command goes on from there" in " ".join(driver.output().split())

    done = subprocess.run(
        [sys.executable, "-m", "crate_ray", "sweep", str(path), "--json"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of 6 trials are done" in done.stderr
    found = json.loads(done.stdout)  # and nothing else stands there
    assert (found["sweep"], found["state"], len(found["trials"])) == ("tiny", "FINISHED", 6)
    for trial in found["trials"]:
        assert trial["id"].startswith(("crate-", "mae-"))
        assert trial["config"]["optimizer"]["lr"] == trial["values"]["optimizer.lr"]
        assert trial["final"]["eval_loss"] > 0
    assert found["best"].keys() == {"crate", "mae"}
    best = max((t for t in found["trials"] if t["arm"] == "mae"), key=lambda t: t["objectives"]["knn_top1"])
    assert found["best"]["mae"]["value"] == best["objectives"]["knn_top1"]
    assert found["front"][0]["objectives"] == ["knn_top1", "params_m"]
    assert found["forecast"]["error"]["trials"] == 6
    assert found["spent"]["trials"] == 6
    assert Path(found["links"]["report"]).read_text().startswith("# Sweep tiny")
    assert mirrored(tmp_path / "out") == ("FINISHED", ["FINISHED"] * 6)

    again = drive("sweep", str(path))
    assert again.wait(90) == 0
    assert "FINISHED before; nothing was run" in again.output()


def mirrored(out: Path) -> tuple[str, list[str]]:
    """Status in MLflow of the sweep's run, and of those below it."""
    from crate_ray.tracking.client import open_client

    client = open_client(f"sqlite:///{out}/mlflow.db")
    experiment = client.get_experiment_by_name("crate-mae/tiny")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags["kind"] == "sweep")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    return parent.info.status, [run.info.status for run in children]
