"""Images as patches, where patches lie, and which of them are hidden.

In: images, grid sizes, uniform noise. Out: patch tokens, position tables, a `Masking`.
A patch is one row of pixels in the order (row, column, channel), the order of the published
prediction targets, so the embedding and the loss share one reshape instead of a convolution and a reshape.

Shapes: B batch, N patches, K kept patches, Q pixel values of a patch (3 patch_size^2), D width, C channels, H height, W width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from crate_ray.config import ConfigError


class Masking(NamedTuple):
    """Which patches of each image are hidden."""

    kept: Tensor
    """(B, K) indices of the visible patches, in the order of their noise."""
    masked: Tensor
    """(B, M) indices of the hidden patches, M = N - K."""
    mask: Tensor
    """(B, N) bool, true where hidden."""


def draw_masking(noise_BN: Tensor, num_kept: int) -> Masking:
    """Keeps the patches of the smallest noise, exactly `num_kept` an image; ties go to the first patch."""
    order_BN = torch.argsort(noise_BN, dim=1, stable=True)
    kept_BK, masked_BM = order_BN[:, :num_kept], order_BN[:, num_kept:]
    mask_BN = torch.ones_like(noise_BN, dtype=torch.bool).scatter(1, kept_BK, False)
    return Masking(kept_BK, masked_BM, mask_BN)


def take_tokens(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens at the given positions of each image, (B, K, D)."""
    return x_BND.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """Cuts images into square patches, row by row of the grid: (B, N, Q)."""
    batch, channels, height, width = images_BCHW.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images_BCHW.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches_BNQ: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify` for square images: (B, 3, H, W)."""
    batch, num_patches, values = patches_BNQ.shape
    side = round(num_patches**0.5)
    channels = values // patch_size**2
    cut = patches_BNQ.reshape(batch, side, side, patch_size, patch_size, channels)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, side * patch_size, side * patch_size)


def normalise_patches(patches_BNQ: Tensor) -> Tensor:
    """Each patch at mean 0 and variance 1 (unbiased, as published): the target of `norm_pix_loss`."""
    variance_BN1, mean_BN1 = torch.var_mean(patches_BNQ, dim=-1, keepdim=True)
    return (patches_BNQ - mean_BN1) * torch.rsqrt(variance_BN1 + 1e-6)


def sincos_positions(width: int, grid_side: int) -> Tensor:
    """The fixed two-dimensional position table with a zero row for the class token in front.

    Row 1 + r * grid_side + c is [sin(c w), cos(c w), sin(r w), cos(r w)] with width / 4 frequencies
    w_i = 10000^(-i / (width / 4)) (He et al. 2022, published code; note the column comes first).

    Args:
        width: Values a token, a multiple of 4.
        grid_side: Patches along one side.

    Returns:
        Table of shape (1, 1 + grid_side^2, width), float32, computed in float64.
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(grid_side, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = axis.repeat(grid_side, 1), axis.repeat_interleave(grid_side, dim=0)
    table = torch.cat([columns, rows], dim=1)
    return torch.cat([torch.zeros_like(table[:1]), table]).float().unsqueeze(0)


def interpolate_positions(table_1ND: Tensor, num_patches: int) -> Tensor:
    """A position table for another number of patches: bicubic between patches, the class token's row kept.

    Source: fine-tuning in the published MAE code, after DeiT (align_corners False). It does so with fixed sin-cos tables
    too. `sincos_positions` of the new grid would be as good a table, but not the one that the weights were trained
    with: it counts patches, so that the same place of an image gets another row. Interpolation keeps the place.

    Args:
        table_1ND: (1, 1 + n, D), n the square of a whole number.
        num_patches: Patches of the new grid, the square of a whole number.

    Returns:
        (1, 1 + num_patches, D), float32.

    Raises:
        ConfigError: Patches that make no square.
    """
    old, new = math.isqrt(table_1ND.shape[1] - 1), math.isqrt(num_patches)
    for side, patches in ((old, table_1ND.shape[1] - 1), (new, num_patches)):
        if side**2 != patches or not patches:
            raise ConfigError(f"a position table of {patches} patches is no square grid and cannot be interpolated")
    cls_11D, patches_1ND = table_1ND[:, :1].float(), table_1ND[:, 1:].float()
    grid_1DHW = patches_1ND.transpose(1, 2).reshape(1, -1, old, old)
    resized_1DHW = functional.interpolate(grid_1DHW, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls_11D, resized_1DHW.flatten(2).transpose(1, 2)], dim=1)
