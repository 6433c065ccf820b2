"""MLflow's own pages and its interface over HTTP for one database: one small server process, started and ended here.

In: a database URI, and the names by which people will call this machine. Out: a running server, which also keeps the files.
MLflow's defaults start fifteen processes and take 3 GB; one worker without the job runner is two processes and serves a
group of people well. A server answers only to names that it was told, so that a page of another site cannot reach it: by
default those of the machine itself; and a browser that calls it by another name may look at pages but gets no runs.
"""

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from crate_ray.config import ConfigError
from crate_ray.tracking.client import absolute_uri, database_path, hide_secrets, public_uri

_STOP_SECONDS = 5.0
_EVERY_ADDRESS = ("0.0.0.0", "::")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PRIVATE = ("10.*", "192.168.*", *(f"172.{number}.*" for number in range(16, 32)))  # as MLflow's own default


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
        """The last lines that the server wrote, without passwords."""
        self._log.seek(0)
        return hide_secrets("\n".join(self._log.read().decode(errors="replace").splitlines()[-num_lines:]))


def serve(
    uri: str,
    host: str = "127.0.0.1",
    port: int = 5000,
    *,
    allowed_hosts: Sequence[str] = (),
    artifacts: str | None = None,
    workers: int = 1,
    timeout_s: float = 120,
) -> Server:
    """Starts MLflow's server on a database and waits until it answers.

    Args:
        uri: A database; sqlite or any other that MLflow keeps runs in.
        host: Address to listen on.
        port: Port to listen on.
        allowed_hosts: Names by which clients and browsers call the server, beside its own.
        artifacts: Folder or bucket where it keeps files; by default `mlartifacts` beside a sqlite database, else here.
        workers: Processes that answer.
        timeout_s: How long the start may take; it imports for seconds.

    Raises:
        ConfigError: The URI is a server already, the port is taken, or a name is none.
        RuntimeError: The server ended or did not answer in time; its last lines are in the message.
    """
    uri = absolute_uri(uri)
    if uri.startswith(("http://", "https://")):
        raise ConfigError(f"tracking.uri = '{public_uri(uri)}' is a server already; open it in a browser")
    names = _names(host, allowed_hosts)
    _check_port(host, port)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - the server writes to it for as long as it lives
    process = subprocess.Popen(
        _command(uri, host, port, names, artifacts, workers),
        env={**os.environ, **_environment(uri)},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    server = Server(process, f"http://{_own_address(host)}:{port}", log)
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


def _command(uri: str, host: str, port: int, names: Sequence[str], artifacts: str | None, workers: int) -> list[str]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", str(workers)]
    if artifacts is None:
        database = database_path(uri)
        artifacts = str((database.parent if database else Path.cwd()) / "mlartifacts")
    command += ["--artifacts-destination", artifacts]
    if names:
        command += ["--allowed-hosts", ",".join(_host_patterns(names, port))]
        command += ["--cors-allowed-origins", ",".join(_origins(names, port))]
    return command


def _names(host: str, allowed: Iterable[str]) -> list[str]:
    """What this server is called, beside the loopback addresses; empty where MLflow's own default does.

    Raises:
        ConfigError: One of the names is no host name.
    """
    names = list(allowed)
    for name in names:
        if not name or set(name) & set("/,* ") or name.count(":") == 1:
            raise ConfigError(
                f"--allowed-hosts '{name}' is no host name; give names such as mlflow.example.org, without http:// or port"
            )
    if host in _EVERY_ADDRESS:
        import psutil

        addresses = [
            entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET
        ]
        names += [socket.gethostname(), socket.getfqdn(), *addresses]
    elif host not in _LOOPBACK:
        names.append(host)
    return list(dict.fromkeys(_bracketed(name) for name in names if name not in _LOOPBACK))


def _host_patterns(names: Sequence[str], port: int) -> list[str]:
    """A list of our own replaces MLflow's, which lets loopback and private addresses in."""
    own = [text for name in (*_LOOPBACK, *names) for text in (name, f"{name}:{port}")]
    return [*own, *_PRIVATE]


def _origins(names: Sequence[str], port: int) -> list[str]:
    """A browser says by which address it opened the page. MLflow takes no other than loopback for its own, and answers 403."""
    return [origin for name in names for origin in (f"http://{name}:{port}", f"http://{name}", f"https://{name}")]


def _bracketed(name: str) -> str:
    """An IPv6 address as it stands in a URL."""
    with contextlib.suppress(ValueError):
        return f"[{name}]" if ipaddress.ip_address(name).version == 6 else name
    return name


def _own_address(host: str) -> str:
    """Where this machine reaches a server that listens there."""
    return "127.0.0.1" if host in _EVERY_ADDRESS else _bracketed(host)


def _environment(uri: str) -> dict[str, str]:
    """The database goes by environment: a command line, with its password, is public on the machine."""
    return {
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
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
