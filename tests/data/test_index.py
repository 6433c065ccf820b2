import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fault_server import FaultServer
from hostile import image

from crate_ray.config import ConfigError
from crate_ray.data import DamagedDataError, Fault, ShardIndex, build_index, load_index, map_with, verify_shards
from crate_ray.data.shards import pack_shard

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

PNG = image(0, "PNG")


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


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Four shards of five samples that someone else wrote."""
    for shard in range(4):
        rows = [{"__key__": f"k{shard}{i}", "png": PNG + bytes([shard, i]) * 300, "cls": str(i).encode()} for i in range(5)]
        write(tmp_path / "theirs", rows, f"s{shard}.tar")
    return tmp_path / "theirs"


def test_an_index_of_ones_own_keeps_the_uris_of_shards_that_lie_elsewhere(theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = indexed("theirs", out="mine")
    monkeypatch.chdir("/")
    index = load_index(str(tmp_path / "mine"))
    assert index.shard_uris == [str(theirs / f"s{i}.tar") for i in range(4)]
    assert "theirs/s1.tar" in index.locate(7)
    assert sorted(path.name for path in theirs.iterdir()) == [f"s{i}.tar" for i in range(4)]
    assert index.digest == indexed(str(theirs)).digest
    assert verify_shards(str(tmp_path / "mine")).indexed
    (theirs / "s9.tar").write_bytes((theirs / "s1.tar").read_bytes())
    assert [(f.fault, f.shard) for f in verify_shards(str(tmp_path / "mine")).findings] == [(Fault.UNINDEXED, "s9.tar")]


def test_a_folder_that_cannot_be_written_asks_for_another(theirs, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="choose a folder of your own with --out DIR"):
        build_index(str(theirs), out=str(tmp_path / "file" / "mine"))


def test_an_interrupted_indexing_reads_only_what_it_had_not_read(theirs):
    class StopError(Exception):
        pass

    def stop(done: int, total: int, samples: int) -> None:
        if done == 3:
            raise StopError

    with pytest.raises(StopError):
        build_index(str(theirs), progress=stop)
    assert not list(theirs.glob("*.parquet"))
    changed = theirs / "s1.tar"
    write(theirs, [{"__key__": "new", "jpg": b"1", "cls": b"8"}], changed.name)
    read = []
    summary = build_index(
        str(theirs), task_map=lambda function, tasks: (read.extend(tasks), enumerate(map(function, tasks)))[1]
    )
    assert [file.name for file in read] == ["s1.tar", "s3.tar"]  # the one that changed, and the one not reached
    assert (summary.resumed_shards, summary.num_samples, summary.num_classes) == (2, 16, 9)
    assert sorted(path.name for path in theirs.iterdir()) == [
        "s0.tar",
        "s1.tar",
        "s2.tar",
        "s3.tar",
        "samples.parquet",
        "shards.parquet",
    ]
    resumed = load_index(str(theirs))
    again = indexed(str(theirs))
    assert resumed.samples.equals(again.samples)
    assert resumed.shards.equals(again.shards)


def test_another_label_field_does_not_take_what_was_read_for_the_first(theirs):
    write(theirs, [{"__key__": "j", "jpg": b"1", "cls": b"0", "json": b'{"label": 0, "other": 3}'}], "s0.tar")
    (theirs / "s1.tar").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="not-a-tar"):
        build_index(str(theirs))
    index = indexed(str(theirs), label_field="other", skip_damaged=True)
    assert index.labels.tolist() == [3, *range(5), *range(5)]


def test_a_repaired_shard_is_the_only_one_read_after_a_refusal(theirs):
    sound = (theirs / "s2.tar").read_bytes()
    (theirs / "s2.tar").write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ConfigError, match=r"1 fault\..*\n  shard s2\.tar at byte"):
        build_index(str(theirs))
    (theirs / "s2.tar").write_bytes(sound)
    assert build_index(str(theirs)).resumed_shards == 3


def test_shards_read_in_any_order_give_the_same_index(theirs, tmp_path):
    def backwards(function, tasks):
        return ((i, function(tasks[i])) for i in reversed(range(len(tasks))))

    first = indexed(str(theirs), out=str(tmp_path / "first"))
    second = indexed(str(theirs), out=str(tmp_path / "second"), task_map=backwards)
    assert first.samples.equals(second.samples)
    assert (tmp_path / "first" / "samples.parquet").read_bytes() == (tmp_path / "second" / "samples.parquet").read_bytes()


@pytest.mark.slow
def test_processes_give_the_same_index(theirs, tmp_path):
    first = indexed(str(theirs), out=str(tmp_path / "first"))
    assert indexed(str(theirs), out=str(tmp_path / "second"), task_map=map_with(2)).samples.equals(first.samples)


def test_an_index_of_an_earlier_release_is_read(theirs):
    index = indexed(str(theirs))
    shards = pq.read_table(theirs / "shards.parquet")
    earlier = shards.select(["name", "bytes", "count", "checksum"])
    metadata = {key: shards.schema.metadata[key] for key in (b"schema_version", b"num_classes")}
    pq.write_table(earlier.replace_schema_metadata(metadata), theirs / "shards.parquet")
    samples = pq.read_table(theirs / "samples.parquet")
    pq.write_table(samples.replace_schema_metadata(metadata), theirs / "samples.parquet")
    loaded = load_index(str(theirs))
    assert loaded.digest == index.digest
    assert loaded.shard_uris == index.shard_uris
    assert verify_shards(str(theirs), decode=False).indexed


def peak_mib(folder: Path, num_shards: int) -> tuple[float, int]:
    """Peak memory of `crate-ray data index` on so many shards of 2,500 tiny samples, and its samples."""
    rows = [{"__key__": f"key-{i:08d}", "jpg": b"1" * 40, "cls": b"7", "json": b'{"width": 500}'} for i in range(2500)]
    packed = pack_shard(rows)
    folder.mkdir()
    (folder / "s-000000.tar").write_bytes(packed)
    for number in range(1, num_shards):
        (folder / f"s-{number:06d}.tar").hardlink_to(folder / "s-000000.tar")
    code = (
        "import sys; from pathlib import Path; from crate_ray.cli.main import main\n"
        f"sys.argv = ['crate-ray', 'data', 'index', {str(folder)!r}, '--json']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "status = Path('/proc/self/status').read_text()\n"  # ru_maxrss would be that of the parent, before exec
        "print(status.split('VmHWM:')[1].split()[0], 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak_kib, has_torch = done.stderr.split()[-2:]
    assert has_torch == "False"
    return int(peak_kib) / 1024, json.loads(done.stdout)["num_samples"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_index_as_large_as_imagenets_is_made_in_200_mib(tmp_path):
    small, _ = peak_mib(tmp_path / "small", 4)
    large, num_samples = peak_mib(tmp_path / "large", 513)
    assert num_samples == 1_282_500
    print(f"{small:.0f} MiB for 10,000 samples, {large:.0f} MiB for {num_samples:,}")
    assert large < 200


def test_an_interrupted_indexing_of_web_shards_reads_one_that_changed_at_equal_size_again(tmp_path):
    def shard(label: bytes) -> bytes:
        return pack_shard([{"__key__": "k", "png": PNG, "cls": label}])

    with FaultServer({"/0.tar": shard(b"1"), "/1.tar": b"damaged"}) as server:
        url, out = f"{server.url}/{{0..1}}.tar", str(tmp_path / "mine")
        with pytest.raises(ConfigError, match="not-a-tar"):
            build_index(url, out=out)
        server.files["/1.tar"] = shard(b"2")
        summary = build_index(url, out=out, num_classes=10)
        assert summary.resumed_shards == 1
        assert None not in load_index(out).shards["etag"].to_pylist()
        server.files["/1.tar"] = b"damaged"
        with pytest.raises(ConfigError, match="not-a-tar"):
            build_index(url, out=out)
        server.files |= {"/0.tar": shard(b"3"), "/1.tar": shard(b"2")}
        assert build_index(url, out=out).resumed_shards == 0
        assert load_index(out).labels.tolist() == [3, 2]


def test_tables_of_two_indexings_are_refused(theirs):
    build_index(str(theirs))
    earlier = (theirs / "shards.parquet").read_bytes()
    rows = [{"__key__": f"new{i}", "png": PNG, "cls": b"0"} for i in range(5)]
    write(theirs, rows, "s0.tar")  # as many samples as before
    build_index(str(theirs))
    load_index(str(theirs))
    (theirs / "shards.parquet").write_bytes(earlier)  # as if it had ended between the two
    with pytest.raises(ConfigError, match=r"samples.parquet and shards.parquet disagree; index again"):
        load_index(str(theirs))


def test_the_index_names_the_members_of_each_sample(tmp_path):
    samples = [{"__key__": "a", "jpg": b"1", "json": b"{}", "cls": b"3"}, {"__key__": "b", "png": PNG, "mask.png": PNG}]
    url = write(tmp_path, samples)
    assert indexed(url).column("members").tolist() == ["cls,jpg,json", "mask.png,png"]
    earlier = pq.read_table(tmp_path / "samples.parquet").drop_columns("members")
    pq.write_table(earlier, tmp_path / "samples.parquet")
    assert load_index(url).samples["members"].null_count == 2


def test_a_full_disk_is_one_message(theirs, monkeypatch):
    def full(uri, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crate_ray.storage.write_atomic", full)
    with pytest.raises(ConfigError, match=rf"{theirs} cannot be written \(.*No space left.*\); make room there"):
        build_index(str(theirs))


def _end_this_process(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_worker_process_that_is_killed_is_one_message():
    with pytest.raises(ConfigError, match="one of 2 processes was ended from outside"):
        list(map_with(2)(_end_this_process, [1, 2, 3]))


def test_of_many_findings_some_are_held_and_all_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr("crate_ray.data.findings._MAX_FINDINGS", 3)
    for shard in range(4):
        write(tmp_path, [{"__key__": f"k{i}", "jpg": b"1", "cls": b"dog"} for i in range(2)], f"s{shard}.tar")
    with pytest.raises(DamagedDataError, match="8 faults") as refusal:
        build_index(str(tmp_path))
    assert [finding.shard for finding in refusal.value.findings] == ["s0.tar", "s0.tar", "s1.tar", "s1.tar"]
    assert refusal.value.findings[-1].what == "5 more of this kind, here and in other shards"
    labels = [finding for finding in verify_shards(str(tmp_path), decode=False).findings if finding.fault == Fault.LABEL]
    assert len(labels) == 4


def test_a_folder_that_may_not_be_listed_is_one_message(theirs, monkeypatch):
    def refused(action, what):  # the administrator, who may run this, is refused nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("crate_ray.data.listing.retrying", refused)
    with pytest.raises(ConfigError, match=r"theirs may not be listed .*right to read"):
        build_index(str(theirs))


def test_a_task_of_the_cluster_whose_process_dies_is_one_message(monkeypatch):
    from ray.exceptions import WorkerCrashedError

    from crate_ray.launch import indexing

    def died(reference):
        raise WorkerCrashedError

    monkeypatch.setattr(indexing.ray, "get", died)
    with pytest.raises(ConfigError, match=r"process died each time .*; take fewer workers"):
        indexing.result_of(None, "take fewer workers")


def test_a_folder_of_splits_names_them_and_a_missing_one_is_said_to_be_missing(tmp_path, shapes_folder):
    with pytest.raises(ConfigError, match=r"holds the splits test, train, validation; name one of them: .*/validation$"):
        build_index(str(shapes_folder))
    for url in ("nowhere", "nowhere/a.tar"):
        with pytest.raises(ConfigError, match=f"{url}: it does not exist; give the folder"):
            build_index(str(tmp_path / url))


def test_a_tar_of_tars_is_refused_with_the_way_to_build_from_it(tmp_path):
    inner = pack_shard([{"__key__": "n01_1", "jpg": b"1"}])
    url = write(tmp_path, [{"__key__": f"n{i}", "tar": inner} for i in range(3)])
    with pytest.raises(ConfigError, match=r"a\.tar holds archives, not images; unpack these.*imagenet:DIR OUT"):
        build_index(url)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_a_field_that_no_sample_has_is_one_line_and_shards_without_labels_name_their_fields(tmp_path):
    about = b'{"url": "u", "class_id": 1}'
    url = write(tmp_path, [{"__key__": f"k{i}", "jpg": b"1", "json": about} for i in range(16)])
    assert build_index(url).json_fields == ("class_id", "url")
    assert build_index(url, label_field="class_id").json_fields == ()
    with pytest.raises(DamagedDataError) as refusal:
        build_index(url, label_field="nosuch")
    assert str(refusal.value).endswith("the json of 16 samples has no field 'nosuch' (bad-label); fields are class_id, url")
    assert len(refusal.value.findings) == 16


def test_a_refusal_shows_the_first_findings_of_each_kind(tmp_path):
    url = write(tmp_path, [{"__key__": f"k{i:02d}", "jpg": b"1", "cls": b"dog"} for i in range(16)])
    write(tmp_path, [], "b.tar")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DamagedDataError, match="17 faults") as refusal:
        build_index(url)
    _, *labels, more, empty = str(refusal.value).splitlines()
    assert [line.split("'")[1] for line in labels] == ["k00", "k01", "k02"]
    assert more == "  and 13 more bad-label; --json gives all"
    assert empty.startswith("  shard b.tar at byte 0")
