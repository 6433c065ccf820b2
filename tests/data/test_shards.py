import io
import tarfile

import pytest

from crate_ray.config import ConfigError
from crate_ray.data.shards import pack_shard, split_name
from crate_ray.data.tar import Member, ShardStream, walk_tar

SAMPLES = [{"__key__": f"s{i}", "jpg": bytes([i]) * (700 + i), "cls": str(i).encode()} for i in range(5)]


def tar_of(members: list[tuple[str, bytes]], **options) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def walk(data: bytes, *, window: int = 4096) -> list[Member]:
    """All members, through a window so small that it moves often."""
    return list(walk_tar(ShardStream(io.BytesIO(data), len(data), "a.tar", window=window)))


def test_the_walk_finds_the_bytes_that_were_packed():
    packed = pack_shard(SAMPLES)
    found = {member.name: packed[member.offset : member.offset + member.size] for member in walk(packed)}
    assert found == {f"{s['__key__']}.{ext}": s[ext] for s in SAMPLES for ext in ("jpg", "cls")}


def test_packing_twice_gives_the_same_bytes_without_extended_headers():
    packed = pack_shard(SAMPLES)
    assert packed == pack_shard(SAMPLES)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert all(not info.pax_headers and info.mtime == 0 for info in archive)


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_in_every_tar_format(tar_format):
    names = ["d" * 60 + "/" + "e" * 70 + "/name.jpg", "short.jpg"]
    names += ["ü/grün" * 30 + ".png", "x" * 300 + ".jpg"] if tar_format != tarfile.USTAR_FORMAT else []
    data = tar_of([(name, name.encode()) for name in names], format=tar_format)
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in walk(data)] == [(n, n.encode()) for n in names]


def test_folders_and_links_are_passed_over():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.jpg"), (tarfile.REGTYPE, "folder/a.jpg")):
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
    assert [member.name for member in walk(stream.getvalue())] == ["folder/a.jpg"]


def test_a_size_in_base_256_is_read():
    data = bytearray(tar_of([("a.jpg", b"abc")]))
    data[124:136] = b"\x80" + (3).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:512]) - sum(data[148:156]) + 8 * 32)
    assert [member.size for member in walk(bytes(data))] == [3]


def test_an_archive_cut_anywhere_is_refused_with_shard_and_byte():
    packed = pack_shard(SAMPLES)
    end = next(i for i in range(0, len(packed), 512) if not any(packed[i:]))
    for length in (*range(1, end + 1024, 256), end + 1023):
        with pytest.raises(ConfigError, match=r"shard a\.tar is damaged at byte \d+"):
            walk(packed[:length])
    assert len(walk(packed[: end + 1024])) == 10


def test_a_flipped_bit_in_any_header_byte_is_found():
    packed = bytearray(pack_shard(SAMPLES))
    second = next(member.offset for i, member in enumerate(walk(bytes(packed))) if i == 1) - 512
    for position in (0, 5, 100, 126, 150, 257, 300, 400):
        packed[second + position] ^= 0x04
        with pytest.raises(ConfigError, match=f"shard a.tar is damaged at byte {second}"):
            walk(bytes(packed))
        packed[second + position] ^= 0x04


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>" * 40, b"\x1f\x8b" + b"z" * 2000])
def test_what_is_no_archive_is_refused(content):
    with pytest.raises(ConfigError, match=r"a\.tar is damaged at byte 0"):
        walk(content)


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a/b.jpg", "a/b", "jpg"),
        ("./a.JPEG", "a", "jpeg"),
        ("v1.2/n01_1.v2.JPEG", "v1.2/n01_1", "v2.jpeg"),
        ("a.mask.png", "a", "mask.png"),
        ("__x.jpg", "__x", "jpg"),
    ],
)
def test_names_split_at_the_first_dot_of_the_file_name(name, key, extension):
    assert split_name(name) == (key, extension)


@pytest.mark.parametrize("name", ["README", "a/.hidden.jpg", ".hidden.jpg", "__x__/a.jpg", "__x__", "a.", "folder/"])
def test_what_belongs_to_no_sample_is_passed_over(name):
    assert split_name(name) is None
