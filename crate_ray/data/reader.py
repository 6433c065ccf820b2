"""Reading batches: positions of the order become decoded images, in order, on threads that run ahead.

In: a folder of shards with its index, a rank of a world, a cursor. Out: an endless iterator of `Batch`.
Threads only execute tasks that the order has already fixed, so their number never changes a batch; decoding
releases the interpreter's lock, so threads scale without copying images between processes. The trade-off: the few
microseconds of Python a sample are serial, which bounds one reader at some ten thousand small images a second.
A sample that cannot be read is replaced by its neighbour at the same position, counted, and bounded. A batch that does not
come in time is an error that names the threads and the samples they are on; nothing waits for ever.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.config import ConfigError
from crate_ray.data import order as orders
from crate_ray.data.cache import ShardCache
from crate_ray.data.images import DEFAULT_MAX_PIXELS, Augmentation
from crate_ray.data.index import load_index
from crate_ray.data.loaders import LoaderThreads
from crate_ray.data.mix import Source, load_ordered, load_source
from crate_ray.data.samples import Ids, SampleLoader, Transform

logger = logging.getLogger(__name__)

_ALWAYS_REPLACEABLE = 8
_SHOWN_THREADS = 4
_EVALUATION_HORIZON = 16
DEFAULT_LOADER_TIMEOUT_S = 300.0
DEFAULT_CACHE_BYTES = 64 << 30


class LoaderTimeoutError(TimeoutError):
    """No batch came in time; the message names the threads and what they are on."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, on the CPU.

    Attributes:
        images_BCHW: uint8, RGB.
        labels_B: int64; -1 without a label.
        noise_BN: float32 in [0, 1), or None when no noise was asked for.
        weights_B: float32; 0 on rows that only pad the batch, else 1.
        sample_ids_B: int64; rows of the index that the images come from.
        epochs_B: int64; pass over the data each row belongs to.
        cursor_after: Samples consumed over all epochs and ranks once this batch is done.
    """

    images_BCHW: torch.Tensor
    labels_B: torch.Tensor
    noise_BN: torch.Tensor | None
    weights_B: torch.Tensor
    sample_ids_B: torch.Tensor
    epochs_B: torch.Tensor
    cursor_after: int


class _PendingBatch:
    """A batch that threads are filling, each its own rows."""

    def __init__(
        self, loader: SampleLoader, threads: LoaderThreads | None, ids_B: Ids, epochs_B: Ids, *, num_tasks: int
    ) -> None:
        self._buffers = loader.allocate(len(ids_B))
        self._loader, self.planned = loader, (ids_B, epochs_B)
        bounds = [i * len(ids_B) // num_tasks for i in range(num_tasks + 1)]
        slices = [slice(a, b) for a, b in pairwise(bounds) if a < b]
        self._tasks: list[Future[int]] = []
        self._inline = 0
        for rows in slices:
            if threads is None:
                self._inline += loader.fill(self._buffers, rows, ids_B, epochs_B)
            else:
                self._tasks.append(threads.submit(loader.fill, self._buffers, rows, ids_B, epochs_B))

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    def wait(self, timeout_s: float) -> None:
        """Return when all rows are filled; raises the fault of a row at once.

        Raises:
            LoaderTimeoutError: They are not, within the timeout.
        """
        done, late = wait(self._tasks, timeout=timeout_s, return_when=FIRST_EXCEPTION)
        for task in done:
            task.result()
        if late:
            busy = "; ".join(self._loader.busy()[:_SHOWN_THREADS]) or "no loader thread is at work"
            raise LoaderTimeoutError(
                f"no batch within data.loader_timeout_s={timeout_s:g}: {busy}; check that storage, or raise the timeout"
            )

    def finish(self, *, padded: int, cursor_after: int, timeout_s: float) -> tuple[Batch, int]:
        """Wait for the rows, pad them with weightless copies of the first; also return how many were replaced."""
        self.wait(timeout_s)
        replaced = self._inline + sum(task.result() for task in self._tasks)
        ids_B, epochs_B = self.planned
        num_rows = len(ids_B)
        rows = torch.arange(padded)
        weights_B = (rows < num_rows).float()
        rows = torch.where(rows < num_rows, rows, 0)

        def pad(values: NDArray[Any]) -> torch.Tensor:
            tensor = torch.from_numpy(values)
            return tensor if padded == num_rows else tensor[rows]

        noise = self._buffers.noise_BN
        batch = Batch(
            pad(self._buffers.images_BCHW),
            pad(self._buffers.labels_B),
            None if noise is None else pad(noise),
            weights_B,
            pad(self._buffers.sample_ids_B),
            pad(epochs_B),
            cursor_after,
        )
        self._loader.done(ids_B)
        return batch, replaced


class _ReadAhead:
    """Batches of a plan, in order: some being filled, and more announced to the loader where it fetches shards early.

    Args:
        num_loaders: Threads; 0 fills a batch when it is asked for.
        prefetch: Batches being filled ahead.
        horizon: Batches announced ahead, at least `prefetch`; used with a cache.
        timeout_s: Longest wait for a batch.
    """

    def __init__(self, loader: SampleLoader, *, num_loaders: int, prefetch: int, horizon: int, timeout_s: float) -> None:
        self._loader, self._timeout_s = loader, timeout_s
        self._depth = prefetch if num_loaders else 1
        self._horizon = max(horizon, self._depth) if loader.fetches_ahead else self._depth
        self._num_tasks = max(1, num_loaders)
        self.threads = LoaderThreads(num_loaders) if num_loaders else None
        self._plan: Iterator[tuple[Ids, Ids]] = iter(())
        self._announced: deque[tuple[Ids, Ids]] = deque()
        self._pending: deque[_PendingBatch] = deque()

    def start(self, plan: Iterable[tuple[Ids, Ids]]) -> None:
        """Drop what was read ahead, and go on with another plan: sample ids and epochs of each batch."""
        for pending in self._pending:
            pending.cancel()
        for ids_B, _ in [*(pending.planned for pending in self._pending), *self._announced]:
            self._loader.done(ids_B)
        self._pending.clear()
        self._announced.clear()
        self._plan = iter(plan)

    def _fill_up(self) -> None:
        while len(self._pending) + len(self._announced) < self._horizon and (planned := next(self._plan, None)):
            self._loader.expect(planned[0])
            self._announced.append(planned)
        while len(self._pending) < self._depth and self._announced:
            ids_B, epochs_B = self._announced[0]
            self._pending.append(_PendingBatch(self._loader, self.threads, ids_B, epochs_B, num_tasks=self._num_tasks))
            self._announced.popleft()

    def next(self, *, padded: int | None, cursor_after: int) -> tuple[Batch, int] | None:
        """The next batch and how many of its samples are stand-ins; None at the end of the plan."""
        self._fill_up()
        if not self._pending:
            return None
        pending = self._pending[0]
        rows = len(pending.planned[0]) if padded is None else padded
        result = pending.finish(padded=rows, cursor_after=cursor_after, timeout_s=self._timeout_s)
        self._pending.popleft()
        return result

    def close(self) -> None:
        """End the threads and let go of the shards."""
        self.start(())
        self._loader.close()  # first: threads that wait for a shard hear of it and come back
        if self.threads is not None:
            self.threads.close()


class BatchReader(Protocol):
    """What a training loop needs of a reader, whoever decodes for it."""

    @property
    def replaced_samples(self) -> int:
        """Samples handed out so far that stand in for unreadable ones."""

    @property
    def epochs(self) -> tuple[float, ...]:
        """Passes over each data set so far, by all ranks."""

    def __next__(self) -> Batch:
        """This rank's share of the next global batch."""

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch handed out."""

    def close(self) -> None:
        """End whatever runs ahead."""


class ReplacedSamples:
    """Counts stand-ins, and raises when there are too many.

    Args:
        max_fraction: Of the samples handed out, once they are more than eight; 0 allows none.
        url: Where they come from, for the message.
    """

    def __init__(self, max_fraction: float, url: str) -> None:
        self.count, self._delivered = 0, 0
        self._max_fraction, self._url = max_fraction, url

    def add(self, replaced: int, *, delivered: int) -> None:
        """Count one batch.

        Raises:
            ConfigError: Too many have been replaced so far.
        """
        self.count += replaced
        self._delivered += delivered
        allowed = self._max_fraction * self._delivered
        if self._max_fraction > 0:
            allowed = max(allowed, _ALWAYS_REPLACEABLE)
        if replaced and self.count > allowed:
            raise ConfigError(
                f"{self.count} of {self._delivered} samples could not be read and were replaced, more than "
                f"data.max_replaced_fraction={self._max_fraction} allows; `crate-ray data verify` shows which, of {self._url}"
            )


class Position:
    """Where a reader stands in the order; whoever decodes, it is told alike."""

    def __init__(self, order: orders.Order, *, cursor: int, replaced: ReplacedSamples) -> None:
        self._order, self._cursor, self._replaced = order, cursor, replaced

    @property
    def replaced_samples(self) -> int:
        """Samples handed out so far by this reader that stand in for unreadable ones."""
        return self._replaced.count

    @property
    def epochs(self) -> tuple[float, ...]:
        """Passes over each data set so far, by all ranks."""
        return self._order.progress(self._cursor)

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch handed out: all that a resumed run needs, with any number of ranks."""
        return {"cursor": self._cursor}


