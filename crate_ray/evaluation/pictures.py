"""Images, reconstructions and maps as pictures for people.

In: uint8 tensors, or a model with normalised images. Out: a grid of tiles as an array, and PNG bytes; files are written
by the caller. The grids need torch alone, so that a bare machine draws them; titles and labels are set by matplotlib,
which is imported where it is used.

Shapes: B images (rows of a grid), C channels, H height, W width, S tile side, N patches, Q pixel values of a patch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Grid = NDArray[np.uint8]

GAP = 4
TILE_SIDE = 96


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
    """Square images side by side on white, GAP pixels apart.

    Args:
        columns: uint8 tensors (B, 3, S, S); row i of the grid holds image i of each.
        tile_side: Side of a tile in pixels. None keeps images of `TILE_SIDE` pixels and more, and enlarges smaller ones by
            whole factors.

    Returns:
        Picture of shape (GAP + B (tile + GAP), GAP + len(columns) (tile + GAP), 3).

    Raises:
        ValueError: No columns, or columns that differ in shape.
    """
    shapes = {tuple(column.shape) for column in columns}
    if len(shapes) != 1:
        raise ValueError(f"the columns of a grid have one shape, these have {sorted(shapes) or 'none'}")
    rows, _, side, _ = shapes.pop()
    tile = tile_side or side * max(1, -(-TILE_SIDE // side))
    pitch = tile + GAP
    canvas = torch.full((3, GAP + rows * pitch, GAP + len(columns) * pitch), 255, dtype=torch.uint8)
    for j, column in enumerate(columns):
        for i, image_CHW in enumerate(resize_tiles(column.cpu(), tile)):
            top, left = GAP + i * pitch, GAP + j * pitch
            canvas[:, top : top + tile, left : left + tile] = image_CHW
    return canvas.permute(1, 2, 0).contiguous().numpy()


def resize_tiles(images_BCHW: Tensor, side: int) -> Tensor:
    """Square uint8 images of another size: smaller with antialiasing, larger by the nearest pixel, so that pixels stay visible."""
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
