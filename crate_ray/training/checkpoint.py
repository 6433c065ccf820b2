"""Checkpoints: whole or not there, and never unpickled.

In: model, optimizer, step, cursor. Out: checkpoints/step_NNNNNNNN/ with model.safetensors,
optimizer.safetensors and, written last, manifest.json with the size and SHA-256 of each file. A folder
without a manifest, or with a file of another size, is not a checkpoint. The manifests are the only
truth: nothing else points at a checkpoint.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load

from crate_ray import storage
from crate_ray.config import SCHEMA_VERSION, ConfigError, ModelConfig
from crate_ray.models.weight_files import encode_safetensors
from crate_ray.runs import RunFolder
from crate_ray.training.sharded import read_whole

log = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_PIN = "pinned-"


@dataclass(frozen=True)
class Checkpoint:
    """A saved state: where it is and what the loop must know to go on."""

    uri: str
    step: int
    cursor: int
    train_seconds: float
    files: Mapping[str, Mapping[str, int | str]]
    state: Mapping[str, Any] = field(default_factory=dict)

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


def save_checkpoint(
    folder: RunFolder,
    *,
    step: int,
    cursor: int,
    train_seconds: float,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    config: ModelConfig | None = None,
    state: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Writes a checkpoint; it exists once its manifest does.

    Args:
        folder: The run's.
        step: Optimizer steps done.
        cursor: Where the reader goes on.
        train_seconds: Time trained so far.
        model: Its state dict.
        optimizer: Its state, flat.
        config: The model's, which then stands in the model file: heads, lambda and eta are not in a state dict.
        state: What else a run goes on from, as JSON can hold it.

    Raises:
        OSError: The store refuses; what was there before is untouched.
    """
    uri = folder.path("checkpoints", f"step_{step:08d}")
    storage.delete(storage.join(uri, "manifest.json"))  # one left by a damaged checkpoint of this step must not vouch for this
    files: dict[str, dict[str, int | str]] = {}
    for name, tensors, its_config in ((MODEL_FILE, model, config), (OPTIMIZER_FILE, optimizer, None)):
        data = encode_safetensors(tensors, its_config)
        storage.write_atomic(storage.join(uri, name), data)
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    body = {"step": step, "cursor": cursor, "train_seconds": train_seconds, "files": files, "state": dict(state or {})}
    folder.write_json(f"checkpoints/step_{step:08d}/manifest.json", body)
    return Checkpoint(uri, step, cursor, train_seconds, files, state or {})


def list_checkpoints(folder: RunFolder) -> list[Checkpoint]:
    """Whole checkpoints, oldest first.

    Raises:
        ConfigError: A checkpoint of a newer format than this program reads.
    """
    found = []
    for name in storage.list_dir(folder.path("checkpoints")):
        manifest = folder.read_json(f"checkpoints/{name}/manifest.json") if name.startswith("step_") else None
        if manifest is None:
            continue
        if manifest["schema_version"] > SCHEMA_VERSION:
            raise ConfigError(
                f"{folder.path('checkpoints', name)} has format {manifest['schema_version']}, this program reads up to "
                f"{SCHEMA_VERSION}; install a newer crate-ray"
            )
        uri = folder.path("checkpoints", name)
        if _is_whole(uri, manifest):
            values = (manifest["step"], manifest["cursor"], manifest["train_seconds"], manifest["files"])
            found.append(Checkpoint(uri, *values, state=manifest.get("state", {})))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def latest_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """The newest whole checkpoint, or None."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def prune_checkpoints(folder: RunFolder, *, keep_last: int) -> None:
    """Deletes all but the newest and the pinned ones."""
    for checkpoint in list_checkpoints(folder)[:-keep_last]:
        if any(name.startswith(_PIN) for name in storage.list_dir(checkpoint.uri)):
            continue
        delete_checkpoint(checkpoint)


def delete_checkpoint(checkpoint: Checkpoint) -> None:
    """Deletes one, pins and all; the manifest goes first, so that a half-deleted one is none."""
    storage.delete(storage.join(checkpoint.uri, "manifest.json"))
    storage.delete(checkpoint.uri)


def pin_checkpoint(folder: RunFolder, step: int, *, by: str) -> None:
    """Keeps the checkpoint of a step from being pruned until it is unpinned; it may be pinned before it is written.

    Args:
        folder: The run's.
        step: Of the checkpoint.
        by: Who needs it; one checkpoint may be pinned by several.
    """
    storage.write_atomic(folder.path("checkpoints", f"step_{step:08d}", _PIN + by), "")


def unpin_checkpoint(folder: RunFolder, step: int, *, by: str) -> None:
    """Takes a pin away, where there is one."""
    storage.delete(folder.path("checkpoints", f"step_{step:08d}", _PIN + by))


def copy_checkpoint(checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Puts the same checkpoint, bit by bit, into another run; it is there once its manifest is."""
    target = folder.path("checkpoints", f"step_{checkpoint.step:08d}")
    for name in (*checkpoint.files, "manifest.json"):
        storage.write_atomic(storage.join(target, name), storage.read_bytes(storage.join(checkpoint.uri, name)))


def _is_whole(uri: str, manifest: Mapping[str, Any]) -> bool:
    for name, expected in manifest["files"].items():
        try:
            actual = storage.size(storage.join(uri, name))
        except FileNotFoundError:
            actual = -1
        if actual != expected["bytes"]:
            log.warning(
                "%s/%s has %d bytes instead of %d; this checkpoint is passed over", uri, name, actual, expected["bytes"]
            )
            return False
    return True
