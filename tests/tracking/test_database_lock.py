"""Drivers that open one database at once take turns, and none waits for another for ever."""

import fcntl
from pathlib import Path

import pytest

from crate_ray.config import ConfigError
from crate_ray.tracking import database


def test_a_lock_that_another_process_keeps_is_given_up_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_LOCK_SECONDS", 0.2)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with (tmp_path / ".mlflow.db.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"\.mlflow\.db\.lock for 0\.2 s"), database.alone(uri):
            pass
    with database.alone(uri):  # it was let go of
        pass
