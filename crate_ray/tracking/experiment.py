"""The experiment that runs are mirrored to: its database, its name, its saved views.

In: a tracking URI and a name. Out: an experiment id. What the user can correct is an error before
anything starts; a server that does not answer is a warning, because runs do not need it.
"""

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from crate_ray.config import ConfigError
from crate_ray.tracking.client import absolute_uri, configure, database_path, explain, one_line, open_client, public_uri
from crate_ray.tracking.database import alone
from crate_ray.tracking.limits import MAX_EXPERIMENT_NAME
from crate_ray.tracking.views import write_views

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)


def initialise(uri: str, experiment: str, *, timeout_s: float = 5, artifact_root: str | None = None) -> str | None:
    """Creates database, experiment and saved views; called once, before any worker starts.

    Several drivers that start together wait for each other here.

    Args:
        uri: The tracking store.
        experiment: Name of the experiment.
        timeout_s: How long one request may take.
        artifact_root: Where a new experiment keeps files, for a database that is no sqlite.

    Returns:
        The experiment id, or None when a server does not answer: one warning, and the run goes on
        without it.

    Raises:
        ConfigError: The database cannot be written or is none, the name does not fit, or the experiment was deleted.
    """
    uri = absolute_uri(uri)
    database = database_path(uri)
    if database is not None:
        _check_database(uri, database)
    configure(timeout_s=timeout_s)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return connect(uri, experiment, timeout_s=timeout_s, artifact_root=artifact_root)[1]
    except (MlflowException, SQLAlchemyError) as error:
        if database is not None:
            raise ConfigError(f"tracking.uri = '{public_uri(uri)}': {one_line(error)}") from None
        logger.warning(
            "MLflow at %s does not answer (%s); runs go on, and `crate-ray tracking sync` sends them later",
            public_uri(uri),
            explain(error),
        )
        return None


def connect(uri: str, experiment: str, *, timeout_s: float = 5, artifact_root: str | None = None) -> tuple["MlflowClient", str]:
    """A client and the experiment's id, with database, experiment and saved views in place.

    Raises:
        ConfigError: The name does not fit, the experiment was deleted, or the database's driver is not installed.
        mlflow.exceptions.MlflowException: The store does not answer.
        sqlalchemy.exc.SQLAlchemyError: The database does not answer.
    """
    configure(timeout_s=timeout_s)
    try:
        with alone(uri):
            client = open_client(uri, timeout_s=timeout_s)
            experiment_id = open_experiment(client, uri, experiment, artifact_root)
            write_views(client, experiment_id)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracking.uri = '{public_uri(uri)}' needs the Python package '{error.name}'; for PostgreSQL: "
            "pip install 'crate-ray[postgresql]'"
        ) from None
    return client, experiment_id


def open_experiment(client: "MlflowClient", uri: str, name: str, artifact_root: str | None = None) -> str:
    """Finds or creates an experiment and gives its id.

    Raises:
        ConfigError: The experiment is in MLflow's trash, or its name does not fit.
        mlflow.exceptions.MlflowException: The store does not answer.
    """
    from mlflow.exceptions import MlflowException

    if not 0 < len(name) <= MAX_EXPERIMENT_NAME:
        raise ConfigError(f"tracking.experiment has {len(name)} characters; MLflow takes 1 to {MAX_EXPERIMENT_NAME}")
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(
                name,
                _artifact_location(uri, name, artifact_root),
                tags={"mlflow.experimentKind": "custom_model_development"},
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


def _artifact_location(uri: str, experiment: str, artifact_root: str | None) -> str | None:
    """Beside a sqlite database, else below `artifact_root`; a server decides for itself."""
    database = database_path(uri)
    if database is not None:
        artifact_root = (database.parent / "mlartifacts").as_uri()
    if artifact_root is None or uri.startswith(("http://", "https://")):
        return None
    return f"{artifact_root}/{re.sub(r'[^A-Za-z0-9._-]+', '-', experiment)}"