class Reader(Position):
    """An endless iterator over one rank's batches; made by `open_reader`."""

    def __init__(
        self,
        loader: SampleLoader,
        order: orders.Order,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        cursor: int,
        num_loaders: int,
        prefetch: int,
        max_replaced_fraction: float,
        loader_timeout_s: float,
    ) -> None:
        super().__init__(order, cursor=cursor, replaced=ReplacedSamples(max_replaced_fraction, loader.index.url))
        self._batch_size = batch_size
        self._slice = orders.rank_slice(rank, world_size, batch_size)
        horizon = min(order.window * order.lanes, order.num_samples) // batch_size + 1  # one window of every lane
        self._ahead = _ReadAhead(
            loader, num_loaders=num_loaders, prefetch=prefetch, horizon=horizon, timeout_s=loader_timeout_s
        )
        self.load_state_dict({"cursor": cursor})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def _plan(self, cursor: int) -> Iterator[tuple[Ids, Ids]]:
        """Sample ids and epochs of this rank's batches from a position on; the next epoch is ordered in the background."""
        mine, ordered = slice(self._slice.start, self._slice.stop), [-1]
        while True:
            rows = orders.global_batch(self._order, cursor=cursor, size=self._batch_size)
            cursor += self._batch_size
            upcoming = [int(passes) + 1 for passes in self._order.progress(cursor)]
            if self._ahead.threads is not None and upcoming != ordered:
                ordered = upcoming
                self._ahead.threads.submit(self._order.order_epochs, upcoming)
            yield np.ascontiguousarray(rows.sample_ids[mine]), np.ascontiguousarray(rows.epochs[mine])

    def __next__(self) -> Batch:
        try:
            delivered = self._ahead.next(padded=self._slice.padded, cursor_after=self._cursor + self._batch_size)
        except BaseException:
            self.load_state_dict(self.state_dict())  # the next call tries this batch again, not the one after it
            raise
        assert delivered is not None, "the order has no end"
        batch, replaced = delivered
        self._cursor += self._batch_size
        self._replaced.add(replaced, delivered=self._slice.stop - self._slice.start)
        return batch

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position; batches that were read ahead are thrown away."""
        self._cursor = int(state["cursor"])
        self._ahead.start(self._plan(self._cursor))

    def close(self) -> None:
        """Stop the threads and close the shards; the reader is of no use afterwards. A stuck thread is left behind."""
        self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_reader(
    source: Source,
    *,
    global_batch: int,
    image_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    cursor: int = 0,
    lanes: int = 64,
    window: int = 2048,
    num_loaders: int = 2,
    augment: Augmentation = "none",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    noise_size: int = 0,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    on_error: Literal["replace", "raise"] = "replace",
    max_replaced_fraction: float = 0.001,
    prefetch: int = 4,
    loader_timeout_s: float = DEFAULT_LOADER_TIMEOUT_S,
    cache_dir: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    fetch_ahead: bool = True,
) -> Reader:
    """Open a folder of shards, or several, for training.

    Args:
        source: Folder of shards with their index, local or remote; or the parts of a mix.
        global_batch: Samples B a step over all ranks.
        image_size: Side S of the images handed out, pixels.
        rank: This process, 0 <= rank < world_size.
        world_size: Processes W that share every global batch, 1 <= W <= B.
        seed: Decides order, crops, flips and noise.
        cursor: Samples consumed before, over all epochs.
        lanes: Canonical lanes of the order.
        window: Samples of a lane that are shuffled together.
        num_loaders: Threads; 0 reads in the calling thread.
        augment: `random_resized_crop`, or `none` for a deterministic resize and central crop.
        crop_scale: Area range of the random crop, as a share of the image.
        flip: Mirror half of the images when augmenting.
        noise_size: Length N of the mask noise of a sample; 0 for none.
        max_pixels: Larger images are refused from their header.
        on_error: What to do with a sample that cannot be read.
        max_replaced_fraction: Raise once more than this share (and more than 8) had to be replaced; 0 allows none.
        prefetch: Batches read ahead.
        loader_timeout_s: Longest wait for a batch, seconds; not bounded with 0 threads, where the store's own limits hold.
        cache_dir: Folder on this machine's disk for whole shards of a remote URL; None reads them by range.
        cache_bytes: Bytes of that folder, over all processes that share it.
        fetch_ahead: Fetch the shards of a whole window of every lane into it before their samples are asked for; of no use
            to a reader that is given a new position for every batch.

    Raises:
        ConfigError: For a missing index, more ranks than samples in a batch, or a value out of range.
    """
    for name, value, least in (
        ("global_batch", global_batch, 1),
        ("image_size", image_size, 1),
        ("cursor", cursor, 0),
        ("prefetch", prefetch, 1),
    ):
        if value < least:
            raise ConfigError(f"{name}={value} is too small; it is at least {least}")
    index, order = load_ordered(source, seed=seed, lanes=lanes, window=window)
    transform = Transform(image_size, augment, crop_scale, flip, noise_size, seed, max_pixels)
    return Reader(
        SampleLoader(
            index,
            transform,
            replace=on_error == "replace",
            cache=_open_cache(cache_dir, cache_bytes),
            fetch_ahead=fetch_ahead,
        ),
        order,
        batch_size=global_batch,
        rank=rank,
        world_size=world_size,
        cursor=cursor,
        num_loaders=num_loaders,
        prefetch=prefetch,
        max_replaced_fraction=max_replaced_fraction,
        loader_timeout_s=loader_timeout_s,
    )


def _open_cache(cache_dir: str | None, cache_bytes: int) -> ShardCache | None:
    return ShardCache(cache_dir, max_bytes=cache_bytes) if cache_dir else None


def read_all(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    num_loaders: int = 2,
    sample_ids: Sequence[int] | Ids | None = None,
    noise_size: int = 0,
    seed: int = 0,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    on_error: Literal["replace", "raise"] = "raise",
    prefetch: int = 4,
    loader_timeout_s: float = DEFAULT_LOADER_TIMEOUT_S,
    cache_dir: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
) -> Iterator[Batch]:
    """Read samples once in index order, resized and cut centrally, for evaluation; the last batch may be shorter.

    Mask noise is that of epoch 0, so every pass masks the same patches. An unreadable sample raises: numbers that are
    compared must not rest on a stand-in. Where images are only looked among, `replace` gives its neighbour, label and all.

    Args:
        source: Folder of shards with their index; or the parts of a mix, in the order of their combined index.
        batch_size: Samples in a batch.
        image_size: Side S of the images handed out, pixels.
        num_loaders: Threads; 0 reads in the calling thread.
        sample_ids: Rows of the index to read, in this order; all by default.
        noise_size: Length N of the mask noise of a sample; 0 for none.
        seed: Seed of the noise.
        max_pixels: Larger images are refused from their header.
        on_error: What to do with a sample that cannot be read.
        prefetch: Batches read ahead.
        loader_timeout_s: As in `open_reader`.
        cache_dir: As in `open_reader`.
        cache_bytes: As in `open_reader`.
    """
    index = load_source(source)
    ids = np.arange(index.num_samples) if sample_ids is None else np.asarray(sample_ids, dtype=np.int64)
    transform = Transform(image_size, noise_size=noise_size, seed=seed, max_pixels=max_pixels)
    loader = SampleLoader(index, transform, replace=on_error == "replace", cache=_open_cache(cache_dir, cache_bytes))
    batches = (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))
    ahead = _ReadAhead(
        loader, num_loaders=num_loaders, prefetch=prefetch, horizon=_EVALUATION_HORIZON, timeout_s=loader_timeout_s
    )
    ahead.start((ids_B, np.zeros_like(ids_B)) for ids_B in batches)
    done = 0
    try:
        while (delivered := ahead.next(padded=None, cursor_after=min(done + batch_size, len(ids)))) is not None:
            done += batch_size
            yield delivered[0]
    finally:
        ahead.close()


def read_masks(url: str, sample_ids: Sequence[int] | Ids, *, image_size: int) -> torch.Tensor:
    """Read the stored object masks of some samples, cut as `read_all` cuts their images.

    Args:
        url: Folder of shards with their index.
        sample_ids: Rows of the index.
        image_size: Side S of the masks handed out, pixels.

    Returns:
        (len(sample_ids), S, S) bool, true on the object.

    Raises:
        ConfigError: For a sample that has no mask, or one that cannot be read.
    """
    loader = SampleLoader(load_index(url), Transform(image_size), replace=False)
    try:
        return torch.stack([loader.mask(int(sample_id)) for sample_id in sample_ids])
    finally:
        loader.close()
