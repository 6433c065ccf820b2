"""Nodes that an autoscaler cannot get: the wait is told, ended in time, or another group is used."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from autoscaling import JOIN_S, Autoscaling, autoscaling
from faults import wait_for
from test_autoscaling import trained
from test_train_on_ray import arguments

from crate_ray.runs import RunFolder, read_status

pytestmark = pytest.mark.slow

# By name: logical CPUs of a node, nodes at most, priority; what the names mean stands in autoscaling_provider.py.
GROUPS = {"sold_out": (3, 2, 0), "stuck": (4, 1, 1), "spare": (4, 1, 0)}


@pytest.fixture(scope="module")
def autoscaler() -> Iterator[Autoscaling]:
    """A cluster of a head without CPUs, for the tests of this module."""
    with autoscaling(GROUPS, most_nodes=3) as cluster:
        yield cluster


@pytest.fixture
def submit(autoscaler: Autoscaling, start_driver: Callable[..., Any]) -> Callable[..., Any]:
    """Starts drivers on that cluster, once it has no nodes."""
    autoscaler.wait_for_nodes({})
    return lambda *words: start_driver(*words, environment=autoscaler.environment)


def test_a_group_whose_machines_do_not_join_is_replaced_by_another(
    autoscaler: Autoscaling, submit: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    # First in this file: the autoscaler avoids a group for ten minutes after a machine of it did not join.
    submitted = time.monotonic()
    driver = submit("train", "digits_crate_mae", *arguments(overrides, "scale.cpus_per_worker=4", "train.steps=40"))
    wait_for(lambda: "1 x stuck on their way" in driver.output(), "word of the wait", 120)
    assert driver.wait(150) == 0, driver.output()
    ended_after = time.monotonic() - submitted
    print(f"\nfallback: the run on the other group ended {ended_after:.1f} s after the command ({JOIN_S} s to join)")
    assert trained(tmp_path / "out")
    assert autoscaler.nodes() == {"spare": 1}


def test_a_node_that_never_comes_is_reported_with_what_was_asked_for(
    submit: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    # Three workers need a node of `sold_out`: there is one `spare` and one `stuck`.
    more = ["scale.num_workers=3", "scale.cpus_per_worker=3", "scale.node_wait_s=40", "name=waiting"]
    started = time.monotonic()
    driver = submit("train", "digits_crate_mae", *arguments(overrides, *more))
    wait_for(lambda: "waiting for" in driver.output(), "word of the wait", 120)
    said_after = time.monotonic() - started
    assert driver.wait(120) == 1, driver.output()
    status = read_status(RunFolder(str(tmp_path / "out" / "waiting")))
    assert status is not None
    assert status.state == "FAILED"
    assert str(status.reason).startswith("no room came within 40 s for 3 x 3 CPU: the cluster's nodes have ")
    assert "sold_out could not be started (monitor.log on the head says why)" in str(status.reason)
    gave_up_after = time.monotonic() - started
    print(f"\na node that never comes: said {said_after:.1f} s after the command, given up after {gave_up_after:.1f} s")
