"""The run folder: one run's only record. Everything in it is JSON, YAML or safetensors.

Layout: config.yaml, fingerprint.json, run_meta.json, status.json, lease.json, metrics.jsonl (or
metrics/ segments on an object store), final.json, checkpoints/, pictures/.
"""

import json
from typing import Any

from crate_ray import storage
from crate_ray.config import SCHEMA_VERSION, ConfigError, RunConfig, dump_yaml, read_yaml

_TRIALS = "trials"
_SWEEP = "sweep.yaml"


class RunFolder:
    """Paths and small files of one run.

    Args:
        uri: The folder, local or in an object store; need not exist yet.
    """

    def __init__(self, uri: str) -> None:
        self.uri = storage.absolute(uri)

    def __repr__(self) -> str:
        return f"RunFolder({self.uri!r})"

    @property
    def name(self) -> str:
        """The run's name, which is the folder's."""
        return self.uri.partition("?")[0].rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        """Whether records can be appended."""
        return storage.is_local(self.uri)

    def path(self, *parts: str) -> str:
        """A URI inside the folder."""
        return storage.join(self.uri, *parts)

    def exists(self) -> bool:
        """Whether a run was created here."""
        return storage.exists(self.path("config.yaml"))

    def check_exists(self) -> None:
        """Refuses a folder without a run.

        Raises:
            ConfigError: No run was created here.
        """
        if not self.exists():
            raise ConfigError(f"'{self.uri}' is not a run folder (it has no config.yaml); `crate-ray runs` lists them")

    def read_config(self) -> RunConfig:
        """The resolved configuration; FileNotFoundError when this is no run."""
        text = storage.read_text(self.path("config.yaml"))
        return load_run_text(text, where=self.path("config.yaml"))

    def write_config(self, config: RunConfig) -> None:
        """Writes the resolved configuration."""
        storage.write_atomic(self.path("config.yaml"), f"# schema_version: {SCHEMA_VERSION}\n{dump_yaml(config)}")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder, or None when it is not there."""
        try:
            value = json.loads(storage.read_text(self.path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return dict(value)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes a JSON file atomically, with the schema version."""
        storage.write_atomic(self.path(name), json.dumps({"schema_version": SCHEMA_VERSION, **value}, indent=1) + "\n")


def load_run_text(text: str, *, where: str) -> RunConfig:
    """Parses a configuration that `write_config` wrote."""
    return RunConfig.parse(read_yaml(text, where=where), where=where)


def list_runs(root: str) -> list[RunFolder]:
    """Run folders directly below a folder, in its `trials/`, and those of the sweeps below it, sorted by path."""
    found: list[RunFolder] = []
    for name in storage.list_dir(root):
        folder = RunFolder(storage.join(root, name))
        if folder.exists():
            found.append(folder)
        elif name == _TRIALS:
            found.extend(list_runs(folder.uri))
        elif storage.exists(folder.path(_SWEEP)):
            found.extend(list_runs(folder.path(_TRIALS)))
    return found


def sweep_of(folder: RunFolder) -> RunFolder | None:
    """The folder of the sweep that a run is a trial of; None for any other run."""
    place, mark, query = folder.uri.partition("?")
    root, _, group = place.rpartition("/")[0].rpartition("/")
    sweep = RunFolder(root + mark + query) if group == _TRIALS else None
    return sweep if sweep is not None and storage.exists(sweep.path(_SWEEP)) else None
