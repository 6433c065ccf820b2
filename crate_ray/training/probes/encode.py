"""Features of whole splits: in this process, or in blocks that any process computes and leaves beside the run.

In: a subject. Out: the features of its encoder, or of its control, in the order of the index. A block is a whole number of
batches, so a row is computed beside the same others wherever it is computed: features are the same bit for bit on equal
devices with equally many threads, and else equal up to the order of float sums. With a map of tasks each block is a file
RUN/features/<digest>/block_NNNNN.safetensors, so an interrupted probe encodes only what is missing; the price is disk for
2 x 4 bytes x width an image, given back once the numbers are written.

Shapes: N images, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from crate_ray import storage
from crate_ray.config import digest
from crate_ray.data import Source, load_source
from crate_ray.data.workers import TaskMap
from crate_ray.evaluation.features import Features, joined
from crate_ray.models import Classifier, MaskedAutoencoder
from crate_ray.runs import RunFolder
from crate_ray.training.evaluate import EVAL_BATCH, Ids, encode_images
from crate_ray.training.precision import resolve_precision
from crate_ray.training.probes.subjects import ProbeRequest, Subject, find_subject

BLOCK_IMAGES = 16 * EVAL_BATCH
FOLDER = "features"
_FORMAT = 1
_TENSORS = ("mean_ND", "cls_ND", "labels_N")


@dataclass(frozen=True)
class EncodeTask:
    """One block: images `first` to `stop` of a source, by the encoder of a subject; plain values."""

    folder: str
    request: ProbeRequest
    trained: bool
    source: Source
    first: int
    stop: int
    out: str


def encode_block(task: EncodeTask) -> None:
    """Encodes a block and writes it down, whole or not at all."""
    # The step is said, so a run that is not finished, or that goes on meanwhile, gives the same checkpoint to every task.
    subject = find_subject(RunFolder(task.folder), task.request)
    found = _encode(subject.build(trained=task.trained), subject, task.source, np.arange(task.first, task.stop))
    storage.write_atomic(task.out, save({name: getattr(found, name) for name in _TENSORS}))


class FeatureReader:
    """The features of a subject and its control; each split is encoded once.

    Args:
        subject: Who is judged.
        task_map: Computes blocks elsewhere; None encodes in this process and writes nothing.
    """

    def __init__(self, subject: Subject, task_map: TaskMap | None = None) -> None:
        self._subject = subject
        self._task_map = task_map
        self._held: dict[str, Features] = {}
        self._models: dict[bool, MaskedAutoencoder | Classifier] = {}
        self._folders: list[str] = []

    def read(self, source: Source, *, trained: bool) -> Features:
        """Features of every image of a source, in the order of its index."""
        index = load_source(source)
        key = self._key(index.digest, trained)
        if key not in self._held:
            self._held[key] = (
                self._blocks(source, index.num_samples, key, trained) if self._task_map else self._here(source, trained)
            )
        return self._held[key]

    def delete(self) -> None:
        """Gives back the disk of the blocks; call it once the numbers are written."""
        for folder in self._folders:
            storage.delete(folder)

    def _here(self, source: Source, trained: bool) -> Features:
        if trained not in self._models:
            self._models[trained] = self._subject.build(trained=trained)
        return _encode(self._models[trained], self._subject, source, None)

    def _blocks(self, source: Source, num_images: int, key: str, trained: bool) -> Features:
        assert self._task_map is not None
        place = self._subject.folder.path(FOLDER, key)
        self._folders.append(place)
        request = replace(self._subject.request, step=self._subject.checkpoint.step, use_ema=self._subject.is_ema)
        tasks = [
            EncodeTask(self._subject.folder.uri, request, trained, source, first, min(first + BLOCK_IMAGES, num_images), out)
            for first, out in _block_files(place, num_images)
        ]
        missing = [task for task in tasks if _read_block(task) is None]
        for _ in self._task_map(encode_block, missing):
            pass
        parts = [_read_block(task) for task in tasks]
        lost = [task.out for task, part in zip(tasks, parts, strict=True) if part is None]
        if lost:
            raise OSError(f"{lost[0]} was written and cannot be read: every node must see the run folder")
        return joined([part for part in parts if part is not None])

    def _key(self, source_digest: str, trained: bool) -> str:
        """16 hex digits of everything that features follow from."""
        subject, config = self._subject, self._subject.config
        weights = digest({**subject.checkpoint.files, "": subject.weights}) if trained else f"untrained {config.train.seed}"
        parts = {"format": _FORMAT, "batch": EVAL_BATCH, "weights": weights, "source": source_digest}
        read = {"mean": config.data.mean, "std": config.data.std, "precision": config.train.precision}
        return digest({**parts, **read, "model": config.model.model_dump(mode="json")})[:16]


def _block_files(place: str, num_images: int) -> Iterator[tuple[int, str]]:
    for number, first in enumerate(range(0, num_images, BLOCK_IMAGES)):
        yield first, storage.join(place, f"block_{number:05d}.safetensors")


def _read_block(task: EncodeTask) -> Features | None:
    """A block that was written; None where there is none, or not the whole of it."""
    if not storage.exists(task.out):
        return None
    try:
        tensors = load(storage.read_bytes(task.out))
        found = Features(*(tensors[name] for name in _TENSORS))
    except (SafetensorError, KeyError, FileNotFoundError):
        return None
    return found if len(found.labels_N) == task.stop - task.first else None


def _encode(model: MaskedAutoencoder | Classifier, subject: Subject, source: Source, sample_ids: Ids | None) -> Features:
    config = subject.config
    precision = resolve_precision(config.train.precision, next(model.parameters()).device.type)
    return encode_images(model, config, source, precision=precision, sample_ids=sample_ids)
