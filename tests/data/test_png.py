"""PNG files made to break a decoder: torchvision's ends the process at most of these."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from crate_ray.data.images import ImageError, decode
from crate_ray.data.png import checked_png

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
ROWS = [row.tobytes() for row in PIXELS]
PLAIN = zlib.compress(b"".join(b"\0" + row for row in ROWS))


def chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    stated = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", stated)


def png(*chunks: bytes, width: int = 7, height: int = 5, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def adam7(pixels_HWC: np.ndarray) -> bytes:
    """The passes of an interlaced picture (PNG specification, section 8.2), unfiltered."""
    data = b""
    for left, top, right, down in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        part = pixels_HWC[top::down, left::right]
        data += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(chunk(b"IDAT", PLAIN, checksum=1)), "checksum of its PNG chunk b'IDAT'"),
        (png(chunk(b"IDAT", PLAIN[:-4] + b"abcd")), "compressed data is damaged"),
        (png(chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 30)), "compressed data is damaged"),
        (png(chunk(b"IDAT", PLAIN[:-4])), "does not hold the 110 bytes"),
        (png(chunk(b"IDAT", zlib.compress(bytes(50)))), "does not hold the 110 bytes"),
        (png(chunk(b"IDAT", zlib.compress(bytes(111)))), "does not hold the 110 bytes"),
        (png(chunk(b"IDAT", zlib.compress(bytes(10_000_000)))), "does not hold the 110 bytes"),
        (png(chunk(b"IDAT", zlib.compress(b"\x09" * 110))), "unknown filter"),
        (png(chunk(b"IDAT", PLAIN), interlace=1), "does not hold the 116 bytes"),
        (png(chunk(b"IDAT", PLAIN[:9]), chunk(b"tEXt", b"a\0b"), chunk(b"IDAT", PLAIN[9:])), "not in one piece"),
        (png(chunk(b"IDAT", b"")), "does not hold the 110 bytes"),
        (png(), "holds no picture"),
        (png(chunk(b"ABCD", b""), chunk(b"IDAT", PLAIN)), "out of place or unknown"),
        (png(chunk(b"IHDR", bytes(13)), chunk(b"IDAT", PLAIN)), "not one of 13 bytes"),
        (png(chunk(b"IDAT", PLAIN), colour=5), "does not exist"),
        (png(chunk(b"IDAT", PLAIN), depth=3), "does not exist"),
        (png(chunk(b"IDAT", zlib.compress(bytes(40))), colour=3), "cannot be decoded"),  # no palette
        (png(chunk(b"IDAT", PLAIN))[:-20], "cut short"),
    ],
)
def test_a_png_that_would_end_the_process_is_refused(data, message):
    with pytest.raises(ImageError, match=message):
        decode(data)


def test_an_interlaced_picture_is_decoded():
    data = png(chunk(b"IDAT", zlib.compress(adam7(PIXELS))), interlace=1)
    np.testing.assert_array_equal(decode(data).permute(1, 2, 0), PIXELS)


def test_what_no_pixel_depends_on_is_left_out_and_pixels_stay():
    extra = (chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100_000))), chunk(b"tEXt", b"note\0x", checksum=7))
    data = png(*extra, chunk(b"IDAT", PLAIN[:20]), chunk(b"IDAT", PLAIN[20:]), chunk(b"tIME", b"x" * 7))
    kept = checked_png(data)
    assert [kind in kept for kind in (b"iCCP", b"tEXt", b"tIME", b"IDAT")] == [False, False, False, True]
    np.testing.assert_array_equal(decode(data).permute(1, 2, 0), PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (31, 17)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_every_format_that_pil_writes_passes(mode, size):
    sink = io.BytesIO()
    Image.fromarray(PIXELS).resize(size).convert(mode).save(sink, "PNG")
    reference = np.asarray(Image.open(io.BytesIO(sink.getvalue())).convert("RGBA"))[..., :3]
    np.testing.assert_array_equal(decode(sink.getvalue()).permute(1, 2, 0), reference)
