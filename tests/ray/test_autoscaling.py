"""Runs and sweeps on a cluster whose nodes an autoscaler starts for them and takes away again."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from autoscaling import Autoscaling, autoscaling
from faults import records_after, wait_for
from test_train_on_ray import arguments

from crate_ray.runs import RunFolder, list_trials
from sweeps import write_sweep_file

pytestmark = pytest.mark.slow

# By name: logical CPUs of a node, nodes at most, priority.
GROUPS = {"small": (1, 2, 0), "large": (2, 2, 0)}


@pytest.fixture(scope="module")
def autoscaler() -> Iterator[Autoscaling]:
    """A cluster of a head without CPUs, for the tests of this module."""
    with autoscaling(GROUPS, most_nodes=3) as cluster:
        yield cluster


@pytest.fixture
def submit(autoscaler: Autoscaling, start_driver: Callable[..., Any]) -> Callable[..., Any]:
    """Starts drivers on that cluster, once it has no nodes."""
    autoscaler.wait_for_nodes({}, timeout_s=60)
    return lambda *words: start_driver(*words, environment=autoscaler.environment)


def last_step(root: Path) -> float:
    """When the runs below the folder trained last."""
    return max(record["time"] for folder in runs_below(root) for record in records_after(folder, 0.0))


def runs_below(root: Path) -> list[RunFolder]:
    """Those that have trained."""
    return [RunFolder(str(path.parent)) for path in root.rglob("metrics.jsonl")]


def trained(root: Path) -> bool:
    """Whether a run below the folder has made a step."""
    return any(records_after(folder, 0.0) for folder in runs_below(root))


def test_a_waiting_run_gets_nodes_of_the_group_that_holds_its_workers_and_they_go_when_it_ends(
    autoscaler: Autoscaling, submit: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    more = ["scale.num_workers=2", "scale.cpus_per_worker=2", "train.steps=40"]
    submitted = time.monotonic()
    driver = submit("train", "digits_crate_mae", *arguments(overrides, *more))
    wait_for(lambda: trained(tmp_path / "out") or driver.process.poll() is not None, "step", 150)
    began = time.monotonic() - submitted
    assert autoscaler.nodes() == {"large": 2}, driver.output()
    autoscaler.wait_for_nodes({})
    ended = time.time() - last_step(tmp_path / "out")
    assert driver.wait(90) == 0, driver.output()
    print(f"\ntrain: {began:.1f} s from submit to training on two new nodes, {ended:.1f} s from its last step to no nodes")


def test_a_sweep_grows_with_the_nodes_that_are_started_for_it(
    autoscaler: Autoscaling, submit: Callable[..., Any], digits: Path, tmp_path: Path
) -> None:
    rates = {"optimizer.lr": {"grid": [1e-3, 7e-4, 5e-4, 3e-4]}}
    path = write_sweep_file(digits, tmp_path, tune=rates, more={"train.steps": 200}, max_concurrent=2, report_every_steps=50)
    submitted = time.monotonic()
    driver = submit("sweep", str(path), "--json")
    folder = str(tmp_path / "out" / "tiny")
    seen: list[tuple[int, int]] = []
    began = gone = 0.0
    while driver.process.poll() is None or autoscaler.nodes():
        assert time.monotonic() - submitted < 230, driver.output()
        nodes = autoscaler.nodes().total()
        gone = time.time() if nodes else gone
        seen.append((nodes, sum(row.state == "RUNNING" for row in list_trials(folder))))
        if not began and trained(tmp_path / "out"):
            began = time.monotonic() - submitted
        time.sleep(0.3)
    assert driver.wait(1) == 0, driver.output()
    assert seen[0] == (0, 0)  # it was not refused, though nothing was there
    assert max(running for _, running in seen) == 2
    assert [row.state for row in list_trials(folder)] == ["FINISHED"] * 4
    ended = gone - last_step(tmp_path / "out")
    print(f"\nsweep: {began:.1f} s from submit to the first step, {ended:.1f} s from the last step to no nodes")
    print(f"(nodes, trials): {shape(seen)}")


def shape(seen: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without repetitions."""
    return [now for before, now in zip([(-1, -1), *seen], seen, strict=False) if now != before]


def test_what_fits_on_no_node_to_come_is_refused_with_the_numbers_before_anything_starts(
    autoscaler: Autoscaling, submit: Callable[..., Any], digits: Path, overrides: list[str], tmp_path: Path
) -> None:
    path = write_sweep_file(digits, tmp_path, resources_per_trial={"cpus": 5})
    driver = submit("sweep", str(path))
    assert driver.wait(60) == 2, driver.output()
    said = " ".join(driver.output().split())
    assert "a trial takes 1 x 5 CPU and never fits: the cluster's nodes have 0 CPU, its autoscaler may add " in said
    assert "2 x large of 2 CPU" in said
    assert "(3 nodes in all), room for 0 such workers" in said
    driver = submit("train", "digits_crate_mae", *arguments(overrides, "scale.num_workers=5", "scale.cpus_per_worker=2"))
    assert driver.wait(60) == 2, driver.output()
    assert "scale.num_workers = 5 of 2 CPU each do not fit" in " ".join(driver.output().split())
    assert not (tmp_path / "out").exists()
    assert autoscaler.nodes() == {}


def test_nodes_of_trials_of_several_workers_go_away_too(
    autoscaler: Autoscaling, submit: Callable[..., Any], digits: Path, tmp_path: Path
) -> None:
    rates = {"optimizer.lr": {"grid": [1e-3]}}
    path = write_sweep_file(digits, tmp_path, tune=rates, resources_per_trial={"num_workers": 2, "cpus": 2})
    driver = submit("sweep", str(path), "--json")
    wait_for(lambda: trained(tmp_path / "out") or driver.process.poll() is not None, "step", 150)
    assert driver.wait(200) == 0, driver.output()
    autoscaler.wait_for_nodes({})
