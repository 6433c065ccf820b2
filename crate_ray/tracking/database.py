"""Turns at a fresh database: of several drivers that start together, one makes the tables.

In: a tracking URI. Out: a lock that is held while MLflow opens the store. MLflow's migrations break when two
processes run them at once, on sqlite and on PostgreSQL alike. A file lock orders the processes of one machine, a
lock in the database those of all machines. A server makes its tables when it starts, before anybody asks it.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from crate_ray.config import ConfigError
from crate_ray.tracking.client import database_path

_LOCK_KEY = 0x6372617465726179  # "crateray"; others that lock this database must not mean the same thing
_POLL_SECONDS = 0.1
_LOCK_SECONDS = 120  # making all tables took 11 s on a busy machine


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Holds the right to make the tables of a database; of a server, nothing.

    Raises:
        ConfigError: Another process of this machine keeps the lock of a sqlite database.
        sqlalchemy.exc.SQLAlchemyError: PostgreSQL does not answer. MLflow itself would try again for 100 s.
        ModuleNotFoundError: There is no driver for it.
    """
    database = database_path(uri)
    if database is not None:
        with _file_lock(database.with_name(f".{database.name}.lock")):
            yield
    elif uri.startswith("postgresql"):
        with _postgres_lock(uri):
            yield
    else:
        yield


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """A lock that ends with this process; one that another keeps for good is given up, for a run waits here at its start."""
    deadline = time.monotonic() + _LOCK_SECONDS
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"another process has held {path} for {_LOCK_SECONDS} s, and with it the tracking database; end that "
                        "process, or choose another place: --set tracking.uri=sqlite:///PATH/mlflow.db"
                    ) from None
                time.sleep(_POLL_SECONDS)
        yield


@contextlib.contextmanager
def _postgres_lock(uri: str) -> Iterator[None]:
    """A lock of a transaction of its own, which ends with the connection whatever becomes of this process."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.pool import NullPool

    engine = create_engine(uri, poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_SECONDS}s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
        yield
