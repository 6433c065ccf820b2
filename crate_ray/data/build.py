"""Building a data set: a source's samples become shards, index and a note of how they were made.

In: the name of a source and a folder. Out: OUT/{train,validation,test}/ with `*.tar`, `samples.parquet`, `shards.parquet`,
and OUT/dataset.json. The note is written first, marked unfinished, so that an interrupted build continues where it stopped
and nothing is ever mixed with another source, seed or size. A shard is made in memory and put down whole:
one that exists is complete. The price is a shard's size in memory for each worker process.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from crate_ray import storage
from crate_ray.config import ConfigError
from crate_ray.data.indexing import build_index, writing_to
from crate_ray.data.schema import SCHEMA_VERSION
from crate_ray.data.shards import pack_shard
from crate_ray.data.sources.source import SPLITS, Source
from crate_ray.data.workers import map_with

logger = logging.getLogger(__name__)

DATASET_FILE = "dataset.json"
_KNOWN = "digits, photos, shapes:N, folder:DIR, imagenet:DIR"
_UNWRITABLE = "make room there, or choose another folder"
_SAMPLES_WORTH_A_POOL = 20_000


@dataclass(frozen=True)
class BuildSummary:
    """What a build left behind.

    Attributes:
        out: The folder.
        source: The source as the user named it.
        classes: Name of each class; the label is the position.
        counts: Samples in each split.
        digests: Digest of each split's shards.
        reused: True when the folder already held exactly this and nothing was done.
    """

    out: str
    source: str
    classes: list[str]
    counts: dict[str, int]
    digests: dict[str, str]
    reused: bool


@dataclass(frozen=True)
class _ShardTask:
    """One shard to write: its file, the number of its first sample, its items."""

    uri: str
    split: str
    first: int
    items: Sequence[Any]
    render: Callable[[Any], dict[str, bytes]]


def make_source(source: str, *, seed: int = 0, image_size: int | None = None, num_classes: int | None = None) -> Source:
    """Find a source by name and plan its splits.

    Args:
        source: `digits`, `photos`, `shapes:N`, `folder:DIR` or `imagenet:DIR`.
        seed: Decides the split and whatever is drawn at random.
        image_size: Side in pixels; only of `shapes`, which can be drawn at any size.
        num_classes: Number of classes; only of `shapes`.

    Raises:
        ConfigError: For an unknown source, a bad argument, or a setting that the source does not have.
    """
    kind, _, argument = source.partition(":")
    if kind != "shapes" and (image_size, num_classes) != (None, None):
        raise ConfigError(f"image_size and num_classes belong to shapes:N; {source} keeps its own sizes and classes")
    if source == "digits":
        from crate_ray.data.sources.digits import digits

        return digits(seed)
    if source == "photos":
        from crate_ray.data.sources.photos import photos

        return photos(seed)
    if kind == "shapes":
        if not argument.isdecimal():
            raise ConfigError(f"{source!r}: say how many images to draw: shapes:1000")
        from crate_ray.data.sources.shapes import shapes

        return shapes(int(argument), seed, image_size=image_size or 64, num_classes=num_classes)
    if kind in ("folder", "imagenet") and argument:
        from crate_ray.data.sources.files import folder, imagenet

        return (folder if kind == "folder" else imagenet)(argument, seed)
    raise ConfigError(f"unknown source {source!r}; known are {_KNOWN}")


def _tasks(source: Source, out: str) -> list[_ShardTask]:
    """Cut each split into at least two shards of nearly equal counts."""
    tasks = []
    for split, items in source.splits.items():
        num_shards = max(min(2, len(items)), -(-len(items) // source.shard_samples))
        bounds = [i * len(items) // num_shards for i in range(num_shards + 1)]
        for number, (start, stop) in enumerate(pairwise(bounds)):
            uri = storage.join(out, split, f"{split}-{number:06d}.tar")
            tasks.append(_ShardTask(uri, split, start, items[start:stop], source.render))
    return tasks


def _samples(task: _ShardTask) -> Iterator[dict[str, bytes | str]]:
    for number, item in enumerate(task.items, task.first):
        yield {"__key__": f"{task.split}-{number:08d}", **task.render(item)}


def _write(task: _ShardTask) -> int:
    """Write one shard unless it is there already; return its number of samples."""
    if not storage.exists(task.uri):
        content = pack_shard(_samples(task))
        with writing_to(task.uri, _UNWRITABLE):
            storage.write_atomic(task.uri, content)
    return len(task.items)


def _write_all(tasks: list[_ShardTask], workers: int | None, progress: Callable[[int, int], None] | None) -> None:
    """Write the shards, in processes of their own when there are samples enough to pay for starting these."""
    total, done = sum(len(task.items) for task in tasks), 0
    if workers is None:
        workers = min(len(tasks), os.cpu_count() or 1) if total >= _SAMPLES_WORTH_A_POOL else 1
    for _, count in map_with(workers)(_write, tasks):
        done += count
        if progress:
            progress(done, total)


def _flat(note: dict[str, Any]) -> dict[str, Any]:
    """What decides a data set, with the options of its source under their own names and the long list of classes last."""
    options: dict[str, Any] = note.get("options", {})
    rest = {key: value for key, value in note.items() if key not in ("options", "classes")}
    return {**rest, **options, "classes": note.get("classes")}


def _claim(out: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The note of a finished identical build, or None after marking the folder as being built.

    Raises:
        ConfigError: When the folder holds something else.
    """
    uri = storage.join(out, DATASET_FILE)
    if storage.exists(uri):
        note: dict[str, Any] = json.loads(storage.read_text(uri))
        stated, asked = _flat(note), _flat(identity)
        if differing := [key for key in asked if stated.get(key) != asked[key]]:
            key = differing[0]
            raise ConfigError(
                f"{out} holds another data set: it was built with {key} {stated.get(key)}; asked for {asked[key]}; "
                "choose another folder or delete it"
            )
        return note if note["complete"] else None
    if any(storage.list_dir(storage.join(out, split)) for split in SPLITS):
        raise ConfigError(f"{out} holds files that no build of crate-ray wrote; choose an empty folder")
    with writing_to(out, _UNWRITABLE):
        storage.write_atomic(uri, json.dumps({**identity, "complete": False}, indent=2))
    return None


