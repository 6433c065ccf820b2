"""Frozen features: what a probe reads from an encoder.

In: a model with `encode` and an iterable of batches. Out: numpy arrays, one row an image.
The image is unmasked, as in every published probe. Both summaries come from one pass, because
the class token of a masked autoencoder never enters its loss: the mean over patches is the
primary feature, the class token the published one. All rows stay in memory (4 bytes x 2 x width
an image), which suits probes on up to millions of images and spares a second pass.

Shapes: B batch, N images, T tokens (class token first), D width, P pixels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from crate_ray.config import ConfigError
from crate_ray.evaluation.protocols import Token

FloatArray = NDArray[np.float32]
LabelArray = NDArray[np.int64]

MAX_PIXEL_SIDE = 64
_PIXEL_GRID = 32


class ImageBatch(Protocol):
    """The part of a batch that features need.

    `images_BCHW` (B, 3, H, W) uint8, `labels_B` (B,) int64, `weights_B` (B,) float32: 0 on rows that only pad.
    """

    @property
    def images_BCHW(self) -> Tensor: ...  # noqa: D102

    @property
    def labels_B(self) -> Tensor: ...  # noqa: D102

    @property
    def weights_B(self) -> Tensor: ...  # noqa: D102


class Encoder(Protocol):
    """A model whose `encode` maps (B, 3, H, W) to tokens (B, T, D), the class token first."""

    training: bool

    def encode(self, images: Tensor, /) -> Tensor: ...  # noqa: D102

    def train(self, mode: bool = True) -> object: ...  # noqa: D102


@dataclass(frozen=True)
class Features:
    """Features of N images.

    Attributes:
        mean_ND: Mean of the patch tokens, class token excluded.
        cls_ND: Class token.
        labels_N: Class of each image, -1 where it has none.
    """

    mean_ND: FloatArray
    cls_ND: FloatArray
    labels_N: LabelArray

    def of(self, token: Token) -> FloatArray:
        """What a probe reads: (N, D), or (N, 2 D) of both, the class token first."""
        if token == "both":
            return np.concatenate([self.cls_ND, self.mean_ND], axis=1)
        return self.cls_ND if token == "cls" else self.mean_ND

    def rows(self, numbers: NDArray[np.int64]) -> "Features":
        """The features of some of the images, in this order."""
        return Features(self.mean_ND[numbers], self.cls_ND[numbers], self.labels_N[numbers])


def joined(parts: Sequence[Features]) -> Features:
    """One set of features after the other."""
    return Features(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Features)))


@torch.inference_mode()
def extract_features(
    model: Encoder,
    batches: Iterable[ImageBatch],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
) -> Features:
    """Encodes every image once, unmasked, and leaves the model in the mode it was in.

    Args:
        model: Already on `device`.
        batches: Images as uint8; padding rows (weight 0) are dropped.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        device: Where the images go.

    Raises:
        ConfigError: There is not one image.
    """
    scale = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255
    shift = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
    means, tokens, labels = [], [], []
    was_training = model.training
    model.train(False)
    try:
        for batch in batches:
            kept_B = batch.weights_B > 0
            images_BCHW = (batch.images_BCHW.to(device).float() - shift) / scale
            latent_BTD = model.encode(images_BCHW)[kept_B.to(device)].float()
            means.append(latent_BTD[:, 1:].mean(dim=1).cpu())
            tokens.append(latent_BTD[:, 0].cpu())
            labels.append(batch.labels_B[kept_B].cpu())
    finally:
        model.train(was_training)
    _require_images(sum(len(part) for part in labels))
    return Features(torch.cat(means).numpy(), torch.cat(tokens).numpy(), torch.cat(labels).numpy())


def raw_pixels(batches: Iterable[ImageBatch]) -> tuple[FloatArray, LabelArray]:
    """The control without a model: pixels in [0, 1], flattened.

    Of images above `MAX_PIXEL_SIDE` a side, which no solver could take, the means over squares on a grid of 32 x 32 are taken.

    Returns:
        pixels_NP float32 with P = 3 H W, or 3 x 32 x 32, and labels_N.

    Raises:
        ConfigError: There is not one image.
    """
    pixels, labels = [], []
    for batch in batches:
        kept_B = batch.weights_B > 0
        images_BCHW = batch.images_BCHW[kept_B].float()
        if max(images_BCHW.shape[-2:]) > MAX_PIXEL_SIDE:
            images_BCHW = functional.adaptive_avg_pool2d(images_BCHW, _PIXEL_GRID)
        pixels.append(images_BCHW.flatten(1).div(255).cpu())
        labels.append(batch.labels_B[kept_B].cpu())
    _require_images(sum(len(part) for part in labels))
    return torch.cat(pixels).numpy(), torch.cat(labels).numpy()


def _require_images(count: int) -> None:
    if count == 0:
        raise ConfigError("no image to take features from: the split is empty; check data.train, data.eval or data.test")
