"""Several data sets as one: a combined index, and an order that alternates between them in the ratio of their weights.

In: folders of shards with weights. Out: an index and an order with the interfaces of a single data set's, so that the reader
knows nothing of mixes. Which data set a position belongs to follows a pattern of `sum(whole weights)` positions, repeated
without end, so both that and the position within the data set are found in constant time: a bare cursor resumes a mix as it
resumes anything else. Within the pattern sample j of a data set with share s gets a position in
[floor(j / s), ceil((j + 1) / s)), the earliest end first; such a schedule always exists for shares that add up to 1 (Baruah et
al. 1996, "Proportionate progress"), and it keeps every data set within one sample of s p after p positions, for all p.

The trade-off: the pattern itself is not random. What is random is each data set's own order, which is the one it has alone.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from crate_ray.config import MixPart, whole_weights
from crate_ray.data.index import ShardIndex, load_index
from crate_ray.data.order import GlobalBatch, Int64Array, Order, SampleOrder

Source = str | Sequence[MixPart]


def fair_pattern(counts: Sequence[int]) -> Int64Array:
    """Return which data set each position of a period belongs to.

    Args:
        counts: Positions that each data set gets in a period; at least 1 each.

    Returns:
        `dataset_T` with T = sum(counts): data set k comes counts[k] times, and after any p positions more than
        p counts[k] / T - 1 and less than p counts[k] / T + 1 times.
    """
    period = sum(counts)
    given = [0] * len(counts)
    pattern = np.empty(period, dtype=np.int64)
    for position in range(period):
        released = (k for k, count in enumerate(counts) if given[k] < count and given[k] * period // count <= position)
        pattern[position] = chosen = min(released, key=lambda k: -(-(given[k] + 1) * period // counts[k]))
        given[chosen] += 1
    return pattern


class MixedOrder:
    """The endless sequence of several data sets, each in its own order and in epochs of its own.

    Args:
        parts: The orders of the data sets, of the same lanes and window.
        counts: Their weights as whole numbers.
    """

    def __init__(self, parts: Sequence[SampleOrder], counts: Sequence[int]) -> None:
        self.lanes, self.window = parts[0].lanes, parts[0].window
        self.num_samples = sum(part.num_samples for part in parts)
        self._parts, self._counts = tuple(parts), np.asarray(counts, dtype=np.int64)
        self._first_ids = list(accumulate((part.num_samples for part in parts), initial=0))
        self._dataset_T = fair_pattern(counts)
        of_dataset = [np.cumsum(self._dataset_T == k) for k in range(len(parts))]
        self._given_T = np.stack([np.concatenate([[0], given[:-1]]) for given in of_dataset])  # [k, t]: of k before t

    def _given(self, cursor: int) -> list[int]:
        """Positions of each data set before a cursor."""
        periods, within = divmod(cursor, len(self._dataset_T))
        return [int(given) for given in periods * self._counts + self._given_T[:, within]]

    def rows(self, cursor: int, size: int) -> GlobalBatch:
        """The rows of the `size` positions from a cursor on, in their order; lanes are those of the data sets."""
        dataset_B = self._dataset_T[np.arange(cursor, cursor + size, dtype=np.int64) % len(self._dataset_T)]
        ids_B, epochs_B, lanes_B = (np.empty(size, dtype=np.int64) for _ in range(3))
        for k, (part, start) in enumerate(zip(self._parts, self._given(cursor), strict=True)):
            mine = np.flatnonzero(dataset_B == k)
            if len(mine):  # consecutive positions of this data set
                own = part.rows(start, len(mine))
                ids_B[mine], epochs_B[mine], lanes_B[mine] = own.sample_ids + self._first_ids[k], own.epochs, own.lanes
        return GlobalBatch(ids_B, epochs_B, lanes_B)

    def progress(self, cursor: int) -> tuple[float, ...]:
        """Passes over each data set at a cursor."""
        return tuple(given / part.num_samples for given, part in zip(self._given(cursor), self._parts, strict=True))

    def order_epochs(self, epochs: Sequence[int]) -> None:
        """Order an epoch of each data set now, so that it is there when it is asked for."""
        for part, epoch in zip(self._parts, epochs, strict=True):
            part.epoch(epoch)


def _with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


def concatenate(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """One index over several: the sample ids of each follow those of the one before; what `source` names is kept apart."""
    located = [_with_column(index.shards, "uri", pa.array(index.shard_uris, pa.string())) for index in indexes]
    samples = [
        _with_column(index.samples, "source", pc.binary_join_element_wise(str(number), index.samples["source"], "/"))
        for number, index in enumerate(indexes)
    ]
    return ShardIndex(
        ", ".join(index.url for index in indexes),
        pa.concat_tables(samples).unify_dictionaries().combine_chunks(),
        pa.concat_tables(located),
        max(index.num_classes for index in indexes),
        ", ".join(index.shards_url for index in indexes),
        None,
        tuple(accumulate((index.num_samples for index in indexes[:-1]), initial=0)),
    )


def load_source(source: Source) -> ShardIndex:
    """The index of a folder of shards, or the combined one of the parts of a mix.

    Raises:
        ConfigError: As `load_index`.
    """
    return load_index(source) if isinstance(source, str) else concatenate([load_index(part.train) for part in source])


def load_ordered(source: Source, *, seed: int, lanes: int, window: int) -> tuple[ShardIndex, Order]:
    """The index of a source and its order.

    Args:
        source: A folder of shards, or the parts of a mix.
        seed: Seed of the run, for all data sets alike.
        lanes: Canonical lanes of each data set.
        window: Samples of a lane that are shuffled together.

    Raises:
        ConfigError: As `load_index`.
    """
    if isinstance(source, str):
        index = load_index(source)
        return index, SampleOrder(index.shard_sizes, seed=seed, lanes=lanes, window=window)
    indexes = [load_index(part.train) for part in source]
    parts = [SampleOrder(index.shard_sizes, seed=seed, lanes=lanes, window=window) for index in indexes]
    return concatenate(indexes), MixedOrder(parts, whole_weights([part.weight for part in source]))


def with_classes(source: Source, num_classes: int) -> Source | None:
    """What of a source may stand beside images of so many classes: a folder as it is, of a mix the labelled parts with as many.

    Data sets of a mix keep their own labels, and label 3 of one is not label 3 of another.
    """
    if isinstance(source, str):
        return source
    return [part for part in source if num_classes and load_index(part.train).num_classes == num_classes] or None
