"""The format of checkpoints: whole or not there, and never unpickled. docs/checkpoints.md says what is guaranteed.

In: files of tensors, and the state that a run goes on from. Out: checkpoints/step_NNNNNNNN/ with the files and, written last,
manifest.json with the size and SHA-256 of each. A folder without a manifest, with one that is torn, or with a file of another
size, is not a checkpoint. The manifests are the only truth: nothing else points at a checkpoint. When they are written, and by
whom, is `saving`.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig, resume_parts
from crate_ray.runs import RunFolder
from crate_ray.training.sharded import files_of, read_whole

log = logging.getLogger(__name__)

FORMAT = 2
"""Of manifests written here. 1 had step, cursor, train_seconds and files, and is still read."""
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
MANIFEST = "manifest.json"
LARGER_IS_BETTER = {"eval/loss": False, "eval/top1": True, "eval/knn_top1": True}
"""What the best checkpoints may be chosen by."""

_PIN = "pinned-"
_UNSET = "unset"
_MAY_CHANGE = {"model.mask_ratio", "model.ista_step_size", "model.ista_lambda"}  # a clone in a population changes these
_MUST_AGREE = ("task", "model.", "data.", "optimizer.name", "train.global_batch", "train.seed")

FileEntry = Mapping[str, int | str]
"""`bytes` and `sha256` of a file."""


@dataclass(frozen=True)
class Checkpoint:
    """A saved state: where it is and what the loop must know to go on.

    Attributes:
        uri: Its folder.
        step: Optimizer steps done.
        state: What the loop goes on from, as JSON: `cursor`, `train_seconds`, `evaluation`, `records`, and what others add.
        files: Size and checksum by name.
        configuration: What the run's numbers follow from, flat; empty in a checkpoint of format 1.
    """

    uri: str
    step: int
    state: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    configuration: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cursor(self) -> int:
        """Where the reader goes on."""
        return int(self.state["cursor"])

    @property
    def train_seconds(self) -> float:
        """Time trained so far."""
        return float(self.state["train_seconds"])

    def holds(self, name: str) -> bool:
        """Whether a file is there, or shards of it."""
        return bool(files_of(self, name))

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one file, or of its shards joined; verified.

        Raises:
            ConfigError: The bytes are not those that were written, or there is no such file.
        """
        return load(self.read_bytes(name)) if name in self.files else read_whole(self, name)

    def read_bytes(self, name: str) -> bytes:
        """One file, verified.

        Raises:
            ConfigError: The bytes are not those that were written.
        """
        data = storage.read_bytes(storage.join(self.uri, name))
        if hashlib.sha256(data).hexdigest() != self.files[name]["sha256"]:
            raise ConfigError(
                f"checkpoint file {storage.join(self.uri, name)} is damaged (checksum differs); delete its folder"
            )
        return data


def checkpoint_uri(folder: RunFolder, step: int) -> str:
    """Where the checkpoint of a step lies, or would."""
    return folder.path("checkpoints", f"step_{step:08d}")


def write_file(uri: str, name: str, pieces: Sequence[memoryview]) -> FileEntry:
    """Writes one file of a checkpoint; returns what its manifest says of it.

    Raises:
        OSError: The store refuses.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    storage.write_atomic(storage.join(uri, name), pieces)
    return {"bytes": sum(map(len, pieces)), "sha256": digest.hexdigest()}


def write_manifest(
    folder: RunFolder,
    step: int,
    *,
    files: Mapping[str, FileEntry],
    state: Mapping[str, Any],
    configuration: Mapping[str, Any],
    attempt: int = 1,
) -> Checkpoint:
    """Makes a checkpoint of files that are written already; from now on it exists.

    Args:
        folder: The run's.
        step: Optimizer steps done.
        files: All of the checkpoint's, from `write_file`.
        state: See Checkpoint.
        configuration: See Checkpoint.
        attempt: Start of the run that wrote it.

    Raises:
        OSError: The store refuses.
    """
    head = {"schema_version": FORMAT, "step": step, "attempt": attempt, "time": time.time()}
    body = {**head, "state": dict(state), "configuration": dict(configuration), "files": dict(files)}
    uri = checkpoint_uri(folder, step)
    storage.write_atomic(storage.join(uri, MANIFEST), json.dumps(body, indent=1) + "\n")
    return Checkpoint(uri, step, state, files, configuration)


def saved_configuration(config: RunConfig) -> dict[str, Any]:
    """What a manifest says of the configuration; of the data their order, as their content is the run folder's to check."""
    return {key: value for key, value in resume_parts(config, "").items() if key != "data.digest"}


