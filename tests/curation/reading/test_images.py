import csv
import io
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from curation.reading.pictures.images import Decoded, ImageLimits, Rejected, decode, luma_deviation
from tests.conftest import encoded, picture

LIMITS = ImageLimits()


def decoded(content: bytes) -> Decoded:
    result = decode(content, LIMITS)
    assert isinstance(result, Decoded), result
    return result


@pytest.mark.parametrize(
    ("format_", "mode"), [("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB"), ("BMP", "RGB"), ("GIF", "P")]
)
def test_formats_are_recognised_by_content(format_, mode):
    result = decoded(encoded(picture(1), format_))
    assert (result.width, result.height, result.format, result.mode) == (96, 72, format_, mode)
    assert result.image.mode == "RGB"


def test_cmyk_keeps_its_colours():
    original = np.asarray(picture(2), np.float32)
    result = decoded(encoded(picture(2).convert("CMYK"), "JPEG", quality=95))
    assert result.mode == "CMYK"
    assert np.abs(np.asarray(result.image, np.float32) - original).mean() < 6


def test_16_bit_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 96 * 72).reshape(72, 96).astype(np.uint16)
    result = decoded(encoded(Image.fromarray(ramp), "PNG"))
    expected = ramp / 257.0
    assert np.abs(np.asarray(result.image)[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode):
    image = Image.new("RGBA", (40, 30), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": image.getpixel((0, 0))} if mode == "P" else {}
    assert np.asarray(decoded(encoded(image, "PNG", **options)).image).min() == 255


@pytest.mark.parametrize(("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)])
def test_exif_orientation_is_applied(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = decoded(encoded(picture(3), "JPEG", exif=exif, quality=95))
    upright = np.asarray(picture(3).transpose(turn), np.float32)
    assert result.warning == "rotated"
    assert np.abs(np.asarray(result.image, np.float32) - upright).mean() < 6


def test_first_frame_of_an_animation():
    frames = [picture(seed) for seed in range(3)]
    result = decoded(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert result.warning == "animated"
    assert np.abs(np.asarray(result.image, np.float32) - np.asarray(frames[0], np.float32)).mean() < 12


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\xff\xd8\xff", "not_an_image"),
        (b"<html>not found</html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unsupported_format"),
        (encoded(picture(4))[:-400], "damaged"),
        (encoded(picture(4), "PNG")[:-400], "damaged"),
    ],
)
def test_reasons(content, reason):
    result = decode(content, LIMITS)
    assert isinstance(result, Rejected)
    assert result.reason == reason


def test_bomb_is_refused_from_its_header_without_allocating():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    tracemalloc.start()
    result = decode(bomb, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(result, Rejected)
    assert (result.reason, result.width) == ("too_many_pixels", 60_000)
    assert peak < 1 << 20


def test_scan_bomb_is_refused():
    progressive = encoded(picture(5), "JPEG", progressive=True)
    start = progressive.index(b"\xff\xda")
    end = progressive.rindex(b"\xff\xd9")
    bomb = progressive[:end] + progressive[start:end] * 200 + b"\xff\xd9"
    assert decode(bomb, LIMITS) == Rejected("too_many_scans", 96, 72, "JPEG")


def test_file_size_limit():
    assert decode(b"x" * 11, ImageLimits(max_file_bytes=10)) == Rejected("file_too_large")


def test_luma_deviation_tells_blank_from_picture():
    assert luma_deviation(Image.new("RGB", (200, 100), "teal")) == 0
    assert luma_deviation(picture(6)) > 10


def test_damaged_files_of_the_real_data(real_data):
    """Every row of pool_bad_truth.csv gets what it expects: dimensions and brightness too."""
    folder = real_data / "pool_bad"
    with tarfile.open(folder / "pool_bad.tar") as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    wrong = []
    for row in csv.DictReader((folder / "pool_bad_truth.csv").read_text(encoding="utf-8").splitlines()):
        result = decode(members[row["member"]], LIMITS)
        good = isinstance(result, Decoded)
        as_expected = {"reject": not good, "reject_no_alloc": not good, "ok_or_reject": True}.get(row["expect"], good)
        if good and row["width"] and row["expect"] != "ok_or_reject":
            as_expected &= (result.width, result.height) == (int(row["width"]), int(row["height"]))
        if good and row["mean_luma"]:
            as_expected &= abs(np.asarray(result.image.convert("L")).mean() - float(row["mean_luma"])) <= 6
        if not as_expected:
            wrong.append((row["key"], row["defect"], result))
    assert wrong == []


def test_random_bytes_never_raise():
    generator = np.random.default_rng(0)
    base = [encoded(picture(7), f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    for content in base:
        for _ in range(40):
            damaged = bytearray(content)
            for position in generator.integers(0, len(damaged), 12):
                damaged[position] = generator.integers(256)
            assert isinstance(decode(bytes(damaged), LIMITS), Decoded | Rejected)


def test_png_inside_a_jpeg_name_is_a_png():
    buffer = io.BytesIO(encoded(picture(8), "PNG"))
    assert decoded(buffer.getvalue()).format == "PNG"
