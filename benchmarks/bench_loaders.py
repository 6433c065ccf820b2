"""Loader threads beside loader processes: the same samples, decoded and cropped by the same code.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_loaders

JPEGs of 500 x 375 cut from two photographs, quality 95, to 224 pixels (random resized crop), batches of 64. Threads are
`open_reader`; processes are torch's DataLoader, whose items are whole batches of the same plan. CPU time is that of the process
and its children, start of the workers included; the variants take turns, medians of the rounds, and smallest to largest.
"""

import gc
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from crate_ray.data import build_index, load_index, open_reader
from crate_ray.data.order import SampleOrder, global_batch
from crate_ray.data.samples import SampleLoader, Transform
from crate_ray.data.shards import pack_shard

NUM_IMAGES, BATCH, BATCHES, ROUNDS = 512, 64, 32, 5
CROP = {"image_size": 224, "augment": "random_resized_crop", "seed": 0}


class Batches(Dataset[torch.Tensor]):
    """Item i is the images of global batch i; a worker opens the shards for itself."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._loader: SampleLoader | None = None

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, position: int) -> torch.Tensor:
        if self._loader is None:
            torch.set_num_threads(1)
            index = load_index(self._url)
            self._loader = SampleLoader(index, Transform(**CROP), replace=False)
            self._order = SampleOrder(index.shard_sizes, seed=0, lanes=64, window=2048)
        rows = global_batch(self._order, cursor=position * BATCH, size=BATCH)
        buffers = self._loader.allocate(BATCH)
        self._loader.fill(buffers, slice(0, BATCH), rows.sample_ids, rows.epochs)
        return torch.from_numpy(buffers.images_BCHW)


def write_images(folder: Path) -> float:
    """Writes the shards; returns the mean bytes of an image."""
    from sklearn.datasets import load_sample_images
    from torchvision.io import encode_jpeg

    photos = [torch.from_numpy(np.array(photo)).permute(2, 0, 1) for photo in load_sample_images().images]
    generator = np.random.default_rng(0)
    samples = []
    for number in range(NUM_IMAGES):
        photo = photos[number % 2]
        top, left = generator.integers(photo.shape[1] - 375), generator.integers(photo.shape[2] - 500)
        image = photo[:, top : top + 375, left : left + 500].contiguous()
        samples.append({"__key__": f"{number:05d}", "jpg": encode_jpeg(image, quality=95).numpy().tobytes(), "cls": b"0"})
    for shard in range(4):
        (folder / f"{shard}.tar").write_bytes(pack_shard(samples[shard::4]))
    build_index(str(folder))
    return statistics.mean(len(sample["jpg"]) for sample in samples)


def threads(url: str, count: int) -> None:
    """Reads all batches with so many threads."""
    with open_reader(url, global_batch=BATCH, num_loaders=count, **CROP) as reader:
        for _ in range(BATCHES):
            next(reader)


def processes(url: str, count: int) -> None:
    """Reads all batches with so many processes."""
    for _ in DataLoader(Batches(url), batch_size=None, num_workers=count, prefetch_factor=2):
        pass


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(run: Callable[[], None]) -> tuple[float, float]:
    """Milliseconds an image: CPU and wall."""
    gc.collect()
    cpu, wall = cpu_seconds(), time.perf_counter()
    run()
    scale = 1000 / (BATCH * BATCHES)
    return (cpu_seconds() - cpu) * scale, (time.perf_counter() - wall) * scale


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        print(f"{NUM_IMAGES} JPEGs of 500 x 375, {write_images(Path(name)) / 1000:.0f} kB on average")
        variants: dict[str, Callable[[], None]] = {"in line": lambda: threads(name, 0)}
        for count in (1, 2):
            variants[f"{count} thread{'s'[: count - 1]}"] = lambda count=count: threads(name, count)
            variants[f"{count} process{'es'[: 2 * count - 2]}"] = lambda count=count: processes(name, count)
        taken: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
        for turn in range(ROUNDS + 1):
            for variant, run in variants.items():
                figures = measure(run)
                if turn:  # the first round warms caches and imports
                    taken[variant].append(figures)
    print(f"{'':12} CPU ms an image       wall ms an image")
    for variant, figures in taken.items():
        columns = [f"{statistics.median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in zip(*figures, strict=True)]
        print(f"{variant:12} {columns[0]:21} {columns[1]}")


if __name__ == "__main__":
    main()
