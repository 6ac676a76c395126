"""What does not carry pixels cannot reject a picture: the zoo, read alike by curation and by training."""

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image

from curation.reading.pictures import formats
from curation.reading.pictures.images import Decoded, ImageLimits, Rejected, decode
from curation.reading.samples import Member, group_sample
from pretrain.data.decode import open_image
from tests import image_zoo as zoo
from tests.conftest import encoded, picture

LIMITS = ImageLimits()
_TURNS = {1: 0, 6: -1, 3: 2, 8: 1}  # quarter turns to the left that bring the picture upright


def decoded(content: bytes) -> Decoded:
    result = decode(content, LIMITS)
    assert isinstance(result, Decoded), result
    return result


@pytest.mark.parametrize("name", zoo.SOUND)
def test_sound_pictures_are_kept_as_they_are(name: str) -> None:
    """To the last bit: one decoder reads them in curation and in training."""
    odd = zoo.SOUND[name]()
    result = decoded(odd.content)
    pixels = np.asarray(result.image)
    assert np.array_equal(pixels, np.rot90(np.asarray(decoded(odd.clean).image), _TURNS[odd.orientation]))
    assert result.warning == odd.warning
    trained_on = open_image(odd.content)
    assert (trained_on.width, trained_on.height) == (result.width, result.height) == result.image.size
    assert np.array_equal(trained_on.decode(), pixels)


@pytest.mark.parametrize("name", [name for name in zoo.SOUND if name.startswith("jpeg") and "cmyk" not in name])
def test_odd_jpegs_decode_at_a_scale_too(name: str) -> None:
    odd = zoo.SOUND[name]()
    half = open_image(odd.content).decode(0.5)
    assert np.array_equal(half, np.rot90(open_image(odd.clean).decode(0.5), _TURNS[odd.orientation]))


@pytest.mark.parametrize("name", zoo.CUT)
def test_pictures_cut_in_their_pixels_stay_damaged(name: str) -> None:
    result = decode(zoo.CUT[name](), LIMITS)
    assert isinstance(result, Rejected)
    # WebP and the list of tags of a TIFF cannot even be opened then.
    assert result.reason == ("not_an_image" if name in ("webp", "tiff") else "damaged")


@pytest.mark.parametrize("name", zoo.FOREIGN)
def test_pictures_of_other_kinds_say_so(name: str) -> None:
    kind, content = zoo.FOREIGN[name]
    assert decode(content, LIMITS) == Rejected("unsupported_format", format=kind)
    if name in formats.FOREIGN_SUFFIXES:
        sample = group_sample("k", [(Member(name, f"k.{name}", 512, len(content)), content)])
        assert sample.image is not None
        assert sample.reason in (None, "unsupported_format")


@pytest.mark.parametrize("suffix", ["heic", "jxl", "psd"])
def test_a_plain_picture_comes_before_one_of_another_kind(suffix: str) -> None:
    jpeg = encoded(picture(0))
    group = [(Member(suffix, f"k.{suffix}", 512, 9), b"8BPS\0\1aaa"), (Member("jpg", "k.jpg", 2048, len(jpeg)), jpeg)]
    sample = group_sample("k", group)
    assert (sample.content, sample.reason) == (jpeg, None)


def heif(**options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture(1, zoo.SIZE)).save(buffer, quality=95, **options)
    return buffer.getvalue()


def jxl(**options: object) -> bytes:
    return pytest.importorskip("pylibjxl").encode(np.asarray(picture(1, zoo.SIZE)), effort=3, **options)


EXTRA = {
    "heic": lambda: heif(),
    "heic_exif_nonsense": lambda: heif(exif=b"Exif\0\0nonsense"),
    "heic_bytes_behind": lambda: heif() + bytes(5000),
    "jxl": lambda: jxl(),
    "jxl_exif_nonsense": lambda: jxl(exif=b"nonsense"),
    "jxl_of_a_jpeg": lambda: pytest.importorskip("pylibjxl").jpeg_to_jxl(zoo.jpeg()),
}


