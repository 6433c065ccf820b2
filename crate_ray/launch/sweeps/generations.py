"""Where a trial stands on disk: its own run folder, or the newest copy that it made of another trial.

In: a trial's folder and the pointer that Tune hands from one trial to another. Out: the run folder to go on in. A clone is an
ordinary run folder `gen_NN` below the trial's, with the donor's whole checkpoint as its first: weights, optimizer, step and
place in the data. Copying costs the size of a checkpoint once; in return no trial depends on a folder of another one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from crate_ray import storage
from crate_ray.runs import RunFolder
from crate_ray.training.checkpoint import (
    Checkpoint,
    copy_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    pin_checkpoint,
    unpin_checkpoint,
)

_POINTER = "pointer.json"
_PIN = "clone"
_PINNED = 2  # the newest ones that were pointed at; one that is copied later gives way to the donor's newest


@dataclass(frozen=True)
class Pointer:
    """What Tune keeps of a trial's state.

    Attributes:
        trial: URI of the trial's folder.
        run: URI of the run folder with the checkpoint: the trial's, or that of one of its clones.
        step: Of the checkpoint.
    """

    trial: str
    run: str
    step: int

    def write(self, folder: str) -> None:
        """As a file in Tune's checkpoint folder."""
        (Path(folder) / _POINTER).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: str) -> Self:
        """The inverse of `write`."""
        return cls(**json.loads((Path(folder) / _POINTER).read_text()))


@dataclass(frozen=True)
class Generation:
    """A run folder of a trial, and the keys that differ from the trial's own configuration."""

    folder: RunFolder
    set: Mapping[str, Any]


def point_to(trial: RunFolder, run: RunFolder, *, step: int) -> Pointer:
    """Points at the newest checkpoint of a trial and pins it, so that another trial may copy it some time later.

    Args:
        trial: The trial's folder.
        run: Where it trains.
        step: What it has reported.
    """
    checkpoints = list_checkpoints(run)
    for checkpoint in checkpoints[-1:]:
        pin_checkpoint(run, checkpoint.step, by=_PIN)
    for checkpoint in checkpoints[:-_PINNED]:
        unpin_checkpoint(run, checkpoint.step, by=_PIN)
    return Pointer(trial.uri, run.uri, checkpoints[-1].step if checkpoints else step)


def runs_of(trial: RunFolder) -> list[RunFolder]:
    """Every run folder of a trial: its own, its clones and its rungs."""
    below = [name for name in storage.list_dir(trial.uri) if name.startswith(("gen_", "rung_"))]
    return [trial, *(RunFolder(trial.path(name)) for name in below)]


def newest_generation(trial: RunFolder) -> Generation:
    """The trial's newest whole clone, or the trial itself."""
    for name in reversed(_clones(trial)):
        folder = RunFolder(trial.path(name))
        body = folder.read_json("generation.json")
        if body is not None:
            return Generation(folder, body["set"])
    return Generation(trial, {})


def clone(trial: RunFolder, pointer: Pointer, changes: Mapping[str, Any]) -> Generation:
    """A new generation of a trial that goes on from another trial's checkpoint; the same again where it was begun already.

    Args:
        trial: The folder of the trial that copies.
        pointer: Of the donor.
        changes: Keys over the trial's own configuration.

    Raises:
        FileNotFoundError: The donor has no checkpoint.
    """
    origin = {"donor": pointer.run, "step": pointer.step, "set": dict(changes)}
    newest = newest_generation(trial)
    body = newest.folder.read_json("generation.json")
    if body is not None and {key: body[key] for key in origin} == origin:
        return newest
    folder = RunFolder(trial.path(f"gen_{len(_clones(trial)) + 1:02d}"))
    storage.delete(folder.uri)
    copy_checkpoint(_donated(pointer), folder)
    folder.write_json("generation.json", origin)  # last: a clone without it was never whole
    return Generation(folder, changes)


def _donated(pointer: Pointer) -> Checkpoint:
    run = RunFolder(pointer.run)
    exact = [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.step == pointer.step]
    found = exact[0] if exact else latest_checkpoint(run)
    if found is None:
        raise FileNotFoundError(f"no checkpoint to copy in {pointer.run}")
    return found


def _clones(trial: RunFolder) -> list[str]:
    return sorted(name for name in storage.list_dir(trial.uri) if name.startswith("gen_"))