def build_source(
    source: str,
    out: str,
    *,
    seed: int = 0,
    image_size: int | None = None,
    num_classes: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BuildSummary:
    """Write a source as shards with their index; continue an interrupted build; return at once when it is all there.

    Args:
        source: `digits`, `photos`, `shapes:N`, `folder:DIR` or `imagenet:DIR`.
        out: Folder of the data set, local or remote.
        seed: Decides the split, the order and whatever is drawn at random.
        image_size: Side in pixels, for `shapes`.
        num_classes: Number of classes, for `shapes`.
        workers: Processes; by default one a core when there are samples enough.
        progress: Called with samples written and samples in all.

    Raises:
        ConfigError: For an unknown source, or a folder that holds another data set.
    """
    planned = make_source(source, seed=seed, image_size=image_size, num_classes=num_classes)
    # Through JSON, so that it compares equal to what a note says.
    identity = json.loads(
        json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "source": source,
                "seed": seed,
                "options": planned.options,
                "classes": planned.classes,
            }
        )
    )
    if (note := _claim(out, identity)) is not None:
        return BuildSummary(out, source, note["classes"], note["counts"], note["digests"], reused=True)
    tasks = _tasks(planned, out)
    _write_all(tasks, workers, progress)
    counts, digests = {}, {}
    for split, items in planned.splits.items():
        index = build_index(storage.join(out, split), num_classes=len(planned.classes), record_times=False)
        if index.num_samples != len(items):
            raise ConfigError(
                f"{index.url} holds {index.num_samples} samples instead of {len(items)}; delete it and build again"
            )
        counts[split], digests[split] = index.num_samples, index.digest
    note = {**identity, "counts": counts, "digests": digests, "complete": True}
    storage.write_atomic(storage.join(out, DATASET_FILE), json.dumps(note, indent=2))
    return BuildSummary(out, source, planned.classes, counts, digests, reused=False)
