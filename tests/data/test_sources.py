import csv
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import ImageReadMode, decode_image

from crate_ray.config import ConfigError
from crate_ray.data import build_source, load_index, verify_shards
from crate_ray.data.build import make_source
from crate_ray.data.sources.shapes import OUTLINES, draw
from crate_ray.data.tar import ShardStream, walk_tar

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


def pixels(data: bytes) -> np.ndarray:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED).numpy()


def tree(root: Path, names: list[str]) -> Path:
    """Small valid images, every one different."""
    template = make_source("shapes:10", image_size=16)
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(template.render(number)["png"])
    return root


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.*"))}


def test_digits_are_split_by_picture_before_they_are_placed():
    source = make_source("digits", seed=3)
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 12_000, "validation": 788, "test": 2_400}
    pictures = {split: {item.picture for item in items} for split, items in source.splits.items()}
    assert {split: len(ids) for split, ids in pictures.items()} == {"train": 1000, "validation": 197, "test": 600}
    assert len(set.union(*pictures.values())) == 1797
    for split, items in source.splits.items():
        assert set(Counter(items).values()) == {1}
        shares = np.bincount([item.label for item in items]) / len(items)
        assert np.abs(shares - 0.1).max() < 0.02, split
    assert make_source("digits", seed=3).splits == source.splits != make_source("digits", seed=4).splits


def test_a_digit_is_drawn_at_its_place_on_black():
    source = make_source("digits")
    item = source.splits["train"][0]
    sample = source.render(item)
    image = pixels(sample["png"])
    assert image.shape == (3, 32, 32)
    assert np.all(image[0] == image[1])
    inside = image[:, item.top : item.top + 24, item.left : item.left + 24]
    assert inside.sum() == image.sum() > 0
    fields = json.loads(sample["json"])
    assert fields == {"source": f"digit-{item.picture:04d}", "label": item.label, "placement": [item.top, item.left]}
    assert int(sample["cls"]) == item.label


def test_photos_share_no_column_between_splits():
    source = make_source("photos")
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 1600, "validation": 200, "test": 200}
    regions = source.render.args[0]
    assert sum(regions[0, split].shape[2] for split in source.splits) == 2 * 640
    for split, items in source.splits.items():
        for crop in items:
            _, height, width = regions[crop.photo, split].shape
            assert 224 <= crop.side <= 448
            assert crop.top + crop.side <= height
            assert crop.left + crop.side <= width
    assert pixels(source.render(source.splits["test"][1])["jpg"]).shape[1] == source.splits["test"][1].side


def test_a_drawn_shape_has_its_mask_and_depends_on_seed_and_index_only():
    for index in range(len(OUTLINES)):
        image, mask, label = draw(index, seed=0, image_size=48, num_classes=len(OUTLINES))
        assert image.shape == (3, 48, 48)
        assert label == index
        assert set(np.unique(mask)) == {0, 255}
        assert 0.01 < (mask > 0).mean() < 0.6
    again = draw(7, seed=0, image_size=48, num_classes=10)
    np.testing.assert_array_equal(draw(7, seed=0, image_size=48, num_classes=10)[0], again[0])
    assert not np.array_equal(draw(7, seed=1, image_size=48, num_classes=10)[0], again[0])


def test_shapes_are_drawn_at_several_hundred_a_second():
    render = make_source("shapes:1000").render
    render(0)
    start = time.process_time()
    for index in range(60):
        render(index)
    assert 60 / (time.process_time() - start) > 200


def test_a_build_writes_splits_indexes_and_a_note(shapes_folder):
    note = json.loads((shapes_folder / "dataset.json").read_text())
    assert note["counts"] == {"train": 96, "validation": 12, "test": 12}
    assert note["source"] == "shapes:120"
    assert note["options"] == {"image_size": 24, "num_classes": 10}
    assert note["complete"] is True
    assert note["classes"] == list(OUTLINES)
    for split, digest in note["digests"].items():
        assert load_index(str(shapes_folder / split)).digest == digest
        assert verify_shards(str(shapes_folder / split)).findings == ()


