"""Trials under Ray Tune: actors that are used again, and what trials of several workers leave in the cluster: nothing."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from trials import trial_of

from crate_ray.config import RunConfig
from crate_ray.launch.placement import free_orphaned_groups
from crate_ray.launch.sweeps.trial import SweepTrial
from crate_ray.runs import RunFolder, read_status
from crate_ray.runs.trials import TrialRow, read_trial

GONE_S = 20.0  # for actors of a killed owner to be noticed


class Listed(Searcher):
    """Trials from a list."""

    def __init__(self, trials: list[dict[str, Any]]) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self._trials = iter(trials)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        return next(self._trials, Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass


class StopAtFirstReport(FIFOScheduler):
    """Ends the trials with some seed after their first report."""

    def __init__(self, seeds: set[int]) -> None:
        super().__init__()
        self._seeds = seeds

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        stops = trial.config["point"]["seed"] in self._seeds
        return str(TrialScheduler.STOP if stops else TrialScheduler.CONTINUE)


def run_tune(
    trials: list[dict[str, Any]], root: Path, *, cpus: float, at_a_time: int, stopped: set[int] | None = None, retries: int = 0
) -> list[dict[str, Any]]:
    """The last result of each trial."""
    tuner = tune.Tuner(
        tune.with_resources(SweepTrial, {"cpu": cpus}),
        tune_config=tune.TuneConfig(
            search_alg=Listed(trials),
            num_samples=-1,
            scheduler=StopAtFirstReport(stopped or set()),
            max_concurrent_trials=at_a_time,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(root), verbose=0, failure_config=tune.FailureConfig(max_failures=retries)
        ),
    )
    return [result.metrics or {} for result in tuner.fit()]


@pytest.fixture
def make_trial(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setenv("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")

    def make(*more: str, **keys: Any) -> dict[str, Any]:
        tiny = ["train.steps=12", "eval.every_steps=3", "checkpoint.every_steps=3"]
        return trial_of(
            RunConfig.load("digits_crate_mae", [*overrides, *tiny, *more]), str(tmp_path / "sweep"), sweep={}, **keys
        )

    return make


def row_of(trial: dict[str, Any]) -> TrialRow:
    row = read_trial(RunFolder(trial["folder"]))
    assert row is not None
    return row


@pytest.mark.usefixtures("cluster")
def test_one_actor_trains_one_trial_after_another_and_a_stop_leaves_a_checkpoint(
    make_trial: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    trials = [make_trial(f"train.seed={seed}") for seed in range(4)]
    began = time.monotonic()
    results = run_tune(trials, tmp_path, cpus=1, at_a_time=1, stopped={1})
    print(f"{time.monotonic() - began:.1f} s in all; a trial: {[round(row_of(trial).seconds, 2) for trial in trials]}")
    assert len({result["pid"] for result in results}) == 1
    assert sorted(result["state"] for result in results) == ["FINISHED", "FINISHED", "FINISHED", "RUNNING"]
    rows = [row_of(trial) for trial in trials]
    assert [row.state for row in rows] == [
        "FINISHED",
        "KILLED",
        "FINISHED",
        "FINISHED",
    ]  # the driver would have marked it stopped
    stopped = RunFolder(trials[1]["folder"])
    status = read_status(stopped)
    assert status is not None
    assert status.state == "KILLED"
    assert (Path(stopped.uri) / "checkpoints" / "step_00000003" / "manifest.json").exists()


def held() -> tuple[set[str], set[str]]:
    """Placement groups that hold or await resources, and living actors but for the one of the cluster itself."""
    from ray.util.state import list_actors

    groups = {key for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}
    actors = list_actors(filters=[("state", "!=", "DEAD")], limit=1000)
    return groups, {f"{actor.class_name} {actor.pid}" for actor in actors if actor.class_name != "_AutoscalingCoordinatorActor"}


def what_stays(before: tuple[set[str], set[str]]) -> tuple[set[str], set[str]]:
    """What was not there before (tests share a cluster, and Ray Data's two bookkeeping actors live as long as it) and is
    still there after `GONE_S`."""
    deadline = time.monotonic() + GONE_S
    while True:
        groups, actors = (now - then for now, then in zip(held(), before, strict=True))
        if not (groups or actors) or time.monotonic() >= deadline:
            return groups, actors
        free_orphaned_groups()
        time.sleep(0.5)


class Killer:
    """Kills what trains a trial, -9, after the trial's first report."""

    def __init__(self, actors: list[dict[str, Any]], workers: list[dict[str, Any]]) -> None:
        self._actors, self._workers = [RunFolder(t["folder"]) for t in actors], [RunFolder(t["folder"]) for t in workers]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        actors, workers = list(self._actors), list(self._workers)
        while (actors or workers) and not self._over.wait(0.1):
            for folders, find in ((actors, actor_of), (workers, first_worker_of)):
                for folder in list(folders):
                    row = read_trial(folder)
                    if row is not None and row.step > 0 and (pid := find(folder)) is not None:
                        os.kill(pid, signal.SIGKILL)
                        folders.remove(folder)


def actor_of(folder: RunFolder) -> int | None:
    lease = folder.read_json("lease.json")
    return lease["pid"] if lease else None


def first_worker_of(folder: RunFolder) -> int | None:
    """Rank 0 writes train.log."""
    log = f"{folder.uri}/train.log"
    for process in psutil.process_iter(["cmdline"]):
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or []) and any(f.path == log for f in process.open_files()):
            return process.pid
    return None


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("each", [1, pytest.param(5, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_trials_of_two_workers_leave_no_group_and_no_actor_however_they_end(
    each: int, make_trial: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def trial(seed: int, *more: str) -> dict[str, Any]:
        return make_trial(
            f"train.seed={seed}", "scale.num_workers=2", "scale.cpus_per_worker=0.6", "scale.max_failures=0", *more
        )

    finished, stopped = [trial(seed) for seed in range(each)], [trial(100 + seed) for seed in range(each)]
    long = ("train.steps=3000", "eval.every_steps=20", "checkpoint.every_steps=20")  # they end by a kill
    failing, killed = [trial(200 + seed, *long) for seed in range(each)], [trial(300 + seed, *long) for seed in range(each)]
    trials = [one for four in zip(finished, stopped, failing, killed, strict=True) for one in four]
    before = held()
    began = time.monotonic()
    with Killer(actors=killed, workers=failing):
        run_tune(trials, tmp_path, cpus=0.01, at_a_time=3, stopped={100 + seed for seed in range(each)})
    seconds = time.monotonic() - began
    groups, actors = what_stays(before)
    print(f"{len(trials)} trials in {seconds:.1f} s; gone {time.monotonic() - began - seconds:.1f} s later")
    assert (groups, actors) == (set(), set())
    assert {row_of(one).state for one in finished} == {"FINISHED"}
    assert {row_of(one).state for one in failing} == {"FAILED"}
    assert {row_of(one).step for one in stopped} == {3}
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
