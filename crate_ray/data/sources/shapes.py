"""Drawn shapes at any size and in any number, with the class known and the object's mask stored.

One shape of one class lies on a textured background among clutter. Colours, textures, position, size and rotation are
independent of the class, so only the outline tells it. Image i is a function of the seed and i alone.
The mask lets white-box analysis ask whether attention or codes follow the object. Up to 96 pixels images are PNG,
larger ones JPEG, as real data sets of that size are.
"""

import json
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.config import ConfigError
from crate_ray.data.sources.source import Source
from crate_ray.data.streams import Purpose, stream

Plane = NDArray[np.floating]

_LARGEST_PNG = 96
_JPEG_QUALITY = 92
_NUM_CLUTTER = 3
_TEXTURE_CELLS = 9


def _polygon(x: Plane, y: Plane, corners: int) -> Plane:
    """Distance to the nearest side's line of a regular polygon whose corners lie at radius 0.95; negative inside."""
    sector = 2 * math.pi / corners
    angle = np.mod(np.arctan2(y, x) + sector / 2, sector) - sector / 2
    level: Plane = np.hypot(x, y) * np.cos(angle) - 0.95 * math.cos(sector / 2)
    return level


def _flower(x: Plane, y: Plane) -> Plane:
    level: Plane = np.hypot(x, y) - (0.65 + 0.3 * np.cos(5 * np.arctan2(y, x)))
    return level


def _cross(x: Plane, y: Plane) -> Plane:
    across, along = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(across - 0.3, along - 0.95), np.maximum(across - 0.95, along - 0.3))


# Each maps coordinates in [-1, 1] of the shape's own frame to a level that is negative inside.
OUTLINES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "disk": lambda x, y: np.hypot(x, y) - 0.85,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.75,
    "triangle": partial(_polygon, corners=3),
    "flower": _flower,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) - 0.24,
    "cross": _cross,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.9, 0.75 - np.hypot(x - 0.45, y)),
    "ellipse": lambda x, y: np.hypot(x, 2.2 * y) - 0.95,
    "hexagon": partial(_polygon, corners=6),
    "bar": lambda x, y: np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.25),
}


def _texture(size: int, rng: np.random.Generator) -> Plane:
    """Two colours mixed by smooth noise and by stripes of a random direction, (3, S, S) in [0, 1]."""
    colours = rng.random((2, 3), dtype=np.float32)
    cells = rng.random((_TEXTURE_CELLS, _TEXTURE_CELLS), dtype=np.float32)
    noise = torch.nn.functional.interpolate(torch.from_numpy(cells)[None, None], size=(size, size), mode="bilinear")[
        0, 0
    ].numpy()
    angle, frequency, phase, weight = (rng.random(4) * [math.pi, 12, 2 * math.pi, 0.8]).astype(np.float32)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    stripes = 0.5 + 0.5 * np.sin(frequency * (np.cos(angle) * ramp + np.sin(angle) * ramp[:, None]) * math.pi + phase)
    mix = (1 - weight) * noise + weight * stripes
    textured: Plane = colours[0][:, None, None] * mix + colours[1][:, None, None] * (1 - mix)
    return textured


def _coverage(
    outline: Callable[[Plane, Plane], Plane], size: int, rng: np.random.Generator, radius: tuple[float, float]
) -> Plane:
    """How far a shape at a random place, size and rotation covers each pixel, (S, S) in [0, 1], edges antialiased."""
    half = rng.uniform(*radius)
    middle = rng.uniform(half - 1, 1 - half, 2)
    turn = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = (ramp - np.float32(middle[0])) / np.float32(half), (ramp[:, None] - np.float32(middle[1])) / np.float32(half)
    cos, sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    level = outline(cos * x + sin * y, cos * y - sin * x)
    covered: Plane = np.clip(0.5 - level * np.float32(half * size / 2), 0, 1)
    return covered


def draw(index: int, *, seed: int, image_size: int, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], int]:
    """Draw one image.

    Returns:
        The image (3, S, S) uint8, the object's mask (S, S) uint8 with 255 inside, and the class.
    """
    rng = stream(Purpose.BUILD, seed=seed, item=index)
    label = index % num_classes
    image = _texture(image_size, rng)
    for _ in range(int(rng.integers(_NUM_CLUTTER + 1))):
        speck = _coverage(OUTLINES["disk"], image_size, rng, (0.05, 0.15))
        image += speck * (rng.random((3, 1, 1), dtype=np.float32) - image)
    mask = _coverage(list(OUTLINES.values())[label], image_size, rng, (0.4, 0.8))
    image += mask * (_texture(image_size, rng) - image)
    image += rng.normal(0, 0.02, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), (mask >= 0.5).astype(np.uint8) * np.uint8(255), label


def _render(index: int, *, seed: int, image_size: int, num_classes: int) -> dict[str, bytes]:
    from torchvision.io import encode_jpeg, encode_png

    pixels_CHW, mask_HW, label = draw(index, seed=seed, image_size=image_size, num_classes=num_classes)
    image = torch.from_numpy(pixels_CHW)
    small = image_size <= _LARGEST_PNG
    encoded = encode_png(image) if small else encode_jpeg(image, quality=_JPEG_QUALITY)
    fields = {"source": f"shape-{index}", "label": label, "class": list(OUTLINES)[label]}
    return {
        "png" if small else "jpg": encoded.numpy().tobytes(),
        "mask.png": encode_png(torch.from_numpy(mask_HW)[None]).numpy().tobytes(),
        "cls": str(label).encode(),
        "json": json.dumps(fields).encode(),
    }


def shapes(num_images: int, seed: int, *, image_size: int = 64, num_classes: int | None = None) -> Source:
    """`num_images` drawn images of the first `num_classes` shapes, split 80 / 10 / 10.

    Raises:
        ConfigError: For fewer than ten images, a size under 8 pixels, or more classes than there are shapes.
    """
    classes = list(OUTLINES)[: num_classes if num_classes is not None else len(OUTLINES)]
    if num_images < 10 or image_size < 8 or len(classes) < 1 or len(classes) != (num_classes or len(classes)):
        given = f"{num_images:,} images at {image_size} pixels" + ("" if num_classes is None else f" in {num_classes} classes")
        raise ConfigError(
            f"shapes:{num_images}: {given} cannot be drawn; "
            f"it takes 10 images or more, 8 pixels or more and 1 to {len(OUTLINES)} classes"
        )
    bounds = [0, num_images * 8 // 10, num_images * 9 // 10, num_images]
    splits = {split: range(bounds[i], bounds[i + 1]) for i, split in enumerate(("train", "validation", "test"))}
    render = partial(_render, seed=seed, image_size=image_size, num_classes=len(classes))
    return Source(
        f"shapes:{num_images}", classes, splits, render, 2000, {"image_size": image_size, "num_classes": len(classes)}
    )
