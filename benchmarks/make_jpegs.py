"""Photograph-like JPEGs without photographs: noise with the spectrum of natural images, as shards and as an image folder.

    python -m benchmarks.make_jpegs DIR

In: a folder. Out: `DIR/{small,large}/shards` with index and `DIR/{small,large}/images/0..9/*.jpg`, the same files in both, the
same bytes on every machine with one build of Pillow. The amplitude falls as a power of the spatial frequency, chosen so that
`small` (500 x 375 and 375 x 500, quality 90) has about 100 KB an image and `large` (1600 x 1200, quality 85) about 740 KB.
What noise lacks is smooth areas, so the share of entropy decoding is like that of detailed photographs.
"""

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crate_ray.data import build_index, load_index
from crate_ray.data.shards import pack_shard

NUM_CLASSES = 10
SHARED, OWN = 0.85, 0.5
"""How much of a pixel all channels share, and how much each has of its own."""
CONTRAST = 60.0


@dataclass(frozen=True)
class Kind:
    """One set of images: their number, sides, JPEG quality and the exponent of their spectrum."""

    name: str
    num_images: int
    width: int
    height: int
    quality: int
    exponent: float
    images_per_shard: int


KINDS = (
    Kind("small", 1024, 500, 375, quality=90, exponent=1.25, images_per_shard=128),
    Kind("large", 96, 1600, 1200, quality=85, exponent=1.2, images_per_shard=32),
)


def draw_pixels(seed: int, *, height: int, width: int, exponent: float) -> NDArray[np.uint8]:
    """One image, (height, width, 3): noise with amplitude frequency ** -exponent."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no mean
    channels = []
    for _ in range(3):
        spectrum = frequency**-exponent * np.exp(2j * np.pi * random.random(frequency.shape))
        channel = np.fft.irfft2(spectrum, s=(height, width))
        channels.append(channel / channel.std())
    noise = np.stack(channels, axis=-1)
    return np.clip(128 + CONTRAST * (SHARED * noise[..., :1] + OWN * noise), 0, 255).astype(np.uint8)


def draw_jpeg(kind: Kind, number: int) -> bytes:
    """One file; every other one stands upright where the kind is small."""
    is_upright = kind.name == "small" and number % 2 == 1
    height, width = (kind.width, kind.height) if is_upright else (kind.height, kind.width)
    pixels = draw_pixels(number, height=height, width=width, exponent=kind.exponent)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=kind.quality)
    return encoded.getvalue()


def _samples(kind: Kind) -> Iterator[tuple[str, int, bytes]]:
    for number in range(kind.num_images):
        yield f"{number:06d}", number % NUM_CLASSES, draw_jpeg(kind, number)


def make(folder: Path, kind: Kind) -> Path:
    """Write one kind, unless it is there; return its folder."""
    out = folder / kind.name
    if (out / "shards" / "samples.parquet").exists() and load_index(str(out / "shards")).num_samples == kind.num_images:
        return out
    (out / "shards").mkdir(parents=True, exist_ok=True)
    members: list[dict[str, bytes | str]] = []
    for key, label, jpeg in _samples(kind):
        path = out / "images" / str(label) / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
        members.append({"__key__": key, "jpg": jpeg, "cls": str(label).encode(), "json": json.dumps({"id": key}).encode()})
        if len(members) == kind.images_per_shard:
            number = int(key) // kind.images_per_shard
            (out / "shards" / f"{kind.name}-{number:04d}.tar").write_bytes(pack_shard(members))
            members = []
    assert not members, "images_per_shard divides num_images"
    build_index(str(out / "shards"))
    return out


def main() -> None:
    """Write all kinds and say how large their images are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for kind in KINDS:
        sizes = load_index(str(make(folder, kind) / "shards")).column("size")
        print(f"{kind.name}: {len(sizes)} images, mean {sizes.mean() / 1e3:.1f} KB")


if __name__ == "__main__":
    main()
