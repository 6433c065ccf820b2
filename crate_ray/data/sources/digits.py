"""Real handwritten digits that ship with scikit-learn: 1,797 pictures of 8 x 8 pixels by 43 writers.

Each is drawn at 24 pixels on a black canvas of 32 and set down at random offsets: enough to see a masked autoencoder
learn within minutes on a CPU. Pictures are split before they are drawn; the writers are not recorded, so
a test digit may come from a hand that also wrote training digits.
"""

import json
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from crate_ray.data.sources.source import Source
from crate_ray.data.streams import Purpose, stream

CANVAS = 32
_DRAWN = 24
_SPLIT_SIZES = {"train": 1000, "validation": 197, "test": 600}
_PLACEMENTS = {"train": 12, "validation": 4, "test": 4}
_LARGEST_VALUE = 16


class Placement(NamedTuple):
    """One digit set down at one offset."""

    picture: int
    label: int
    top: int
    left: int


def _stratified(labels: NDArray[np.int64], generator: np.random.Generator) -> dict[str, NDArray[np.int64]]:
    """Split pictures so that every split has each class in the proportion of the whole, up to one picture."""
    share = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    ordered = np.lexsort((labels, share))
    bounds = np.cumsum([0, *_SPLIT_SIZES.values()])
    return {split: ordered[bounds[i] : bounds[i + 1]] for i, split in enumerate(_SPLIT_SIZES)}


def _placements(
    pictures: NDArray[np.int64], labels: NDArray[np.int64], count: int, rng: np.random.Generator
) -> list[Placement]:
    """`count` different uniform offsets for every picture, all in shuffled order."""
    positions = CANVAS - _DRAWN + 1
    placed = [
        Placement(int(picture), int(labels[picture]), *divmod(int(cell), positions))
        for picture in pictures
        for cell in rng.choice(positions**2, count, replace=False)
    ]
    return [placed[i] for i in rng.permutation(len(placed))]


def _render(pictures_PHW: NDArray[np.uint8], item: Placement) -> dict[str, bytes]:
    from torchvision.io import encode_png

    small = torch.from_numpy(pictures_PHW[item.picture]).float()[None, None] * (255 / _LARGEST_VALUE)
    drawn = torch.nn.functional.interpolate(small, size=(_DRAWN, _DRAWN), mode="bilinear", align_corners=False)[0]
    canvas = torch.zeros(3, CANVAS, CANVAS, dtype=torch.uint8)
    canvas[:, item.top : item.top + _DRAWN, item.left : item.left + _DRAWN] = drawn.round().to(torch.uint8)
    fields = {"source": f"digit-{item.picture:04d}", "label": item.label, "placement": [item.top, item.left]}
    return {"png": encode_png(canvas).numpy().tobytes(), "cls": str(item.label).encode(), "json": json.dumps(fields).encode()}


def digits(seed: int) -> Source:
    """Digits of scikit-learn: 12,000 training, 788 validation and 2,400 test samples of 32 x 32 pixels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(np.int64)
    generator = stream(Purpose.BUILD, seed=seed)
    pictures = _stratified(labels, generator)
    splits = {split: _placements(pictures[split], labels, _PLACEMENTS[split], generator) for split in _SPLIT_SIZES}
    render = partial(_render, data.images.astype(np.uint8))
    return Source("digits", [str(digit) for digit in range(10)], splits, render, shard_samples=1000)
