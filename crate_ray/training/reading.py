"""The batches of one attempt on one rank, from a cursor on.

In: a configuration, a worker and a cursor. Out: batches in the canonical order, but for those that a rollback passes over; and
how far the run has come in its data.
"""

from collections.abc import Callable

from crate_ray.config import RunConfig
from crate_ray.data import Batch, BatchReader
from crate_ray.runs import WorkerContext
from crate_ray.training.objective import noise_size


class TrainingBatches:
    """A reader that can be opened again further on.

    Args:
        config: The run's.
        context: This worker.
        cursor: Where the attempt begins.
        num_samples: Of the training data.
        open_batches: Called as `data.open_reader`.
    """

    def __init__(
        self,
        config: RunConfig,
        context: WorkerContext,
        *,
        cursor: int,
        num_samples: int,
        open_batches: Callable[..., BatchReader],
    ) -> None:
        self._config, self._context, self._num_samples = config, context, num_samples
        self._open_batches = open_batches
        self._replaced = 0  # by readers before this one
        self._reader = self._open(cursor)

    def next_batch(self, place: Callable[[int], int]) -> Batch:
        """The next one; `place` says where to read on from a cursor, which is elsewhere where batches are passed over."""
        if (ahead := place(self.cursor)) != self.cursor:
            self._replaced += self._reader.replaced_samples
            self._reader.close()
            self._reader = self._open(ahead)
        return next(self._reader)

    @property
    def cursor(self) -> int:
        """Images handed out to all workers, over all epochs."""
        return int(self._reader.state_dict()["cursor"])

    @property
    def replaced_samples(self) -> int:
        """Samples that this rank had to replace."""
        return self._replaced + self._reader.replaced_samples

    def epochs(self) -> dict[str, float]:
        """Passes over the data; of a mix, over the samples of all its data sets together and over each."""
        passes = {"data/epoch": self.cursor / self._num_samples}
        if self._config.data.mix is not None:
            passes |= {f"data/epoch_{number}": value for number, value in enumerate(self._reader.epochs)}
        return passes

    def close(self) -> None:
        """Stops the loader threads."""
        self._reader.close()

    def _open(self, cursor: int) -> BatchReader:
        data, train = self._config.data, self._config.train
        return self._open_batches(
            data.source,
            global_batch=train.global_batch,
            rank=self._context.rank,
            world_size=self._context.world_size,
            seed=train.seed,
            cursor=cursor,
            lanes=data.lanes,
            window=data.window,
            num_loaders=data.num_loaders,
            image_size=self._config.model.image_size,
            augment=data.augment,
            crop_scale=data.crop_scale,
            flip=data.flip,
            noise_size=noise_size(self._config),
            max_pixels=data.max_pixels,
            on_error=data.on_error,
            max_replaced_fraction=data.max_replaced_fraction,
            loader_timeout_s=data.loader_timeout_s,
            cache_dir=data.cache_dir,
            cache_bytes=data.cache_bytes,
        )
