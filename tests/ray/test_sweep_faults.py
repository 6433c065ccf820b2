"""Sweeps whose driver or trial dies, or that are asked to stop, in the middle; the same command again goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from crate_ray.runs import RunFolder, TrialRow, list_trials, read_status
from sweeps import attempts, run, steps_done_twice, study_states, write_population_file, write_sweep_file

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

DRIVER = "import sys; from crate_ray.config import SweepConfig; from crate_ray.launch.sweeps.driver import run_sweep; "
DRIVER += "outcome = run_sweep(SweepConfig.load(sys.argv[1])); print(outcome.state, outcome.signal)"
ASHA = {"type": "asha", "grace_steps": 20, "reduction_factor": 2}


@contextmanager
def driver(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A sweep in a process of its own, gone at the end."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def wait_for(folder: RunFolder, holds: Callable[[list[TrialRow]], bool], *, timeout_s: float = 120) -> list[TrialRow]:
    """The rows of a sweep as soon as they hold."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        rows = list_trials(folder.uri)
        if holds(rows):
            return rows
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s: {[(row.id, row.state, row.step) for row in list_trials(folder.uri)]}")


def some_are_over_and_one_runs(rows: list[TrialRow]) -> bool:
    return sum(row.is_over for row in rows) >= 2 and any(row.state == "RUNNING" and row.step > 0 for row in rows)


@pytest.fixture
def path(digits: Path, tmp_path: Path) -> Path:
    """Six trials of which asha stops some, two at a time."""
    grid = {"optimizer.lr": {"grid": [1e-3, 1e-4, 3e-4, 2e-4, 2e-3, 3e-3]}}
    more = {"train.steps": 200, "checkpoint.every_steps": 20}
    return write_sweep_file(digits, tmp_path, tune=grid, scheduler=ASHA, report_every_steps=20, max_concurrent=2, more=more)


def test_a_killed_driver_costs_no_finished_work(path: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "out" / "tiny"))
    with driver(path) as process:
        wait_for(folder, some_are_over_and_one_runs)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    over = {row.id: row.step for row in list_trials(folder.uri) if row.is_over}
    before = attempts(folder)
    outcome, seen = run(path)
    assert outcome.state == "FINISHED"
    assert set(seen.before) == set(over)
    assert not set(seen.started) & set(over)
    assert {name: attempts(folder)[name] for name in over} == {name: before[name] for name in over}
    assert {row.id: row.step for row in outcome.rows if row.id in over} == over
    assert all(row.is_over for row in outcome.rows)
    states = [read_status(RunFolder(folder.path("trials", row.id))) for row in outcome.rows]
    assert all(status is not None and status.state != "RUNNING" for status in states)


def test_a_sweep_that_is_interrupted_writes_checkpoints_and_goes_on(path: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "out" / "tiny"))
    with driver(path) as process:
        wait_for(folder, some_are_over_and_one_runs)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=90)
    assert output.split() == ["KILLED", str(int(signal.SIGINT))]
    rows = list_trials(folder.uri)
    killed = [row for row in rows if row.state == "KILLED"]
    assert killed
    assert all(row.is_over or row.state == "KILLED" for row in rows)
    assert all(any(Path(folder.uri, "trials", row.id, "checkpoints").iterdir()) for row in killed)
    outcome, seen = run(path)
    assert outcome.state == "FINISHED"
    assert {row.id for row in killed} <= set(seen.started)


def test_a_killed_trial_is_started_again_and_the_sweep_finishes(path: Path, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "out" / "tiny"))
    with driver(path) as process:
        wait_for(folder, lambda rows: any(row.state == "RUNNING" and row.step > 0 for row in rows))
        victims = [p for p in psutil.process_iter(["cmdline"]) if "SweepTrial" in " ".join(p.info["cmdline"] or [])]
        os.kill(victims[0].pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=150)
    assert output.split()[-2:] == ["FINISHED", "None"]  # after what Ray says of the dead process
    assert all(row.is_over for row in list_trials(folder.uri))


