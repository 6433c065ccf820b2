"""From a configuration to a run that may start: paths made absolute, data found, identity settled.

Everything that can refuse a run refuses it here, before a cluster is touched.
"""

from typing import Any

from crate_ray import storage
from crate_ray.config import RunConfig, digest, fingerprint, resume_parts
from crate_ray.data import load_index
from crate_ray.runs import RunFolder, find_run, open_run
from crate_ray.training.precision import resolve_precision


def absolute_paths(config: RunConfig) -> RunConfig:
    """The same configuration with local paths that hold in any working directory."""
    data = config.data
    paths = {key: storage.absolute(url) for key in ("train", "eval", "test") if (url := getattr(data, key)) is not None}
    return config.model_copy(
        update={
            "data": data.model_copy(update=paths),
            "storage": config.storage.model_copy(update={"path": storage.absolute(config.storage.path)}),
        }
    )


def data_digest(config: RunConfig) -> str:
    """Digest of the training and validation shards: names, sizes and contents, never where they lie."""
    parts: dict[str, Any] = {"train": load_index(config.data.train).digest}
    if config.data.eval is not None:
        parts["eval"] = load_index(config.data.eval).digest
    return digest(parts)


def locate_run(config: RunConfig) -> RunFolder:
    """The folder that the run has or would have; reads the data's index and writes nothing.

    Args:
        config: With absolute paths.

    Raises:
        ConfigError: No such data, or a name that another configuration has.
    """
    if config.data.test is not None:
        load_index(config.data.test)  # missed now, not after the training
    return find_run(config, resume_parts(config, data_digest(config)))


def prepare_run(
    config: RunConfig,
    *,
    device_type: str,
    kind: str = "train",
    study: str = "",
    parent_uid: str | None = None,
    uri: str | None = None,
) -> tuple[RunConfig, RunFolder]:
    """Checks data and storage, and opens the run folder.

    Args:
        config: As loaded; relative paths are taken from the working directory.
        device_type: "cpu" or "cuda": decides what precision `auto` is.
        kind: See `runs.open_run`, as the arguments below.
        study: The study that the run belongs to.
        parent_uid: The run above it.
        uri: The folder, where it is not storage.path/name.

    Returns:
        The configuration with absolute paths, and the folder.

    Raises:
        ConfigError: No such data, storage that cannot be written, or a name that another configuration has.
    """
    config = absolute_paths(config)
    storage.check_writable(config.storage.path)
    precision = resolve_precision(config.train.precision, device_type)
    identity = fingerprint(config, data_digest(config), precision)
    folder = open_run(config, identity, kind=kind, study=study, parent_uid=parent_uid, uri=uri)
    return config, folder
