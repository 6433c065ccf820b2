"""Every fault a shard may have: what `data verify` and `data index` say, and what webdataset does with the same bytes.

The table in docs/data_format.md is this file in words.
"""

import io
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile import AT, FAULTS, NUM_SAMPLES, SOUND, Hostile, changed, image, members, png_that_claims, samples
from hostile import webdataset_reads as webdataset

from crate_ray.config import ConfigError
from crate_ray.data import DamagedDataError, Fault, build_index, load_index, open_reader, verify_shards
from crate_ray.data.shards import pack_shard

pytestmark = [
    pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one sound shard."""
    (tmp_path / "good.tar").write_bytes(pack_shard(samples("a")))
    return tmp_path


def put(folder: Path, hostile: Hostile, name: str = "bad.tar") -> str:
    """Add a hostile shard; return what to index or verify."""
    if hostile.fault == Fault.NO_SHARD:
        return f"{folder}/{{good,{name.removesuffix('.tar')}}}.tar"
    (folder / name).write_bytes(hostile.make())
    return str(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_its_name_and_place_and_nothing_else_is(folder, fault):
    hostile = FAULTS[fault]
    (found,) = verify_shards(put(folder, hostile)).findings
    assert (found.fault, found.shard, found.key) == (hostile.fault, "bad.tar", hostile.key)
    if hostile.offset is not None:
        assert found.offset == hostile.offset
    assert found.what
    assert found.fix


@pytest.mark.parametrize("fault", FAULTS)
def test_webdataset_takes_the_same_shard_as_the_table_says(folder, fault):
    put(folder, FAULTS[fault])
    assert webdataset([folder / "bad.tar"], fields="jpg;png cls", decode="pil") == FAULTS[fault].theirs


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_shard_is_not_indexed_and_what_can_be_told_apart_is(folder, fault):
    hostile = FAULTS[fault]
    url = put(folder, hostile)
    if hostile.blocks:
        with pytest.raises(DamagedDataError, match=rf"bad\.tar.*\({hostile.fault}\)") as refusal:
            build_index(url)
        assert [finding.fault for finding in refusal.value.findings] == [hostile.fault]
        assert not list(folder.glob("*.parquet"))
    summary = build_index(url, skip_damaged=True)
    assert summary.num_samples + summary.left_out_samples == NUM_SAMPLES * (2 - summary.left_out_shards)
    assert summary.left_out_shards == (hostile.blocks and hostile.key == "")
    assert summary.left_out_samples == (hostile.key != "" and hostile.fault not in (Fault.IMAGE, Fault.NO_LABEL))
    assert load_index(summary.url).num_samples == summary.num_samples


def test_all_faults_are_reported_in_one_run(folder):
    for number, hostile in enumerate(FAULTS.values()):
        if hostile.fault != Fault.NO_SHARD:
            put(folder, hostile, f"bad-{number:02d}.tar")
    found = verify_shards(str(folder)).findings
    expected = [(f"bad-{i:02d}.tar", h.fault, h.key) for i, h in enumerate(FAULTS.values()) if h.fault != Fault.NO_SHARD]
    assert [(finding.shard, finding.fault, finding.key) for finding in found] == expected
    with pytest.raises(DamagedDataError) as refusal:
        build_index(str(folder))
    assert len(refusal.value.findings) == sum(h.blocks and h.fault != Fault.NO_SHARD for h in FAULTS.values())


def test_a_flipped_bit_in_the_picture_is_found_by_the_checksum_and_passes_webdataset(folder):
    (folder / "bad.tar").write_bytes(SOUND)
    build_index(str(folder))
    place = AT["b5.jpg"].offset + AT["b5.jpg"].size - 300
    (folder / "bad.tar").write_bytes(changed(place))
    assert webdataset([folder / "bad.tar"], fields="jpg cls", decode="pil") == (NUM_SAMPLES, None)
    (found,) = verify_shards(str(folder)).findings
    assert (found.fault, found.shard, found.key, found.offset) == (Fault.CHANGED, "bad.tar", "b5", AT["b5.jpg"].offset)


def test_a_flipped_bit_outside_of_the_pictures_is_found_too(folder):
    (folder / "bad.tar").write_bytes(SOUND)
    build_index(str(folder))
    (folder / "bad.tar").write_bytes(changed(AT["b5.cls"].offset, flip=2))  # another label, which is a number too
    (found,) = verify_shards(str(folder)).findings
    assert (found.fault, found.key) == (Fault.CHANGED, "b5")
    (folder / "bad.tar").write_bytes(changed(AT["b5.cls"].offset + 9))  # the padding behind it
    (found,) = verify_shards(str(folder)).findings
    assert (found.fault, found.key) == (Fault.CHANGED, "")


def test_samples_that_went_and_came_after_indexing_are_named(folder):
    (folder / "bad.tar").write_bytes(SOUND)
    build_index(str(folder))
    rows = samples("b")
    rows[5] = {**rows[5], "__key__": "new"}
    (folder / "bad.tar").write_bytes(pack_shard(rows))
    found = {(finding.fault, finding.key) for finding in verify_shards(str(folder)).findings}
    assert {(Fault.LOST, "b5"), (Fault.UNINDEXED, "new")} <= found


def test_a_damaged_shard_that_was_left_out_is_reported_by_its_damage_alone(folder):
    unlabelled = pack_shard([{name: value for name, value in row.items() if name != "cls"} for row in samples("b")])
    (folder / "bad.tar").write_bytes(unlabelled[: len(unlabelled) // 2])
    build_index(str(folder), skip_damaged=True)
    assert [finding.fault for finding in verify_shards(str(folder)).findings] == [Fault.TRUNCATED]
    (folder / "bad.tar").write_bytes(SOUND)
    assert [finding.fault for finding in verify_shards(str(folder)).findings] == [Fault.UNINDEXED]


PICKLE = b"cos\nsystem\n(S'touch %s'\ntR."


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "pt", "pyd.gz", "extra.pyd"])
def test_a_pickle_is_reported_and_never_opened(folder, extension):
    trap = folder / "executed"
    rows = samples("b")
    rows[5][extension] = PICKLE % str(trap).encode()
    (folder / "bad.tar").write_bytes(pack_shard(rows))
    (found,) = verify_shards(str(folder)).findings
    assert (found.fault, found.key) == (Fault.CODE, "b5")
    assert build_index(str(folder)).num_samples == 2 * NUM_SAMPLES
    with open_reader(str(folder), global_batch=20, image_size=16, num_loaders=0) as reader:
        next(reader)
    assert not trap.exists()
    if extension == "pyd":
        assert webdataset([folder / "bad.tar"], fields="jpg cls", decode="pil") == (NUM_SAMPLES, None)
        assert trap.exists()  # webdataset ran it


@pytest.mark.parametrize("url", ["pipe:touch executed", "ftp://host/a.tar", "file+exec://x", "ray://head:10001"])
@pytest.mark.parametrize("read", [build_index, verify_shards, load_index])
def test_schemes_that_are_not_read_are_refused(tmp_path, monkeypatch, url, read):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"would run a shell command|is not supported"):
        read(url)
    assert not list(tmp_path.iterdir())


def test_an_index_cannot_smuggle_in_a_shell_command(folder):
    """webdataset runs `pipe:`; here it is refused also where it comes from a table that a stranger wrote."""
    build_index(str(folder))
    trap = folder / "executed"
    table = pq.read_table(folder / "shards.parquet")
    uri = pa.array([f"pipe:touch {trap}"])
    pq.write_table(table.set_column(table.column_names.index("uri"), "uri", uri), folder / "shards.parquet")
    (found, *_) = [finding for finding in verify_shards(str(folder)).findings if finding.fault == Fault.UNREADABLE]
    assert "would run a shell command" in found.what
    with (
        open_reader(str(folder), global_batch=4, image_size=16, num_loaders=0) as reader,
        pytest.raises(ConfigError, match="would run a shell command"),
    ):
        next(reader)
    import webdataset as wds

    with wds.gopen(f"pipe:touch {trap}") as stream:
        stream.read()
    assert trap.exists()  # webdataset ran it


def test_the_pixel_limit_is_configurable_and_read_from_the_header(folder):
    started = time.monotonic()
    rows = [{**row, **({"png": png_that_claims(14_000, 14_000)} if i == 5 else {})} for i, row in enumerate(samples("b"))]
    del rows[5]["jpg"]
    (folder / "bad.tar").write_bytes(pack_shard(rows))
    assert [finding.key for finding in verify_shards(str(folder), decode=False).findings] == ["b5"]
    assert verify_shards(str(folder), decode=False, max_pixels=196_000_000).findings == ()
    assert len(verify_shards(str(folder), max_pixels=1000).findings) == 20
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("content", "label"),
    [
        (b"[" * 100_000, None),
        (b'{"label": ' + b"9" * 5000 + b"}", None),
        (b'{"label": 99999999999999}', -1),
        (b'{"label": true}', -1),
        (b'{"label": -3}', -1),
        (b'{"label": NaN}', -1),
        (b'{"source": "\\ud800", "label": 2}', 2),
        (b"\xff\xfe{}", None),
        (b"[1, 2]", -1),
        (b" " * 2_000_000, None),
    ],
)
def test_hostile_json_is_a_finding_or_no_label_never_a_crash(tmp_path, content, label):
    (tmp_path / "a.tar").write_bytes(pack_shard([{"__key__": "k", "jpg": image(0), "json": content}]))
    if label is None:
        (found,) = verify_shards(str(tmp_path)).findings
        assert (found.fault, found.key) == (Fault.LABEL, "k")
    else:
        assert load_index(build_index(str(tmp_path)).url).labels.tolist() == [label]


@pytest.mark.parametrize("content", [b"-1", b"1_0", b"0x3", b"", b"9" * 5000, b"4294967296", b"3.0", b"\xd9\xa3", b"1 2"])
def test_a_cls_that_is_no_plain_number_is_a_finding(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(pack_shard([{"__key__": "k", "jpg": image(0), "cls": content}]))
    (found,) = verify_shards(str(tmp_path)).findings
    assert (found.fault, found.key) == (Fault.LABEL, "k")


def header_with(field: slice, value: bytes, *, kind: bytes = b"0") -> bytes:
    """The sound shard with one field of its first header replaced, and a right checksum."""
    data = bytearray(SOUND)
    data[156:157] = kind
    data[field] = value.ljust(field.stop - field.start, b"\0")
    data[148:156] = b"%06o\0 " % (sum(data[:512]) - sum(data[148:156]) + 8 * 32)
    return bytes(data)


SIZE = slice(124, 136)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (header_with(SIZE, b"-0000000001"), Fault.NOT_A_TAR),
        (header_with(SIZE, b"1_0"), Fault.NOT_A_TAR),
        (header_with(SIZE, b"0o17"), Fault.NOT_A_TAR),
        (header_with(SIZE, b"\xff" * 12), Fault.NOT_A_TAR),
        (header_with(SIZE, b"\x80" + b"\xff" * 11), Fault.TRUNCATED),
        (header_with(SIZE, b"77777777777"), Fault.TRUNCATED),
        (header_with(SIZE, b"00000000001", kind=b"S"), Fault.UNSUPPORTED),
        (header_with(SIZE, b"00000001000", kind=b"x"), Fault.HEADER),
    ],
)
def test_hostile_header_fields_end_in_a_finding(tmp_path, data, fault):
    (tmp_path / "a.tar").write_bytes(data)
    (found,) = verify_shards(str(tmp_path)).findings
    assert (found.fault, found.offset) == (fault, 0)


def pax(records: bytes, name: str = "k.jpg") -> bytes:
    """An archive whose first member has these extended records."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        extended = tarfile.TarInfo("././@PaxHeader")
        extended.type, extended.size = b"x", len(records)
        archive.addfile(extended, io.BytesIO(records))
        info = tarfile.TarInfo(name)
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("records", "fault"),
    [
        (b"11 size=-1\n", Fault.HEADER),
        (b"20 size=99999999999\n", Fault.TRUNCATED),
        (b"12 size=abc\n", Fault.HEADER),
        (b"0 path=a.jpg\n", Fault.HEADER),
        (b"999 path=a.jpg\n", Fault.HEADER),
        (b"path=a.jpg\n", Fault.HEADER),
        (b"22 GNU.sparse.major=1\n", Fault.UNSUPPORTED),
        (b"9" * 5000, Fault.HEADER),
        (b"5 a=\n" * 300_000, Fault.UNSUPPORTED),
    ],
)
def test_hostile_extended_headers_end_in_a_finding(tmp_path, records, fault):
    (tmp_path / "a.tar").write_bytes(pax(records))
    assert fault in {finding.fault for finding in verify_shards(str(tmp_path)).findings}