def killed_driver(path: Path, holds: Callable[[list[TrialRow]], bool]) -> list[TrialRow]:
    """Kills the driver of a sweep, -9, as soon as its rows hold; the rows as it left them."""
    folder = RunFolder(str(path.parent / "out" / "tiny"))
    with driver(path) as process:
        wait_for(folder, holds)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    return list_trials(folder.uri)


def test_a_killed_driver_of_hyperband_goes_on_and_repeats_no_more_than_since_the_checkpoints(
    digits: Path, tmp_path: Path
) -> None:
    path = write_sweep_file(
        digits,
        tmp_path,
        tune={"optimizer.lr": {"loguniform": [1e-4, 1e-2], "num": 5}},
        scheduler={"type": "hyperband", "grace_steps": 40, "reduction_factor": 3},
        report_every_steps=20,
        max_concurrent=2,
        more={"train.steps": 120},
    )
    left = killed_driver(path, lambda rows: any(row.is_over for row in rows) and any(is_between(row) for row in rows))
    over = {row.id: (row.state, row.step) for row in left if row.is_over}
    outcome, seen = run(path)
    assert (outcome.state, len(outcome.rows)) == ("FINISHED", 5)
    assert all(row.is_over for row in outcome.rows)
    assert {row.id: (row.state, row.step) for row in outcome.rows if row.id in over} == over
    assert not set(seen.started) & set(over)
    twice = steps_done_twice(outcome.folder)
    print(f"{len(over)} of 5 were over; steps done twice: {twice}")
    assert max(twice.values()) <= 20


def is_between(row: TrialRow) -> bool:
    """Whether a trial runs, and has reported."""
    return row.state == "RUNNING" and row.step > 0


def test_a_killed_driver_of_a_population_goes_on_with_its_clones_and_their_values(digits: Path, tmp_path: Path) -> None:
    path = write_population_file(digits, tmp_path, steps=200, interval_steps=40, report_every_steps=20)
    trials = tmp_path / "out" / "tiny" / "trials"
    killed_driver(path, lambda rows: any(trials.glob("*/gen_*/generation.json")) and any(is_between(row) for row in rows))
    before = {clone: clone.read_text() for clone in trials.glob("*/gen_*/generation.json")}
    outcome, _ = run(path)
    assert outcome.counts == {"FINISHED": 4}
    assert all(row.step == 200 for row in outcome.rows)
    assert {clone: clone.read_text() for clone in before} == before
    for row in outcome.rows:  # what a trial ended with is what its newest clone says
        clones = sorted(trials.glob(f"{row.id}/gen_*/generation.json"))
        if clones:
            assert row.values == json.loads(clones[-1].read_text())["set"]
    twice = steps_done_twice(outcome.folder)
    print(f"{len(before)} clones before; {len(list(trials.glob('*/gen_*')))} after; steps done twice: {twice}")
    assert max(twice.values()) <= 20


def test_what_a_killed_driver_asked_of_its_search_is_marked_failed_and_asked_again(digits: Path, tmp_path: Path) -> None:
    path = write_sweep_file(
        digits,
        tmp_path,
        tune={"optimizer.lr": {"loguniform": [1e-4, 1e-2]}},
        search={"method": "tpe"},
        budget={"trials": 5},
        report_every_steps=20,
        max_concurrent=2,
        more={"train.steps": 200, "checkpoint.every_steps": 20},
    )
    left = killed_driver(path, some_are_over_and_one_runs)
    folder = RunFolder(str(tmp_path / "out" / "tiny"))
    before = study_states(folder)
    orphans = {row.id for row in left if not row.is_over}
    outcome, seen = run(path)
    print(f"the study before {before}, after {study_states(folder)}")
    assert before["RUNNING"] >= len(orphans) > 0
    assert outcome.counts == {"FINISHED": 5}
    assert study_states(folder) == {"COMPLETE": 5, "FAIL": before["RUNNING"]}
    assert orphans <= set(seen.started)
    assert max(steps_done_twice(folder).values()) <= 20
