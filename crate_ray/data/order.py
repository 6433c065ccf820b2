"""The order of samples: pure functions of the shard sizes, the seed and a position.

In: how many samples each shard holds, a seed, an epoch or a cursor. Out: numpy arrays of sample ids.
Nothing here depends on the number of ranks or loader threads, so any of them may change at any step and the global batches
stay the same; a bare cursor is all that a resumed run needs.

The trade-off: samples are shuffled over shards and inside windows of each lane, not over the whole epoch. A lane then reads
a handful of shards almost sequentially, which object stores and page caches reward; shards written in shuffled order
(ours are) make the difference to a full shuffle invisible. An epoch's order is held in memory, 8 bytes a sample, and
twice that while it is made.

Epoch e over N samples in C lanes:

1. permute the shards and concatenate their sample ids (stream SHARDS of seed, e);
2. rotate the result by a random offset in [0, N) (the same stream);
3. cut it into C lanes, the first N mod C of which are one sample longer than the others;
4. within each lane, permute every window of w consecutive samples (stream WINDOWS of seed, e, lane);
5. position p of the epoch is sample p // C of lane p mod C: every sample comes exactly once, nothing is dropped.

The positions of all epochs follow one another without end. The global batch at a cursor is the next B positions, sorted
stably by lane; rank r of W takes rows [r B // W, (r + 1) B // W).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from crate_ray.config import ConfigError
from crate_ray.data.streams import Purpose, stream

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class GlobalBatch:
    """Rows of an order, such as those of one global batch in lane order: three int64 arrays of length B."""

    sample_ids: Int64Array
    epochs: Int64Array
    lanes: Int64Array


class Order(Protocol):
    """What the reader needs of an order; `num_samples` are those of all data sets together."""

    lanes: int
    window: int
    num_samples: int

    def rows(self, cursor: int, size: int) -> GlobalBatch:
        """The rows of the `size` positions from a cursor on, in their order."""

    def progress(self, cursor: int) -> tuple[float, ...]:
        """Passes over each data set at a cursor."""

    def order_epochs(self, epochs: Sequence[int]) -> None:
        """Order an epoch of each data set now, so that it is there when it is asked for."""


@dataclass(frozen=True)
class RankSlice:
    """Rows [start, stop) of the global batch, to be padded to `padded` rows (the same for every rank)."""

    start: int
    stop: int
    padded: int


def _concatenated_ids(shard_sizes: Int64Array, shard_order: Int64Array) -> Int64Array:
    """Sample ids of the shards in the given order, (N,)."""
    first_id = np.cumsum(shard_sizes) - shard_sizes
    sizes = shard_sizes[shard_order]
    ids: Int64Array = np.repeat(first_id[shard_order] - (np.cumsum(sizes) - sizes), sizes)
    ids += np.arange(len(ids), dtype=np.int64)
    return ids


def _shuffled_windows(ids: Int64Array, sort_keys: NDArray[np.float64], window: int) -> Int64Array:
    """The ids of a lane with every `window` of them sorted by their keys; the last window may be shorter."""
    whole = len(ids) - len(ids) % window
    shuffled = np.empty_like(ids)
    for part, width in ((slice(0, whole), window), (slice(whole, None), len(ids) - whole)):
        if width:
            rows = np.argsort(sort_keys[part].reshape(-1, width), axis=1, kind="stable")
            shuffled[part] = np.take_along_axis(ids[part].reshape(-1, width), rows, axis=1).ravel()
    return shuffled


def epoch_order(shard_sizes: Sequence[int], *, seed: int, epoch: int, lanes: int, window: int) -> Int64Array:
    """Return the samples of one epoch in the order of its positions.

    Args:
        shard_sizes: Samples in each shard, in index order; at least one sample in all.
        seed: Seed of the run.
        epoch: Pass over the data, from 0.
        lanes: Canonical lanes C, at least 1; may exceed the number of samples.
        window: Samples w of a lane that are shuffled together, at least 1; 1 keeps the order of the lane.

    Returns:
        `sample_id_N`: axis 0 is the position p in the epoch, which lies in lane p mod C.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    num_samples = int(sizes.sum())
    if num_samples < 1 or lanes < 1 or window < 1:
        raise ConfigError(f"an order needs samples, lanes and a window of at least 1; got {num_samples}, {lanes} and {window}")
    generator = stream(Purpose.SHARDS, seed=seed, epoch=epoch)
    unrotated = _concatenated_ids(sizes, generator.permutation(len(sizes)))
    begin = int(generator.integers(num_samples))
    sample_ids = np.empty_like(unrotated)
    for lane in range(min(lanes, num_samples)):  # the lanes after these are empty
        length = num_samples // lanes + (lane < num_samples % lanes)
        in_lane = unrotated.take(np.arange(begin, begin + length), mode="wrap")
        begin += length
        if window > 1:
            sort_keys = stream(Purpose.WINDOWS, seed=seed, epoch=epoch, item=lane).random(length)
            in_lane = _shuffled_windows(in_lane, sort_keys, window)
        sample_ids[lane::lanes] = in_lane
    return sample_ids


