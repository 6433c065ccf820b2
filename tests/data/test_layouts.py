"""Shards as others write them: the index sees the samples that a webdataset pipeline sees."""

import io
import json
import pickle
import tarfile
import threading
from contextlib import ExitStack
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_server import FaultServer
from hostile import image, webdataset_reads

from crate_ray.config import ConfigError
from crate_ray.data import DamagedDataError, Fault, ShardIndex, build_index, load_index, open_reader, verify_shards
from crate_ray.data.listing import list_shards
from crate_ray.data.shards import image_extensions, pack_shard, runs_code
from crate_ray.data.verify import _indexed_tasks

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


def tar(path: Path, members: list[tuple[str, bytes]], **options) -> None:
    with tarfile.open(path, mode="w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def indexed(url: object, **options) -> ShardIndex:
    return load_index(build_index(str(url), **options).url)


def webdataset_samples(folder: Path) -> dict[str, list[bytes]]:
    """Key and images of every sample that webdataset's stages group; keys without a leading `./`."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    images: dict[str, list[bytes]] = {}
    with ExitStack() as stack:
        paths = sorted(folder.glob("*.tar"))
        streams = [{"url": path.name, "stream": stack.enter_context(path.open("rb"))} for path in paths]
        for sample in group_by_keys(tar_file_expander(streams)):
            found = [sample[name] for name in image_extensions([name for name in sample if not name.startswith("__")])]
            images.setdefault(sample["__key__"].removeprefix("./"), []).extend(found)
    return {key: found for key, found in images.items() if found}


def our_samples(index: ShardIndex) -> dict[str, list[bytes]]:
    images: dict[str, list[bytes]] = {}
    for row, uri in zip(index.samples.to_pylist(), (index.shard_uris[i] for i in index.shard_of), strict=True):
        data = Path(uri).read_bytes()
        images.setdefault(row["key"], []).append(data[row["offset"] : row["offset"] + row["size"]])
    return images


def test_imagenet_in_the_naming_of_timm(tmp_path):
    for shard in range(2):
        rows = [(f"n01440764_{shard}{i}", 7 * i + shard) for i in range(5)]
        members = [
            (f"{key}.{extension}", content)
            for key, label in rows
            for extension, content in (
                ("cls", str(label).encode()),
                ("jpg", key.encode()),
                ("json", json.dumps({"label": label, "filename": f"train/{key}.JPEG"}).encode()),
            )
        ]
        tar(tmp_path / f"imagenet1k-train-{shard:04d}.tar", members)
    (tmp_path / "_info.json").write_text("{}")
    index = indexed(tmp_path)
    assert index.shard_names == ["imagenet1k-train-0000.tar", "imagenet1k-train-0001.tar"]
    assert index.labels.tolist() == [7 * i + shard for shard in range(2) for i in range(5)]
    assert our_samples(index) == webdataset_samples(tmp_path)


def test_img2dataset_with_its_own_tables_beside(tmp_path):
    members = []
    for i, extension in enumerate(("jpg", "png", "webp", "jpg")):
        key = f"00000{i:04d}"
        about = {"key": key, "caption": "a cat", "url": "https://x", "status": "success", "class_id": 3 - i}
        members += [(f"{key}.{extension}", key.encode()), (f"{key}.txt", b"a cat"), (f"{key}.json", json.dumps(about).encode())]
    tar(tmp_path / "00000.tar", members)
    pq.write_table(pa.table({"key": [f"00000{i:04d}" for i in range(9)]}), tmp_path / "00000.parquet")  # five that failed
    (tmp_path / "00000_stats.json").write_text('{"count": 9}')
    index = indexed(tmp_path)
    assert index.column("extension").tolist() == ["jpg", "png", "webp", "jpg"]
    assert index.labels.tolist() == [-1] * 4
    assert our_samples(index) == webdataset_samples(tmp_path)
    assert indexed(tmp_path, label_field="class_id").labels.tolist() == [3, 2, 1, 0]
    assert load_index(str(tmp_path)).label_field == "class_id"
    with pytest.raises(DamagedDataError, match=r"has no field 'klass' \(bad-label\)"):
        build_index(str(tmp_path), label_field="klass")


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_every_kind_give_the_samples_of_webdataset(tmp_path, tar_format):
    names = [
        "n01_1.JPEG",
        "n01_2.Jpg",
        "./n01_3.jpeg",
        "train/n01/n01_4.PNG",
        "v1.2/n01_5.webp",
        "n01_6.v2.JPEG",
        "d" * 120 + "/" + "e" * 130 + ".jpe",
        "ü/grün.jpg",
        "__first.jpg",
    ]
    tar(tmp_path / "a.tar", [(name, name.encode()) for name in names], format=tar_format)
    index = indexed(tmp_path)
    assert index.num_samples == len(names)
    assert our_samples(index) == webdataset_samples(tmp_path)
    assert index.samples.to_pylist()[5] | {"offset": 0} == index.samples.to_pylist()[5] | {
        "key": "n01_6",
        "extension": "v2.jpeg",
        "offset": 0,
    }


def test_a_dotted_name_finds_its_label_under_the_same_dots_or_none(tmp_path):
    members = [("a.v2.JPEG", b"1"), ("a.v2.cls", b"4"), ("a.cls", b"5"), ("b.v2.JPEG", b"2"), ("b.cls", b"6")]
    tar(tmp_path / "a.tar", [*members, ("c.v2.png", b"3"), ("c.v2.json", b'{"label": 7}'), ("c.other.json", b"not json")])
    assert indexed(tmp_path).labels.tolist() == [4, 6, 7]


def test_names_that_share_all_but_a_later_part_are_refused_and_not_lost(tmp_path):
    tar(tmp_path / "a.tar", [(f"frame.{i:04d}.jpg", bytes([i])) for i in range(3)])
    with pytest.raises(DamagedDataError, match=r"sample 'frame'.*it could be any of the images 0000\.jpg, 0001\.jpg"):
        build_index(str(tmp_path))


def test_names_that_are_not_utf_8_are_kept_apart(tmp_path):
    tar(tmp_path / "a.tar", [("caf\udce9.jpg", b"1"), ("caf\udce8.jpg", b"2")], format=tarfile.GNU_FORMAT, encoding="utf-8")
    assert indexed(tmp_path).column("key").tolist() == ["caf\\xe9", "caf\\xe8"]


def test_members_far_apart_are_one_sample_where_webdataset_makes_two(tmp_path):
    keys = [f"k{i}" for i in range(6)]
    tar(tmp_path / "a.tar", [(f"{key}.jpg", key.encode()) for key in keys] + [(f"{key}.cls", b"1") for key in keys])
    index = indexed(tmp_path)
    assert index.labels.tolist() == [1] * 6
    assert webdataset_reads([tmp_path / "a.tar"]) == (12, None)
    assert our_samples(index) == webdataset_samples(tmp_path)


def test_a_mask_is_not_an_image_and_code_is_told_by_its_name():
    assert image_extensions(["cls", "mask.png"]) == []
    assert image_extensions(["mask.png", "v2.jpeg"]) == ["v2.jpeg"]
    assert image_extensions(["a.jpg", "b.png"]) == ["a.jpg", "b.png"]
    assert runs_code("pyd.gz")
    assert not runs_code("pyd2")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two folders of three shards each, one picture a shard."""
    for folder in ("in1k", "in9k"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            (tmp_path / folder / f"s-{i:04d}.tar").write_bytes(pack_shard([{"__key__": f"{folder}-{i}", "jpg": image(i)}]))
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("in1k", ["s-0000.tar", "s-0001.tar", "s-0002.tar"]),
        ("in1k/", ["s-0000.tar", "s-0001.tar", "s-0002.tar"]),
        ("in1k/s-0001.tar", ["s-0001.tar"]),
        ("in1k/s-{0000..0001}.tar", ["s-0000.tar", "s-0001.tar"]),
        ("in1k/s-*.tar", ["s-0000.tar", "s-0001.tar", "s-0002.tar"]),
        ("in1k/s-000[12].tar", ["s-0001.tar", "s-0002.tar"]),
        ("in{1,9}k/s-000{0,2}.tar", [f"in{n}k/s-000{i}.tar" for n in (1, 9) for i in (0, 2)]),
        ("{in9k,in1k}/*.tar", [f"in{n}k/s-000{i}.tar" for n in (1, 9) for i in range(3)]),
    ],
)
def test_folders_files_braces_and_wildcards_name_shards(tree, pattern, names):
    index = indexed(f"{tree}/{pattern}")
    assert index.shard_names == names
    assert [Path(uri).is_file() for uri in index.shard_uris] == [True] * len(names)
    assert verify_shards(index.url).findings == ()
    assert list_shards(f"file://{tree}/{pattern}").files[0].size == Path(index.shard_uris[0]).stat().st_size


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("in1k/s-{0000..0001.tar", "the braces in"),
        ("*/s-0000.tar", "stand in file names only"),
        ("nowhere/*.tar", r"no \*\.tar shards"),
        ("in1k/t-{0..2}.tar", r"no \*\.tar shards"),
        ("in1k/s-0009.tar", r"no \*\.tar shards"),
    ],
)
def test_patterns_that_name_nothing_are_refused(tree, pattern, message):
    with pytest.raises(ConfigError, match=message):
        build_index(f"{tree}/{pattern}")


