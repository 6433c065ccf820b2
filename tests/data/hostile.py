"""Shards with one fault each, and how webdataset's own reading stages take them."""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from crate_ray.data.shards import pack_shard
from crate_ray.data.tar import Member, ShardStream, walk_tar

NUM_SAMPLES = 10


def image(seed: int, form: str = "JPEG") -> bytes:
    """A picture of 48 x 40 pixels of noise."""
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(sink, form)
    return sink.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A small picture whose header, checksum and all, declares a large one."""
    data = bytearray(image(0, "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def tar_of(members: list[tuple[str, bytes]], **options) -> bytes:
    """An archive of members in this order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def samples(prefix: str) -> list[dict[str, bytes | str]]:
    """Ten labelled pictures."""
    return [
        {"__key__": f"{prefix}{i}", "jpg": image(i + 100 * len(prefix)), "cls": str(i % 3).encode()} for i in range(NUM_SAMPLES)
    ]


def members(data: bytes) -> list[Member]:
    """All members of a sound archive."""
    return list(walk_tar(ShardStream(io.BytesIO(data), len(data), "shard.tar")))


SOUND = pack_shard(samples("b"))
AT = {member.name: member for member in members(SOUND)}
_END = next(i for i in range(0, len(SOUND), 512) if not any(SOUND[i:]))  # where the closing zero blocks begin


def changed(position: int, *, flip: int = 1) -> bytes:
    """The sound shard with a bit of one byte flipped."""
    data = bytearray(SOUND)
    data[position] ^= flip
    return bytes(data)


def with_image(content: bytes, name: str = "jpg") -> bytes:
    """The sound shard with another image in its sample b5."""
    rows = samples("b")
    del rows[5]["jpg"]
    rows[5] = {**rows[5], name: content}
    return pack_shard(rows)


@dataclass(frozen=True)
class Hostile:
    """A fault: the shard, what `data verify` must name, and what webdataset hands out of this shard's ten samples.

    Attributes:
        make: The bytes of the shard; None where there is no file.
        fault: Name of the finding.
        key: Sample that it names.
        offset: Byte that it names.
        theirs: Samples webdataset yields, and the name of the exception it ends with, if any.
        blocks: Whether `data index` refuses the shard.
    """

    make: Callable[[], bytes]
    fault: str
    key: str = ""
    offset: int | None = None
    theirs: tuple[int, str | None] = (NUM_SAMPLES, None)
    blocks: bool = True


def _twice(where: int) -> bytes:
    """The sound shard with the image of b4 a second time, as its member number `where`."""
    rows = [(m.name, SOUND[m.offset : m.offset + m.size]) for m in AT.values()]
    return tar_of([*rows[:where], ("b4.jpg", image(99)), *rows[where:]])


def _without(name: str) -> bytes:
    return tar_of([(m.name, SOUND[m.offset : m.offset + m.size]) for m in AT.values() if m.name != name])


_PICTURE = image(1)
FAULTS: dict[str, Hostile] = {
    "cut inside a member": Hostile(
        lambda: SOUND[: AT["b4.jpg"].offset + 100], "truncated", "", AT["b4.jpg"].offset - 512, theirs=(4, "ReadError")
    ),
    "cut at a member boundary": Hostile(
        lambda: SOUND[: AT["b6.cls"].offset - 512], "truncated", "", AT["b6.cls"].offset - 512, theirs=(6, None)
    ),
    "cut inside a header": Hostile(
        lambda: SOUND[: AT["b6.cls"].offset - 200], "truncated", "", AT["b6.cls"].offset - 512, theirs=(6, None)
    ),
    "cut after the first zero block": Hostile(lambda: SOUND[: _END + 512], "truncated", "", _END),
    "corrupt header": Hostile(
        lambda: changed(AT["b4.jpg"].offset - 512 + 3),
        "corrupt-header",
        "",
        AT["b4.jpg"].offset - 512,
        theirs=(4, "ValueError"),
    ),
    "empty file": Hostile(lambda: b"", "empty", "", 0, theirs=(0, "ReadError")),
    "a web page": Hostile(lambda: b"<!DOCTYPE html><title>503</title>" * 100, "not-a-tar", "", 0, theirs=(0, "ReadError")),
    "two archives joined by cat": Hostile(lambda: SOUND[: _END + 1024] + SOUND, "trailing-data", "", _END + 1024),
    "no file": Hostile(lambda: SOUND, "missing-shard", theirs=(0, "FileNotFoundError")),
    "duplicate key, side by side": Hostile(lambda: _twice(10), "duplicate-key", "b4", theirs=(4, "ValueError")),
    "duplicate key, apart": Hostile(lambda: _twice(18), "duplicate-key", "b4", theirs=(9, "ValueError")),
    "missing image": Hostile(lambda: _without("b5.jpg"), "no-image", "b5", blocks=False, theirs=(5, "ValueError")),
    "missing label": Hostile(lambda: _without("b5.cls"), "no-label", "b5", blocks=False, theirs=(5, "ValueError")),
    "label that is no number": Hostile(
        lambda: pack_shard([{**row, **({"cls": b"dog"} if row["__key__"] == "b5" else {})} for row in samples("b")]),
        "bad-label",
        "b5",
        theirs=(5, "DecodingError"),
    ),
    "image cut short": Hostile(
        lambda: with_image(_PICTURE[: len(_PICTURE) // 2]), "bad-image", "b5", blocks=False, theirs=(5, "DecodingError")
    ),
    "corrupt image": Hostile(
        lambda: with_image(_PICTURE[:2] + bytes(300) + _PICTURE[302:]),
        "bad-image",
        "b5",
        blocks=False,
        theirs=(5, "DecodingError"),
    ),
    "bytes that are no image": Hostile(
        lambda: with_image(b"GIF89a" + bytes(90)), "bad-image", "b5", blocks=False, theirs=(5, "DecodingError")
    ),
    "196-megapixel PNG": Hostile(
        lambda: with_image(png_that_claims(14_000, 14_000), "png"), "bad-image", "b5", blocks=False, theirs=(5, "DecodingError")
    ),
}


def webdataset_reads(paths: list[Path], *, fields: str | None = None, decode: str | None = None) -> tuple[int, str | None]:
    """How many samples webdataset's stages yield from shards, and the exception they end with."""
    import webdataset as wds
    from webdataset.tariterators import group_by_keys, tar_file_expander

    count = 0
    with ExitStack() as stack:
        try:
            streams = ({"url": str(path), "stream": stack.enter_context(path.open("rb"))} for path in paths)
            found = group_by_keys(tar_file_expander(streams))
            found = wds.decode(decode)(found) if decode else found
            for _ in wds.to_tuple(*fields.split())(found) if fields else found:
                count += 1
        except Exception as error:  # noqa: BLE001  whatever it raises is the answer
            return count, type(error).__name__
    return count, None
