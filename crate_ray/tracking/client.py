"""The one door to MLflow: where the database lies, how its client is set up, how it gives up.

In: a tracking URI. Out: the same URI made unambiguous, and a client that gives up within seconds.
MLflow's own defaults wait four minutes for a server that is down and retry seven times; here a
request is tried once, and the mirror does the waiting.
"""

import logging
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from crate_ray import storage
from crate_ray.config import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL_UI = "http://127.0.0.1:5000"
_SQLITE = "sqlite:///"
# As SQLAlchemy and requests read a URL, past the scheme; and `user:pa/ss@host` in the place of a server, which is none.
_DATABASE_USER = re.compile(r"^[^:/@]*(:[^@]*)?@")
_WEB_USER = re.compile(r"^([^/?#]*|[^/:@]*:(?!\d+([/?#]|$))[^@]*)@")
_PASSWORD = re.compile(r"(?<=://)[^\s'\"/:@]*:[^\s'\"@]*@")
_SECRET = re.compile(r"\b(\w*(?:password|passwd|secret|token))=[^\s&;'\"]+", re.IGNORECASE)
_REMOTE = ("http", "https", "postgresql", "mysql", "mssql", "databricks")


def default_uri(storage_path: str) -> str:
    """A sqlite database beside the run folders.

    A database file cannot live in an object store: for one, it is placed in the current folder.
    """
    return f"{_SQLITE}{_local_folder(storage_path) / 'mlflow.db'}"


def default_artifact_root(storage_path: str) -> str:
    """Where files go that are mirrored to a database without a server: beside the run folders, as its database would be."""
    return (_local_folder(storage_path) / "mlartifacts").as_uri()


def _local_folder(storage_path: str) -> Path:
    return (storage.local_path(storage_path) if storage.is_local(storage_path) else Path()).resolve()


def absolute_uri(uri: str) -> str:
    """The URI with a relative sqlite path made absolute, so that it means the same in every process.

    Raises:
        ConfigError: A scheme that MLflow's tracking does not take, or its retired file store.
    """
    if uri.startswith(_SQLITE):
        path, mark, query = uri.removeprefix(_SQLITE).partition("?")
        if not path:
            raise ConfigError(f"tracking.uri = '{uri}' names no file; use sqlite:///PATH/mlflow.db")
        return f"{_SQLITE}{Path(path).expanduser().resolve()}{mark}{query}"
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in _REMOTE or (scheme != "databricks" and "://" not in uri):
        raise ConfigError(
            f"tracking.uri = '{public_uri(uri)}' is not a tracking store; valid: sqlite:///PATH/mlflow.db, "
            "http(s)://HOST:PORT, or the URL of a PostgreSQL or MySQL database"
        )
    return uri.rstrip("/")


def database_path(uri: str) -> Path | None:
    """The file of a sqlite URI; None for everything else."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


def public_uri(uri: str) -> str:
    """The URI without user, password and query, for logs and files; what a database takes for a password may hold a slash."""
    scheme, separator, rest = uri.partition("://")
    if not separator or uri.startswith(_SQLITE):
        return uri
    user = _WEB_USER if scheme in ("http", "https") else _DATABASE_USER
    return f"{scheme}://{re.split('[?&#]', user.sub('', rest, count=1), maxsplit=1)[0]}"


def hide_secrets(text: str) -> str:
    """A text, such as a command or a configuration, without the passwords of the URIs in it."""
    return _SECRET.sub(r"\1=...", _PASSWORD.sub("", text))


def web_url(uri: str) -> str:
    """Where the pages of a tracking store are: the server itself, or where `tracking ui` serves a database."""
    return public_uri(uri).rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL_UI


def configure(*, timeout_s: float) -> None:
    """Sets MLflow's environment; before its first import, because some settings are read there.

    They hold for the whole process: the last `timeout_s` counts, the rest gives way to what the user set.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(math.ceil(timeout_s))
    os.environ.setdefault("PGCONNECT_TIMEOUT", str(max(2, math.ceil(timeout_s))))


def open_client(uri: str, *, timeout_s: float = 5) -> "MlflowClient":
    """A client whose every request is tried once and ends within `timeout_s`.

    The import takes seconds and is done here; so is the creation of a fresh database.
    """
    configure(timeout_s=timeout_s)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):  # dozens of lines when a database is created
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(absolute_uri(uri))


def one_line(error: BaseException) -> str:
    """An exception as one line, without passwords; of a long one both ends, since MLflow puts the cause last."""
    text = re.sub(r"//[^/\s]*@", "//", hide_secrets(" ".join(str(error).split()))) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:80]} ... {text[-150:]}"


def explain(error: BaseException) -> str:
    """An exception as one line, with the fix where a server refuses the name by which it was called."""
    text = one_line(error)
    if "Invalid Host header" not in str(error):
        return text
    return f"{text}; a server answers only to names that it was told: start it with `--allowed-hosts NAME`"