def check_same_run(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Refuses a checkpoint whose tensors or cursor mean something else under this configuration.

    Length, schedule and rates may differ: a longer run goes on from the checkpoint of a shorter one.

    Raises:
        ConfigError: Lists the keys that differ, with both values.
    """
    there, here = checkpoint.configuration, saved_configuration(config)
    if not there:
        return
    keys = sorted(key for key in {*there, *here} - _MAY_CHANGE if key.startswith(_MUST_AGREE))
    lines = {key: f"{key}: {there.get(key, _UNSET)} there, {here.get(key, _UNSET)} here" for key in keys}
    differing = [line for key, line in lines.items() if there.get(key) != here.get(key)]
    if differing:
        raise ConfigError(
            f"checkpoint {checkpoint.uri} was made by another configuration; these keys differ:\n  "
            + "\n  ".join(differing)
            + "\nSet them back, or start another run from its weights: --set train.init_from=RUN_FOLDER"
        )


def list_checkpoints(folder: RunFolder) -> list[Checkpoint]:
    """Whole checkpoints, oldest first.

    Raises:
        ConfigError: A checkpoint of a newer format than this program reads.
    """
    found = (_read_checkpoint(folder.path("checkpoints", name)) for name in _step_folders(folder))
    return sorted((checkpoint for checkpoint in found if checkpoint is not None), key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """The newest whole checkpoint, or None."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def _step_folders(folder: RunFolder) -> list[str]:
    return [name for name in storage.list_dir(folder.path("checkpoints")) if name.startswith("step_")]


def _read_checkpoint(uri: str) -> Checkpoint | None:
    """What a folder's manifest says, or None where the folder is no whole checkpoint."""
    try:
        manifest = json.loads(storage.read_text(storage.join(uri, MANIFEST)))
        if manifest["schema_version"] > FORMAT:
            raise ConfigError(
                f"{uri} has format {manifest['schema_version']}, this program reads up to {FORMAT}; install a newer crate-ray"
            )
        checkpoint = _parse(uri, manifest)
    except FileNotFoundError:
        return None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s/%s is damaged (%s); this checkpoint is passed over", uri, MANIFEST, error)
        return None
    return checkpoint if _is_whole(checkpoint) else None


def _parse(uri: str, manifest: Mapping[str, Any]) -> Checkpoint:
    """A manifest of format 1 had no state of its own, and no configuration."""
    state = manifest["state"] if "cursor" not in manifest else {key: manifest[key] for key in ("cursor", "train_seconds")}
    files: dict[str, FileEntry] = {
        name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in manifest["files"].items()
    }
    return Checkpoint(uri, int(manifest["step"]), dict(state), files, dict(manifest.get("configuration", {})))


def _is_whole(checkpoint: Checkpoint) -> bool:
    for name, expected in checkpoint.files.items():
        try:
            actual = storage.size(storage.join(checkpoint.uri, name))
        except FileNotFoundError:
            actual = -1
        if actual != expected["bytes"]:
            log.warning(
                "%s/%s has %d bytes instead of %d; this checkpoint is passed over",
                *(checkpoint.uri, name, actual, expected["bytes"]),
            )
            return False
    return True


def prune_checkpoints(
    folder: RunFolder,
    *,
    keep_last: int,
    keep_best: int = 0,
    best_metric: str = "eval/loss",
    writing: int | None = None,
) -> None:
    """Deletes all but the newest, the best and the pinned ones, and what writers that died have left behind.

    Args:
        folder: The run's; nobody may be writing a checkpoint into it, but that of `writing`.
        keep_last: The newest ones to keep.
        keep_best: Those with the best `best_metric` to keep besides; of equals the earlier ones.
        best_metric: A key of LARGER_IS_BETTER; checkpoints without a finite value of it are not among the best.
        writing: Step whose folder is left as it is.
    """
    checkpoints = list_checkpoints(folder)
    kept = checkpoints[-keep_last:] + best_checkpoints(checkpoints, best_metric)[:keep_best]
    untouched = None if writing is None else checkpoint_uri(folder, writing)
    for uri in {folder.path("checkpoints", name) for name in _step_folders(folder)} - {untouched}:
        its_files = next((checkpoint.files for checkpoint in kept if checkpoint.uri == uri), None)
        if its_files is None:
            its_files = _pinned_files(uri, checkpoints)
        if its_files is None:
            _delete(uri)
        else:
            _delete_strangers(uri, its_files)


def _pinned_files(uri: str, checkpoints: Sequence[Checkpoint]) -> Mapping[str, FileEntry] | None:
    """The files to keep because of a pin: those of the checkpoint, none of a partial one; None where there is no pin."""
    if not any(name.startswith(_PIN) for name in storage.list_dir(uri)):
        return None
    return next((checkpoint.files for checkpoint in checkpoints if checkpoint.uri == uri), {})


def _delete_strangers(uri: str, files: Mapping[str, FileEntry]) -> None:
    """Deletes what an earlier writer of the same step has left in a checkpoint's folder."""
    for name in storage.list_dir(uri):
        if name not in files and not name.startswith(_PIN) and not (files and name == MANIFEST):
            storage.delete(storage.join(uri, name))


def best_checkpoints(checkpoints: Sequence[Checkpoint], metric: str) -> list[Checkpoint]:
    """Those with a finite value of a metric, the best first, of equals the earlier one."""
    sign = -1 if LARGER_IS_BETTER[metric] else 1
    values = ((checkpoint.state.get("evaluation", {}).get(metric), checkpoint) for checkpoint in checkpoints)
    found = [(sign * value, checkpoint) for value, checkpoint in values if value is not None and math.isfinite(value)]
    return [checkpoint for _, checkpoint in sorted(found, key=lambda pair: (pair[0], pair[1].step))]


def delete_checkpoint(checkpoint: Checkpoint) -> None:
    """Deletes one, pins and all."""
    _delete(checkpoint.uri)


def _delete(uri: str) -> None:
    """The manifest goes first, so that a half-deleted checkpoint is none."""
    storage.delete(storage.join(uri, MANIFEST))
    storage.delete(uri)


def pin_checkpoint(folder: RunFolder, step: int, *, by: str) -> None:
    """Keeps the checkpoint of a step from being pruned until it is unpinned; it may be pinned before it is written.

    Args:
        folder: The run's.
        step: Of the checkpoint.
        by: Who needs it; one checkpoint may be pinned by several.
    """
    storage.write_atomic(storage.join(checkpoint_uri(folder, step), _PIN + by), "")


def unpin_checkpoint(folder: RunFolder, step: int, *, by: str) -> None:
    """Takes a pin away, where there is one."""
    storage.delete(storage.join(checkpoint_uri(folder, step), _PIN + by))


def copy_checkpoint(checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Puts the same checkpoint, bit by bit, into another run; it is there once its manifest is."""
    target = checkpoint_uri(folder, checkpoint.step)
    for name in (*checkpoint.files, MANIFEST):
        storage.write_atomic(storage.join(target, name), storage.read_bytes(storage.join(checkpoint.uri, name)))
