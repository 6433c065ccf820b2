"""The one door to MLflow: where the database lies, how its client is set up, what an experiment is.

In: a tracking URI and an experiment's name. Out: a client that gives up within seconds, and an
experiment with our saved views. MLflow's own defaults wait four minutes for a server that is
down and retry seven times; here a request is tried once, and the mirror does the waiting.
"""

import logging
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from crate_ray import storage
from crate_ray.config import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

LOCAL_UI = "http://127.0.0.1:5000"
_SQLITE = "sqlite:///"
_REMOTE = ("http", "https", "postgresql", "mysql", "mssql", "databricks")


def default_uri(storage_path: str) -> str:
    """A sqlite database beside the run folders.

    A database file cannot live in an object store: for one, it is placed in the current folder.
    """
    folder = storage.local_path(storage_path) if storage.is_local(storage_path) else Path()
    return f"{_SQLITE}{(folder / 'mlflow.db').resolve()}"


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
            f"tracking.uri = '{uri}' is not a tracking store; valid: sqlite:///PATH/mlflow.db, "
            "http(s)://HOST:PORT, or the URL of a PostgreSQL or MySQL database"
        )
    return uri.rstrip("/")


def database_path(uri: str) -> Path | None:
    """The file of a sqlite URI; None for everything else."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]) if uri.startswith(_SQLITE) else None


def public_uri(uri: str) -> str:
    """The URI without user and password, for logs and files."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def web_url(uri: str) -> str:
    """Where the pages of a tracking store are: the server itself, or where `tracking ui` serves a database."""
    return public_uri(uri).rstrip("/") if uri.startswith(("http://", "https://")) else LOCAL_UI


def open_client(uri: str, *, timeout_s: float = 5) -> "MlflowClient":
    """A client whose every request is tried once and ends within `timeout_s`.

    Settings that the user made in the environment stand. The import takes seconds and is done here.
    """
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(timeout_s)),
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):  # dozens of lines when a database is created
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(absolute_uri(uri))


def initialise(uri: str, experiment: str, *, timeout_s: float = 5) -> str | None:
    """Creates database, experiment and saved views; called once, before any worker starts.

    Several processes that open a fresh sqlite database at once break its migration, so that one
    caller has to come first: the driver.

    Returns:
        The experiment id, or None when a server does not answer: one warning, and the run goes on
        without it.

    Raises:
        ConfigError: The database cannot be written, or the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    from crate_ray.tracking.views import write_views

    uri = absolute_uri(uri)
    database = database_path(uri)
    if database is not None:
        _check_database(uri, database)
    client = open_client(uri, timeout_s=timeout_s)
    try:
        experiment_id = open_experiment(client, uri, experiment)
        write_views(uri, experiment_id, client=client)
    except MlflowException as error:
        if database is not None:
            raise ConfigError(f"tracking.uri = '{public_uri(uri)}': {first_line(error)}") from None
        logger.warning(
            "MLflow at %s does not answer (%s); runs go on, and `crate-ray tracking sync` sends them later",
            public_uri(uri),
            first_line(error),
        )
        return None
    return experiment_id


def open_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Finds or creates an experiment and gives its id.

    Raises:
        ConfigError: The experiment is in MLflow's trash.
        mlflow.exceptions.MlflowException: The store does not answer.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(
                name, _artifact_location(uri, name), tags={"mlflow.experimentKind": "custom_model_development"}
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another driver was faster
    if found is None or found.lifecycle_stage != "active":
        raise ConfigError(
            f"tracking.experiment = '{name}' was deleted in MLflow; restore it there, or use another name "
            "(--set tracking.experiment=NAME)"
        )
    return str(found.experiment_id)


def first_line(error: BaseException) -> str:
    """An exception as one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _check_database(uri: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(_unwritable(uri, path.parent, str(error))) from None
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK) or path.is_dir():
        raise ConfigError(_unwritable(uri, target, "no write access, or a folder where the file should be"))


def _unwritable(uri: str, path: Path, reason: str) -> str:
    return f"tracking.uri = '{uri}': cannot write {path} ({reason}); choose another place: --set tracking.uri=sqlite:///PATH/mlflow.db"


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Beside a sqlite database; a server decides for itself."""
    database = database_path(uri)
    if database is None:
        return None
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment)
    return (database.parent / "mlartifacts" / slug).as_uri()
