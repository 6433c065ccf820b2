import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from crate_ray.data.images import ImageError, center_crop, crop_box, decode, mask_noise, random_resized_crop, read_header
from crate_ray.data.streams import Purpose, stream

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)


def encoded(mode: str, form: str, **options) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(sink, form, **options)
    return sink.getvalue()


def png_that_claims(side: int) -> bytes:
    """A small picture whose header, checksum and all, declares a large one."""
    data = bytearray(encoded("RGB", "PNG"))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("mode", "form", "options", "name"),
    [
        ("RGB", "PNG", {}, "png"),
        ("L", "PNG", {}, "png"),
        ("RGBA", "PNG", {}, "png"),
        ("P", "PNG", {}, "png"),
        ("I;16", "PNG", {}, "png"),
        ("RGB", "JPEG", {}, "jpg"),
        ("RGB", "JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(500)}, "jpg"),
        ("L", "JPEG", {}, "jpg"),
        ("CMYK", "JPEG", {}, "jpg"),
        ("RGB", "WEBP", {}, "webp"),
        ("RGB", "WEBP", {"lossless": True}, "webp"),
        ("RGBA", "WEBP", {"exif": b"Exif\0\0" + bytes(20)}, "webp"),
    ],
)
def test_every_kind_of_image_decodes_to_rgb_with_the_size_of_its_header(mode, form, options, name):
    if mode == "I;16":
        sink = io.BytesIO()
        Image.fromarray(PIXELS[..., 0].astype(np.uint16) << 8).save(sink, form)
        data = sink.getvalue()
    else:
        data = encoded(mode, form, **options)
    assert read_header(data) == (name, 56, 40)
    image = decode(data)
    assert image.shape == (3, 40, 56)
    assert image.dtype == torch.uint8
    if mode == "I;16":
        np.testing.assert_array_equal(image[0], PIXELS[..., 0])
    elif mode != "CMYK":
        reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - reference).max() <= 4


def test_a_png_bomb_is_refused_from_its_header():
    with pytest.raises(ImageError, match="14000 x 14000 pixels"):
        decode(png_that_claims(14_000))
    with pytest.raises(ImageError, match=r"data\.max_pixels=100"):
        decode(encoded("RGB", "JPEG"), max_pixels=100)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_images_cut_short_and_other_bytes_are_refused(form):
    data = encoded("RGB", form)
    for length in (0, 3, 15, 20, len(data) // 2):
        with pytest.raises(ImageError):
            decode(data[:length])
    with pytest.raises(ImageError, match="neither JPEG, PNG nor WebP"):
        decode(b"GIF89a" + data)


def test_an_image_of_the_right_size_is_left_alone_and_others_are_cut_centrally():
    square = torch.from_numpy(PIXELS[:32, :32].transpose(2, 0, 1).copy())
    assert center_crop(square, 32) is square
    image = torch.from_numpy(PIXELS.transpose(2, 0, 1).copy())
    for size in (16, 32, 64):
        assert center_crop(image, size).shape == (3, size, size)


def test_the_central_crop_agrees_with_pil_on_a_photograph_like_image():
    smooth = np.asarray(Image.fromarray(PIXELS).resize((448, 320), Image.Resampling.BICUBIC))
    ours = center_crop(torch.from_numpy(smooth.transpose(2, 0, 1).copy()), 112).permute(1, 2, 0).numpy().astype(int)
    resized = np.asarray(Image.fromarray(smooth).resize((179, 128), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(ours - resized[8:120, 33:145]).max() <= 1


def test_crop_boxes_lie_inside_and_their_areas_fill_the_range():
    areas = []
    for item in range(400):
        top, left, height, width = crop_box(300, 400, (0.2, 1.0), stream(Purpose.CROP, seed=0, item=item))
        assert top >= 0
        assert left >= 0
        assert top + height <= 300
        assert left + width <= 400
        assert 0.74 < width / height < 1.35
        areas.append(height * width / 120_000)
    assert min(areas) < 0.25
    assert max(areas) > 0.9
    assert 0.5 < np.mean(areas) < 0.65


def test_a_very_wide_image_falls_back_to_its_central_box():
    assert crop_box(10, 1000, (0.9, 1.0), stream(Purpose.CROP, seed=0)) == (0, 493, 10, 13)


def test_crops_are_a_function_of_seed_epoch_and_sample():
    image = torch.from_numpy(PIXELS.transpose(2, 0, 1).copy())

    def crop(**where):
        return random_resized_crop(image, 16, scale=(0.2, 1.0), flip=True, generator=stream(Purpose.CROP, **where))

    base = crop(seed=1, epoch=2, item=3)
    assert torch.equal(base, crop(seed=1, epoch=2, item=3))
    for other in ({"seed": 2, "epoch": 2, "item": 3}, {"seed": 1, "epoch": 3, "item": 3}, {"seed": 1, "epoch": 2, "item": 4}):
        assert not torch.equal(base, crop(**other))


def test_half_of_the_images_are_mirrored_and_none_without_flip():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(3, 32, 32)

    def rising(flip: bool) -> float:
        crops = [
            random_resized_crop(ramp, 16, scale=(0.5, 1.0), flip=flip, generator=stream(Purpose.CROP, seed=0, item=i))
            for i in range(200)
        ]
        return sum(bool(crop[0, 0, -1] > crop[0, 0, 0]) for crop in crops) / len(crops)

    assert rising(flip=False) == 1
    assert 0.4 < rising(flip=True) < 0.6


def test_mask_noise_is_uniform_and_its_own_stream():
    noise = np.stack([mask_noise(64, seed=0, epoch=0, sample_id=i) for i in range(200)])
    assert noise.dtype == np.float32
    assert 0 <= noise.min() < noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.02
    assert len(np.unique(noise[:, 0])) == 200
    assert not np.array_equal(noise[0], mask_noise(64, seed=0, epoch=1, sample_id=0))
    np.testing.assert_array_equal(noise[5, :16], mask_noise(16, seed=0, epoch=0, sample_id=5))
