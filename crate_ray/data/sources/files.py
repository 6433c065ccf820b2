"""Trees of image files: a folder a class, or ImageNet as its archives unpack.

Files go into the shards as they are, byte for byte; nothing is decoded or encoded again. Splits are made by a hash of
seed and file name, class by class, so they depend neither on the order of a listing nor on the machine.
Training files are written in shuffled order, which lets a reader shuffle in windows and still mix well.
"""

import csv
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from crate_ray.config import ConfigError
from crate_ray.data.images import read_header
from crate_ray.data.shards import IMAGE_EXTENSIONS
from crate_ray.data.sources.source import Source

_SHARD_SAMPLES = 1000
_FOLDER_SHARES = {"validation": 0.05, "test": 0.05}
_IMAGENET_SHARES = {"validation": 0.01}
_SPLIT_FOLDERS = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
_TRUTH_FILE = "ILSVRC2012_validation_ground_truth.txt"
_SOLUTION_FILE = "LOC_val_solution.csv"
_KIT_FOLDER = "ILSVRC2012_devkit_t12/data"


class File(NamedTuple):
    """One image file, relative to the root, and its class."""

    path: str
    label: int


def _is_image(path: Path) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def _hash(seed: int, path: str) -> str:
    return hashlib.sha256(f"{seed}/{path}".encode()).hexdigest()


def _render(root: str, file: File) -> dict[str, bytes]:
    """A file as it is, under the extension of its content (ImageNet has a PNG that calls itself JPEG)."""
    path = Path(root, file.path)
    data = path.read_bytes()
    try:
        extension, _, _ = read_header(data)
    except ValueError as error:
        raise ConfigError(f"{path} is not an image: {error}; repair or remove it and build again") from None
    fields = {"source": file.path, "label": file.label}
    return {extension: data, "cls": str(file.label).encode(), "json": json.dumps(fields).encode()}


def _class_names(root: Path) -> list[str]:
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ConfigError(f"{root} holds no class folders; images are expected as {root}/CLASS/NAME.jpg")
    return names


def _tree(root: Path, folder: Path, classes: list[str]) -> list[File]:
    """The images in the class folders of a folder."""
    if unknown := set(_class_names(folder)) - set(classes):
        raise ConfigError(f"{folder} holds the class {min(unknown)!r}, which is not a training class; remove it")
    files = [
        File(path.relative_to(root).as_posix(), label)
        for label, name in enumerate(classes)
        for path in (folder / name).rglob("*")
        if _is_image(path)
    ]
    if not files:
        raise ConfigError(f"{folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}) in its class folders")
    return files


def _hold_out(files: list[File], shares: dict[str, float], seed: int) -> dict[str, list[File]]:
    """Give each split its share of every class, the files with the smallest hashes first; the rest trains."""
    by_class: dict[int, list[File]] = {}
    for file in sorted(files, key=lambda file: _hash(seed, file.path)):
        by_class.setdefault(file.label, []).append(file)
    splits: dict[str, list[File]] = {"train": [], **{split: [] for split in shares}}
    for members in by_class.values():
        start = 0
        for split, share in shares.items():
            stop = start + round(share * len(members))
            splits[split] += members[start:stop]
            start = stop
        splits["train"] += members[start:]
    return {split: held for split, held in splits.items() if held}


def _source(name: str, root: Path, classes: list[str], splits: dict[str, list[File]], seed: int) -> Source:
    """The source of planned splits, in shuffled order; its options pin the files that it was planned from."""
    shuffled = {split: sorted(files, key=lambda file: _hash(seed + 1, file.path)) for split, files in splits.items()}
    listing = hashlib.sha256()
    for split, files in shuffled.items():
        for file in files:
            listing.update(f"{split}\t{file.path}\t{file.label}\t{(root / file.path).stat().st_size}\n".encode())
    return Source(name, classes, shuffled, partial(_render, str(root)), _SHARD_SAMPLES, {"files_sha256": listing.hexdigest()})


def _existing(directory: str) -> Path:
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{root} is not a folder")
    return root


