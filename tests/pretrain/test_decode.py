"""Bytes to upright RGB: every format and orientation, scaled JPEG decode, and each way of being damaged."""

import csv
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pretrain.data.decode import Damaged, ImageLimits, open_image
from tests.conftest import encoded, picture


def reason_of(content: bytes, limits: ImageLimits | None = None) -> str:
    with pytest.raises(Damaged) as caught:
        open_image(content, limits).decode()
    return caught.value.reason


def test_a_jpeg_equals_pillow() -> None:
    content = encoded(picture(0, (101, 77)), quality=95)
    image = open_image(content)
    assert (image.height, image.width) == (77, 101)
    pixels = image.decode()
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    difference = np.abs(pixels.astype(int) - np.asarray(Image.open(io.BytesIO(content))))
    assert difference.max() <= 1  # both are libjpeg-turbo, perhaps of other versions


@pytest.mark.parametrize("scale", [1.0, 0.7, 0.5, 0.49, 0.25, 0.13, 0.125, 0.01])
@pytest.mark.parametrize("size", [(500, 375), (333, 517), (37, 21)])
def test_scaled_decode_covers_what_is_needed(scale: float, size: tuple[int, int]) -> None:
    """The smallest of 1, 1/2, 1/4, 1/8 that is not below the scale; it looks like the image, reduced."""
    content = encoded(picture(1, size), quality=95)
    pixels = open_image(content).decode(scale)
    divisor = max(d for d in (1, 2, 4, 8) if d == 1 or scale * d <= 1)
    assert pixels.shape == (-(-size[1] // divisor), -(-size[0] // divisor), 3)
    if min(pixels.shape[:2]) > 40:
        reduced = np.asarray(Image.open(io.BytesIO(content)).resize(pixels.shape[1::-1], Image.Resampling.BOX))
        assert np.abs(pixels.astype(int) - reduced).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_exif_orientation_is_undone(orientation: int, format_: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(2, (64, 40)), format_, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    image = open_image(content)
    assert (image.width, image.height) == expected.size
    assert np.abs(image.decode().astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(
    ("format_", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "1"), ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"),
     ("TIFF", "RGB"), ("TIFF", "F"), ("PPM", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "I;16")],
)  # fmt: skip
def test_other_formats_and_modes_become_rgb(format_: str, mode: str) -> None:
    gray = picture(3).convert("L")
    if mode == "I;16":
        source = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    elif mode == "F":
        source = Image.fromarray(np.asarray(gray).astype(np.float32))
    else:
        source = picture(3).convert(mode)
    pixels = open_image(encoded(source, format_)).decode()
    assert pixels.shape == (72, 96, 3)
    assert abs(pixels.mean() - np.asarray(picture(3)).mean()) < 6


def test_transparency_is_over_white() -> None:
    pixels = open_image(encoded(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), "PNG")).decode()
    assert (pixels == 255).all()


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        + struct.pack(">I", 0) + end + struct.pack(">I", zlib.crc32(end))
    )  # fmt: skip


def test_damage_has_a_reason() -> None:
    jpeg = encoded(picture(4, (640, 480)), quality=90)
    assert reason_of(b"") == "empty"
    assert reason_of(jpeg, ImageLimits(max_file_bytes=100)) == "file_too_large"
    assert reason_of(jpeg, ImageLimits(max_pixels=640 * 480 - 1)) == "too_many_pixels"
    assert reason_of(jpeg[: len(jpeg) // 2]) == "damaged"
    assert reason_of(b"\xff\xd8\xff") == "not_an_image"
    assert reason_of(b"<html>no image here</html>") == "not_an_image"
    assert reason_of(np.random.default_rng(0).bytes(3000)) == "not_an_image"
    assert reason_of(encoded(picture(4), "PNG")[:-2000]) == "damaged"
    for side in (20_000, 60_000):  # Pillow warns of the first, refuses the second
        assert reason_of(png_header(side, side)) == "too_many_pixels"
    at = jpeg.index(b"\xff\xc0") + 5  # frame header: height, width
    assert reason_of(jpeg[:at] + struct.pack(">HH", 65500, 65500) + jpeg[at + 4 :]) == "too_many_pixels"
    progressive = encoded(picture(4), progressive=True)
    assert open_image(progressive).decode().shape == (72, 96, 3)
    scans = progressive[progressive.index(b"\xff\xda") : -2]
    assert reason_of(progressive[:-2] + scans * 200 + b"\xff\xd9") == "too_many_scans"


def test_bytes_after_the_end_do_not_matter() -> None:
    jpeg = encoded(picture(5))
    np.testing.assert_array_equal(open_image(jpeg + b"garbage" * 50).decode(), open_image(jpeg).decode())


def test_random_damage_is_an_image_or_a_reason() -> None:
    """Never another exception, whatever the bytes."""
    rng = np.random.default_rng(0)
    sound = [encoded(picture(6), format_) for format_ in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]
    outcomes = set()
    for i in range(240):
        content = np.frombuffer(sound[i % len(sound)], np.uint8).copy()
        content[rng.integers(len(content), size=8)] = rng.integers(256, size=8)
        try:
            outcomes.add(open_image(content.tobytes(), ImageLimits(max_pixels=1_000_000)).decode(0.3).ndim)
        except Damaged as damage:
            outcomes.add(damage.reason)
    assert {3, "damaged", "not_an_image"} <= outcomes


def test_real_odd_files(real_data: Path) -> None:
    """What a tolerant reader should do with each of 51 files: decode, convert, rotate, or reject."""
    folder = real_data / "pool_bad"
    with tarfile.open(folder / "pool_bad.tar") as tar:
        content = {m.name: tar.extractfile(m).read() for m in tar if m.isreg()}  # type: ignore[union-attr]
    checked = 0
    for row in csv.DictReader((folder / "pool_bad_truth.csv").open(encoding="utf-8")):
        if row["member"].endswith((".txt", ".json")):
            continue
        try:
            pixels = open_image(content[row["member"]]).decode()
        except Damaged:
            assert row["expect"].startswith(("reject", "ok_or_reject")), row
            continue
        finally:
            checked += 1
        assert not row["expect"].startswith("reject"), row
        if row["width"]:
            assert pixels.shape == (int(row["height"]), int(row["width"]), 3), row
        if row["mean_luma"]:
            luma = pixels @ np.array([0.299, 0.587, 0.114])
            assert abs(luma.mean() - float(row["mean_luma"])) <= 6, row
    assert checked == 49
