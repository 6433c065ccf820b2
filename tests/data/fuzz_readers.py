"""Coverage-guided fuzzing of the tar walk, the image headers and the PNG check, for as long as you like.

    python -m pip install atheris
    python tests/data/fuzz_readers.py tar|header|png --seconds 60

The checks are the properties that test_fuzz_readers.py holds for mutated files in every test run. libFuzzer stops at the
first exception that is not ours, or at a single input that takes longer than ten seconds, and leaves the input in a file.
"""

import io
import sys
import tarfile
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType

import numpy as np
from PIL import Image

from crate_ray.data import headers, png, shards, tar
from crate_ray.data.headers import ImageError, read_header
from crate_ray.data.png import checked_png
from crate_ray.data.shards import pack_shard, split_name
from crate_ray.data.tar import BLOCK, DamagedShardError, ShardStream, walk_tar

_PIXELS = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)


class Guarded(io.RawIOBase):
    """A file of these bytes that counts what is read and refuses to be read past its end."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data, self._position = memoryview(data), 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        assert len(buffer) <= len(self._data) - self._position, "read past the end of the file"
        self._data[self._position : self._position + len(buffer)].tobytes()
        buffer[:] = self._data[self._position : self._position + len(buffer)]
        self._position += len(buffer)
        return len(buffer)


def with_right_checksums(data: bytes) -> bytes:
    """Every block that looks like a header, with a checksum that agrees, so that the fields behind it are reached."""
    fixed = bytearray(data)
    for at in range(0, len(data) - BLOCK + 1, BLOCK):
        if any(fixed[at : at + 100]):
            total = sum(fixed[at : at + BLOCK]) - sum(fixed[at + 148 : at + 156]) + 8 * 0x20
            fixed[at + 148 : at + 156] = b"%06o\0 " % total
    return bytes(fixed)


def check_tar(data: bytes, *, repair: bool = True) -> None:
    """Members lie inside of the file, in order and apart; only our own error is raised."""
    data = with_right_checksums(data) if repair else data
    stream = ShardStream(Guarded(data), len(data), "fuzzed.tar", window=1 << 20)
    end = 0
    try:
        for member in walk_tar(stream):
            assert end + BLOCK <= member.offset
            assert member.size >= 0
            end = member.offset + member.size
            assert end <= len(data)
            assert stream.read(member.size) == data[member.offset : end]
            split_name(member.name)
            member.name.encode()
    except DamagedShardError as error:
        assert 0 <= error.offset <= len(data)


def check_header(data: bytes) -> None:
    """A format and a size, or our own error; the same from a view that ends where the bytes end."""
    try:
        name, width, height = read_header(data)
    except ImageError:
        return
    assert name in {"jpg", "png", "webp"}
    assert 0 <= width < 2**32
    assert 0 <= height < 2**32
    padded = memoryview(data + b"\xff\xc0" * 50)[: len(data)]
    assert read_header(padded) == (name, width, height)


def check_png(data: bytes) -> None:
    """Critical chunks that pass again, or our own error; never more memory than a small picture takes."""
    try:
        _, width, height = read_header(data)
        if width * height > 1_000_000:
            return
        kept = checked_png(data)
    except ImageError:
        return
    assert checked_png(kept) == kept


def _tar_seeds() -> list[bytes]:
    rows = [{"__key__": f"s{i}", "jpg": bytes(300), "cls": b"1"} for i in range(2)]
    seeds = [pack_shard(rows), b"", bytes(1024)]
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=tar_format) as archive:
            for kind, name in ((tarfile.REGTYPE, "ü" * 120 + ".jpg"), (tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "l.jpg")):
                info = tarfile.TarInfo(name)
                info.type, info.size = kind, 5 if kind == tarfile.REGTYPE else 0
                archive.addfile(info, io.BytesIO(b"abcde"))
        seeds.append(sink.getvalue())
    return [seed[:6144] for seed in seeds]


def _header_seeds() -> list[bytes]:
    seeds = []
    for form, mode, options in (
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "L", {"exif": b"Exif\0\0" + bytes(50)}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"exif": b"Exif\0\0" + bytes(20)}),
    ):
        sink = io.BytesIO()
        Image.fromarray(_PIXELS).convert(mode).save(sink, form, **options)
        seeds.append(sink.getvalue())
    return seeds


TAR_SEEDS, HEADER_SEEDS = _tar_seeds(), _header_seeds()
CHECKS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "tar": (check_tar, TAR_SEEDS),
    "header": (check_header, HEADER_SEEDS),
    "png": (check_png, HEADER_SEEDS[:2]),
}


def _functions(*modules: ModuleType) -> Iterator[FunctionType]:
    """Every function and method that these modules define."""
    for module in modules:
        for value in vars(module).values():
            members = vars(value).values() if isinstance(value, type) else [value]
            own = [member for member in members if isinstance(member, FunctionType)]
            yield from (function for function in own if function.__module__ == module.__name__)


def main() -> None:
    """One target for some seconds."""
    import tempfile
    from pathlib import Path

    import atheris

    target, seconds = sys.argv[1], sys.argv[sys.argv.index("--seconds") + 1]
    check, seeds = CHECKS[target]
    for function in _functions(tar, headers, png, shards):
        atheris.instrument_func(function)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-timeout=10", "-max_len=8192", corpus], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
