"""The same shards, read by the webdataset library and by us: the same keys, bytes and labels, whoever wrote them.

Layouts that webdataset reads and other tools wrote are in test_layouts.py, damaged shards in test_hostile_shards.py.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import image

from crate_ray.data import DamagedDataError, ShardIndex, build_index, build_source, load_index, read_all, verify_shards

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

Samples = dict[str, tuple[bytes, int]]


def pipeline(folder: Path, *stages: Callable[[Iterator[Any]], Iterator[Any]]) -> list[Any]:
    """What the library's pipeline over all shards yields; its own opener would leave the files open."""
    import webdataset as wds
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with ExitStack() as stack:
        streams = [{"url": str(path), "stream": stack.enter_context(path.open("rb"))} for path in sorted(folder.glob("*.tar"))]
        return list(wds.DataPipeline(lambda: iter(streams), tar_file_expander, group_by_keys, *stages))


def by_webdataset(folder: Path, images: str = "jpg;png;webp;jpeg", labels: str = "cls;json") -> Samples:
    """Image bytes and label by key, from an ordinary pipeline of the library."""
    import webdataset as wds

    found: Samples = {}
    for key, data, label in pipeline(folder, wds.to_tuple("__key__", images, labels)):
        assert key not in found
        value = json.loads(label)
        found[key] = data, int(value["label"] if isinstance(value, dict) else value)
    return found


def by_us(index: ShardIndex) -> Samples:
    uris = [index.shard_uris[shard] for shard in index.shard_of]
    found: Samples = {}
    for row, uri in zip(index.samples.to_pylist(), uris, strict=True):
        data = Path(uri).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        found[row["key"]] = data, row["label"]
    assert len(found) == index.num_samples
    return found


def write(folder: Path, samples: list[dict[str, Any]], *, maxcount: int = 4) -> ShardIndex:
    """Shards by the library's writer, with its encoders, indexed by us."""
    import webdataset as wds

    with wds.ShardWriter(str(folder / "w-%04d.tar"), maxcount=maxcount, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    build_index(str(folder))
    return load_index(str(folder))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_webdataset_reads_from_our_shards_what_we_read(shapes_folder: Path, split: str) -> None:
    ours = by_us(load_index(str(shapes_folder / split)))
    assert ours == by_webdataset(shapes_folder / split)
    assert len(ours) == {"train": 96, "validation": 12, "test": 12}[split]


def test_webdataset_decodes_from_our_shards_the_pixels_that_we_hand_out(shapes_folder: Path) -> None:
    import webdataset as wds

    folder = shapes_folder / "validation"
    theirs = pipeline(folder, wds.decode("torchrgb8"), wds.to_tuple("png", "cls"))
    (batch,) = read_all(str(folder), batch_size=12, image_size=24)
    assert torch.equal(batch.images_BCHW, torch.stack([picture for picture, _ in theirs]))
    assert batch.labels_B.tolist() == [label for _, label in theirs]


def test_webdataset_reads_photographs_with_their_tables_beside(tmp_path: Path) -> None:
    """A source of folders, whose file names have dots; JPEG bytes are stored as they were found."""
    for number in range(9):
        path = tmp_path / "in" / f"class{number % 3}" / f"a.{number}.v1.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(number))
    build_source(f"folder:{tmp_path / 'in'}", str(tmp_path / "out"))
    ours = {}
    for split in ("train", "validation", "test"):
        if (tmp_path / "out" / split).is_dir():
            found = by_us(load_index(str(tmp_path / "out" / split)))
            assert found == by_webdataset(tmp_path / "out" / split)
            ours |= found
    assert sorted(data for data, _ in ours.values()) == sorted(image(number) for number in range(9))


@pytest.mark.parametrize(
    ("extension", "label"),
    [
        ("jpg", {"cls": 3}),
        ("png", {"json": {"label": 3, "caption": "a cat"}}),
        ("webp", {"cls": 3, "txt": "a cat"}),
        ("JPEG", {"cls": 3}),
    ],
)
def test_what_webdatasets_writer_writes_is_indexed_to_the_same_samples(
    tmp_path: Path, extension: str, label: dict[str, Any]
) -> None:
    index = write(tmp_path, [{"__key__": f"n{i:03d}", extension: image(i), **label} for i in range(10)])
    assert index.shard_sizes == (4, 4, 2)
    assert by_us(index) == by_webdataset(tmp_path) == {f"n{i:03d}": (image(i), 3) for i in range(10)}


def test_folders_in_keys_and_metadata_members_agree(tmp_path: Path) -> None:
    samples = [{"__key__": f"n{i % 2}/v1.2/{i:03d}", "jpg": image(i), "cls": i, "depth.npy": b"x"} for i in range(6)]
    index = write(tmp_path, [*samples[:3], {"__key__": "__about__/authors", "txt": "no sample"}, *samples[3:]])
    assert by_us(index) == by_webdataset(tmp_path) == {f"n{i % 2}/v1.2/{i:03d}": (image(i), i) for i in range(6)}


def test_a_tar_writer_to_a_stream_agrees_too(tmp_path: Path) -> None:
    import webdataset as wds

    with (tmp_path / "s.tar").open("wb") as stream, wds.TarWriter(stream) as writer:
        for i in range(5):
            writer.write({"__key__": f"k{i}", "png": image(i), "json": {"label": i}})
    build_index(str(tmp_path))
    assert by_us(load_index(str(tmp_path))) == by_webdataset(tmp_path)
    assert verify_shards(str(tmp_path), decode=False).findings == ()


def test_dotted_keys_split_at_the_first_dot_for_both(tmp_path: Path) -> None:
    """The writer takes the key `n01.v2`; whoever reads, finds the sample `n01` with the members `v2.jpg` and `v2.cls`."""
    index = write(tmp_path, [{"__key__": f"n{i:02d}.v2", "jpg": image(i), "cls": i} for i in range(5)])
    assert index.column("extension").tolist() == ["v2.jpg"] * 5
    assert by_us(index) == by_webdataset(tmp_path, "v2.jpg", "v2.cls") == {f"n{i:02d}": (image(i), i) for i in range(5)}


def test_where_dotted_keys_differ_webdataset_merges_samples_and_we_refuse(tmp_path: Path) -> None:
    """Keys that differ after the first dot alone: one sample of two images for the library, which nobody meant."""
    samples = [{"__key__": f"clip.{i}", "jpg": image(i), "cls": i} for i in range(2)]
    with pytest.raises(DamagedDataError, match=r"sample 'clip'.*it could be any of the images 0\.jpg, 1\.jpg"):
        write(tmp_path, samples)
    assert by_webdataset(tmp_path, "0.jpg", "0.cls") == {"clip": (image(0), 0)}
    assert by_webdataset(tmp_path, "1.jpg", "1.cls") == {"clip": (image(1), 1)}
