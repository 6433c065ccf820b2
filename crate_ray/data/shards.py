"""WebDataset shards: writing them, and walking those that anyone wrote.

In: samples as dictionaries of bytes, or the bytes of a tar file. Out: the bytes of a tar file, or its members and samples.
Shards are written with webdataset's own writer and fixed metadata, so the same samples give the same bytes.
They are read with a walk of our own over the headers, because the tar readers in use stop silently at a damaged header and
lose the rest of the shard: here every header checksum is verified and the end-of-archive blocks are required. The price is
that archives cut short, which other readers accept, are refused.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from crate_ray.config import ConfigError

Buffer = bytes | memoryview

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "png", "webp")
_ZERO_BLOCK = bytes(BLOCK)
_CHECKSUM_BLANK = 8 * 0x20


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of a tar archive: its name and where its content lies."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The members that share a key, by extension (lower case, everything after the first dot)."""

    key: str
    members: dict[str, Member]

    def image_extension(self) -> str | None:
        """The extension of the image: a plain one first, else the only one that ends in an image format."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return extension
        compound = [name for name in self.members if name.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS]
        return compound[0] if len(compound) == 1 else None


def _number(field: bytes) -> int:
    """A numeric header field: octal digits, or base 256 when the top bit is set (GNU, for sizes of 8 GiB and more)."""
    if field[:1] >= b"\x80":
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b"\0 ") or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes) -> dict[str, str]:
    """The records `length key=value newline` of a PAX extended header."""
    records: dict[str, str] = {}
    while data.strip(b"\0"):
        length_text, _, _ = data.partition(b" ")
        length = int(length_text)
        if length <= len(length_text) + 1 or length > len(data):
            raise ValueError("a record runs past its header")
        key, _, value = data[len(length_text) + 1 : length - 1].partition(b"=")
        records[key.decode("utf-8")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _damaged(shard: str, offset: int, what: str) -> ConfigError:
    return ConfigError(f"shard {shard} is damaged at byte {offset}: {what}; write or copy it again")


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _checked_header(data: Buffer, offset: int, shard: str) -> tuple[bytes, int]:
    """The header block at an offset and the size it declares, once its checksum agrees."""
    header = bytes(data[offset : offset + BLOCK])
    if len(header) < BLOCK:
        raise _damaged(shard, offset, "it ends without the two zero blocks that close a tar archive (cut short)")
    try:
        stated, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        raise _damaged(shard, offset, "this is not a tar header") from None
    if stated != sum(header) - sum(header[148:156]) + _CHECKSUM_BLANK:
        raise _damaged(shard, offset, "the checksum of the tar header does not agree")
    return header, size


def walk_tar(data: Buffer, shard: str) -> Iterator[Member]:
    """Yield the regular files of a tar archive in order.

    PAX and GNU long names and sizes are understood; folders and links are passed over.

    Args:
        data: The whole archive (a memory map will do: only headers are touched).
        shard: Name used in error messages.

    Raises:
        ConfigError: For a damaged, truncated, compressed or sparse archive, naming the shard and the byte.
    """
    offset, everywhere, here = 0, dict[str, str](), dict[str, str]()
    while bytes(data[offset : offset + BLOCK]) != _ZERO_BLOCK:
        header, size = _checked_header(data, offset, shard)
        kind, content = header[156:157], offset + BLOCK
        if kind in b"0\0" + b"7" and "size" in (override := everywhere | here):
            size = int(override["size"])
        if content + size > len(data):
            raise _damaged(shard, offset, f"a member of {size} bytes runs past the end of the file (cut short)")
        if kind in (b"x", b"g"):
            try:
                (here if kind == b"x" else everywhere).update(_pax_records(bytes(data[content : content + size])))
            except ValueError as error:
                raise _damaged(shard, offset, f"its PAX header cannot be read ({error})") from None
        elif kind == b"L":
            here["path"] = _text(bytes(data[content : content + size]))
        elif kind == b"S" or (here and any(key.startswith("GNU.sparse") for key in here)):
            raise ConfigError(
                f"shard {shard}: the member at byte {offset} is sparse, which shards do not use; repack with plain tar"
            )
        elif kind != b"K":
            if kind in (b"0", b"\0", b"7"):
                yield Member((everywhere | here).get("path") or _header_name(header), content, size)
            here = {}
        offset = content + -(-size // BLOCK) * BLOCK
    if bytes(data[offset + BLOCK : offset + 2 * BLOCK]) != _ZERO_BLOCK:
        raise _damaged(shard, offset, "the second of the two zero blocks that close a tar archive is missing (cut short)")


def split_name(name: str) -> tuple[str, str]:
    """Split a member name into key and extension at the first dot of the file name, as WebDataset does."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def group_samples(members: Iterable[Member], shard: str) -> list[Sample]:
    """Group members by key, in order of first appearance, adjacent or not.

    Members without an extension, hidden files and `__name__` metadata are passed over.

    Raises:
        ConfigError: When a sample holds the same extension twice.
    """
    samples: dict[str, Sample] = {}
    for member in members:
        key, extension = split_name(member.name)
        base = key.rpartition("/")[2]
        if not extension or not base or base.startswith("__"):
            continue
        sample = samples.setdefault(key, Sample(key, {}))
        if extension in sample.members:
            raise ConfigError(
                f"shard {shard}: sample {key!r} holds {extension!r} twice, at bytes {sample.members[extension].offset} "
                f"and {member.offset}; give every sample of a shard its own key"
            )
        sample.members[extension] = member
    return list(samples.values())


def pack_shard(samples: Iterable[Mapping[str, bytes | str]]) -> bytes:
    """Pack samples into a tar archive; the same samples give the same bytes.

    Args:
        samples: Each has `__key__` and members by extension, as bytes.
    """
    from webdataset.writer import TarWriter

    stream = io.BytesIO()
    # An integer time: for a float, tarfile writes an extended header of two more blocks before every member.
    with TarWriter(stream, user="crate-ray", group="crate-ray", mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(dict(sample))
    return stream.getvalue()
