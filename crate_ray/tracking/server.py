"""MLflow's own pages for a local database: one small server process, started and ended here.

In: a database URI. Out: a running server. MLflow's defaults start fifteen processes and take 3 GB;
one worker without the job runner is two processes and serves a group of people well. A shared
server for a cluster is another matter and is not started from here.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from types import TracebackType
from typing import IO, Self

from crate_ray.config import ConfigError
from crate_ray.tracking.client import absolute_uri, database_path, public_uri

_STOP_SECONDS = 5.0


class Server:
    """A running server; a context manager that ends it with all its processes.

    Attributes:
        url: Its base address.
        pid: Its process, which leads a process group of its own.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, log: IO[bytes]) -> None:
        self._process = process
        self._log = log
        self.url = url
        self.pid = process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def wait(self) -> int:
        """Blocks until the server ends by itself; gives its exit status."""
        return self._process.wait()

    def close(self) -> None:
        """Ends the server's process group: politely, then not. Again is fine."""
        if self._log.closed:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):  # the whole group is gone already
                os.killpg(self.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS)
        self._log.close()

    def is_healthy(self) -> bool:
        """Whether the server answers now."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def log_tail(self, num_lines: int = 8) -> str:
        """The last lines that the server wrote."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-num_lines:])


def serve(uri: str, host: str = "127.0.0.1", port: int = 5000, *, timeout_s: float = 120) -> Server:
    """Starts MLflow's server on a database and waits until it answers.

    Args:
        uri: A database; sqlite or any other that MLflow keeps runs in.
        host: Address to listen on; MLflow refuses foreign host names by itself.
        port: Port to listen on.
        timeout_s: How long the start may take; it imports for seconds.

    Raises:
        ConfigError: The URI is a server already, or the port is taken.
        RuntimeError: The server ended or did not answer in time; its last lines are in the message.
    """
    uri = absolute_uri(uri)
    if uri.startswith(("http://", "https://")):
        raise ConfigError(f"tracking.uri = '{public_uri(uri)}' is a server already; open it in a browser")
    _check_port(host, port)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - the server writes to it for as long as it lives
    process = subprocess.Popen(
        _command(uri, host, port),
        env={**os.environ, **_environment(uri)},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    server = Server(process, f"http://{host}:{port}", log)
    try:
        _wait_until_healthy(server, timeout_s)
    except BaseException:
        server.close()
        raise
    return server


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _command(uri: str, host: str, port: int) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    database = database_path(uri)
    if database is not None:
        command += ["--artifacts-destination", str(database.parent / "mlartifacts")]
    return command


def _environment(uri: str) -> dict[str, str]:
    """The database goes by environment: a command line, with its password, is public on the machine."""
    return {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port} ({error.strerror}); another server may be running there. "
                f"Free right now: --port {free_port()}"
            ) from None


def _wait_until_healthy(server: Server, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not server.is_healthy():
        if server.has_ended() or time.monotonic() > deadline:
            state = "ended while starting" if server.has_ended() else f"did not answer within {timeout_s:g} s"
            raise RuntimeError(f"the MLflow server {state}; its last lines:\n{server.log_tail()}")
        time.sleep(0.2)