def test_many_extended_records_take_linear_time(tmp_path):
    (tmp_path / "a.tar").write_bytes(pax(b"5 a=\n" * 200_000))
    started = time.process_time()
    verify_shards(str(tmp_path))
    assert time.process_time() - started < 3


def test_damage_in_the_middle_does_not_hide_the_faults_in_front_of_it(folder):
    rows = samples("b")
    rows[1]["cls"] = b"cat"
    rows[2]["jpg"] = b"no image"
    data = bytearray(pack_shard(rows))
    data[members(bytes(data))[9].offset - 500] ^= 1
    (folder / "bad.tar").write_bytes(data)
    found = [(finding.fault, finding.key) for finding in verify_shards(str(folder)).findings]
    assert found == [(Fault.LABEL, "b1"), (Fault.IMAGE, "b2"), (Fault.HEADER, "")]


def test_in_training_every_kind_of_bad_image_is_replaced_in_its_place_and_counted(tmp_path):
    """The order of a sound copy is the reference: positions do not shift, whatever is wrong with a sample."""
    sound = [{"__key__": f"k{i:02d}", "png": image(i, "PNG"), "cls": str(i % 7).encode()} for i in range(40)]
    bad = {4: png_that_claims(14_000, 14_000), 9: image(9, "PNG")[:200], 10: b"<html>", 39: image(39, "PNG")}
    for name, rows in (("sound", sound), ("bad", [{**row, "png": bad.get(i, row["png"])} for i, row in enumerate(sound)])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar").write_bytes(pack_shard(rows))
        build_index(str(tmp_path / name))
    shard = tmp_path / "bad" / "a.tar"
    data = bytearray(shard.read_bytes())
    last = members(bytes(data))[-1] if members(bytes(data))[-1].name.endswith("png") else members(bytes(data))[-2]
    data[last.offset + last.size // 2] ^= 1
    shard.write_bytes(data)
    options = {"global_batch": 16, "image_size": 16, "augment": "random_resized_crop", "noise_size": 4, "num_loaders": 2}
    stand_in = {4: 5, 9: 11, 10: 11, 39: 0}
    with open_reader(str(tmp_path / "sound"), **options) as whole, open_reader(str(tmp_path / "bad"), **options) as reader:
        for _ in range(5):  # two epochs of 40, in batches of 16
            expected, found = next(whole), next(reader)
            ids = expected.sample_ids_B.tolist()
            assert found.sample_ids_B.tolist() == [stand_in.get(i, i) for i in ids]
            assert found.labels_B.tolist() == [stand_in.get(i, i) % 7 for i in ids]
            assert torch.equal(found.noise_BN, expected.noise_BN)
            same = [row for row, i in enumerate(ids) if i not in stand_in]
            assert torch.equal(found.images_BCHW[same], expected.images_BCHW[same])
        assert reader.replaced_samples == 2 * len(stand_in)
        with pytest.raises(ConfigError, match=r"9 of \d+ samples could not be read and were replaced, more than"):
            for _ in range(3):
                next(reader)