def test_the_same_build_again_returns_at_once_and_another_is_refused(tmp_path):
    out = str(tmp_path / "d")
    first = build_source("shapes:20", out, image_size=16)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    second = build_source("shapes:20", out, image_size=16)
    assert (first.reused, second.reused) == (False, True)
    assert second.digests == first.digests
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")} == before
    for change, key in (({"seed": 1}, "seed"), ({"image_size": 24}, "image_size"), ({"num_classes": 3}, "num_classes")):
        with pytest.raises(ConfigError, match=f"it was built with {key} [0-9]+; asked for {change[key]};"):
            build_source("shapes:20", out, **{"image_size": 16, **change})
    with pytest.raises(ConfigError, match="it was built with source shapes:20; asked for shapes:30"):
        build_source("shapes:30", out, image_size=16)


def test_a_folder_with_foreign_files_is_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.tar").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="no build of crate-ray wrote"):
        build_source("shapes:20", str(tmp_path), image_size=16)
    assert contents(tmp_path) == {"train/mine.tar": b"precious"}


def test_two_builds_give_the_same_bytes(shapes_folder, tmp_path):
    build_source("shapes:120", str(tmp_path / "again"), image_size=24)
    assert contents(tmp_path / "again") == contents(shapes_folder)


@pytest.mark.slow
def test_processes_build_the_same_bytes(tmp_path):
    images = tree(tmp_path / "images", [f"{c}/{i:03d}.png" for c in ("cat", "dog") for i in range(20)])
    one = build_source(f"folder:{images}", str(tmp_path / "one"), workers=1)
    seen: list[tuple[int, int]] = []
    two = build_source(
        f"folder:{images}", str(tmp_path / "two"), workers=2, progress=lambda done, total: seen.append((done, total))
    )
    assert one.digests == two.digests
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert seen[-1] == (40, 40)


def test_an_interrupted_build_continues_and_keeps_whole_shards(tmp_path):
    images = tree(tmp_path / "images", [f"{c}/{i:03d}.png" for c in ("cat", "dog") for i in range(20)])
    source, out = f"folder:{images}", tmp_path / "out"
    whole = build_source(source, str(tmp_path / "whole"))

    class StopError(Exception):
        pass

    def stop_after_first(done: int, total: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        build_source(source, str(out), workers=1, progress=stop_after_first)
    (kept,) = out.rglob("*.tar")
    written = kept.stat().st_mtime_ns
    assert json.loads((out / "dataset.json").read_text())["complete"] is False
    with pytest.raises(ConfigError, match="it was built with seed 0"):
        build_source(source, str(out), seed=9)
    finished = build_source(source, str(out))
    assert finished.digests == whole.digests
    assert kept.stat().st_mtime_ns == written
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_is_split_in_every_class_and_files_are_kept_byte_for_byte(tmp_path):
    images = tree(tmp_path / "images", [f"{c}/sub/{i:03d}.png" for c in ("b", "a") for i in range(40)])
    summary = build_source(f"folder:{images}", str(tmp_path / "out"))
    assert summary.classes == ["a", "b"]
    assert summary.counts == {"train": 72, "validation": 4, "test": 4}
    found = {}
    for split in summary.counts:
        index = load_index(str(tmp_path / "out" / split))
        assert len(set(np.bincount(index.labels))) == 1
        for row in index.samples.to_pylist():
            data = (tmp_path / "out" / split / row["shard"]).read_bytes()
            found[row["source"]] = data[row["offset"] : row["offset"] + row["size"]]
    assert found == {path.relative_to(images).as_posix(): path.read_bytes() for path in images.rglob("*.png")}


def test_given_split_folders_are_respected(tmp_path):
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(5)] + [f"val/{c}/{i}.png" for c in "ab" for i in range(2)]
    images = tree(tmp_path / "images", names)
    assert build_source(f"folder:{images}", str(tmp_path / "out")).counts == {"train": 10, "validation": 4}
    tree(images, ["val/c/1.png"])
    with pytest.raises(ConfigError, match="the class 'c', which is not a training class"):
        make_source(f"folder:{images}")


