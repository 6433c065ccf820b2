"""One sample: its bytes from the shard, checked, decoded, transformed and put into a row of a batch.

In: sample ids and epochs. Out: rows of preallocated arrays. Local shards are memory maps, of which a bounded number is
kept; remote ones are read by range, one request an image. Every read is compared with the hash in the index, which costs
microseconds and finds the flipped bits that image decoders let pass. Crop, flip and noise depend on (seed, epoch, sample).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.images import (
    DEFAULT_MAX_PIXELS,
    Augmentation,
    ImageError,
    center_crop,
    decode,
    mask_noise,
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


Ids = NDArray[np.int64]


class Buffers(NamedTuple):
    """Rows of a batch that threads fill."""

    images_BCHW: NDArray[np.uint8]
    labels_B: Ids
    noise_BN: NDArray[np.float32] | None
    sample_ids_B: Ids


class _LocalShard:
    """A shard on local disk, mapped into memory; the map lives until the last slice of it is gone."""

    def __init__(self, uri: str) -> None:
        self._data = read_shard(uri)
        self.size = len(self._data)

    def read(self, offset: int, size: int) -> Buffer:
        return self._data[offset : offset + size]


class _RemoteShard:
    """A shard in an object store, read by range; closed when the last reference is gone."""

    def __init__(self, uri: str) -> None:
        self._file = storage.open_input(uri)
        self.size = int(self._file.size())

    def read(self, offset: int, size: int) -> Buffer:
        return bytes(self._file.read_at(size, offset))


def _find_hash() -> Callable[[Buffer], int] | None:
    """The hash of the index; without its package images are read unchecked, with a warning."""
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError:
        logger.warning("xxhash is not installed: images are read without comparing them with the index")
        return None
    return xxh3_64_intdigest


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
        self._hash = _find_hash()

    def allocate(self, num_rows: int) -> Buffers:
        """Empty rows."""
        side, noise_size = self.transform.image_size, self.transform.noise_size
        return Buffers(
            np.empty((num_rows, 3, side, side), dtype=np.uint8),
            np.empty(num_rows, dtype=np.int64),
            np.empty((num_rows, noise_size), dtype=np.float32) if noise_size else None,
            np.empty(num_rows, dtype=np.int64),
        )

    def close(self) -> None:
        """Let go of the open shards."""
        with self._lock:
            self._open.clear()

    def _shard(self, number: int) -> _LocalShard | _RemoteShard:
        """An open shard, of the size that the index states."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        uri = storage.join(self.index.url, self.index.shard_names[number])
        try:
            shard = _LocalShard(uri) if storage.is_local(uri) else _RemoteShard(uri)
        except FileNotFoundError:
            raise ConfigError(f"shard {uri} is in the index but not there; copy it back or index the folder again") from None
        expected = int(self._shard_bytes[number])
        if shard.size != expected:
            raise ConfigError(
                f"shard {uri} has {shard.size} bytes, its index says {expected}; copy it or index the folder again"
            )
        with self._lock:
            shard = self._open.setdefault(number, shard)
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def read(self, sample_id: int) -> Buffer:
        """The encoded image of a sample.

        Raises:
            ImageError: When its bytes are not those that were indexed.
            ConfigError: When its shard is missing or of another size.
        """
        shard = self._shard(int(self._shard_of[sample_id]))
        data = shard.read(int(self._offsets[sample_id]), int(self._sizes[sample_id]))
        if self._hash is not None and self._hash(data) != int(self._hashes[sample_id]):
            raise ImageError("its bytes do not have the hash in the index (damaged since it was indexed)")
        return data

    def mask(self, sample_id: int) -> torch.Tensor:
        """The stored object mask of a sample, resized and cut centrally, (S, S) bool.

        Raises:
            ConfigError: When the sample has no mask or it cannot be read.
        """
        row = self.index.samples.slice(sample_id, 1).to_pylist()[0]
        if row["mask_offset"] is None:
            raise ConfigError(
                f"{self.index.locate(sample_id)} has no mask (member mask.png); masks are stored by the source shapes:N"
            )
        data = self._shard(int(self._shard_of[sample_id])).read(row["mask_offset"], row["mask_size"])
        try:
            decoded = decode(data, max_pixels=self.transform.max_pixels)
        except ImageError as error:
            raise ConfigError(f"the mask of {self.index.locate(sample_id)}: {error}") from error
        return center_crop(decoded, self.transform.image_size)[0] >= 128

    def image(self, sample_id: int, *, epoch: int, drawn_as: int) -> torch.Tensor:
        """The transformed image of a sample, (3, S, S) uint8, with the random numbers of the sample `drawn_as`."""
        decoded = decode(self.read(sample_id), max_pixels=self.transform.max_pixels)
        return self.transform.apply(decoded, epoch=epoch, sample_id=drawn_as)

    def _image_or_neighbour(self, sample_id: int, *, epoch: int) -> tuple[torch.Tensor, int]:
        """An image and the id of the sample it is: the one asked for, or the next in the index that can be read."""
        num_samples = self.index.num_samples
        for step in range(min(_MAX_NEIGHBOURS, num_samples) if self.replace else 1):
            candidate = (sample_id + step) % num_samples
            try:
                return self.image(candidate, epoch=epoch, drawn_as=sample_id), candidate
            except ImageError as error:
                message = f"{self.index.locate(candidate)}: {error}"
                if not self.replace:
                    raise ConfigError(f"{message}; repair the data or set data.on_error=replace") from error
                logger.warning("%s; replaced by its neighbour", message)
        raise ConfigError(f"{self.index.locate(sample_id)} and the {_MAX_NEIGHBOURS - 1} samples after it cannot be read")

    def fill(self, buffers: Buffers, rows: slice, ids_B: Ids, epochs_B: Ids) -> int:
        """Fill some rows of a batch with the samples planned for them; return how many are neighbours instead."""
        replaced, seed = 0, self.transform.seed
        for row in range(rows.start, rows.stop):
            sample_id, epoch = int(ids_B[row]), int(epochs_B[row])
            image, found = self._image_or_neighbour(sample_id, epoch=epoch)
            buffers.images_BCHW[row] = image.numpy()
            buffers.labels_B[row], buffers.sample_ids_B[row] = self._labels[found], found
            if buffers.noise_BN is not None:
                noise_size = self.transform.noise_size
                buffers.noise_BN[row] = mask_noise(noise_size, seed=seed, epoch=epoch, sample_id=sample_id)
            replaced += found != sample_id
        return replaced