class SampleOrder:
    """The endless concatenation of epochs, with the last few epochs it was asked for kept in memory.

    Args:
        shard_sizes: Samples in each shard, in index order.
        seed: Seed of the run.
        lanes: Canonical lanes.
        window: Samples of a lane that are shuffled together.
    """

    _KEPT_EPOCHS = 2

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, lanes: int, window: int) -> None:
        self.shard_sizes = tuple(int(size) for size in shard_sizes)
        self.num_samples = sum(self.shard_sizes)
        self.seed, self.lanes, self.window = seed, lanes, window
        self._epochs: dict[int, Int64Array] = {}
        self._lock = Lock()

    def epoch(self, epoch: int) -> Int64Array:
        """Sample ids of one epoch by position, (N,). Safe to call from several threads."""
        if (known := self._epochs.get(epoch)) is not None:  # without the lock, which is held while another epoch is sorted
            return known
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = epoch_order(
                    self.shard_sizes, seed=self.seed, epoch=epoch, lanes=self.lanes, window=self.window
                )
                for old in sorted(self._epochs)[: -self._KEPT_EPOCHS]:
                    if old != epoch:
                        del self._epochs[old]
            return self._epochs[epoch]

    def rows(self, cursor: int, size: int) -> GlobalBatch:
        """The rows of the `size` positions from a cursor on, in their order."""
        epochs, within = np.divmod(np.arange(cursor, cursor + size, dtype=np.int64), self.num_samples)
        sample_ids = np.empty(size, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            rows = epochs == epoch
            sample_ids[rows] = self.epoch(epoch)[within[rows]]
        return GlobalBatch(sample_ids, epochs, within % self.lanes)

    def progress(self, cursor: int) -> tuple[float, ...]:
        """Passes over the data set at a cursor."""
        return (cursor / self.num_samples,)

    def order_epochs(self, epochs: Sequence[int]) -> None:
        """Order an epoch now, so that it is there when it is asked for."""
        self.epoch(epochs[0])


def global_batch(order: Order, *, cursor: int, size: int) -> GlobalBatch:
    """Return the rows of the global batch at a cursor, in lane order.

    Args:
        order: The order of the data set or sets.
        cursor: Samples consumed so far over all epochs.
        size: Global batch B, at least 1; may span several epochs.
    """
    found = order.rows(cursor, size)
    rows = np.argsort(found.lanes, kind="stable")
    return GlobalBatch(found.sample_ids[rows], found.epochs[rows], found.lanes[rows])


def rank_slice(rank: int, world_size: int, global_batch_size: int) -> RankSlice:
    """Return the rows of the global batch that one rank computes.

    Raises:
        ConfigError: When there are more ranks than rows, or no such rank.
    """
    if world_size > global_batch_size:
        raise ConfigError(
            f"{world_size} workers cannot share a global batch of {global_batch_size}: every worker needs at least one sample; "
            f"raise train.global_batch or lower scale.num_workers to {global_batch_size}"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of the {world_size} ranks 0 to {world_size - 1}")
    start, stop = rank * global_batch_size // world_size, (rank + 1) * global_batch_size // world_size
    return RankSlice(start, stop, -(-global_batch_size // world_size))
