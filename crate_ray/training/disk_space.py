"""Whether checkpoints fit where they are to be written: before a run starts, before each of them, and after a fault.

In: a configuration and its folder. Out: an error that says what is needed, what is free, and which keys help. The size of a
checkpoint is known before there is one, from the number of parameters; only a local disk says how much room it has.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from crate_ray import storage
from crate_ray.config import ConfigError, RunConfig
from crate_ray.models.cost import count_parameters
from crate_ray.models.memory import training_state_bytes
from crate_ray.runs import RunFolder
from crate_ray.storage import bytes_in_words
from crate_ray.training.checkpoint import list_checkpoints

log = logging.getLogger(__name__)

_FLOAT32 = 4
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def checkpoint_bytes(config: RunConfig) -> int:
    """What one checkpoint of a run takes, but for headers: weights and their average with position tables, optimizer state."""
    parameters, keeps_average = count_parameters(config.model), config.train.ema is not None
    weights_and_gradients = 2 * _FLOAT32 * parameters.trainable
    moments = training_state_bytes(config.model, optimizer=config.optimizer.name) - weights_and_gradients
    return moments + _FLOAT32 * parameters.total * (2 if keeps_average else 1)


def held_bytes(folder: RunFolder) -> int:
    """What the checkpoints of a run take now; new ones take their place."""
    return sum(int(entry["bytes"]) for checkpoint in list_checkpoints(folder) for entry in checkpoint.files.values())


def check_disk_space(config: RunConfig, folder: RunFolder) -> None:
    """Refuses a local disk that cannot hold two checkpoints; warns where it cannot hold all that are to be kept, and one more.

    Args:
        config: The run's.
        folder: Where it has or will have its checkpoints; those that are there count as room, as new ones take their place.

    Raises:
        ConfigError: With the figures.
    """
    free = storage.free_bytes(folder.uri)
    if free is None:
        return
    size = checkpoint_bytes(config)
    held = held_bytes(folder)
    kept = config.checkpoint.keep_last + (config.checkpoint.keep_best or 0)
    fits = (free + held) // size
    figures = f"a checkpoint takes about {bytes_in_words(size)} and {bytes_in_words(free + held)} are there for them"
    if fits < 2:
        raise ConfigError(
            f"storage.path = '{config.storage.path}' is too full for this run: {figures}, but the one before is kept until "
            f"the next is whole; free {bytes_in_words(2 * size - free - held)} more, or set storage.path to a larger disk"
        )
    if fits < kept + 1:
        log.warning(
            "storage.path = '%s': %s, but %d are to be kept and one more while it is written; "
            "free %s more, or lower checkpoint.keep_last or checkpoint.keep_best",
            *(config.storage.path, figures, kept, bytes_in_words((kept + 1) * size - free - held)),
        )


@contextmanager
def explained(config: RunConfig, folder: RunFolder, *, needed: int) -> Iterator[None]:
    """Writes of a checkpoint, which do not begin where there is no room for them; a fault says what to free.

    Args:
        config: The run's.
        folder: The run's.
        needed: Bytes that are to be written; 0 for what is too small to matter.

    Raises:
        OSError: One message: the fault, bytes needed and free, and the keys that help.
    """
    free = storage.free_bytes(folder.uri)
    try:
        if free is not None and free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield
    except OSError as error:
        room = "" if free is None else f" and {bytes_in_words(free)} were free"
        need = f"; {bytes_in_words(needed)} were to be written to {folder.uri}{room}" if needed else ""
        keep = config.checkpoint
        best = "" if keep.keep_best is None else f" or checkpoint.keep_best ({keep.keep_best})"
        fix = "Look after the store, or move the runs to another storage.path"
        if error.errno in _NO_ROOM:
            fix = (
                f"Delete what is not needed there, lower checkpoint.keep_last ({keep.keep_last}){best}, or move the runs to "
                "another storage.path"
            )
        raise OSError(f"{error}{need}. {fix}") from error
