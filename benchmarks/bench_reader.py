"""What does an image cost on its way from a shard into a batch? CPU time, beside the published pipelines and the bare decoder.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_reader --work DIR            # about five minutes on an idle machine
    OMP_NUM_THREADS=1 python -m benchmarks.bench_reader --work DIR --ray      # Ray Data too: starts Ray on this machine

The images come from benchmarks/make_jpegs.py, written to DIR once. All pipelines cut a random box of 20 to 100 per cent of the
area, resize it bicubically to 224 x 224 and mirror half of the images:
  ours        open_reader, threads, uint8
  webdataset  WebDataset, torchvision decode and v2 transforms on uint8, worker processes of a DataLoader
  MAE recipe  that of facebookresearch/mae: PIL and v1 transforms over an image folder, float32, DataLoader
  Ray Data    read_webdataset with the webdataset row's transforms, through map
  decode      libjpeg-turbo alone, the whole image, from memory: simplejpeg if installed, else torchvision

A round opens every pipeline in turn, lets it run in and then counts the CPU time of this process and its children over a
fixed number of images, so that start-up and what is read ahead stay out, and a busy minute of the machine hits all alike. One
loader runs on one core, two on two; the processes of Ray run where they like, and two is the number of its map tasks. Printed
as Markdown: medians over rounds, smallest to largest, ratios round by round, goals.
"""

import argparse
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.make_jpegs import KINDS, Kind, make
from crate_ray.data import epoch_order, load_index, open_reader
from crate_ray.data.images import decode, random_resized_crop
from crate_ray.data.samples import SampleLoader, Transform
from crate_ray.data.streams import Purpose, stream

SIDE = 224
SCALE = (0.2, 1.0)
BATCH = {"small": 64, "large": 8}  # what is on its way at either end of a count is at most a batch
WARM_BATCHES = 5  # our reader keeps four ahead, a DataLoader two a worker
MEASURED = {"small": 1024, "large": 192}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GOAL_MS, GOAL_RAW_RATIO, GOAL_TWO_LOADERS = 2.0, 5.0, 1.1

Batches = Generator[Any, None, None]
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Set:
    """One kind of images on disk."""

    kind: Kind
    folder: Path

    @property
    def shards(self) -> str:
        """Folder of the shards with their index."""
        return str(self.folder / "shards")

    @property
    def urls(self) -> list[str]:
        """The shards."""
        return sorted(str(path) for path in (self.folder / "shards").glob("*.tar"))


def ours(data: Set, num_loaders: int) -> Batches:
    """Batches of our reader."""
    with open_reader(
        data.shards,
        global_batch=BATCH[data.kind.name],
        image_size=SIDE,
        num_loaders=num_loaders,
        augment="random_resized_crop",
        crop_scale=SCALE,
    ) as reader:
        yield from reader


def _epochs(loader: Any) -> Batches:
    while True:
        yield from loader


def _data_loader(dataset: Any, *, batch_size: int | None, workers: int, shuffle: bool) -> Any:
    return torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, shuffle=shuffle, num_workers=workers, persistent_workers=True, drop_last=shuffle
    )


def mae_recipe(data: Set, num_loaders: int) -> Batches:
    """Batches as the published MAE code makes them."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIDE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    dataset = datasets.ImageFolder(str(data.folder / "images"), transform=transform)
    yield from _epochs(_data_loader(dataset, batch_size=BATCH[data.kind.name], workers=num_loaders, shuffle=True))


def _uint8_transform() -> Callable[[bytes], torch.Tensor]:
    """Decode with torchvision, then its v2 transforms on uint8."""
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )

    def transform(encoded: bytes) -> torch.Tensor:
        image: torch.Tensor = crop(
            decode_image(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), mode=ImageReadMode.RGB)
        )
        return image

    return transform


def web_dataset(data: Set, num_loaders: int) -> Batches:
    """Batches of webdataset with the fastest transforms of torchvision."""
    import webdataset as wds

    dataset = wds.WebDataset(data.urls, shardshuffle=False, nodesplitter=wds.split_by_node)
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(_uint8_transform(), int).batched(BATCH[data.kind.name], partial=False)
    yield from _epochs(_data_loader(dataset.repeat(), batch_size=None, workers=num_loaders, shuffle=False))


def ray_data(data: Set, num_loaders: int) -> Batches:
    """Batches of Ray Data; the cluster is this machine's and runs on."""
    import ray

    transform = _uint8_transform()

    def row(sample: dict[str, Any]) -> dict[str, Any]:
        return {"image": transform(sample["jpg"]).numpy(), "label": int(sample["cls"])}

    dataset = ray.data.read_webdataset(data.urls, decoder=None).map(row, compute=ray.data.TaskPoolStrategy(size=num_loaders))
    while True:
        yield from dataset.iter_batches(batch_size=BATCH[data.kind.name])


