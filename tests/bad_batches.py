"""Readers that hand out bad batches at chosen places: images that are no numbers, and images that ask for too much memory."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch

from crate_ray.data import Batch, BatchReader, open_reader

TOO_MANY_BYTES = 2**60
Spoil = Callable[[Batch, int], Batch]


class SpoilingReader:
    """Hands on the batches of another reader, each through `spoil` with its cursor."""

    def __init__(self, reader: BatchReader, spoil: Spoil) -> None:
        self._reader, self._spoil = reader, spoil

    @property
    def replaced_samples(self) -> int:
        return self._reader.replaced_samples

    @property
    def epochs(self) -> tuple[float, ...]:
        return self._reader.epochs

    def __next__(self) -> Batch:
        cursor = self.state_dict()["cursor"]
        return self._spoil(next(self._reader), cursor)

    def state_dict(self) -> dict[str, int]:
        return self._reader.state_dict()

    def close(self) -> None:
        self._reader.close()


def without_numbers(cursors: Collection[int], *, on_rank: int = 0) -> Callable[..., BatchReader]:
    """For `open_batches`: one image of the batches at these cursors is NaN, on one rank."""

    def spoil(batch: Batch, cursor: int) -> Batch:
        if cursor not in cursors:
            return batch
        images_BCHW = batch.images_BCHW.float()
        images_BCHW[0] = float("nan")
        return dataclasses.replace(batch, images_BCHW=images_BCHW)

    return _spoiling(spoil, on_rank)


class HungryRows(torch.Tensor):
    """Images of which only so many fit into memory at once: more make the CPU's allocator fail, with its own error."""

    most: int

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows = super().__getitem__(index).as_subclass(torch.Tensor)
        if len(rows) > self.most:
            torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
        return rows


def hungry(most: int, *, from_cursor: int = 0, on_rank: int = 0) -> Callable[..., BatchReader]:
    """For `open_batches`: from a cursor on, at most so many images of one rank fit into memory at once."""

    def spoil(batch: Batch, cursor: int) -> Batch:
        if cursor < from_cursor:
            return batch
        images_BCHW = batch.images_BCHW.as_subclass(HungryRows)
        images_BCHW.most = most
        return dataclasses.replace(batch, images_BCHW=images_BCHW)

    return _spoiling(spoil, on_rank)


def _spoiling(spoil: Spoil, on_rank: int) -> Callable[..., BatchReader]:
    def opener(source: Any, *, rank: int, **named: Any) -> BatchReader:
        reader = open_reader(source, rank=rank, **named)
        return SpoilingReader(reader, spoil) if rank == on_rank else reader

    return opener
