"""Crops of the two photographs that ship with scikit-learn: real JPEG work without a download.

For measuring readers and for trying the path of large images; two photographs teach no representation. The class is the
photograph. Each is first cut into three vertical regions, one a split, and only then enlarged twofold and
cropped, so no pixel (nor an interpolation that saw it) is shared between splits: of its 640 columns training gets 320,
validation and test 160 each. Crops are squares of 224 pixels up to 448, or to the width of the region if that is less.
"""

import json
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.data.images import resize
from crate_ray.data.sources.source import Source
from crate_ray.data.streams import Purpose, stream

_COLUMNS = {"train": (0, 320), "validation": (320, 480), "test": (480, 640)}
_CROPS = {"train": 1600, "validation": 200, "test": 200}
_ENLARGED = 2
_SMALLEST, _LARGEST = 224, 448
_JPEG_QUALITY = 90


class Crop(NamedTuple):
    """A square of an enlarged region of a photograph."""

    photo: int
    split: str
    top: int
    left: int
    side: int


def _regions(photos: list[NDArray[np.uint8]]) -> dict[tuple[int, str], torch.Tensor]:
    """Each region of each photograph, (3, H, W) uint8, enlarged."""
    cut = {
        (number, split): torch.from_numpy(np.ascontiguousarray(photo_HWC[:, start:stop].transpose(2, 0, 1)))
        for number, photo_HWC in enumerate(photos)
        for split, (start, stop) in _COLUMNS.items()
    }
    return {key: resize(region, region.shape[1] * _ENLARGED, region.shape[2] * _ENLARGED) for key, region in cut.items()}


def _crop(split: str, number: int, region_CHW: torch.Tensor, photo: int, seed: int) -> Crop:
    rng = stream(Purpose.BUILD, seed=seed, epoch=list(_COLUMNS).index(split), item=number)
    height, width = region_CHW.shape[1:]
    side = int(rng.integers(_SMALLEST, min(_LARGEST, height, width) + 1))
    return Crop(photo, split, int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1)), side)


def _render(regions: dict[tuple[int, str], torch.Tensor], names: list[str], crop: Crop) -> dict[str, bytes]:
    from torchvision.io import encode_jpeg

    region = regions[crop.photo, crop.split]
    pixels = region[:, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side].contiguous()
    fields = {"source": f"{names[crop.photo]}-{crop.split}", "label": crop.photo, "crop": [crop.top, crop.left, crop.side]}
    return {
        "jpg": encode_jpeg(pixels, quality=_JPEG_QUALITY).numpy().tobytes(),
        "cls": str(crop.photo).encode(),
        "json": json.dumps(fields).encode(),
    }


def photos(seed: int) -> Source:
    """Crops of two photographs: 1,600 for training, 200 each for validation and test."""
    from sklearn.datasets import load_sample_images

    bunch = load_sample_images()
    names = [str(name).rsplit("/", 1)[-1].split(".")[0] for name in bunch.filenames]
    regions = _regions(bunch.images)
    splits = {
        split: [_crop(split, number, regions[number % len(names), split], number % len(names), seed) for number in range(count)]
        for split, count in _CROPS.items()
    }
    return Source("photos", names, splits, partial(_render, regions, names), shard_samples=400)