def test_a_png_that_calls_itself_jpeg_gets_the_extension_of_its_content(tmp_path):
    images = tree(tmp_path / "images", [f"train/n01/{i}.JPEG" for i in range(3)])
    build_source(f"folder:{images}", str(tmp_path / "out"))
    assert set(load_index(str(tmp_path / "out" / "train")).column("extension")) == {"png"}
    (images / "train" / "n01" / "9.JPEG").write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=r"9\.JPEG is not an image"):
        build_source(f"folder:{images}", str(tmp_path / "other"))


WNIDS = ["n03", "n01", "n02"]  # in the order of the development kit, which is not the sorted one
TRUTH = [2, 3, 1, 2]


def imagenet_tree(root: Path) -> Path:
    names = [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(60)]
    return tree(root, names + [f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)])


def labels_of_test(root: Path, out: Path) -> list[int]:
    summary = build_source(f"imagenet:{root}", str(out))
    assert summary.classes == sorted(WNIDS)
    assert summary.counts == {"train": 177, "validation": 3, "test": 4}
    index = load_index(str(out / "test"))
    return [label for _, label in sorted(zip(index.sources.tolist(), index.labels.tolist(), strict=True))]


def test_imagenets_flat_validation_set_is_labelled_by_the_solution_file(tmp_path):
    root = imagenet_tree(tmp_path / "in")
    with (root / "LOC_val_solution.csv").open("w", newline="") as sink:
        writer = csv.writer(sink)
        writer.writerow(["ImageId", "PredictionString"])
        writer.writerows([f"ILSVRC2012_val_{i:08d}", f"{WNIDS[number - 1]} 1 2 3 4 "] for i, number in enumerate(TRUTH, 1))
    assert labels_of_test(root, tmp_path / "out") == [0, 1, 2, 0]


def test_imagenets_flat_validation_set_is_labelled_by_the_development_kit(tmp_path):
    from scipy.io import savemat

    root = imagenet_tree(tmp_path / "in")
    with pytest.raises(ConfigError, match="is flat and has no labels"):
        make_source(f"imagenet:{root}")
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in TRUTH))
    rows = [(i, wnid, 0) for i, wnid in enumerate(WNIDS, 1)] + [(4, "n99", 3)]
    synsets = np.array(rows, dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("num_children", "i4")])
    savemat(kit / "meta.mat", {"synsets": synsets[:, None]})
    assert labels_of_test(root, tmp_path / "out") == [0, 1, 2, 0]


def test_imagenets_validation_folders_are_read_too(tmp_path):
    root = imagenet_tree(tmp_path / "in")
    for path, number in zip(sorted((root / "val").iterdir()), TRUTH, strict=True):
        (root / "val" / WNIDS[number - 1]).mkdir(exist_ok=True)
        path.rename(root / "val" / WNIDS[number - 1] / path.name)
    assert labels_of_test(root, tmp_path / "out") == [0, 0, 1, 2]  # sources sort by folder here


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("mnist", {}, "unknown source 'mnist'; known are digits, photos, shapes:N"),
        ("shapes:many", {}, "say how many images to draw: shapes:1000"),
        ("shapes", {}, "say how many images to draw: shapes:1000"),
        ("shapes:0", {}, "shapes:0: 0 images at 64 pixels cannot be drawn"),
        ("shapes:5", {}, "10 images or more"),
        ("shapes:50", {"num_classes": 99}, "1 to 10 classes"),
        ("digits", {"image_size": 64}, "belong to shapes:N"),
        ("folder:/nowhere", {}, "is not a folder"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, source, options, message):
    with pytest.raises(ConfigError, match=message):
        build_source(source, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_built_shards_hold_no_partial_files(shapes_folder):
    assert not list(shapes_folder.rglob("*.tmp"))
    for shard in shapes_folder.rglob("*.tar"):
        with shard.open("rb") as file:
            members = list(walk_tar(ShardStream(file, shard.stat().st_size, shard.name)))
        assert {member.name.split(".", 1)[1] for member in members} == {"png", "mask.png", "cls", "json"}
