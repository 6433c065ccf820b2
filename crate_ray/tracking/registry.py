"""The model registry: a name and an alias for what a run has made.

In: a run folder with a checkpoint, a name, perhaps an alias. Out: a version of a registered model that belongs to the run's
logged model, whose tags say where the checkpoint is, its digest, and what the probe gave. The weights stay where they are. One
checkpoint is one version, however often it is registered. This is the foreground: what cannot be done is an error.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crate_ray.config import ConfigError
from crate_ray.runs import RunFolder
from crate_ray.tracking.client import absolute_uri, one_line, open_client, public_uri, web_url
from crate_ray.tracking.describe import RUN_UID_TAG
from crate_ray.tracking.experiment import initialise
from crate_ray.tracking.limits import valid_tags
from crate_ray.tracking.logged_model import CHECKPOINT_TAG, DIGEST_TAG, STEP_TAG, find_model
from crate_ray.tracking.sync import sync

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,127}")
_ALIAS = re.compile(r"[A-Za-z0-9_-]{1,255}")
_TAKEN_ALIAS = re.compile(r"latest|[vV]\d+")  # MLflow gives these a meaning of its own
_PROBE = "final/probe_top1"


@dataclass(frozen=True)
class Registration:
    """A version in the registry: which one, whether it was made now, and its page."""

    name: str
    version: int
    alias: str | None
    is_new: bool
    link: str


def check_names(name: str, alias: str | None) -> None:
    """Refuses names that the registry would refuse, before anything is written.

    Raises:
        ConfigError: Says what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--register '{name}' is no name of a registered model; use up to 128 letters, digits, spaces and . _ -, "
            "the first a letter or a digit"
        )
    if alias is not None and (not _ALIAS.fullmatch(alias) or _TAKEN_ALIAS.fullmatch(alias)):
        raise ConfigError(f"--alias '{alias}' is no alias; use letters, digits, _ and -, but not 'latest' or 'v1', e.g. best")


def find_registry(uri: str, experiment: str) -> str:
    """The id of the experiment that the registered run is in.

    Raises:
        ConfigError: The store does not answer.
    """
    experiment_id = initialise(uri, experiment)
    if experiment_id is None:
        raise ConfigError(f"MLflow at {public_uri(uri)} does not answer; start it, or leave --register out")
    return experiment_id


def register_run(
    folder: RunFolder, name: str, *, uri: str, experiment: str, alias: str | None = None, tags: dict[str, Any] | None = None
) -> Registration:
    """Makes a run's newest checkpoint a version of a registered model, unless it is one; moves the alias to it.

    Args:
        folder: A run that has ended, with a checkpoint; MLflow is caught up with it first.
        name: The registered model; made if there is none.
        uri: The tracking store, which is the registry.
        experiment: Name of the run's experiment.
        alias: Points to this version from now on; one alias is at one version.
        tags: Further tags of the version, such as the file that the weights were exported to.

    Raises:
        ConfigError: A name that the registry refuses, a store that does not answer, or a run that has not ended.
    """
    check_names(name, alias)
    experiment_id = find_registry(uri, experiment)
    (synced,) = sync([folder], uri, experiment)
    if synced.error is not None:
        raise ConfigError(f"run '{folder.name}' cannot be sent to MLflow at {public_uri(uri)}: {synced.error}")
    from mlflow.exceptions import MlflowException

    client = open_client(uri)
    try:
        model = find_model(client, experiment_id, str((folder.read_json("run_meta.json") or {})["run_uid"]))
        if model is None:
            raise ConfigError(f"run '{folder.name}' has not ended, or has no checkpoint: it has no model yet to register")
        version, is_new = _find_or_create(client, name, model, tags or {})
        if alias is not None:
            client.set_registered_model_alias(name, alias, str(version))
    except MlflowException as error:
        raise ConfigError(f"MLflow at {public_uri(uri)} does not register '{name}': {one_line(error)}") from None
    link = f"{web_url(absolute_uri(uri))}/#/models/{name.replace(' ', '%20')}/versions/{version}"
    return Registration(name, version, alias, is_new, link)


def _find_or_create(client: "MlflowClient", name: str, model: "LoggedModel", tags: dict[str, Any]) -> tuple[int, bool]:
    """The version of the model's checkpoint, and whether it was made now; its tags are brought up to date."""
    from mlflow.exceptions import MlflowException

    held = model.tags or {}
    probe = [metric.value for metric in model.metrics or [] if metric.key == _PROBE]
    kept = {key: held[key] for key in (RUN_UID_TAG, CHECKPOINT_TAG, STEP_TAG, DIGEST_TAG)}
    described = valid_tags({**kept, **({"probe_top1": probe[-1]} if probe else {}), **tags})
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    wanted = {key: held[key] for key in (CHECKPOINT_TAG, DIGEST_TAG)}
    for found in client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{held[DIGEST_TAG]}'"):
        if wanted.items() <= found.tags.items():
            for key, value in described.items() - found.tags.items():
                client.set_model_version_tag(name, str(found.version), key, value)
            return int(found.version), False
    # The place of the logged model's files: a registry takes no path of its own machine that is none of its artifacts.
    made = client.create_model_version(
        name,
        model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        tags=described,
        await_creation_for=0,
    )
    return int(made.version), True
