"""A whole run beside an MLflow server in trouble: training does not notice, and nothing is lost."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_server import FaultServer

from crate_ray.config import RunConfig
from crate_ray.runs import Lease, RunFolder, read_records
from crate_ray.tracking import Mirror, initialise, serve, sync
from crate_ray.tracking.client import open_client
from crate_ray.tracking.limits import valid_key
from crate_ray.tracking.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
EXPERIMENT = "crate-mae/faults"
EVERYTHING = {"path": "", "methods": "GET POST PUT DELETE"}


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of a real server."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    initialise(uri, EXPERIMENT)
    with serve(uri, port=free_port()) as server:
        yield server.url.removeprefix("http://")


@pytest.fixture
def proxy(mlflow_server: str) -> Iterator[FaultServer]:
    with FaultServer(upstream=mlflow_server) as server:
        yield server


def train_beside(uri: str, config: RunConfig) -> tuple[RunFolder, Any]:
    """A run in this process with its mirror in another thread: closer to the loop than a driver ever is."""
    from crate_ray.training.loop import LocalContext, run_training
    from crate_ray.training.prepare import prepare_run

    config, folder = prepare_run(config, device_type="cpu")
    lease = Lease.take(folder)
    with Mirror(uri, EXPERIMENT, timeout_s=3) as mirror:
        mirror.follow(folder)
        result = run_training(config, folder, LocalContext(lease.attempt))
        lease.end(result.state)
        return folder, mirror.close(timeout_s=4)


def history(uri: str, folder: RunFolder) -> dict[tuple[str, int], float]:
    """What MLflow holds of a run, point by point."""
    client = open_client(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    uid = (folder.read_json("run_meta.json") or {})["run_uid"]
    (run,) = client.search_runs([experiment.experiment_id], filter_string=f"tags.`crate_ray.run_uid` = '{uid}'")
    assert run.info.status == "FINISHED"
    points = [point for key in run.data.metrics for point in client.get_metric_history(run.info.run_id, key)]
    assert len({(point.key, point.step) for point in points}) == len(points)
    return {(point.key, point.step): point.value for point in points}


@pytest.mark.parametrize("fault", ["refused", "503", "stall", "late", "comes_back"])
def test_a_server_in_trouble_for_a_whole_run_loses_nothing(
    fault: str, proxy: FaultServer, digits: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    tiny = ["model.width=32", "model.num_heads=2", "model.encoder_depth=1", "model.decoder_depth=1", "model.patch_size=8"]
    tiny += ["train.global_batch=32", "train.steps=150", "eval.log_every_steps=1", "eval.every_steps=50", "eval.max_images=32"]
    paths = [f"data.{key}={digits}/{split}" for key, split in (("train", "train"), ("eval", "validation"), ("test", "test"))]
    config = RunConfig.load("digits_crate_mae", [*tiny, *paths, f"storage.path={tmp_path}/out", f"name=beside-{fault}"])
    uri = f"http://127.0.0.1:{free_port()}" if fault == "refused" else proxy.url
    if fault == "comes_back":
        proxy.fail("503", times=2, **EVERYTHING)
    elif fault != "refused":
        proxy.fail(fault, number=2000, **EVERYTHING)
    folder, summary = train_beside(uri, config)
    written = {(valid_key(key), record.step): value for record in read_records(folder) for key, value in record.values.items()}
    assert ("train/loss", 150) in written
    assert (summary.error is None) == (fault == "comes_back")
    proxy.rules.clear()
    proxy.release()
    (result,) = sync([folder], proxy.url, EXPERIMENT)
    assert result.error is None
    held = history(proxy.url, folder)
    assert {key: held[key] for key in written} == pytest.approx(written, nan_ok=True)


def test_a_server_that_makes_a_run_too_late_is_asked_again_and_one_run_stays(proxy: FaultServer, make_run: Any) -> None:
    folder = make_run()
    lease = Lease.take(folder)
    proxy.fail("late", number=5000, times=1, path="/runs/create", methods="POST")
    client = open_client(proxy.url, timeout_s=60)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    uid = (folder.read_json("run_meta.json") or {})["run_uid"]

    def runs() -> list[Any]:
        return list(client.search_runs([experiment.experiment_id], filter_string=f"tags.`crate_ray.run_uid` = '{uid}'"))

    with Mirror(proxy.url, EXPERIMENT, timeout_s=2) as mirror:
        mirror.follow(folder)
        deadline = time.monotonic() + 60
        while len(runs()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        lease.end("FINISHED")
        assert mirror.close(timeout_s=30).error is None
    assert [run.info.status for run in runs()] == ["FINISHED"]
