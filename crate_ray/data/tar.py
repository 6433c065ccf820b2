"""Tar archives from strangers, read once from front to back, in memory of bounded size.

In: a file, local or remote. Out: its members, the content of those that are asked for, and the hash of the whole.
The tar readers in use stop silently at a damaged header and lose the rest of the shard. Here every header checksum is
verified, both closing zero blocks are required, and nothing but zeros may follow them: what others pass over ends in an
error that names the byte. The price is that archives cut short or joined by `cat`, which other readers accept, are refused.
"""

import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from crate_ray.config import ConfigError
from crate_ray.data.findings import Fault

BLOCK = 512
WINDOW_BYTES = 1 << 20
_ZERO_BLOCK = bytes(BLOCK)
_CHECKSUM_BLANK = 8 * 0x20
_ADLER_MODULUS = 65_521
_MAX_EXTENDED_BYTES = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")


class Source(Protocol):
    """What a shard is read from."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill a buffer from its front; return the number of bytes, 0 at the end."""


class DamagedShardError(ConfigError):
    """An archive that cannot be trusted from some byte on.

    Attributes:
        fault: What kind of damage.
        offset: Byte of the archive where it shows.
        what: The same as a clause.
    """

    def __init__(self, shard: str, fault: Fault, offset: int, what: str) -> None:
        super().__init__(shard, fault, offset, what)
        self.shard, self.fault, self.offset, self.what = shard, fault, offset, what

    def __str__(self) -> str:
        return f"shard {self.shard} is damaged at byte {self.offset}: {self.what}; write or copy it again"


class Member(NamedTuple):
    """One regular file of a tar archive: its name and where its content lies."""

    name: str
    offset: int
    size: int


