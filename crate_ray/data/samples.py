"""One sample: its bytes from the shard, checked, decoded, transformed and put into a row of a batch.

In: sample ids and epochs. Out: rows of preallocated arrays. Local shards are memory maps, of which a bounded number is
kept; remote ones are mapped from the cache, or read by range, one request an image. Every read is compared with the hash in
the index, which costs microseconds and finds the flipped bits that image decoders let pass. Crop, flip and noise depend on
(seed, epoch, sample). A sample that is damaged may be replaced; a store that fails is an error that names the sample.
"""

import logging
import resource
import threading
import time
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.cache import CacheClosedError, ShardCache
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
from crate_ray.data.loaders import Prefetcher
from crate_ray.data.shards import Buffer
from crate_ray.data.streams import Purpose, stream

logger = logging.getLogger(__name__)

_MAX_OPEN_SHARDS = 4096
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


class _MappedShard:
    """A shard mapped into memory; the map lives until the last slice of it is gone."""

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self.size = len(data)

    def read(self, offset: int, size: int) -> Buffer:
        return self._data[offset : offset + size]


class _CachedShard(_MappedShard):
    """A remote shard mapped from the cache, whose file may be damaged while the store's is not."""


class _RemoteShard:
    """A shard in a remote store, read by range."""

    def __init__(self, uri: str) -> None:
        self._file = storage.RemoteFile(uri)
        self.size = self._file.size

    def read(self, offset: int, size: int) -> Buffer:
        return self._file.read_at(size, offset)


def _find_hash() -> Callable[[Buffer], int] | None:
    """The hash of the index; without its package images are read unchecked, with a warning."""
    try:
        from xxhash import xxh3_64_intdigest
    except ImportError:
        logger.warning("xxhash is not installed: images are read without comparing them with the index")
        return None
    return xxh3_64_intdigest


