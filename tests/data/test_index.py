import io
import json
import shutil
import tarfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from crate_ray.config import ConfigError
from crate_ray.data import Fault, ShardIndex, build_index, load_index, verify_shards
from crate_ray.data.shards import pack_shard

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc000000301010018dd8db00000000049454e44ae426082"
)


def write(folder: Path, samples, name="a.tar") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pack_shard(samples))
    return str(folder)


def indexed(url: str, **options) -> ShardIndex:
    """The index of a folder, made and loaded."""
    return load_index(build_index(url, **options).url)


def test_the_index_points_at_the_bytes_of_every_image(shapes_folder):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    index = load_index(str(shapes_folder / "train"))
    shards = [shapes_folder / "train" / name for name in index.shard_names]
    ours = {}
    for row in index.samples.to_pylist():
        data = (shapes_folder / "train" / row["shard"]).read_bytes()
        ours[row["key"]] = data[row["offset"] : row["offset"] + row["size"]]
        assert data[row["mask_offset"] :][:4] == b"\x89PNG"
    # webdataset's own reading stages, over streams that this test closes (its WebDataset leaves them open).
    with ExitStack() as stack:
        streams = [{"url": path.name, "stream": stack.enter_context(path.open("rb"))} for path in shards]
        theirs = {sample["__key__"]: sample["png"] for sample in group_by_keys(tar_file_expander(streams))}
    assert ours == theirs
    assert index.num_samples == 96
    assert index.num_classes == 10
    assert index.shard_sizes == (48, 48)
    assert index.sources[3] == "shape-3"


def test_shards_of_webdatasets_writer_can_be_indexed(tmp_path):
    import webdataset as wds

    with wds.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write({"__key__": f"k{i:02d}", "PNG": PNG, "cls": i % 3})
    index = indexed(str(tmp_path))
    assert index.shard_sizes == (4, 4, 2)
    assert index.labels.tolist() == [i % 3 for i in range(10)]
    assert index.column("key").tolist() == [f"k{i:02d}" for i in range(10)]
    assert index.num_classes == 3


def test_labels_come_from_cls_then_json_then_are_none(tmp_path):
    samples = [
        {"__key__": "a", "jpeg": b"1", "cls": b"3\n", "json": b'{"label": 5}'},
        {"__key__": "b", "webp": b"2", "json": json.dumps({"label": 4, "source": "p7"}).encode()},
        {"__key__": "c", "jpg": b"3", "json": b'{"cls": 2}'},
        {"__key__": "d", "jpg": b"4", "json": b'{"label": "cat"}'},
        {"__key__": "e", "v2.JPEG": b"5", "txt": b"a caption"},
    ]
    index = indexed(write(tmp_path, samples))
    assert index.labels.tolist() == [3, 4, 2, -1, -1]
    assert index.sources.tolist() == ["a", "p7", "c", "d", "e"]
    assert index.column("extension").tolist() == ["jpeg", "webp", "jpg", "jpg", "v2.jpeg"]


def test_samples_without_an_image_are_left_out_with_a_warning(tmp_path, caplog):
    url = write(tmp_path, [{"__key__": "a", "jpg": b"1"}, {"__key__": "b", "txt": b"2"}])
    assert build_index(url).num_samples == 1
    assert "no-image: 1 found, the first in shard a.tar, sample 'b'" in caplog.text
    write(tmp_path, [{"__key__": "b", "txt": b"2"}])
    with pytest.raises(ConfigError, match="holds no image"):
        build_index(url)


def test_a_label_that_is_no_number_is_refused_with_its_place(tmp_path):
    with pytest.raises(ConfigError, match=r"shard a\.tar, sample 'k' at byte \d+: the label 'dog' is no whole number"):
        build_index(write(tmp_path, [{"__key__": "k", "jpg": b"1", "cls": b"dog"}]))


def test_the_digest_is_that_of_the_content_and_not_of_the_place(tmp_path, shapes_folder):
    shutil.copytree(shapes_folder / "test", tmp_path / "copy")
    digest = load_index(str(shapes_folder / "test")).digest
    assert build_index(str(tmp_path / "copy")).digest == digest
    (tmp_path / "copy" / "test-000000.tar").rename(tmp_path / "copy" / "other.tar")
    assert build_index(str(tmp_path / "copy")).digest != digest


def test_verification_finds_what_changed(tmp_path, shapes_folder):
    folder = tmp_path / "v"
    shutil.copytree(shapes_folder / "train", folder)
    assert verify_shards(str(folder)).findings == ()
    first, second = sorted(folder.glob("*.tar"))
    data = bytearray(first.read_bytes())
    data[700] ^= 1
    first.write_bytes(data)
    shutil.copy(second, folder / "extra.tar")
    second.unlink()
    found = verify_shards(str(folder)).findings
    assert {(finding.shard, finding.fault) for finding in found} >= {
        ("extra.tar", Fault.UNINDEXED),
        ("train-000000.tar", Fault.CHANGED),
        ("train-000001.tar", Fault.NO_SHARD),
    }


def test_a_truncated_shard_is_refused_by_name(tmp_path):
    url = write(tmp_path, [{"__key__": "k", "jpg": b"1" * 5000}])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:5632])
    with pytest.raises(ConfigError, match=r"shard a\.tar at byte 5632: it ends without the two zero blocks"):
        build_index(url)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a\.tar at byte 0: the file is empty"):
        build_index(url)


def test_missing_folders_indexes_and_versions_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_index(str(tmp_path / "nowhere"))
    url = write(tmp_path, [{"__key__": "k", "jpg": b"1"}])
    with pytest.raises(ConfigError, match="crate-ray data index"):
        load_index(url)
    build_index(url)
    (tmp_path / "samples.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="is not an index"):
        load_index(url)
    with pytest.raises(ConfigError, match=r"no \*\.tar shards"):
        build_index(str(tmp_path / "nowhere"))


def test_members_scattered_by_a_foreign_writer_become_one_sample(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in (("x/1.jpg", b"11"), ("x/2.jpg", b"22"), ("x/2.cls", b"7"), ("x/1.cls", b"6")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (tmp_path / "f.tar").write_bytes(stream.getvalue())
    index = indexed(str(tmp_path))
    assert dict(zip(index.column("key"), index.labels.tolist(), strict=True)) == {"x/1": 6, "x/2": 7}
