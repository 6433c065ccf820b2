"""One sample: its bytes from the shard, checked, decoded, transformed and put into a row of a batch.

In: sample ids and epochs. Out: rows of preallocated arrays. Local shards are memory maps, of which a bounded number is
kept; remote ones are read by range, one request an image. Every read is compared with the hash in the index, which costs
microseconds and finds the flipped bits that image decoders let pass. Crop, flip and noise depend on (seed, epoch, sample).
"""

import logging
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
import torch

from crate_ray import storage
from crate_ray.data.images import (
    DEFAULT_MAX_PIXELS,
    Augmentation,
    center_crop,
    random_resized_crop,
)
from crate_ray.data.index import ShardIndex, read_shard
from crate_ray.data.shards import Buffer
from crate_ray.data.streams import Purpose, stream

logger = logging.getLogger(__name__)

_OPEN_SHARDS = 256
_MAX_NEIGHBOURS = 16


@dataclass(frozen=True)
class Transform:
    """What is done to an image: see `open_reader` for the fields."""

    image_size: int
    augment: Augmentation = "none"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    noise_size: int = 0
    seed: int = 0
    max_pixels: int = DEFAULT_MAX_PIXELS

    def apply(self, image_CHW: torch.Tensor, *, epoch: int, sample_id: int) -> torch.Tensor:
        """The image as the model takes it, (3, S, S) uint8."""
        if self.augment == "none":
            return center_crop(image_CHW, self.image_size)
        generator = stream(Purpose.CROP, seed=self.seed, epoch=epoch, item=sample_id)
        return random_resized_crop(image_CHW, self.image_size, scale=self.crop_scale, flip=self.flip, generator=generator)


class Buffers(NamedTuple):
    """Rows of a batch that threads fill."""

    images_BCHW: np.ndarray
    labels_B: np.ndarray
    noise_BN: np.ndarray | None
    sample_ids_B: np.ndarray


class _OpenShard(Protocol):
    def read(self, offset: int, size: int) -> Buffer: ...

    def close(self) -> None: ...


class _LocalShard:
    """A shard on local disk, mapped into memory."""

    def __init__(self, uri: str) -> None:
        self._data = read_shard(uri)
        self.size = len(self._data)

    def read(self, offset: int, size: int) -> Buffer:
        return self._data[offset : offset + size]

    def close(self) -> None:
        """Nothing: the map lives until the last slice of it is gone."""


class _RemoteShard:
    """A shard in an object store, read by range."""

    def __init__(self, uri: str) -> None:
        self._file = storage.open_input(uri)
        self.size = int(self._file.size())

    def read(self, offset: int, size: int) -> Buffer:
        return bytes(self._file.read_at(size, offset))

    def close(self) -> None:
        self._file.close()


class SampleLoader:
    """Reads samples of an index; safe to use from several threads.

    Args:
        index: The shards.
        transform: What is done to an image.
        replace: Put the next readable sample of the index in the place of an unreadable one, instead of raising.
    """

    def __init__(self, index: ShardIndex, transform: Transform, *, replace: bool) -> None:
        self.index, self.transform, self.replace = index, transform, replace
        self._offsets, self._sizes = index.column("offset"), index.column("size")
        self._hashes, self._labels, self._shard_of = index.column("xxh3"), index.labels, index.shard_of
        self._shard_bytes = index.shards["bytes"].to_numpy()
        self._open: OrderedDict[int, _LocalShard | _RemoteShard] = OrderedDict()
        self._lock = Lock()
        try:
            from xxhash import xxh3_64_intdigest

            self._hash = xxh3_64_intdigest
        except ImportError:
            self._hash = None
            logger.warning("xxhash is not installed: images are read without comparing them with the index")

    def allocate(self, num_rows: int) -> Buffers:
        """Empty rows."""
        side, noise_size = self.transform.image_size, self.transform.noise_size
        return Buffers(
            np.empty((num_rows, 3, side, side), dtype=np.uint8),
            np.empty(num_rows, dtype=np.int64),
            np.empty((num_rows, noise_size), dtype=np.float32) if noise_size else None,
            np.empty(num_rows, dtype=np.int64),
        )
