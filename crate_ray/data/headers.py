"""The size of an image from the first bytes of its file, before any decoder allocates memory for it.

In: JPEG, PNG or WebP bytes from strangers. Out: format, width and height, or an `ImageError`. Nothing is decoded, no torch is
needed, and no byte outside the buffer is read: what is not there is an error.
"""

import struct
from collections.abc import Callable

from crate_ray.data.shards import Buffer

DEFAULT_MAX_PIXELS = 89_478_485
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_BARE_MARKERS = frozenset({0x01, 0xFF, *range(0xD0, 0xD9)})
_MAX_JPEG_MARKERS = 4096  # an ICC profile takes 255 at most; a file of nothing but markers must not keep the parser busy


class ImageError(ValueError):
    """An image that cannot or must not be decoded; the message says why."""


def _png_size(data: Buffer) -> tuple[int, int]:
    kind, width, height = struct.unpack(">4sII", data[12:24])
    if kind != b"IHDR":
        raise ImageError("its first PNG chunk is not the header")
    return width, height


def _jpeg_size(data: Buffer) -> tuple[int, int]:
    """Width and height from the first frame header; the segments before it are skipped by their lengths."""
    position = 2
    for _ in range(_MAX_JPEG_MARKERS):
        if data[position] != 0xFF:
            raise ImageError("its JPEG segments are damaged before the frame header")
        marker = data[position + 1]
        if marker in _JPEG_SIZE_MARKERS:
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return width, height
        position += 1 if marker == 0xFF else 2
        if marker not in _JPEG_BARE_MARKERS:
            (length,) = struct.unpack(">H", data[position : position + 2])
            position += length
    raise ImageError(f"it has more than {_MAX_JPEG_MARKERS} JPEG markers before the frame header")


def _webp_size(data: Buffer) -> tuple[int, int]:
    chunk = bytes(data[12:16])
    if chunk == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack("<HBHB", data[24:30])
        return 1 + (high_width << 16 | low_width), 1 + (high_height << 16 | low_height)
    if chunk == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk != b"VP8 ":
        raise ImageError(f"its first WebP chunk is {chunk!r}, which holds no picture")
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _reader_of(data: Buffer) -> tuple[str, Callable[[Buffer], tuple[int, int]]]:
    start = bytes(data[:12])
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return "png", _png_size
    if start[:3] == b"\xff\xd8\xff":
        return "jpg", _jpeg_size
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return "webp", _webp_size
    raise ImageError(f"it is neither JPEG, PNG nor WebP (it starts with {start[:8]!r})")


def read_header(data: Buffer) -> tuple[str, int, int]:
    """Return the format (jpg, png or webp), the width and the height in pixels that an image's header declares.

    Raises:
        ImageError: When the bytes are no such image or end before its size.
    """
    name, read_size = _reader_of(data)
    try:
        width, height = read_size(data)
    except (IndexError, struct.error):
        raise ImageError("it ends inside its header") from None
    return name, width, height


def check_size(data: Buffer, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
    """Refuse an image by its header alone.

    Raises:
        ImageError: When the header cannot be read, or declares no pixels or more than `max_pixels`.
    """
    _, width, height = read_header(data)
    if width * height > max_pixels or width * height == 0:
        raise ImageError(
            f"its header declares {width} x {height} pixels; between 1 and data.max_pixels={max_pixels} are decoded"
        )
