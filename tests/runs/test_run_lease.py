"""One driver a run: a live one is respected, a dead one is not waited for."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crate_ray.config import ConfigError
from crate_ray.runs import LEASE_SECONDS, Lease, LeaseLostError, RunFolder, read_status

TAKE_AND_DIE = """
import os, sys
from crate_ray.runs import Lease, RunFolder
Lease.take(RunFolder(sys.argv[1]))
os._exit(9)
"""


def hold_elsewhere(tmp_path: Path, *, age_s: float) -> RunFolder:
    """A lease that a driver on another machine last renewed `age_s` ago."""
    held = {"owner": "x", "heartbeat": time.time() - age_s, "host": "another-machine", "pid": 1}
    (tmp_path / "lease.json").write_text(json.dumps(held))
    return RunFolder(str(tmp_path))


def test_a_second_live_driver_is_refused_and_told_who_holds_the_run(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    lease = Lease.take(folder)
    with pytest.raises(ConfigError, match=r"held by another live driver \(.*, process \d+, last seen 0 s ago\)"):
        Lease.take(folder)
    lease.end("KILLED")
    assert Lease.take(folder).attempt == 2


def test_a_lease_of_another_machine_is_respected_while_it_beats(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another-machine"):
        Lease.take(hold_elsewhere(tmp_path, age_s=LEASE_SECONDS - 20))


def test_a_lease_that_has_not_been_renewed_is_taken_over(tmp_path: Path) -> None:
    assert Lease.take(hold_elsewhere(tmp_path, age_s=LEASE_SECONDS + 1)).attempt == 1


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TAKE_AND_DIE, str(tmp_path)], timeout=60, check=False)
    assert done.returncode == 9
    folder = RunFolder(str(tmp_path))
    status = read_status(folder)
    assert status is not None
    assert status.state == "RUNNING"
    assert Lease.take(folder).attempt == 2


def test_the_end_of_a_run_is_written_and_the_folder_given_back(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    lease = Lease.take(folder)
    lease.end("FAILED", "loss nan at step 3")
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.reason, status.attempt) == ("FAILED", "loss nan at step 3", 1)
    assert status.ended is not None
    assert not (tmp_path / "lease.json").exists()


def test_a_beat_is_seen_in_lease_and_status_and_costs_nothing_when_it_comes_too_soon(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    lease = Lease.take(folder)
    first = (tmp_path / "lease.json").read_bytes()
    lease.beat()
    assert (tmp_path / "lease.json").read_bytes() == first
    time.sleep(0.01)
    lease.beat(force=True)
    renewed, status = folder.read_json("lease.json"), read_status(folder)
    assert renewed is not None
    assert status is not None
    assert renewed["heartbeat"] > json.loads(first)["heartbeat"]
    assert status.heartbeat == renewed["heartbeat"]


def test_a_store_that_takes_no_beat_for_longer_than_a_lease_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, seconds in (("HEARTBEAT_SECONDS", 0.02), ("LEASE_SECONDS", 0.05), ("_RETRY_SECONDS", 0.02)):
        monkeypatch.setattr(f"crate_ray.runs.status.{name}", seconds)
    lease = Lease.take(RunFolder(str(tmp_path)))
    held = (tmp_path / "lease.json").read_bytes()
    (tmp_path / "lease.json").unlink()
    (tmp_path / "lease.json").mkdir()  # neither read nor replaced, as on a store that refuses
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        lease.beat()
    assert "no heartbeat" in caplog.text
    (tmp_path / "lease.json").rmdir()
    (tmp_path / "lease.json").write_bytes(held)
    lease.beat(force=True)
    lease.end("FINISHED")


def test_a_driver_that_slept_while_another_took_over_leaves_the_run_alone(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    lease = Lease.take(folder)
    hold_elsewhere(tmp_path, age_s=0)
    with pytest.raises(LeaseLostError, match="taken over by another driver"):
        lease.end("FINISHED")
    status = read_status(folder)
    assert status is not None
    assert status.state == "RUNNING"


def test_of_drivers_that_start_at_the_same_moment_one_gets_the_run(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))

    def take(_: int) -> bool:
        try:
            Lease.take(folder)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1