def test_a_shard_that_braces_name_and_is_not_there_is_refused(tree):
    with pytest.raises(DamagedDataError, match=r"shard s-0003\.tar: .* is not there \(missing-shard\)"):
        build_index(f"{tree}/in1k/s-{{0000..0003}}.tar")
    assert build_index(f"{tree}/in1k/s-{{0000..0003}}.tar", skip_damaged=True).num_samples == 3


def test_shards_in_a_bucket_are_indexed_by_pattern_into_a_folder_of_ones_own(bucket, shapes_folder, tmp_path):
    from pyarrow import fs

    store, root = fs.FileSystem.from_uri(bucket)
    fs.copy_files(
        str(shapes_folder / "train"), f"{root}/theirs", source_filesystem=fs.LocalFileSystem(), destination_filesystem=store
    )
    place, query = bucket.split("?")
    for pattern in ("theirs", "theirs/train-*.tar", "theirs/train-00000{0..1}.tar"):
        index = indexed(f"{place}/{pattern}?{query}", out=str(tmp_path / "mine"), num_classes=10)
        assert index.digest == load_index(str(shapes_folder / "train")).digest
        assert index.shard_uris[0].startswith("s3://")
        assert all(isinstance(time, int) for time in index.shards["modified"].to_pylist())
    assert verify_shards(str(tmp_path / "mine")).findings == ()
    with open_reader(str(tmp_path / "mine"), global_batch=96, image_size=24, num_loaders=2) as reader:
        assert sorted(next(reader).sample_ids_B.tolist()) == list(range(96))
    store.delete_file(f"{root}/theirs/train-000001.tar")
    assert verify_shards(str(tmp_path / "mine")).findings[0].fault == Fault.NO_SHARD


