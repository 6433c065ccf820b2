"""A PostgreSQL cluster for a test: in a folder of its own, on a free port, gone afterwards."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crate_ray.tracking.server import free_port

START_SECONDS = 60


def binaries() -> Path | None:
    """The folder of initdb and postgres; None where PostgreSQL is not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@contextmanager
def cluster() -> Iterator[str]:
    """The URI of a fresh database; PostgreSQL refuses to run as root, so root hands it to another user."""
    programs = binaries()
    assert programs is not None
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    owner = _other_user() if os.geteuid() == 0 else None
    if owner is not None:
        os.chown(folder, owner, -1)
    port = free_port()
    try:
        initdb = [str(programs / "initdb"), "-D", f"{folder}/data", "-U", "crate", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(initdb, check=True, user=owner, capture_output=True, timeout=START_SECONDS, cwd=folder)
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [str(programs / "postgres"), "-D", f"{folder}/data", "-p", str(port), "-k", str(folder), *options],
                user=owner, cwd=folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            _wait_for_port(port, server)
            yield f"postgresql://crate@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGQUIT)  # ends its processes at once, and writes nothing more
            server.wait(START_SECONDS)
    finally:
        shutil.rmtree(folder)


def _other_user() -> int:
    names = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
    return names.get("postgres", names["nobody"])


def _wait_for_port(port: int, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"PostgreSQL did not start on port {port}")
