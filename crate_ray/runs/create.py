"""Opening a run: a new folder, a resume, a finished run, or a refusal that says why.

In: a RunConfig and its fingerprint. Out: the folder and what to do with it. The decision is made
before any worker starts, so a refused run costs nothing and leaves nothing half-written.
"""

import getpass
import platform
import subprocess
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig, digest, run_name
from crate_ray.runs.folder import RunFolder
from crate_ray.runs.status import read_status

_UNSET = "unset"
_PACKAGES = ("crate-ray", "torch", "torchvision", "ray", "mlflow", "webdataset", "numpy", "pyarrow", "pydantic")


def open_run(
    config: RunConfig,
    fingerprint: dict[str, Any],
    *,
    kind: str = "train",
    study: str = "",
    parent_uid: str | None = None,
    stage: Literal["screen", "confirm"] | None = None,
    uri: str | None = None,
) -> RunFolder:
    """Finds or creates the folder of a run.

    Args:
        config: The resolved configuration.
        fingerprint: What `config.fingerprint` gives for it.
        kind: What the run is for: train, trial, control, probe, compare or sweep.
        study: The study that it belongs to.
        parent_uid: The run_uid of the sweep or comparison above it.
        stage: Of a trial: whether its sweep chooses by it, or compares it.
        uri: The folder, where it is not storage.path/name.

    Raises:
        ConfigError: The name belongs to a run of another configuration; the keys that differ are listed.
    """
    folder = find_run(config, fingerprint["resume"]["parts"], uri=uri)
    if folder.read_json("run_meta.json") is None:
        meta = run_meta(family=config.model.family, kind=kind, study=study, parent_uid=parent_uid)
        folder.write_json("run_meta.json", meta if stage is None else {**meta, "stage": stage})
    if folder.read_json("fingerprint.json") is None:
        folder.write_json("fingerprint.json", fingerprint)
    folder.write_config(config)
    return folder


def find_run(config: RunConfig, resume_parts: dict[str, Any], *, uri: str | None = None) -> RunFolder:
    """The folder that a run has or would have; writes nothing.

    Args:
        config: The resolved configuration.
        resume_parts: What `config.resume_parts` gives for it.
        uri: The folder, where it is not storage.path/name.

    Raises:
        ConfigError: The name belongs to a run of another configuration; the keys that differ are listed.
    """
    folder = RunFolder(uri or storage.join(config.storage.path, run_name(config, digest(resume_parts))))
    existing = folder.read_json("fingerprint.json")
    if existing is not None and existing["resume"]["digest"] != digest(resume_parts):
        raise ConfigError(_differences(folder, existing["resume"]["parts"], resume_parts))
    return folder


def record_precision(folder: RunFolder, precision: str) -> None:
    """Corrects the precision that comparisons see to the one that the workers used; the driver could only guess."""
    fingerprint = folder.read_json("fingerprint.json")
    if fingerprint is None or fingerprint["compare"]["parts"]["precision"] == precision:
        return
    parts = {**fingerprint["compare"]["parts"], "precision": precision}
    folder.write_json("fingerprint.json", {**fingerprint, "compare": {"digest": digest(parts), "parts": parts}})


def is_finished(folder: RunFolder) -> bool:
    """Whether the run ended well and there is nothing left to do."""
    status = read_status(folder)
    return status is not None and status.state == "FINISHED"


def _differences(folder: RunFolder, old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key, _UNSET) != new.get(key, _UNSET))
    lines = [f"  {key}: {old.get(key, _UNSET)} there, {new.get(key, _UNSET)} here" for key in keys]
    return (
        f"run name '{folder.name}' belongs to another configuration in {folder.uri}; these keys differ:\n"
        + "\n".join(lines)
        + "\nUse another name, leave the name out (a changed configuration is then a new run), or set the keys back."
    )


def run_meta(*, family: str, kind: str, study: str, parent_uid: str | None) -> dict[str, Any]:
    """The content of a new run's run_meta.json: a run_uid of its own, and where it comes from."""
    commit, dirty = git_state()
    return {
        "run_uid": uuid.uuid4().hex,
        "kind": kind,
        "family": family,
        "study": study,
        "parent_uid": parent_uid,
        "created": time.time(),
        "user": user_name(),
        "git_commit": commit,
        "git_dirty": dirty,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **versions()},
    }


def user_name() -> str:
    """Who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in passwd
        return "unknown"


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's numbers."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> tuple[str | None, bool | None]:
    """Commit of this package's checkout and whether it has changes; (None, None) when installed without one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        outputs = [subprocess.run(c, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout for c in commands]
    except (OSError, subprocess.SubprocessError):
        return None, None
    return outputs[0].strip(), bool(outputs[1].strip())