def test_shards_of_a_web_server_are_named_one_by_one_and_indexed_elsewhere(tree, tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tree / "in1k")))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    place = f"http://127.0.0.1:{server.server_port}"
    try:
        index = indexed(f"{place}/s-{{0000..0002}}.tar", out=str(tmp_path / "mine"))
        assert index.shard_uris == [f"{place}/s-000{i}.tar" for i in range(3)]
        assert index.digest == indexed(tree / "in1k", out=str(tmp_path / "local")).digest
        assert verify_shards(str(tmp_path / "mine")).findings == ()
        with pytest.raises(DamagedDataError, match=r"s-0003\.tar: .* is not there"):
            build_index(f"{place}/s-{{0000..0003}}.tar", out=str(tmp_path / "more"))
        with pytest.raises(ConfigError, match="name the shards"):
            build_index(f"{place}/*.tar", out=str(tmp_path / "more"))
        with pytest.raises(ConfigError, match="choose a folder of your own with --out DIR"):
            build_index(f"{place}/s-0000.tar")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_web_server_that_ignores_ranges_is_asked_once_for_a_shard_that_is_indexed(tmp_path, monkeypatch):
    monkeypatch.setattr("crate_ray.data.scan._REMOTE_CHUNK_BYTES", 1000)
    shard = pack_shard({"__key__": f"k{i}", "png": image(i, "PNG"), "cls": b"1"} for i in range(20))
    with FaultServer({"/a.tar": shard}) as server:
        server.fail("whole")
        assert build_index(f"{server.url}/a.tar", out=str(tmp_path / "mine")).num_samples == 20
        assert server.count("GET") == 1


def test_a_task_of_an_audit_carries_the_rows_of_its_own_shard_only(tmp_path):
    rows = [{"__key__": f"key-{i:05d}", "jpg": b"1"} for i in range(2000)]
    for shard in range(20):
        (tmp_path / f"s{shard:02d}.tar").write_bytes(pack_shard(rows[100 * shard : 100 * (shard + 1)]))
    tasks, _ = _indexed_tasks(indexed(tmp_path))
    assert max(len(pickle.dumps(task)) for task in tasks) < 100 * 60  # key, offset, hash and label of 100 samples
