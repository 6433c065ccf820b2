"""Checkpoints written at once, without a run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from crate_ray import storage
from crate_ray.config import ModelConfig
from crate_ray.models.weight_files import config_metadata
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import (
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    Checkpoint,
    checkpoint_uri,
    write_file,
    write_manifest,
)
from crate_ray.training.tensor_files import HostCopy, file_pieces


def save_checkpoint(
    folder: RunFolder,
    *,
    step: int,
    cursor: int,
    train_seconds: float,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    others: Mapping[str, Mapping[str, Tensor]] | None = None,
    config: ModelConfig | None = None,
    state: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """As a saver's thread writes it; `others` are further files of weights."""
    uri = checkpoint_uri(folder, step)
    storage.delete(storage.join(uri, MANIFEST))
    copies = HostCopy().take({MODEL_FILE: model, **(others or {}), OPTIMIZER_FILE: optimizer})
    metadata = config_metadata(config) if config else {}
    files = {
        name: write_file(uri, name, file_pieces(tensors, {} if name == OPTIMIZER_FILE else metadata))
        for name, tensors in copies.items()
    }
    whole = {"cursor": cursor, "train_seconds": train_seconds, **(state or {})}
    return write_manifest(folder, step, files=files, state=whole, configuration={})