def bare_decoder() -> tuple[str, Callable[[bytes], Any]]:
    """The leanest way here to libjpeg-turbo, and its name."""
    try:
        import simplejpeg
    except ImportError:
        from torchvision.io import decode_jpeg

        return "torchvision", lambda encoded: decode_jpeg(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
    return "simplejpeg", simplejpeg.decode_jpeg


def cpu_s() -> float:
    """CPU time of this process and all its living children, in seconds."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measure_pipeline(pipeline: Callable[[Set, int], Batches], data: Set, num_loaders: int) -> float:
    """Milliseconds of CPU an image, once it runs, on as many cores as it has loaders."""
    batch = BATCH[data.kind.name]
    # Ray Data reads ahead as far as its object store allows, so it is counted over a whole execution, after a whole one.
    warm_batches = MEASURED[data.kind.name] // batch if pipeline is ray_data else WARM_BATCHES
    batches = pipeline(data, num_loaders)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:num_loaders])
    try:
        with closing(batches):
            for _ in islice(batches, warm_batches):
                pass
            before, count = cpu_s(), 0
            while count < MEASURED[data.kind.name]:
                next(batches)
                count += batch
            return (cpu_s() - before) / count * 1e3
    finally:
        os.sched_setaffinity(0, cores)


def _each(function: Callable[[Any], object], items: list[Any]) -> float:
    """Milliseconds of CPU a call."""
    before = time.process_time()
    for item in items:
        function(item)
    return (time.process_time() - before) / len(items) * 1e3


def measure_parts(data: Set) -> dict[str, float]:
    """Milliseconds of CPU an image of the parts of our path, and of the bare decoder."""
    transform = Transform(SIDE, "random_resized_crop", SCALE)
    loader = SampleLoader(load_index(data.shards), transform, replace=False)
    ids = list(range(min(data.kind.num_images, 256)))
    encoded = [bytes(loader.read(i)) for i in ids]
    some = ids[:32]
    decoded = {i: decode(encoded[i]) for i in some}

    def crop(i: int) -> torch.Tensor:
        generator = stream(Purpose.CROP, seed=0, epoch=0, item=i)
        return random_resized_crop(decoded[i], SIDE, scale=SCALE, flip=True, generator=generator)

    _, bare = bare_decoder()
    parts = {
        "read and hash": _each(loader.read, ids),
        "decode": _each(decode, encoded),
        "crop, resize, mirror": _each(crop, some * 4),
        "bare decode": _each(bare, encoded),
    }
    loader.close()
    return parts


def measure_raw(data: Set) -> dict[str, float]:
    """Samples a second of CPU, images as bytes: ours by index in the order of an epoch and hashed, webdataset in file order."""
    import webdataset as wds

    index = load_index(data.shards)
    loader = SampleLoader(index, Transform(SIDE), replace=False)
    order = epoch_order(index.shard_sizes, seed=0, epoch=0, lanes=64, window=2048).tolist()
    passes = max(1, 2048 // len(order))
    before = time.process_time()
    for sample_id in order * passes:
        bytes(loader.read(sample_id))
    ours_s = time.process_time() - before
    loader.close()
    before = time.process_time()
    count = sum(len(sample["jpg"]) > 0 for sample in wds.WebDataset(data.urls, shardshuffle=False))
    return {"ours": len(order) * passes / ours_s, "webdataset": count / (time.process_time() - before)}


def summary(values: list[float], digits: int = 2) -> str:
    """The median, and the smallest to the largest."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    for cells in (header, ("---",) * len(header), *rows):
        print("| " + " | ".join(cells) + " |")
    print()


def bench(data: Set, rounds: int, *, with_ray: bool) -> dict[str, bool]:
    """Measure and print one kind of images; which goals are met."""
    pipelines = {"ours": ours, "webdataset": web_dataset, "MAE recipe": mae_recipe}
    if with_ray:
        pipelines["Ray Data"] = ray_data
    spent: Samples = {}
    for number in range(rounds + 1):  # the first only warms caches
        found = {
            f"{name}, {count}": measure_pipeline(pipeline, data, count)
            for name, pipeline in pipelines.items()
            for count in (1, 2)
        }
        found |= measure_parts(data) | {f"raw {name}": rate for name, rate in measure_raw(data).items()}
        for name, value in found.items() if number else ():
            spent.setdefault(name, []).append(value)
    return report(data, spent, list(pipelines))


def report(data: Set, spent: Samples, pipelines: list[str]) -> dict[str, bool]:
    """Print the tables of one kind; which goals are met."""
    kind, mean_bytes = data.kind, float(load_index(data.shards).column("size").mean())
    print(f"## {kind.width} x {kind.height}, {mean_bytes / 1e3:.0f} KB, {kind.num_images} images\n")
    print("CPU ms an image, from the file into a batch of a running pipeline:\n")
    rows = []
    for name in pipelines:
        one, two = spent[f"{name}, 1"], spent[f"{name}, 2"]
        others = (f"{ratio(one, spent['ours, 1']):.2f}", f"{ratio(one, spent['bare decode']):.2f}")
        rows.append((name, summary(one), summary(two), f"{ratio(two, one):.2f}", *others))
    rows.append((f"decode ({bare_decoder()[0]})", summary(spent["bare decode"]), "", "", "", "1.00"))
    print_table(("pipeline", "1 loader", "2 loaders", "2 / 1", "/ ours", "/ decode"), rows)
    parts = ("read and hash", "decode", "crop, resize, mirror")
    print("Where ours goes, ms: " + "; ".join(f"{part} {statistics.median(spent[part]):.3f}" for part in parts), end="")
    rest = statistics.median(spent["ours, 1"]) - sum(statistics.median(spent[part]) for part in parts)
    print(f"; the rest (order, threads, copy into the batch) {rest:.3f}\n")
    print("Reading alone, images as bytes, a second of CPU:\n")
    raw = {name: spent[f"raw {name}"] for name in ("ours", "webdataset")}
    rows = [(name, summary(rates, 0), f"{statistics.median(rates) * mean_bytes / 1e6:,.0f}") for name, rates in raw.items()]
    print_table(("reader", "samples", "MB"), rows)
    return print_goals(kind, spent, raw)


def print_goals(kind: Kind, spent: Samples, raw: Samples) -> dict[str, bool]:
    """Print and return which goals are met; cost and rate have goals for small images only."""
    one, two = spent["ours, 1"], spent["ours, 2"]
    loaders = ratio(two, one)
    goals = {f"two loaders {loaders:.2f} x one, at most {GOAL_TWO_LOADERS}": loaders <= GOAL_TWO_LOADERS}
    if kind.name == "small":
        reading = ratio(raw["ours"], raw["webdataset"])
        cost = statistics.median(one)
        goals[f"end to end {cost:.2f} ms, at most {GOAL_MS}"] = cost <= GOAL_MS
        goals[f"reading alone {reading:.1f} x webdataset, at least {GOAL_RAW_RATIO}"] = reading >= GOAL_RAW_RATIO
    for text, is_met in goals.items():
        print(f"- {'met' if is_met else 'MISSED'}: {text}")
    print()
    return goals


def start_ray() -> None:
    """A cluster of this machine for this process, unless another one runs here."""
    if any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        raise SystemExit("another Ray cluster runs on this machine; its processes would be measured too")
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=512 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def main() -> None:
    """Both kinds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True, help="folder of the images, 350 MB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], action="append", help="by default both")
    parser.add_argument("--ray", action="store_true", help="Ray Data too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = [Set(kind, make(options.work, kind)) for kind in KINDS if kind.name in (options.kind or ("small", "large"))]
    if options.ray:
        start_ray()
    import torchvision
    import webdataset

    load = os.getloadavg()[0]
    print(
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}, webdataset {webdataset.__version__}, numpy {np.__version__}; {os.cpu_count()} cores, load "
        f"{load:.1f} at the start; {options.rounds} rounds\n"
    )
    goals = [is_met for data in sets for is_met in bench(data, options.rounds, with_ray=options.ray).values()]
    print(f"load {os.getloadavg()[0]:.1f} at the end; {sum(goals)} of {len(goals)} goals met")


if __name__ == "__main__":
    main()
