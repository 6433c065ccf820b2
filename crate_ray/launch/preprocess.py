"""Batches that other nodes read and decode, through Ray Data's streaming: `data.preprocess: ray_data`.

In: what `open_reader` takes. Out: a reader of the same batches in the same order, made by actors of one CPU each instead of
threads of the worker. A batch is a function of the source, the rank and the cursor, so a stream of cursors is all that Ray Data
is given; it keeps their order (`preserve_order`), and a cursor resumes as exactly as without it.

The trade-off: images travel through the object store, and every actor holds an index and an order of its own. It is for nodes
whose GPUs wait for their CPUs while other nodes have CPUs to spare.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import Future, wait
from dataclasses import fields
from itertools import chain
from typing import Any

import numpy as np
import ray.data
import torch
from numpy.typing import NDArray

from crate_ray.data import Batch, LoaderTimeoutError, ReplacedSamples, Source, load_ordered, open_reader, rank_slice
from crate_ray.data.loaders import LoaderThreads
from crate_ray.data.reader import Position

_STREAM_BATCHES = 1024  # of one execution of Ray Data, which plans all of its tasks before the first
_HANDOVER_BATCHES = 32  # left of a stream when the next one starts, so that its actors are there in time
_FETCHED_AHEAD = 2  # batches that are on this node before they are asked for
_STORED_AHEAD = 8  # batches in the object store for each actor, and for two more; with 4, Ray Data lets actors idle

Row = dict[str, NDArray[Any]]


class _BatchMaker:
    """One actor: turns cursors into batches of one rank."""

    def __init__(self, source: Source, options: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self._reader = open_reader(source, **options, num_loaders=0, max_replaced_fraction=1.0, fetch_ahead=False)

    def __call__(self, row: Row) -> Row:
        self._reader.load_state_dict({"cursor": int(row["cursor"][0])})
        before = self._reader.replaced_samples
        batch = next(self._reader)
        values = {field.name: getattr(batch, field.name) for field in fields(Batch)}
        made = {name: np.asarray(value)[None] for name, value in values.items() if value is not None}
        return {**made, "replaced": np.asarray([self._reader.replaced_samples - before])}


def _unpack(row: Row) -> Batch:
    """The batch of a row, copied out of the object store."""
    names = [field.name for field in fields(Batch) if field.name in row]
    made: dict[str, Any] = {name: torch.from_numpy(np.array(row[name][0])) for name in names}
    return Batch(**{"noise_BN": None, **made, "cursor_after": int(made["cursor_after"])})


class StreamedReader(Position):
    """An endless iterator over one rank's batches, decoded by actors; made by `open_streamed_reader`."""

    def __init__(
        self,
        source: Source,
        options: dict[str, Any],
        *,
        cursor: int,
        num_actors: int,
        max_replaced_fraction: float,
        timeout_s: float,
    ) -> None:
        index, order = load_ordered(source, **{name: options[name] for name in ("seed", "lanes", "window")})
        super().__init__(order, cursor=cursor, replaced=ReplacedSamples(max_replaced_fraction, index.url))
        share = rank_slice(options["rank"], options["world_size"], options["global_batch"])
        self._arguments, self._num_actors, self._timeout_s = (source, options), num_actors, timeout_s
        self._step, self._rows_a_batch = options["global_batch"], share.stop - share.start
        self._batch_bytes = share.padded * (3 * options["image_size"] ** 2 + 4 * options.get("noise_size", 0))
        # Ray Data waits for free CPUs without end: in a thread of its own that becomes an error of this one.
        self._threads = LoaderThreads(2)
        self._rows = self._all_rows(cursor)
        self._asked: Future[Row] | None = None
        self._following: Future[Iterator[Row]] | None = None

    def _stream(self, cursor: int) -> Iterator[Row]:
        """The rows of one execution of Ray Data."""
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        # Else every worker's stream fills half of the object store, which all of them share.
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
            object_store_memory=_STORED_AHEAD * (self._num_actors + 2) * self._batch_bytes
        )
        cursors = [{"cursor": cursor + number * self._step} for number in range(_STREAM_BATCHES)]
        batches = ray.data.from_items(cursors, override_num_blocks=_STREAM_BATCHES).map_batches(
            _BatchMaker,
            fn_constructor_args=self._arguments,
            batch_size=1,
            num_cpus=1,
            scheduling_strategy="DEFAULT",  # fills nodes without a GPU first; Ray Data's own, SPREAD, does not
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self._num_actors, initial_size=self._num_actors),
        )
        return iter(batches.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=_FETCHED_AHEAD))

    def _started(self, cursor: int) -> Iterator[Row]:
        """A stream whose first row is there."""
        stream = self._stream(cursor)
        return chain([next(stream)], stream)

    def _all_rows(self, cursor: int) -> Generator[Row, None, None]:
        """The rows of one stream after the other; each starts while the one before it ends."""
        stream = self._stream(cursor)
        while True:
            cursor += _STREAM_BATCHES * self._step
            for number, row in enumerate(stream):
                if number == _STREAM_BATCHES - _HANDOVER_BATCHES:
                    self._following = self._threads.submit(self._started, cursor)
                yield row
            assert self._following is not None, "a stream is longer than its handover"
            stream, self._following = self._following.result(), None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._asked = self._asked or self._threads.submit(next, self._rows)
        if not wait([self._asked], timeout=self._timeout_s).done:
            raise LoaderTimeoutError(
                f"no batch within data.loader_timeout_s={self._timeout_s:g} from the {self._num_actors} actors of "
                "data.preprocess = ray_data; `ray status` shows whether they have CPUs: free some, or raise the timeout"
            )
        asked, self._asked = self._asked, None
        row = asked.result()
        batch = _unpack(row)
        assert batch.cursor_after == self._cursor + self._step, "Ray Data changed the order"
        self._cursor = batch.cursor_after
        self._replaced.add(int(row["replaced"][0]), delivered=self._rows_a_batch)
        return batch

    def close(self) -> None:
        """End the stream and its actors, and the stream that follows it; one that is busy ends after its next row."""
        if self._following is not None:
            self._following.cancel()
            self._following = None
        if self._asked is None:
            self._rows.close()
        else:
            self._asked.add_done_callback(lambda _: self._rows.close())
        self._threads.close()


def open_streamed_reader(
    source: Source,
    *,
    cursor: int = 0,
    num_loaders: int = 2,
    max_replaced_fraction: float = 0.001,
    loader_timeout_s: float = 300.0,
    **options: Any,
) -> StreamedReader:
    """Open a source for training, with `num_loaders` actors in the place of loader threads.

    Args:
        source: As in `open_reader`; each node must reach it.
        cursor: As in `open_reader`.
        num_loaders: Actors of one CPU for this rank; at least one.
        max_replaced_fraction: As in `open_reader`.
        loader_timeout_s: As in `open_reader`.
        options: The other arguments of `open_reader`, all of those that choose the batches.

    Raises:
        ConfigError: As `open_reader`.
    """
    return StreamedReader(
        source,
        options,
        cursor=cursor,
        num_actors=max(1, num_loaders),
        max_replaced_fraction=max_replaced_fraction,
        timeout_s=loader_timeout_s,
    )
