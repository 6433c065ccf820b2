"""Mixup and cutmix of a global batch, the same for any number of workers and micro-batches.

In: whole pairs (2j, 2j + 1) of rows of the global batch, and the cursor of its step. Out: blended images and soft targets.
The transforms are torchvision's, which mix each row with the one before it and draw from torch's global generator. Seen
as two "images", all even rows and all odd rows, that roll is the swap within each pair; and the draws come from a
generator seeded by (seed, cursor), so every worker makes the same. The trade-off: one share, or one box, for all pairs of
a step, as in facebookresearch/mae, and batches that must hold whole pairs.

Shapes: M rows of a worker, an even number; C x H x W image, K classes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from crate_ray.config import DataConfig
from crate_ray.data.streams import Purpose, stream


class PairMixing:
    """Blends the two rows of each pair, or swaps a box between them; with both configured, a coin decides each step.

    Args:
        data: Its `mixup_alpha` and `cutmix_alpha`, at least one of which is set.
        num_classes: Length of the soft targets.
        seed: Seed of the run.
    """

    def __init__(self, data: DataConfig, *, num_classes: int, seed: int) -> None:
        from torchvision.transforms import v2

        self._num_classes = num_classes
        self._seed = seed
        transforms: list[Any] = []
        if data.mixup_alpha is not None:
            transforms.append(v2.MixUp(alpha=data.mixup_alpha))
        if data.cutmix_alpha is not None:
            transforms.append(v2.CutMix(alpha=data.cutmix_alpha))
        self._mix = v2.RandomChoice(transforms)

    def __call__(self, images_MCHW: Tensor, labels_M: Tensor, *, cursor: int) -> tuple[Tensor, Tensor]:
        """Mixes the pairs.

        Args:
            images_MCHW: uint8 or float, first row at an even row of the global batch.
            labels_M: Class of each row.
            cursor: `Batch.cursor_after` of the step, the same on all workers.

        Returns:
            Float images in the range of the input, and targets (M, K).
        """
        targets_MK = functional.one_hot(labels_M, self._num_classes).float()
        key = int(stream(Purpose.MIX, seed=self._seed, item=cursor).integers(2**63))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            images, targets = self._mix(_even_and_odd(images_MCHW.float()), _even_and_odd(targets_MK).flatten(1))
        return _interleave(images, images_MCHW.shape), _interleave(targets, targets_MK.shape)


def _even_and_odd(rows: Tensor) -> Tensor:
    """(M, C, ...) to (2, M / 2 * C, ...): even rows first."""
    pairs = rows.reshape(len(rows) // 2, 2, *rows.shape[1:])
    return pairs.transpose(0, 1).flatten(1, 2)


def _interleave(halves: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_even_and_odd`."""
    return halves.reshape(2, shape[0] // 2, *shape[1:]).transpose(0, 1).reshape(shape)
