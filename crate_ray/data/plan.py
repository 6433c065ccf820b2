"""Which rank reads which sample at which step, and what that adds up to.

In: an order, the size of the world and of the global batch, a cursor. Out: arrays with an axis for steps and one for rows, and
sums over them. It calls the functions that the reader calls and opens no shard, so a plan is what a run reads, at some tenths
of a microsecond a sample; the price is that samples which turn out unreadable, and are replaced, are not known here.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crate_ray.config import ConfigError
from crate_ray.data.order import Int64Array, RankSlice, SampleOrder, global_batch, rank_slice

MAX_READS = 50_000_000  # 16 bytes each, and as much again while they are counted


@dataclass(frozen=True)
class Plan:
    """A stretch of S steps with a global batch of B over W ranks.

    Attributes:
        sample_ids_SB: int64; axis 0 is the step, axis 1 the row of the global batch.
        epochs_SB: int64; pass over the data that each row belongs to.
        shares: Rows of each rank, in order of ranks; together they are all rows.
        cursors: Samples consumed before each step, over all epochs and ranks.
    """

    sample_ids_SB: Int64Array
    epochs_SB: Int64Array
    shares: tuple[RankSlice, ...]
    cursors: range

    def of_rank(self, rank: int) -> Int64Array:
        """Sample ids that one rank reads, (S, rows of that rank)."""
        share = self.shares[rank]
        return self.sample_ids_SB[:, share.start : share.stop]


@dataclass(frozen=True)
class EpochStart:
    """Where an epoch begins: its first sample is the one after `rows_before` others of the batch of `step`."""

    epoch: int
    step: int
    rows_before: int


@dataclass(frozen=True)
class Coverage:
    """What the steps of a plan read of the data set.

    Attributes:
        reads: Samples handed out, with repetitions, without padding.
        distinct_samples: Different samples among them.
        num_samples: Samples of the data set.
        duplicates_within_an_epoch: Reads of a sample that was read before in the same epoch; an order never has any.
        epochs: Epochs that the steps belong to.
    """

    reads: int
    distinct_samples: int
    num_samples: int
    duplicates_within_an_epoch: int
    epochs: tuple[int, ...]


@dataclass(frozen=True)
class RankReads:
    """What one rank reads: images, shards they lie in, encoded bytes, weightless copies that pad its batches, repetitions."""

    images: int
    shards: Int64Array
    num_bytes: int
    padding: int
    duplicates_within_an_epoch: int


def plan_steps(order: SampleOrder, *, world_size: int, global_batch_size: int, steps: int, cursor: int = 0) -> Plan:
    """Plan the steps from a position on.

    Args:
        order: The order of the data set.
        world_size: Ranks W, 1 <= W <= B.
        global_batch_size: Samples B of a step over all ranks.
        steps: Steps S, at least 1.
        cursor: Samples consumed before, over all epochs and ranks.

    Raises:
        ConfigError: For more ranks than rows, a value out of range, or a plan too large to hold.
    """
    for name, value, least in (("steps", steps, 1), ("global batch", global_batch_size, 1), ("cursor", cursor, 0)):
        if value < least:
            raise ConfigError(f"a plan with {name} {value}: it is at least {least}")
    if steps * global_batch_size > MAX_READS:
        raise ConfigError(
            f"{steps:,} steps of {global_batch_size:,} images are more than the {MAX_READS:,} reads of a plan; show at most "
            f"{max(1, MAX_READS // global_batch_size):,} steps, and go on from there with --start-step"
        )
    if cursor + steps * global_batch_size > np.iinfo(np.int64).max:
        raise ConfigError(f"cursor {cursor} is beyond any run; it counts images and is below 2**63")
    shares = tuple(rank_slice(rank, world_size, global_batch_size) for rank in range(world_size))
    cursors = range(cursor, cursor + steps * global_batch_size, global_batch_size)
    sample_ids = np.empty((steps, global_batch_size), dtype=np.int64)
    epochs = np.empty_like(sample_ids)
    for step, at in enumerate(cursors):
        batch = global_batch(order, cursor=at, size=global_batch_size)
        sample_ids[step], epochs[step] = batch.sample_ids, batch.epochs
    return Plan(sample_ids, epochs, shares, cursors)


def epoch_starts(plan: Plan, *, num_samples: int) -> list[EpochStart]:
    """Return the epochs that begin within the steps of a plan, in order."""
    begin, size = plan.cursors.start, plan.cursors.step
    first = -(-begin // num_samples)
    last = (begin + len(plan.cursors) * size - 1) // num_samples
    placed = ((epoch, divmod(epoch * num_samples - begin, size)) for epoch in range(first, last + 1))
    return [EpochStart(epoch, step, rows_before) for epoch, (step, rows_before) in placed]


def _duplicates(sample_ids: Int64Array, epochs: Int64Array, num_samples: int) -> int:
    """Reads of a sample that had been read in the same epoch."""
    within = (epochs - epochs.min()) * num_samples + sample_ids
    return int(within.size - np.unique(within).size)


def measure_coverage(plan: Plan, *, num_samples: int) -> Coverage:
    """Count what the steps of a plan read of `num_samples` samples, and whether any comes twice in one epoch."""
    distinct = np.zeros(num_samples, dtype=bool)
    distinct[plan.sample_ids_SB] = True
    return Coverage(
        reads=plan.sample_ids_SB.size,
        distinct_samples=int(distinct.sum()),
        num_samples=num_samples,
        duplicates_within_an_epoch=_duplicates(plan.sample_ids_SB, plan.epochs_SB, num_samples),
        epochs=tuple(np.unique(plan.epochs_SB).tolist()),
    )


def measure_rank(plan: Plan, rank: int, *, shard_of: NDArray[np.int64], num_bytes_of: NDArray[np.int64]) -> RankReads:
    """Add up what one rank reads.

    Args:
        plan: The steps.
        rank: Which one.
        shard_of: Shard of each sample, (N,).
        num_bytes_of: Encoded bytes of each sample, (N,).
    """
    share, ids = plan.shares[rank], plan.of_rank(rank)
    return RankReads(
        images=ids.size,
        shards=np.unique(shard_of[ids]),
        num_bytes=int(num_bytes_of[ids].sum()),
        padding=len(ids) * (share.padded - (share.stop - share.start)),
        duplicates_within_an_epoch=_duplicates(ids, plan.epochs_SB[:, share.start : share.stop], len(shard_of)),
    )