def folder(directory: str, seed: int) -> Source:
    """DIR/CLASS/NAME.jpg, split 90 / 5 / 5 in every class; or the folders train, val(idation) and test, each with classes.

    Raises:
        ConfigError: When there are no class folders or no images.
    """
    root = _existing(directory)
    given = {split: root / name for split, names in _SPLIT_FOLDERS.items() for name in names if (root / name).is_dir()}
    if "train" in given:
        classes = _class_names(given["train"])
        splits = {split: _tree(root, path, classes) for split, path in given.items()}
    else:
        classes = _class_names(root)
        splits = _hold_out(_tree(root, root, classes), _FOLDER_SHARES, seed)
    return _source(f"folder:{directory}", root, classes, splits, seed)


def _find(root: Path, name: str) -> Path | None:
    """A file of the development kit, in the root or where the kit unpacks it."""
    return next((path for path in (root / name, root / _KIT_FOLDER / name) if path.exists()), None)


def _solution_wnids(solution: Path, paths: list[Path]) -> list[str]:
    """Kaggle's table: ImageId, then the wnid and the boxes of its objects."""
    with solution.open(newline="") as lines:
        wnids = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(lines)}
    if unlabelled := [path.name for path in paths if path.stem not in wnids]:
        raise ConfigError(f"{solution} has no line for {unlabelled[0]}; use the files of one release")
    return [wnids[path.stem] for path in paths]


def _kit_wnids(truth: Path, meta: Path, paths: list[Path]) -> list[str]:
    """The development kit's list: line i is the ILSVRC2012_ID of picture i, which `meta.mat` maps to wnids.

    The ids are not in the order of sorted wnids: labels taken from them directly are wrong.
    """
    from scipy.io import loadmat

    synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
    wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    ids = [int(line) for line in truth.read_text().split()]
    if len(ids) != len(paths) or (unknown := set(ids) - set(wnid_of)):
        cause = (
            f"{len(ids)} lines for {len(paths)} pictures" if len(ids) != len(paths) else f"the id {min(unknown)}, not in {meta}"
        )
        raise ConfigError(f"{truth} has {cause}; use the files of one release")
    return [wnid_of[number] for number in ids]


def _flat_validation(root: Path, classes: list[str]) -> list[File]:
    """The flat folder val/, labelled by Kaggle's table or by the development kit's list."""
    paths = sorted(path for path in (root / "val").iterdir() if _is_image(path))
    truth, meta = _find(root, _TRUTH_FILE), _find(root, "meta.mat")
    if solution := _find(root, _SOLUTION_FILE):
        wnids = _solution_wnids(solution, paths)
    elif truth and meta:
        wnids = _kit_wnids(truth, meta, paths)
    else:
        raise ConfigError(
            f"{root}/val is flat and has no labels; put into {root} the file {_SOLUTION_FILE}, "
            f"or {_TRUTH_FILE} and meta.mat of the development kit"
        )
    label = {name: number for number, name in enumerate(classes)}
    if unknown := set(wnids) - set(label):
        raise ConfigError(f"{root}/val has pictures of the class {min(unknown)!r}, which is not in train; complete train")
    return [File(path.relative_to(root).as_posix(), label[wnid]) for path, wnid in zip(paths, wnids, strict=True)]


def imagenet(directory: str, seed: int) -> Source:
    """ImageNet-1k: train/WNID/NAME.JPEG and val/, labels in the order of sorted names.

    The published validation set is where results are reported, so it becomes the test split; choices are made on one per
    cent of the training files of each class.

    Raises:
        ConfigError: For another layout, or a flat val/ without labels.
    """
    root = _existing(directory)
    if missing := [name for name in ("train", "val") if not (root / name).is_dir()]:
        raise ConfigError(f"{root} has no folder {missing[0]}; ImageNet is expected as train/WNID/*.JPEG and val/")
    classes = _class_names(root / "train")
    splits = _hold_out(_tree(root, root / "train", classes), _IMAGENET_SHARES, seed)
    nested = any(entry.is_dir() for entry in (root / "val").iterdir())
    splits["test"] = _tree(root, root / "val", classes) if nested else _flat_validation(root, classes)
    return _source(f"imagenet:{directory}", root, classes, splits, seed)