class ShardStream:
    """A file that is read once, through a window of bounded size, and hashed on the way.

    Args:
        source: Where the bytes come from.
        size: Bytes that the store says it has; no byte after these is read.
        shard: Name used in error messages.
        window: Bytes of the window.
    """

    def __init__(self, source: Source, size: int, shard: str, *, window: int = WINDOW_BYTES) -> None:
        from xxhash import xxh3_128

        self.size, self.shard, self.position = size, shard, 0
        self._source, self._window = source, memoryview(bytearray(window))
        self._start = self._end = self._fetched = 0
        self._hash = xxh3_128()

    def _fill(self, count: int) -> None:
        """Have at least `count` bytes in the window, which must be there before `size`."""
        left = self._end - self._start
        self._window[:left] = self._window[self._start : self._end]
        self._start, self._end = 0, left
        while self._end < count:
            room = self._window[self._end : self._end + self.size - self._fetched]
            found = self._source.readinto(room) or 0
            if found == 0:
                what = f"the store says {self.size} bytes, but no more came than {self._fetched}"
                raise DamagedShardError(self.shard, Fault.TRUNCATED, self._fetched, what)
            self._hash.update(room[:found])
            self._fetched += found
            self._end += found

    def take(self, count: int) -> memoryview:
        """The next bytes, at most a window of them; valid until the next call.

        Raises:
            DamagedShardError: When the source ends before `size`.
        """
        if self._end - self._start < count:
            self._fill(count)
        piece = self._window[self._start : self._start + count]
        self._start += count
        self.position += count
        return piece

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next bytes in pieces that fit the window, each valid until the next."""
        while count > 0:
            ready = min(count, self._end - self._start or min(count, len(self._window)))
            yield self.take(ready)
            count -= ready

    def read(self, count: int) -> bytes:
        """The next bytes, copied."""
        return bytes(self.take(count)) if count <= len(self._window) else b"".join(bytes(p) for p in self.pieces(count))

    def skip_to(self, offset: int) -> None:
        """Go forward to a byte."""
        ahead = offset - self.position
        if 0 < ahead <= self._end - self._start:
            self._start += ahead
            self.position = offset
            return
        for _ in self.pieces(ahead):
            pass

    def checksum(self) -> str:
        """XXH3-128 of the whole file in hex; what was not read yet is read now."""
        self.skip_to(self.size)
        return self._hash.hexdigest()


def _number(field: bytes) -> int:
    """A numeric header field: octal digits, or base 256 when the top bit is set (GNU, for sizes of 8 GiB and more)."""
    if field[0] & 0xC0 == 0x80:
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits and not digits.isdigit():  # int() would also take signs, blanks and underscores
        raise ValueError("no octal number")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_records(data: bytes) -> dict[str, str]:
    """The records `length key=value newline` of a PAX extended header."""
    records: dict[str, str] = {}
    start, end = 0, len(data.rstrip(b"\0"))
    while start < end:
        blank = data.find(b" ", start, start + 20)
        digits = data[start:blank]
        if blank < 0 or not digits.isdigit():
            raise ValueError("a record does not start with its length")
        stop = start + int(digits)
        if stop <= blank + 1 or stop > len(data):
            raise ValueError("a record runs past its header")
        key, _, value = data[blank + 1 : stop - 1].partition(b"=")
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        start = stop
    return records


def _not_a_tar(header: bytes) -> str:
    start = header.lstrip()[:9].lower()
    if start.startswith((b"<html", b"<!doctype", b"<?xml")):
        return "this is a web page, not a tar archive (an error page saved as a shard?)"
    if header.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return "this is a compressed file; shards are plain tar, so decompress it"
    return "this is not a tar header"


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    return f"{_text(header[345:500])}/{name}" if header[345] and header[257:263] == b"ustar\0" else name


class _TarWalk:
    """The state of a walk: extended headers that apply to the next member, or to all that follow."""

    def __init__(self, stream: ShardStream) -> None:
        self.stream, self._everywhere, self._here = stream, dict[str, str](), dict[str, str]()

    def damaged(self, fault: Fault, offset: int, what: str) -> DamagedShardError:
        return DamagedShardError(self.stream.shard, fault, offset, what)

    def header(self) -> tuple[bytes, int] | None:
        """The next header and the size that it states, or None at the two blocks that close the archive."""
        stream, offset = self.stream, self.stream.position
        if stream.size < BLOCK:
            raise self.damaged(Fault.NOT_A_TAR, 0, f"its {stream.size} bytes are less than one tar header")
        if offset + BLOCK > stream.size:
            what = "it ends without the two zero blocks that close a tar archive (cut short)"
            raise self.damaged(Fault.TRUNCATED, offset, what)
        header = bytes(stream.take(BLOCK))
        if header == _ZERO_BLOCK:
            return None
        field = header[148:156]
        try:
            stated, size = _number(field), _number(header[124:136])
        except ValueError:
            kind, what = (Fault.HEADER, "this is not a tar header") if offset else (Fault.NOT_A_TAR, _not_a_tar(header))
            raise self.damaged(kind, offset, what) from None
        # Adler-32 holds the sum of the bytes modulo 65521, eight times faster than sum(); to pass for equal, two
        # headers must differ by that much, in at least 257 bytes.
        total = (zlib.adler32(header) & 0xFFFF) - 1 - sum(field) + _CHECKSUM_BLANK
        if (stated - total) % _ADLER_MODULUS or stated > BLOCK * 0xFF:
            if offset:
                raise self.damaged(Fault.HEADER, offset, "the checksum of the tar header does not agree")
            raise self.damaged(Fault.NOT_A_TAR, 0, _not_a_tar(header))
        return header, size

    def _extend(self, kind: bytes, offset: int, size: int) -> None:
        """Take an extended header of PAX or a long name of GNU tar."""
        if size > _MAX_EXTENDED_BYTES:
            raise self.damaged(Fault.UNSUPPORTED, offset, f"an extended header of {size} bytes, which no writer makes")
        content = self.stream.read(size)
        if kind == b"L":
            self._here["path"] = _text(content)
        elif kind != b"K":
            try:
                (self._here if kind == b"x" else self._everywhere).update(_pax_records(content))
            except ValueError as error:
                raise self.damaged(Fault.HEADER, offset, f"its PAX header cannot be read ({error})") from None

    def _content_size(self, kind: bytes, offset: int, stated: int | str) -> int:
        """Bytes of content behind a header, of which there are enough in the file."""
        if kind in _WITHOUT_CONTENT:
            return 0
        if isinstance(stated, str) and not (stated.isdecimal() and len(stated) <= 20):
            raise self.damaged(Fault.HEADER, offset, "its PAX header states a size that is no number")
        size = int(stated)
        if self.stream.position + size > self.stream.size:
            what = f"a member of {size} bytes runs past the end of the file (cut short)"
            raise self.damaged(Fault.TRUNCATED, offset, what)
        return size

    def member(self, header: bytes, size: int) -> tuple[Member | None, int]:
        """The regular file behind a header, if it is one, and where the next header lies."""
        content = self.stream.position
        kind, offset = header[156:157], content - BLOCK
        extended = self._everywhere | self._here if self._here or self._everywhere else {}
        if kind == b"S" or any(key.startswith("GNU.sparse") for key in extended):
            raise self.damaged(Fault.UNSUPPORTED, offset, "a sparse member, which shards do not use; repack with plain tar")
        size = self._content_size(kind, offset, extended["size"] if kind in _REGULAR and "size" in extended else size)
        following = content + -(-size // BLOCK) * BLOCK
        if following > self.stream.size:
            raise self.damaged(Fault.TRUNCATED, offset, "the padding of a member runs past the end of the file (cut short)")
        if kind in (b"x", b"g", b"L", b"K"):
            self._extend(kind, offset, size)
            return None, following
        name = extended.get("path") or _header_name(header)
        self._here = {}
        is_file = kind in _REGULAR and not name.endswith("/")
        return (Member(name, content, size) if is_file else None), following

    def close(self) -> None:
        """See the archive end as it should: with a second zero block, and zeros after it."""
        stream, offset = self.stream, self.stream.position - BLOCK
        if stream.position + BLOCK > stream.size or bytes(stream.take(BLOCK)) != _ZERO_BLOCK:
            what = "the second of the two zero blocks that close a tar archive is missing (cut short)"
            raise self.damaged(Fault.TRUNCATED, offset, what)
        for piece in stream.pieces(stream.size - stream.position):
            if foreign := bytes(piece).lstrip(b"\0"):
                start = stream.position - len(foreign)
                what = f"{stream.size - start} bytes follow the end of the archive (tar files joined by cat?)"
                raise self.damaged(Fault.TRAILING, start, what)


def walk_tar(stream: ShardStream) -> Iterator[Member]:
    r"""Yield the regular files of a tar archive in order; between two of them the content of the first may be read.

    PAX and GNU long names and sizes are understood; folders and links are passed over. Bytes of a name that are not UTF-8
    appear as `\xNN`.

    Args:
        stream: The archive, at its start. `stream.read(member.size)` or `stream.pieces` give a member's content.

    Raises:
        DamagedShardError: For a damaged, truncated, compressed or sparse archive, naming the shard and the byte.
    """
    if stream.size == 0:
        raise DamagedShardError(stream.shard, Fault.EMPTY, 0, "the file is empty")
    walk = _TarWalk(stream)
    while (found := walk.header()) is not None:
        member, following = walk.member(*found)
        if member is not None:
            yield member
        stream.skip_to(following)
    walk.close()
