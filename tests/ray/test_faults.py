"""Processes of a run that die while it trains: a worker, the driver, the head of the cluster, a job that is stopped."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from faults import (
    LONG,
    check_losses,
    check_same_command_goes_on,
    log_of,
    records_after,
    stop,
    wait_for,
    wait_until_training_goes_on,
    worker_pids,
)
from nodes import HEALTH, Nodes
from test_train_on_ray import arguments, losses_of, wait_for_step

from crate_ray.runs import RunFolder, read_records, read_status
from crate_ray.training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow

RUN = [*LONG, "scale.num_workers=2", "checkpoint.every_steps=20"]


def last_checkpoint(folder: RunFolder) -> int:
    newest = latest_checkpoint(folder)
    assert newest is not None
    return newest.step


def has_ended(process: psutil.Process) -> bool:
    """A zombie has; its raylet may be in no state to collect it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.timeout(600)
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_no_number(
    drive: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    driver = drive("train", "digits_crate_mae", *arguments(overrides, *RUN))
    folder = wait_for_step(tmp_path / "out", 30, driver)
    victims = worker_pids()
    assert len(victims) == 2
    killed = time.time()
    os.kill(victims[1], signal.SIGKILL)
    before = max(losses_of(folder))
    record = wait_until_training_goes_on(folder, killed, driver)
    print(f"\nworker killed at step {before}: training again at step {record['step']} after {record['time'] - killed:.1f} s")
    wait_for(lambda: max(losses_of(folder)) >= before + 20, "progress")
    stop(driver, folder)
    check_losses(folder, overrides)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("joins", [True, False], ids=["of a cluster", "of this machine alone"])
def test_after_a_killed_driver_its_workers_end_and_the_same_command_goes_on(
    start_driver: Callable[..., Any], request: pytest.FixtureRequest, overrides: list[str], tmp_path: Path, joins: bool
) -> None:
    environment = {"RAY_ADDRESS": request.getfixturevalue("cluster") if joins else ""}
    command = ["train", "digits_crate_mae", *arguments(overrides, *RUN)]
    driver = start_driver(*command, environment=environment)
    folder = wait_for_step(tmp_path / "out", 30, driver)
    orphans = [psutil.Process(pid) for pid in worker_pids()]
    assert len(orphans) == 2
    killed = time.time()
    driver.process.kill()
    driver.wait(10)
    wait_for(lambda: all(map(has_ended, orphans)), "end of the orphans", timeout_s=60)
    print(f"\ndriver killed: its workers ended after {time.time() - killed:.1f} s")
    status = read_status(folder)
    assert status is not None
    assert status.state == "RUNNING"  # nobody was left to say otherwise; STALE once its heartbeat is old
    saved = last_checkpoint(folder)
    check_same_command_goes_on(
        lambda: start_driver(*command, environment=environment), folder, overrides, saved=saved, more_steps=30
    )


@pytest.mark.timeout(600)
def test_workers_that_outlive_the_head_write_nothing_into_the_run_of_the_next_driver(
    start_nodes: Callable[..., Nodes], start_driver: Callable[..., Any], overrides: list[str], tmp_path: Path
) -> None:
    lost = start_nodes(0, HEALTH)
    node = lost.add(2)
    restarted = start_nodes(2, HEALTH)
    command = ["train", "digits_crate_mae", *arguments(overrides, *RUN)]
    driver = start_driver(*command, environment=lost.environment)
    folder = wait_for_step(tmp_path / "out", 30, driver)
    orphans = [psutil.Process(pid) for pid in node.workers()]
    assert len(orphans) == 2
    lost.head.send(signal.SIGKILL)
    driver.process.kill()
    driver.wait(10)

    started = time.time()
    again = start_driver(*command, environment=restarted.environment)
    wait_for(lambda: "attempt 2 has taken over from attempt 1" in log_of(folder), "fence")
    wait_for(lambda: any(map(has_ended, orphans)), "end of rank 0; the other one fails in its next collective")
    print(f"\nhead killed: the orphans were fenced {time.time() - started:.1f} s after the same command")
    wait_for(lambda: any(record.attempt == 2 for record in read_records(folder)), "record of the second attempt")
    records = records_after(folder, 0.0)
    first = next(record for record in records if record["attempt"] == 2)
    print(f"on a new cluster: training again at step {first['step']} after {first['time'] - started:.1f} s")
    assert max(record["time"] for record in records if record["attempt"] == 1) < first["time"]
    wait_for(lambda: max(losses_of(folder)) >= first["step"] + 20, "progress")
    stop(again, folder, attempt=2)
    check_losses(folder, overrides)


def submit(command: list[str], variables: dict[str, str]) -> tuple[Any, str]:
    """Hands a command to the session's cluster as a job; the client, and the job's id."""
    import sys

    from ray._private.worker import global_worker
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(f"http://{global_worker.node.webui_url}")
    words = [sys.executable, "-m", "crate_ray", *command]
    entrypoint = " ".join(f"'{word}'" for word in words)
    return client, client.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": variables})


class Job:
    """Looks like a driver to those who wait for steps."""

    def __init__(self, client: Any, identity: str) -> None:
        self.process, self._client, self._identity = self, client, identity

    def poll(self) -> str | None:
        status = self._client.get_job_status(self._identity)
        return str(status) if status.is_terminal() else None

    def output(self) -> str:
        return str(self._client.get_job_logs(self._identity))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("waits", [True, False], ids=["with its settings", "without"])
@pytest.mark.usefixtures("cluster")
def test_a_stopped_job_writes_a_checkpoint_where_it_is_given_the_time_and_goes_on_either_way(
    drive: Callable[..., Any], overrides: list[str], tmp_path: Path, waits: bool
) -> None:
    command = ["train", "digits_crate_mae", *arguments(overrides, *RUN)]
    settings = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": "90"}
    client, identity = submit(command, settings if waits else {})
    job = Job(client, identity)
    folder = wait_for_step(tmp_path / "out", 30, job)
    workers = worker_pids()
    if not waits:  # no checkpoint within the three seconds that Ray gives a job by default
        os.kill(workers[1], signal.SIGSTOP)
    stopped = time.time()
    client.stop_job(identity)
    wait_for(lambda: job.poll() is not None, "end of the job")
    print(f"\njob stopped {'with' if waits else 'without'} settings: {job.poll()} after {time.time() - stopped:.1f} s")
    status = read_status(folder)
    assert status is not None
    saved = last_checkpoint(folder)
    if waits:
        assert (status.state, status.reason) == ("KILLED", "SIGTERM; a checkpoint was written")
        assert saved == max(losses_of(folder))
    else:
        assert status.state == "RUNNING"
    wait_for(lambda: not worker_pids(), "end of the workers")

    check_same_command_goes_on(lambda: drive(*command), folder, overrides, saved=saved, more_steps=20)
