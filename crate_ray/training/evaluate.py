"""What the loop measures on validation shards: the loss (under fixed masks), a classifier's top-1, and kNN; at the end
of pretraining the loss at other mask ratios too, where losses of models that were trained at several can be compared.

Every rank takes a part of the images; sums and features are gathered, so the numbers do not depend on the number of workers.
For kNN a rank takes whole batches, and features are put back into the order of the index: any number of workers computes the
same batches, and hands the same rows in the same order to the vote, where the order decides between equal neighbours.
Masks are drawn from (seed 0, sample), the same for every run and every step.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from crate_ray.config import RunConfig
from crate_ray.data import Batch, ShardIndex, Source, load_index, load_source, read_all, with_classes
from crate_ray.evaluation.features import Features, extract_features, joined
from crate_ray.evaluation.probes import knn_top1
from crate_ray.models import Classifier, MaskedAutoencoder, with_shared_weights
from crate_ray.training.objective import Objective, create_objective, noise_size
from crate_ray.training.precision import autocast

EVAL_BATCH = 256
Model = MaskedAutoencoder | Classifier
Ids = NDArray[np.int64]


class Evaluator:
    """Validation numbers of one run.

    Args:
        config: Names the task, the shards, image size and mask ratio.
        rank: This worker.
        world_size: Workers that share the work; each must call the same methods.
    """

    def __init__(self, config: RunConfig, *, rank: int, world_size: int, precision: str) -> None:
        assert config.data.eval is not None
        self._config = config
        self._rank = rank
        self._world_size = world_size
        self._precision = precision
        self._eval_url = config.data.eval
        self._eval_index = load_index(self._eval_url)
        self._eval_ids = spread_ids(self._eval_index.num_samples, config.eval.max_images)

    def metrics(self, model: Model) -> dict[str, float]:
        """Means over the validation images of what the task measures: `eval/loss`, for a classifier `eval/top1` too."""
        return {f"eval/{name}": value for name, value in self._means(model, self._config).items()}

    def losses_by_mask_ratio(self, model: Model) -> dict[str, float]:
        """The loss at each of `eval.mask_ratios`, as `eval/loss_m50` for .5; the model is as it was trained.

        The order in which patches are hidden is that of `metrics`: a larger ratio hides all that a smaller one does, and more.
        """
        losses = {}
        for ratio in self._config.eval.mask_ratios or ():
            other = with_shared_weights(model, mask_ratio=ratio)
            config = self._config.model_copy(update={"model": other.config})
            losses[f"eval/loss_m{100 * ratio:g}"] = self._means(other, config)["loss"]
        return losses

    @torch.inference_mode()
    def _means(self, model: Model, config: RunConfig) -> dict[str, float]:
        device = next(model.parameters()).device
        objective = create_objective(model, config)
        totals = torch.zeros(1 + len(objective.measures), dtype=torch.float64)
        ids = self._mine(self._eval_ids)
        for rows_BM in measure_images(objective, config, self._eval_url, precision=self._precision, sample_ids=ids):
            totals += torch.cat([torch.tensor([len(rows_BM)]), rows_BM.sum(dim=0)])
        if self._world_size > 1:
            totals = _all_reduce(totals, device)
        return {name: float(total / totals[0]) for name, total in zip(objective.measures, totals[1:], strict=True)}

    def knn(self, model: Model) -> float | None:
        """Accuracy of kNN for validation images among labelled training images of the same classes; None without any."""
        if self._bank is None or self._eval_index.labels.min() < 0:
            return None
        source, index = self._bank
        model.eval()
        bank = self._features(model, source, spread_ids(index.num_samples, self._config.eval.knn_images))
        queries = self._features(model, self._eval_url, self._eval_ids)
        model.train()
        top1 = knn_top1(
            torch.from_numpy(bank.mean_ND),
            torch.from_numpy(bank.labels_N),
            torch.from_numpy(queries.mean_ND),
            torch.from_numpy(queries.labels_N),
        )
        if self._world_size > 1:  # other processors may break a tie another way, and ranks decide by this number what they save
            mine = torch.tensor([top1 if self._rank == 0 else 0.0], dtype=torch.float64)
            top1 = float(_all_reduce(mine, next(model.parameters()).device))
        return top1

    @cached_property
    def _bank(self) -> tuple[Source, ShardIndex] | None:
        """What kNN looks among; None where not all of it is labelled."""
        source = with_classes(self._config.data.source, self._eval_index.num_classes)
        index = None if source is None else load_source(source)
        return None if source is None or index is None or index.labels.min() < 0 else (source, index)

    def _features(self, model: Model, source: Source, ids: Ids) -> Features:
        rows = [batch_rows(len(ids), rank, self._world_size) for rank in range(self._world_size)]
        own = ids[rows[self._rank]]
        if len(own):
            mine = encode_images(model, self._config, source, precision=self._precision, sample_ids=own)
        else:  # fewer batches than workers
            mine = _no_features(self._config.model.width)
        if self._world_size == 1:
            return mine
        parts: list[Features] = [mine] * self._world_size
        dist.all_gather_object(parts, mine)
        return joined(parts).rows(np.argsort(np.concatenate(rows)))

    def _mine(self, ids: Ids) -> Ids:
        return ids[self._rank :: self._world_size]


@torch.inference_mode()
def measure_images(
    objective: Objective, config: RunConfig, url: str, *, precision: str, sample_ids: Ids | None = None
) -> Iterator[torch.Tensor]:
    """What the objective measures of each image, in the order of the index: (B, measures) float64 on the CPU.

    The model is in evaluation mode meanwhile, and ready to train afterwards.
    """
    device = next(objective.parameters()).device
    objective.eval()
    try:
        for batch in read_images(config, url, sample_ids=sample_ids, noise=noise_size(config) > 0):
            with autocast(precision, device):
                rows_BM = objective.measure(batch.images_BCHW.to(device), objective.targets(batch).to(device))
            yield rows_BM.double().cpu()[batch.weights_B > 0]
    finally:
        objective.train()


def read_images(config: RunConfig, source: Source, *, sample_ids: Ids | None = None, noise: bool = False) -> Iterator[Batch]:
    """One pass over images as the run's model sees them, unaugmented; with the fixed mask noise where it is asked for.

    A damaged image that is judged raises. One of the training images, which probes and kNN learn from, is dealt with as in
    training (`data.on_error`): what the run got over must not end it at its last step.
    """
    is_judged = source in (config.data.eval, config.data.test)
    return read_all(
        source,
        batch_size=EVAL_BATCH,
        image_size=config.model.image_size,
        num_loaders=config.data.num_loaders,
        sample_ids=sample_ids,
        noise_size=config.model.num_patches if noise else 0,
        max_pixels=config.data.max_pixels,
        on_error="raise" if is_judged else config.data.on_error,
        loader_timeout_s=config.data.loader_timeout_s,
        cache_dir=config.data.cache_dir,
        cache_bytes=config.data.cache_bytes,
    )


def encode_images(
    model: Model, config: RunConfig, source: Source, *, precision: str, sample_ids: Ids | None = None
) -> Features:
    """Features of the images under the precision that the run trains in."""
    device = next(model.parameters()).device
    batches = read_images(config, source, sample_ids=sample_ids)
    with autocast(precision, device):
        return extract_features(model, batches, mean=config.data.mean, std=config.data.std, device=device)


def batch_rows(num_rows: int, rank: int, world_size: int) -> Ids:
    """The rows that a rank encodes: whole batches in turn, so that a row is computed beside the same others by any rank."""
    rows = np.arange(num_rows)
    return np.asarray(rows[rows // EVAL_BATCH % world_size == rank])


def _no_features(width: int) -> Features:
    return Features(np.empty((0, width), np.float32), np.empty((0, width), np.float32), np.empty(0, np.int64))


def spread_ids(num_samples: int, wanted: int | None) -> Ids:
    """Sample ids: all of them, or `wanted` of them evenly over the index."""
    if wanted is None or wanted >= num_samples:
        return np.arange(num_samples)
    return np.linspace(0, num_samples - 1, wanted).astype(np.int64)


def _all_reduce(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    on_device = values.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()
