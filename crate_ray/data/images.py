"""From the bytes of an image to pixels of the size a model takes.

In: JPEG, PNG or WebP bytes from strangers. Out: uint8 tensors (3, S, S), RGB; the device normalises them.
The size is read from the file's header first (headers.py) and refused when too large. torchvision decodes (a third faster
than PIL); resizing is bicubic with antialiasing on uint8, which agrees with PIL to one level. Orientation tags are ignored,
as in the published pipelines.
"""

import math
import re
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.data.headers import DEFAULT_MAX_PIXELS, ImageError, check_size, read_header
from crate_ray.data.png import SIGNATURE, checked_png
from crate_ray.data.shards import Buffer
from crate_ray.data.streams import Purpose, stream

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "Augmentation",
    "ImageError",
    "center_crop",
    "crop_box",
    "decode",
    "mask_noise",
    "random_resized_crop",
    "read_header",
    "resize",
]

Augmentation = Literal["none", "random_resized_crop"]

_ASPECT = (3 / 4, 4 / 3)
_CROP_TRIES = 10
_SOURCE_LINE = re.compile(r"\S+\.cpp:\d+, ")  # of torchvision, in its messages


def decode(data: Buffer, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> torch.Tensor:
    """Decode an image to RGB, (3, H, W) uint8. Grey is repeated, alpha dropped, CMYK converted, 16 bits cut to 8.

    Args:
        data: The file's bytes.
        max_pixels: Images whose header declares more are refused before decoding.

    Raises:
        ImageError: When the image is too large or cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_image

    check_size(data, max_pixels=max_pixels)
    # A bytearray, because torch warns of tensors over memory that it may not write.
    safe = checked_png(data) if bytes(data[: len(SIGNATURE)]) == SIGNATURE else data
    encoded = torch.frombuffer(bytearray(safe), dtype=torch.uint8)
    try:
        image: torch.Tensor = decode_image(encoded, mode=ImageReadMode.RGB)
    except RuntimeError as error:
        raise ImageError(f"it cannot be decoded: {_SOURCE_LINE.sub('', str(error).splitlines()[0])}") from None
    return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image


def resize(image_CHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize a uint8 image, bicubic with antialiasing; the image itself when it has that size."""
    if image_CHW.shape[-2:] == (height, width):
        return image_CHW
    resized: torch.Tensor = torch.nn.functional.interpolate(
        image_CHW[None], size=(height, width), mode="bicubic", antialias=True
    )
    return resized[0]


def center_crop(image_CHW: torch.Tensor, image_size: int) -> torch.Tensor:
    """Resize the shorter side to 256/224 of `image_size`, then cut the central square; identity at exactly that size."""
    height, width = image_CHW.shape[-2:]
    if height == width == image_size:
        return image_CHW
    scale = round(image_size * 256 / 224) / min(height, width)
    resized = resize(image_CHW, max(image_size, round(height * scale)), max(image_size, round(width * scale)))
    top, left = (resized.shape[-2] - image_size) // 2, (resized.shape[-1] - image_size) // 2
    return resized[:, top : top + image_size, left : left + image_size]


def crop_box(height: int, width: int, scale: tuple[float, float], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw the box (top, left, height, width) of a random resized crop (Szegedy et al. 2015, as in torchvision).

    The area is uniform in `scale` times the image's, the logarithm of the aspect ratio uniform between 3/4 and 4/3. After ten
    boxes that do not fit, the largest central box within those ratios is taken. Always draws the same count of numbers.
    """
    draws = generator.random((_CROP_TRIES, 4))
    log_ratio = math.log(_ASPECT[0]), math.log(_ASPECT[1])
    for u_area, u_ratio, u_top, u_left in draws.tolist():
        area = height * width * (scale[0] + u_area * (scale[1] - scale[0]))
        ratio = math.exp(log_ratio[0] + u_ratio * (log_ratio[1] - log_ratio[0]))
        box_height, box_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < box_height <= height and 0 < box_width <= width:
            return int(u_top * (height - box_height + 1)), int(u_left * (width - box_width + 1)), box_height, box_width
    box_height, box_width = min(height, round(width / _ASPECT[0])), min(width, round(height * _ASPECT[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_resized_crop(
    image_CHW: torch.Tensor, image_size: int, *, scale: tuple[float, float], flip: bool, generator: np.random.Generator
) -> torch.Tensor:
    """Cut a random box, resize it to (3, S, S) and mirror half of the images when `flip`."""
    top, left, height, width = crop_box(image_CHW.shape[-2], image_CHW.shape[-1], scale, generator)
    mirrored = generator.random() < 0.5
    cropped = resize(image_CHW[:, top : top + height, left : left + width], image_size, image_size)
    return cropped.flip(-1) if flip and mirrored else cropped


def mask_noise(length: int, *, seed: int, epoch: int, sample_id: int) -> NDArray[np.float32]:
    """Uniform float32 noise in [0, 1) that decides which patches of a sample are masked, (length,)."""
    return stream(Purpose.NOISE, seed=seed, epoch=epoch, item=sample_id).random(length, dtype=np.float32)