def _open_limit() -> int:
    """Shards that may be open: each map holds a descriptor, and most of those are left to the rest of the process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN_SHARDS if soft == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN_SHARDS, soft // 4))


class SampleLoader:
    """Reads samples of an index; safe to use from several threads.

    Args:
        index: The shards.
        transform: What is done to an image.
        replace: Put the next readable sample of its data set in the place of an unreadable one, instead of raising.
        cache: Where remote shards are kept; None reads them by range. Closed with the loader.
        fetch_ahead: Fetch shards into the cache once their samples are announced, on threads of the loader's own.
    """

    def __init__(
        self,
        index: ShardIndex,
        transform: Transform,
        *,
        replace: bool,
        cache: ShardCache | None = None,
        fetch_ahead: bool = True,
    ) -> None:
        self.index, self.transform, self.replace = index, transform, replace
        self._offsets, self._sizes = index.column("offset"), index.column("size")
        self._hashes, self._labels, self._shard_of = index.column("xxh3"), index.labels, index.shard_of
        self._shard_bytes, self._checksums = index.shards["bytes"].to_numpy(), index.shards["checksum"].to_pylist()
        self._open: OrderedDict[int, _MappedShard | _RemoteShard] = OrderedDict()
        self._open_limit = _open_limit()
        self._lock = threading.Lock()
        self._hash = _find_hash()
        self._busy: dict[str, tuple[int, float]] = {}
        self._cache = cache
        self._prefetcher = Prefetcher(self._prefetch) if cache and fetch_ahead else None
        self._needed: Counter[int] = Counter()
        self._warned = False

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
        if self._cache is not None:
            self._cache.close()
        if self._prefetcher is not None:
            self._prefetcher.close()
        with self._lock:
            self._open.clear()

    @property
    def fetches_ahead(self) -> bool:
        """Whether it pays to say early which samples will be read."""
        return self._prefetcher is not None

    def expect(self, ids_B: Ids) -> None:
        """Announce samples: their shards are fetched in this order, and kept until `done` is called for the same samples."""
        if self._prefetcher is None:
            return
        shards = list(dict.fromkeys(self._shard_of[ids_B].tolist()))
        with self._lock:
            fresh = [shard for shard in shards if not self._needed[shard]]
            self._needed.update(shards)
        self._prefetcher.add(fresh)

    def done(self, ids_B: Ids) -> None:
        """Take back an announcement; shards that no other one names are let go, so that any process may evict them."""
        if self._prefetcher is None:
            return
        with self._lock:
            for shard in set(self._shard_of[ids_B].tolist()):
                self._needed[shard] -= 1
                if self._needed[shard] <= 0:
                    del self._needed[shard]
                    self._open.pop(shard, None)
        self._prefetcher.add([])

    def busy(self) -> list[str]:
        """What each thread is doing, the longest first, for messages."""
        now = time.monotonic()
        doing = sorted((started, name, sample_id) for name, (sample_id, started) in list(self._busy.items()))
        return [f"{name} has been on {self.index.locate(item)} for {now - started:.1f} s" for started, name, item in doing]

    def _prefetch(self, number: int) -> bool:
        """Cache a shard that is still needed; False where it does not fit yet. A fault is left to the read that meets it."""
        with self._lock:
            if number in self._open or not self._needed[number]:
                return True
            self._let_go(self._open_limit - 1, idle_only=True)
            if len(self._open) >= self._open_limit:
                return False
        try:
            shard = self._cached(number)
        except (OSError, ConfigError, CacheClosedError) as error:
            logger.debug("prefetch: %s", error)
            return True
        with self._lock:
            if shard is not None and self._needed[number]:
                self._open.setdefault(number, shard)
        return shard is not None

    def _cached(self, number: int) -> _CachedShard | None:
        """A shard from the cache, for which shards that nobody needs are let go; None where it does not fit."""
        assert self._cache is not None
        uri, size = self.index.shard_uris[number], int(self._shard_bytes[number])
        while (data := self._cache.open(uri, num_bytes=size, checksum=self._checksums[number])) is None:
            with self._lock:
                idle = next((shard for shard in self._open if not self._needed[shard] and shard != number), None)
                if idle is None:
                    return None
                del self._open[idle]
        return _CachedShard(data)

    def _open_shard(self, number: int) -> _MappedShard | _RemoteShard:
        uri = self.index.shard_uris[number]
        if storage.is_local(uri):
            return _MappedShard(read_shard(uri))
        if self._cache is None:
            return _RemoteShard(uri)
        if (shard := self._cached(number)) is not None:
            return shard
        if not self._warned:
            self._warned = True
            logger.warning(
                "data.cache_bytes=%d is too small for the shards that are read at the same time; those that do not fit, %s "
                "first, are read by range",
                self._cache.max_bytes,
                uri,
            )
        return _RemoteShard(uri)

    def _shard(self, number: int) -> _MappedShard | _RemoteShard:
        """An open shard, of the size that the index states."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        shard = self._open_shard(number)
        expected = int(self._shard_bytes[number])
        if shard.size != expected:
            raise ConfigError(
                f"shard {self.index.shard_uris[number]} has {shard.size} bytes, its index says {expected}; copy it or index "
                "the folder again"
            )
        with self._lock:
            shard = self._open.setdefault(number, shard)
            self._let_go(self._open_limit)
        return shard

    def _let_go(self, limit: int, *, idle_only: bool = False) -> None:
        """Drop open shards beyond a limit: those that are not announced first, of these the least recently read."""
        excess = len(self._open) - limit
        if excess > 0:
            idle = [number for number in self._open if not self._needed[number]]
            needed = [] if idle_only else [number for number in self._open if self._needed[number]]
            for number in [*idle, *needed][:excess]:
                del self._open[number]

    @contextmanager
    def _naming(self, sample_id: int) -> Iterator[None]:
        """Makes every fault of the shard of a sample and of its store name the sample."""
        try:
            yield
        except FileNotFoundError:
            raise ConfigError(
                f"{self.index.locate(sample_id)} is in the index but not there; copy the shard back or index the folder again"
            ) from None
        except ConfigError as error:
            raise ConfigError(f"{self.index.locate(sample_id)}: {error}") from error
        except OSError as error:
            raise storage.StorageError(f"{self.index.locate(sample_id)}: {error}") from error

    def read(self, sample_id: int) -> Buffer:
        """The encoded image of a sample.

        Raises:
            ImageError: When its bytes are not those that were indexed.
            ConfigError: When its shard is missing or of another size.
            StorageError: When its store refuses, or fails until the deadline.
        """
        number, offset, size = int(self._shard_of[sample_id]), int(self._offsets[sample_id]), int(self._sizes[sample_id])
        with self._naming(sample_id):
            shard = self._shard(number)
            data = shard.read(offset, size)
            if not self._is_intact(sample_id, data) and isinstance(shard, _CachedShard):
                data = self._read_again(sample_id, number, shard, offset, size)
        if not self._is_intact(sample_id, data):
            raise ImageError("its bytes do not have the hash in the index (damaged since it was indexed)")
        return data

    def _is_intact(self, sample_id: int, data: Buffer) -> bool:
        return self._hash is None or self._hash(data) == int(self._hashes[sample_id])

    def _read_again(self, sample_id: int, number: int, shard: _CachedShard, offset: int, size: int) -> Buffer:
        """The bytes of a sample from the store; where they are right, the cached file is to blame and is given up."""
        assert self._cache is not None
        remote = storage.RemoteFile(self.index.shard_uris[number])
        data = remote.read_at(size, offset)
        if self._is_intact(sample_id, data):
            path = self._cache.discard_damaged(remote, offset=offset, expected=data)
            logger.warning(
                "the cached shard %s is damaged at byte %d and is fetched again: %s", path, offset, self.index.locate(sample_id)
            )
            with self._lock:
                if self._open.get(number) is shard:
                    del self._open[number]
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
        with self._naming(sample_id):
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
        """An image and the id of the sample it is: the one asked for, or the next of its data set that can be read."""
        data_set = bisect_right(self.index.first_ids, sample_id) - 1
        first, stop = [*self.index.first_ids, self.index.num_samples][data_set : data_set + 2]
        tries = min(_MAX_NEIGHBOURS, stop - first) if self.replace else 1
        for step in range(tries):
            candidate = first + (sample_id - first + step) % (stop - first)
            try:
                return self.image(candidate, epoch=epoch, drawn_as=sample_id), candidate
            except ImageError as error:
                message = f"{self.index.locate(candidate)}: {error}"
                if not self.replace:
                    raise ConfigError(f"{message}; repair the data or set data.on_error=replace") from error
                logger.warning("%s; replaced by its neighbour", message)
        raise ConfigError(f"{self.index.locate(sample_id)} and the {tries - 1} samples after it cannot be read")

    def fill(self, buffers: Buffers, rows: slice, ids_B: Ids, epochs_B: Ids) -> int:
        """Fill some rows of a batch with the samples planned for them; return how many are neighbours instead."""
        thread = threading.current_thread().name
        try:
            return sum(self._fill_row(buffers, row, ids_B, epochs_B, thread) for row in range(rows.start, rows.stop))
        finally:
            self._busy.pop(thread, None)

    def _fill_row(self, buffers: Buffers, row: int, ids_B: Ids, epochs_B: Ids, thread: str) -> bool:
        sample_id, epoch = int(ids_B[row]), int(epochs_B[row])
        self._busy[thread] = sample_id, time.monotonic()
        image, found = self._image_or_neighbour(sample_id, epoch=epoch)
        buffers.images_BCHW[row] = image.numpy()
        buffers.labels_B[row], buffers.sample_ids_B[row] = self._labels[found], found
        if buffers.noise_BN is not None:
            noise_size, seed = self.transform.noise_size, self.transform.seed
            buffers.noise_BN[row] = mask_noise(noise_size, seed=seed, epoch=epoch, sample_id=sample_id)
        return found != sample_id
