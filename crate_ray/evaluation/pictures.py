"""Images, reconstructions and maps as grids of tiles.

In: uint8 tensors, or a masked autoencoder with normalised images and mask noise. Out: a grid as an array, and the bytes of
a PNG; files are written by the caller. Everything here needs torch alone, so that a bare machine draws it too; titles and
labels are `evaluation.figures`.

Shapes: B images (rows of a grid), C channels, H height, W width, N patches, Q pixel values of a patch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from crate_ray.models import MaskedAutoencoder
from crate_ray.models.patches import patchify, unpatchify

Grid = NDArray[np.uint8]

GAP = 4
TILE_SIDE = 96
HIDDEN_GREY = 128


class Reconstruction(NamedTuple):
    """What a masked autoencoder makes of images, in the normalised pixels that it was given: (B, 3, H, W) each."""

    visible: Tensor
    """The images, NaN where hidden: `to_pixels` paints that grey."""
    pasted: Tensor
    """The prediction where hidden, the image itself where visible."""
    predicted: Tensor
    """The prediction everywhere. No loss was ever taken on visible patches, so what stands there means little."""


@torch.inference_mode()
def reconstruct(model: MaskedAutoencoder, images_BCHW: Tensor, noise_BN: Tensor) -> Reconstruction:
    """Predicts hidden patches, in float32.

    A model with `norm_pix_loss` predicts patches of mean 0 and variance 1. Its prediction is put back with each patch's own
    mean and (unbiased) variance, hidden ones included, as every published picture of such a model: brightness and contrast
    of hidden patches are then the image's, only the pattern within a patch is the model's.

    Args:
        model: In evaluation mode or not; it has no dropout.
        images_BCHW: Normalised images on the model's device.
        noise_BN: The patches of the smallest values are visible.
    """
    output = model(images_BCHW, noise_BN)
    patch_size = model.config.patch_size
    patches_BNQ = patchify(images_BCHW, patch_size)
    predicted_BNQ = output.pred.float()
    if model.config.norm_pix_loss:
        variance_BN1, mean_BN1 = torch.var_mean(patches_BNQ, dim=-1, keepdim=True)
        predicted_BNQ = predicted_BNQ * (variance_BN1 + 1e-6).sqrt() + mean_BN1
    hidden_BN1 = output.mask.bool().unsqueeze(-1)
    parts = (
        patches_BNQ.masked_fill(hidden_BN1, torch.nan),
        torch.where(hidden_BN1, predicted_BNQ, patches_BNQ),
        predicted_BNQ,
    )
    return Reconstruction(*(unpatchify(part, patch_size) for part in parts))


def to_pixels(images_BCHW: Tensor, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images as uint8 on the CPU, clipped to what a screen shows; NaN becomes grey.

    Args:
        images_BCHW: (x / 255 - mean) / std, a channel at a time.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
    """
    scale, shift = (torch.tensor(values).view(1, 3, 1, 1) for values in (std, mean))
    pixels = (images_BCHW.cpu().float() * scale + shift) * 255
    return pixels.nan_to_num(HIDDEN_GREY).round().clamp(0, 255).to(torch.uint8)


def reconstruction_grid(
    images_BCHW: Tensor, masked_BCHW: Tensor, reconstructions: Sequence[Tensor], *, tile_side: int | None = None
) -> Grid:
    """A row an image: original, what the model saw, then each reconstruction.

    Args:
        images_BCHW: uint8, RGB.
        masked_BCHW: uint8, the same images with hidden patches painted over.
        reconstructions: uint8 images of the same shape, one column each.
        tile_side: See `tile_grid`.

    Returns:
        Picture of shape (height, width, 3).

    Raises:
        ValueError: The columns differ in shape.
    """
    return tile_grid([images_BCHW, masked_BCHW, *reconstructions], tile_side=tile_side)


def tile_grid(columns: Sequence[Tensor], *, tile_side: int | None = None) -> Grid:
    """Square images side by side on white, `GAP` pixels apart.

    Args:
        columns: uint8 tensors (B, 3, S, S); row i of the grid holds image i of each.
        tile_side: Side of a tile in pixels; None takes `default_tile`.

    Returns:
        Picture of shape (GAP + B (tile + GAP), GAP + len(columns) (tile + GAP), 3).

    Raises:
        ValueError: No columns, or columns that differ in shape.
    """
    shapes = {tuple(column.shape) for column in columns}
    if len(shapes) != 1:
        raise ValueError(f"the columns of a grid have one shape, these have {sorted(shapes) or 'none'}")
    rows, _, side, _ = shapes.pop()
    tile = tile_side or default_tile(side)
    pitch = tile + GAP
    canvas = torch.full((3, GAP + rows * pitch, GAP + len(columns) * pitch), 255, dtype=torch.uint8)
    for j, column in enumerate(columns):
        for i, image_CHW in enumerate(resize_tiles(column.cpu(), tile)):
            top, left = GAP + i * pitch, GAP + j * pitch
            canvas[:, top : top + tile, left : left + tile] = image_CHW
    return canvas.permute(1, 2, 0).contiguous().numpy()


def default_tile(side: int) -> int:
    """Side of the tile that an image is shown in: itself, or the whole multiple that first reaches `TILE_SIDE`."""
    return side * max(1, -(-TILE_SIDE // side))


def resize_tiles(images_BCHW: Tensor, side: int) -> Tensor:
    """Square uint8 images of another size: reduced with antialiasing, enlarged by the nearest pixel so that pixels show."""
    if images_BCHW.shape[-1] == side:
        return images_BCHW
    if images_BCHW.shape[-1] < side:
        return functional.interpolate(images_BCHW, size=(side, side), mode="nearest-exact")
    return functional.interpolate(images_BCHW, size=(side, side), mode="bilinear", antialias=True)


def encode_png(picture: Grid) -> bytes:
    """A picture (height, width, 3) uint8 as the bytes of a PNG file."""
    from torchvision.io import encode_png as encode

    encoded: Tensor = encode(torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))))
    return encoded.numpy().tobytes()
