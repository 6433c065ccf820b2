"""The folder of a sweep: its configuration, its lease, what it has used.

In: a SweepConfig. Out: a RunFolder whose sweep.yaml is this sweep's. Whether a sweep goes on in a folder is decided before
anything is written: another identity is refused with the keys that changed.
"""

from typing import Any

from crate_ray import storage
from crate_ray.config import SCHEMA_VERSION, ConfigError, SweepConfig, dump_sweep, flatten
from crate_ray.runs import RunFolder, list_trials, read_sweep
from crate_ray.runs.create import run_meta
from crate_ray.space.arms import arm_config, arms

STOP_FILE = "stopping.json"
"""There while a session of the sweep is stopping: what trials look for between two reports, where Tune cannot reach them."""

_MAY_CHANGE = ("budget", "confirm", "resources_per_trial", "max_concurrent")
_RUN_KEYS_THAT_MAY_CHANGE = ("storage.", "tracking.", "scale.", "checkpoint.")
_UNSET = "unset"


def locate_sweep(sweep: SweepConfig) -> RunFolder:
    """The folder that a sweep has or would have; writes nothing.

    Raises:
        ConfigError: The arms name several storages, or the folder belongs to a sweep of another identity.
    """
    paths = {name: storage.absolute(arm_config(sweep, name).storage.path) for name in arms(sweep)}
    if len(set(paths.values())) > 1:
        listed = ", ".join(f"'{path}' in arm {name}" for name, path in paths.items())
        raise ConfigError(f"storage.path is {listed}; a sweep has one folder: set it once, under set")
    folder = RunFolder(storage.join(next(iter(paths.values())), sweep.name))
    held = read_sweep(folder)
    if held is not None:
        _check_same(folder, identity(held), identity(sweep))
        _check_confirmed(folder, held, sweep)
    return folder


def write_sweep(folder: RunFolder, sweep: SweepConfig) -> str:
    """Writes sweep.yaml, and run_meta.json where it is new.

    Returns:
        The sweep's run_uid, which is its trials' parent.
    """
    if folder.read_json("run_meta.json") is None:
        families = sorted({arm_config(sweep, name).model.family for name in arms(sweep)})
        folder.write_json("run_meta.json", run_meta(family=" ".join(families), kind="sweep", study=sweep.name, parent_uid=None))
    storage.write_atomic(folder.path("sweep.yaml"), f"# schema_version: {SCHEMA_VERSION}\n{dump_sweep(sweep)}")
    meta = folder.read_json("run_meta.json")
    assert meta is not None
    return str(meta["run_uid"])


def withdraw_sweep(folder: RunFolder, before: SweepConfig | None) -> None:
    """Takes `write_sweep` back.

    Args:
        folder: Of the sweep.
        before: What was there; None where there was no sweep.
    """
    if before is None:
        storage.delete(folder.path("sweep.yaml"))
    else:
        write_sweep(folder, before)


def identity(sweep: SweepConfig) -> dict[str, Any]:
    """What the trials of a sweep and the choice among them follow from, as a flat mapping."""
    values = {key: value for key, value in sweep.model_dump(mode="json").items() if key not in (*_MAY_CHANGE, "name")}
    values["set"] = {key: value for key, value in values["set"].items() if not key.startswith(_RUN_KEYS_THAT_MAY_CHANGE)}
    return flatten(values)


def _check_confirmed(folder: RunFolder, held: SweepConfig, sweep: SweepConfig) -> None:
    """Confirming runs of two kinds would count as seeds of one configuration."""
    if held.confirm is None or sweep.confirm is None or held.confirm.set == sweep.confirm.set:
        return
    if any(row.stage == "confirm" for row in list_trials(folder.uri)):
        raise ConfigError(
            f"confirm.set is {sweep.confirm.set}, and sweep '{folder.name}' in {folder.uri} has confirming runs with "
            f"{held.confirm.set}, which would be averaged with the new ones; set it back, or start a new sweep with "
            "--set name=NEW"
        )


def _check_same(folder: RunFolder, old: dict[str, Any], new: dict[str, Any]) -> None:
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key, _UNSET) != new.get(key, _UNSET))
    if not keys:
        return
    lines = [f"  {key}: {old.get(key, _UNSET)} there, {new.get(key, _UNSET)} here" for key in keys]
    raise ConfigError(
        f"sweep '{folder.name}' in {folder.uri} is another one; these keys differ:\n"
        + "\n".join(lines)
        + "\nStart a new sweep with --set name=NEW, or set the keys back. "
        + f"What may change while a sweep goes on: {', '.join(_MAY_CHANGE)}, storage, tracking."
    )