@pytest.mark.parametrize("name", EXTRA)
def test_heic_and_jpeg_xl_are_read_with_the_extra(name: str) -> None:
    content = EXTRA[name]()
    result = decoded(content)
    assert result.format == ("HEIF" if name.startswith("heic") else "JXL")
    difference = np.abs(np.asarray(result.image, np.float32) - np.asarray(picture(1, zoo.SIZE)))
    assert difference.mean() < 4
    assert np.array_equal(open_image(content).decode(), np.asarray(result.image))
    assert decode(content, ImageLimits(max_pixels=100)) == Rejected("too_many_pixels", *zoo.SIZE, result.format)
    if "behind" not in name:
        assert isinstance(decode(content[: len(content) // 2], LIMITS), Rejected)


@pytest.mark.parametrize("name", EXTRA)
def test_without_the_extra_they_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = EXTRA[name]()
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    formats.is_read.cache_clear()
    try:
        result = decode(content, LIMITS)
    finally:
        formats.is_read.cache_clear()
    assert result == Rejected("unsupported_format", format="HEIF" if name.startswith("heic") else "JXL")


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_fewer_bits_in_16_are_said_or_scaled_as_declared(bits: int, format_: str, colours: int) -> None:
    """Nothing is guessed: undeclared they stay dark and are counted; declared (sBIT, MaxSampleValue) bright."""
    top = (1 << bits) - 1
    whole = np.asarray(decoded(zoo.sixteen_bits(65535, format_, colours)).image, np.float32)
    said = decoded(zoo.sixteen_bits(top, format_, colours, declared=bits))
    assert said.warning is None
    assert np.abs(np.asarray(said.image, np.float32) - whole).max() <= 1
    silent_content = zoo.sixteen_bits(top, format_, colours)
    silent = decoded(silent_content)
    assert silent.warning == "dark_16_bit"
    assert np.asarray(silent.image).max() <= 64
    encoded_image = open_image(silent_content)
    assert np.array_equal(encoded_image.decode(), np.asarray(silent.image))
    assert encoded_image.notes == ["dark_16_bit"]


@pytest.mark.parametrize("top", [16384, 30000, 65535])
def test_bright_16_bits_are_not_touched_by_what_is_declared(top: int) -> None:
    for declared in (0, 8, 12):
        result = decoded(zoo.sixteen_bits(top, "PNG", declared=declared))
        assert result.warning is None
        assert np.asarray(result.image).max() == int(top / 257 + 0.5)


def test_a_dark_picture_that_was_scaled_up_as_png_asks_stays_dark() -> None:
    """sBIT says 12, and all lower bits are empty: a night, and not 12 bits left as they were."""
    values = (np.arange(zoo.SIZE[0] * zoo.SIZE[1]) % 200).reshape(zoo.SIZE[1], zoo.SIZE[0]).astype(np.uint16) << 4
    content = encoded(Image.fromarray(values), "PNG")
    content = zoo.with_chunks(zoo.chunk(b"sBIT", b"\x0c"), clean=content)
    result = decoded(content)
    assert (np.asarray(result.image).max(), result.warning) == (12, None)


def test_the_picture_in_an_icon_is_measured_by_its_own_header() -> None:
    """The icon's list says 16 x 16; the PNG in it says 60,000 x 60,000."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + zoo.chunk(b"IHDR", header) + zoo.chunk(b"IDAT", b"") + zoo.chunk(b"IEND", b"")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22)
    result = decode(b"\0\0\1\0\1\0" + entry + png, LIMITS)
    assert isinstance(result, Rejected)
    assert result.reason == "too_many_pixels"


_MANY = 200_000
MADE_TO_BE_SLOW = {
    "png_of_empty_chunks": lambda: zoo.with_chunks(zoo.chunk(b"teXt", b"") * _MANY),
    "png_of_bombs": lambda: zoo.with_chunks(*[zoo.text_bomb(16 << 20)] * 50),
    "jpeg_of_comments": lambda: zoo.with_segment(0xFE, *[b""] * _MANY),
    "jpeg_of_filling": lambda: zoo.jpeg()[:2] + b"\xff" * (8 << 20) + b"\0" + zoo.jpeg()[2:],
    "jpeg_of_tables": lambda: (c := zoo.jpeg(progressive=True))[:-2] + zoo.segment(0xC4, b"") * _MANY + c[-2:],
    "gif_of_one_byte_blocks": lambda: zoo.gif()[:781] + b"!\xfe" + b"\1a" * _MANY + b"\0" + zoo.gif()[781:],
    "webp_of_empty_chunks": lambda: zoo.riff(*[(b"JUNK", b"")] * _MANY),
    "tiff_of_tags": lambda: b"II*\0" + struct.pack("<IH", 8, 65535) + struct.pack("<HHII", 270, 3, 1, 1) * 65535,
}


@pytest.mark.parametrize("name", MADE_TO_BE_SLOW)
def test_files_made_to_be_slow_are_not(name: str) -> None:
    content = MADE_TO_BE_SLOW[name]()
    start = time.process_time()
    decode(content, LIMITS)
    assert time.process_time() - start < 3  # measured: 0.3 at most
