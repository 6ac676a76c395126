"""Odd files, made on the spot: sound pictures with something odd beside their pixels, cut ones, and foreign kinds.

`SOUND` and `CUT` map a name to a function that makes the file. What does not carry pixels must not reject a picture, so
a sound one is to give the pixels of its clean twin, turned where its EXIF says so.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from tests.conftest import encoded, picture

SIZE = (96, 72)
_RANDOM = np.random.default_rng(0).bytes(8 << 20)  # holds 128 start-of-scan markers


@dataclass(frozen=True)
class Odd:
    """A sound file: what it is without its oddity, and how it is to be turned."""

    content: bytes
    clean: bytes
    orientation: int = 1
    warning: str | None = None


# --- JPEG


@cache
def jpeg(**options: object) -> bytes:
    mode = str(options.pop("mode", "RGB"))
    return encoded(picture(1, SIZE).convert(mode), "JPEG", quality=90, **options)


def segment(kind: int, body: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def with_segment(kind: int, *bodies: bytes, **options: object) -> bytes:
    """A JPEG with segments right behind its start."""
    content = jpeg(**options)
    return content[:2] + b"".join(segment(kind, body) for body in bodies) + content[2:]


def exif(*entries: tuple[int, int, int, bytes], tail: bytes = b"", order: str = "<") -> bytes:
    """An EXIF block: (tag, type, count, four bytes of value or offset) each; the tail begins at 8 + 2 + 12 n + 4."""
    head = (
        (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(entries))
    )
    rows = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return head + rows + bytes(4) + tail


def turned(number: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return (0x0112, 3, 1, struct.pack(order + "HH", number, 0))


def odd_exif(kind: str, orientation: int = 6) -> bytes:
    """EXIF with an orientation and a fault beside it, of which a rewritten block would fail."""
    turn, order = turned(orientation), "<"
    at = 8 + 2 + 24 + 4
    resolution = (0x011A, 5, 1, struct.pack("<I", at))
    match kind:
        case "zero_resolution":
            return exif(turn, resolution, tail=struct.pack("<II", 0, 0))
        case "negative_resolution":
            return exif(turn, (0x011A, 10, 1, struct.pack("<I", at)), tail=struct.pack("<ii", -72, -1))
        case "resolution_over_zero":
            return exif(turn, resolution, tail=struct.pack("<II", 72, 0))
        case "negative_whole_resolution":
            return exif(turn, (0x011A, 9, 1, struct.pack("<i", -72)), (0x0128, 9, 1, struct.pack("<i", -2)))
        case "negative_decimal_resolution":
            return exif(turn, (0x011A, 11, 1, struct.pack("<f", -72.0)))
        case "text_for_a_number":
            return exif(turn, (0x011A, 2, 9, struct.pack("<I", at)), tail=b"72 dots.\0")
        case "value_out_of_the_file":
            return exif(turn, (0x010F, 2, 4000, struct.pack("<I", 1 << 20)))
        case "folder_out_of_the_file":
            return exif(turn, (0x8769, 4, 1, struct.pack("<I", 1 << 24)), (0x8825, 4, 1, struct.pack("<I", 7)))
        case "unknown_type":
            return exif(turn, (0x9999, 77, 1 << 31, b"abcd"))
        case "big_endian":
            order = ">"
            entry = (0x011A, 5, 1, struct.pack(">I", at))
            return exif(turned(orientation, order), entry, tail=bytes(8), order=order)
    raise KeyError(kind)


ODD_EXIF = (
    "zero_resolution",
    "negative_resolution",
    "resolution_over_zero",
    "negative_whole_resolution",
    "negative_decimal_resolution",
    "text_for_a_number",
    "value_out_of_the_file",
    "folder_out_of_the_file",
    "unknown_type",
    "big_endian",
)


def jpeg_exif(block: bytes, orientation: int = 1) -> Odd:
    return Odd(with_segment(0xE1, b"Exif\0\0" + block), jpeg(), orientation, "rotated" if orientation > 1 else None)


def progressive_thumbnail() -> bytes:
    """EXIF whose thumbnail has as many start-of-scan markers as would be refused in a picture."""
    return exif(turned(1)) + b"\xff\xda\0\x08\x01\1\0\0\x3f\0" * 200


def without_end(content: bytes, tail: bytes = b"") -> Odd:
    assert content.endswith(b"\xff\xd9")
    return Odd(content[:-2] + tail, content, 1, "jpeg_without_end")


def mpo_with_broken_second() -> bytes:
    both = encoded(
        picture(1, SIZE), "MPO", save_all=True, append_images=[picture(2, SIZE)], quality=90, icc_profile=None
    )
    second = both.rindex(b"\xff\xd8\xff")
    return both[: second + 40] + b"\0" * 200


# --- PNG


@cache
def png(mode: str = "RGB") -> bytes:
    return encoded(picture(1, SIZE).convert(mode), "PNG")


def chunk(kind: bytes, body: bytes, sum_: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(kind + body) if sum_ is None else sum_)
    )


def with_chunks(*chunks: bytes, clean: bytes | None = None, last: bool = False) -> bytes:
    """A PNG with chunks behind its header, or before its end."""
    content = clean or png()
    at = len(content) - 12 if last else 33
    return content[:at] + b"".join(chunks) + content[at:]


def text_bomb(inflated: int) -> bytes:
    return chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(inflated), 9))


def profile(size: int) -> bytes:
    return chunk(b"iCCP", b"profile\0\0" + zlib.compress(_RANDOM[:size], 1))


def animated_png_with_broken_frames() -> bytes:
    frames = [picture(seed, SIZE) for seed in (1, 2, 3)]
    content = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=50)
    at = content.index(b"fdAT") + 8
    return content[:at] + b"\xa5" * 300 + content[at + 300 :]


# --- WebP, GIF, TIFF, BMP, AVIF


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) & 1) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@cache
def webp() -> bytes:
    return encoded(picture(1, SIZE), "WEBP", lossless=True)


def extended_webp(flags: int, *more: tuple[bytes, bytes]) -> bytes:
    """A lossless WebP with the header that says what else there is, and with that."""
    header = bytes([flags, 0, 0, 0]) + (SIZE[0] - 1).to_bytes(3, "little") + (SIZE[1] - 1).to_bytes(3, "little")
    before = [part for part in more if part[0] == b"ICCP"]
    behind = [part for part in more if part[0] != b"ICCP"]
    return riff((b"VP8X", header), *before, (b"VP8L", webp()[20:]), *behind)


@cache
def animation(format_: str) -> bytes:
    frames = [picture(seed, SIZE) for seed in (1, 2, 3)]
    options = {"lossless": True} if format_ == "WEBP" else {}
    return encoded(frames[0], format_, save_all=True, append_images=frames[1:], duration=50, **options)


@cache
def first_frame(format_: str) -> bytes:
    """The first frame of `animation`, as a file of its own that Pillow made of it."""
    with Image.open(io.BytesIO(animation(format_))) as image:
        return encoded(image.convert("RGB"), "PNG")


def cut_in_the_last_frame(format_: str) -> bytes:
    content = animation(format_)
    return content[: len(content) - len(content) // 4]


@cache
def gif() -> bytes:
    return encoded(picture(1, SIZE), "GIF")


@cache
def tiff(**options: object) -> bytes:
    return encoded(picture(1, SIZE), "TIFF", **options)


def tiff_with_tags(*entries: tuple[int, int, int, bytes], orientation: int = 1, **options: object) -> bytes:
    """A TIFF whose list of tags has these, too, and is written anew behind the file."""
    content = tiff(**options)
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    old = [content[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    new = [struct.pack("<HHI", *entry[:3]) + entry[3] for entry in (*entries, turned(orientation))]
    rows = sorted([*old, *new], key=lambda row: struct.unpack_from("<H", row)[0])
    content += b"\0" * (len(content) % 2)
    body = struct.pack("<H", len(rows)) + b"".join(rows) + bytes(4)
    return content[:4] + struct.pack("<I", len(content)) + content[8:] + body


def two_page_tiff(second: bytes) -> bytes:
    """A TIFF whose list of pages goes on to a second that is these bytes."""
    content = tiff()
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    at = start + 2 + 12 * count
    return content[:at] + struct.pack("<I", len(content)) + content[at + 4 :] + second


@cache
def bmp() -> bytes:
    return encoded(picture(1, SIZE), "BMP")


def bmp_with_header(size: int) -> bytes:
    """The same BMP with a header of another length: shortened, or filled with zeros."""
    content = bmp()
    header = content[18:54][: size - 4].ljust(size - 4, b"\0")
    return content[:10] + struct.pack("<II", 14 + size, size) + header + content[54:]


@cache
def avif(**options: object) -> bytes:
    return encoded(picture(1, SIZE), "AVIF", quality=90, speed=10, **options)


# --- the zoo

SOUND: dict[str, Callable[[], Odd]] = {
    **{f"jpeg_exif_{kind}": lambda kind=kind: jpeg_exif(odd_exif(kind), 6) for kind in ODD_EXIF},
    "jpeg_exif_points_nowhere": lambda: jpeg_exif(b"II*\0" + struct.pack("<I", 1 << 30)),
    "jpeg_exif_is_text": lambda: jpeg_exif(b"no EXIF at all"),
    "jpeg_exif_is_cut": lambda: jpeg_exif(odd_exif("zero_resolution")[:13]),
    "jpeg_exif_orientation_9": lambda: jpeg_exif(exif(turned(9))),
    "jpeg_exif_orientation_is_text": lambda: jpeg_exif(exif((0x0112, 2, 4, b"six\0"))),
    "jpeg_exif_thumbnail_of_many_scans": lambda: jpeg_exif(progressive_thumbnail()),
    "jpeg_8_MB_behind": lambda: Odd(jpeg() + _RANDOM, jpeg()),
    "jpeg_progressive_8_MB_behind": lambda: Odd(jpeg(progressive=True) + _RANDOM, jpeg(progressive=True)),
    "jpeg_film_behind": lambda: Odd(jpeg() + b"\0\0\0\x18ftypmp42" + _RANDOM[:50_000], jpeg()),
    "jpeg_jpegs_behind": lambda: Odd(jpeg() + jpeg() * 120, jpeg()),
    "jpeg_gray_zeros_behind": lambda: Odd(jpeg(mode="L") + bytes(5000), jpeg(mode="L")),
    "jpeg_cmyk_8_MB_behind": lambda: Odd(jpeg(mode="CMYK") + _RANDOM, jpeg(mode="CMYK")),
    "jpeg_without_end": lambda: without_end(jpeg()),
    "jpeg_half_an_end": lambda: without_end(jpeg(), b"\xff"),
    "jpeg_zeros_for_an_end": lambda: without_end(jpeg(progressive=True), bytes(64)),
    "jpeg_progressive_without_end": lambda: without_end(jpeg(progressive=True)),
    "jpeg_gray_without_end": lambda: without_end(jpeg(mode="L")),
    "jpeg_cmyk_without_end": lambda: without_end(jpeg(mode="CMYK")),
    "jpeg_420_without_end": lambda: without_end(jpeg(subsampling=2)),
    "jpeg_profile_of_1.5_MB": lambda: Odd(
        with_segment(0xE2, *(b"ICC_PROFILE\0" + bytes([i + 1, 24]) + _RANDOM[:65000] for i in range(24))), jpeg()
    ),
    "jpeg_profile_of_nothing": lambda: Odd(with_segment(0xE2, b"ICC_PROFILE\0", b"ICC_PROFILE\0\7"), jpeg()),
    "jpeg_texts": lambda: Odd(with_segment(0xFE, *[b"x" * 65000] * 40), jpeg()),
    "jpeg_photoshop_nonsense": lambda: Odd(with_segment(0xED, b"Photoshop 3.0\x008BIM\4\4\xff"), jpeg()),
    "jpeg_mpf_nonsense": lambda: Odd(with_segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"), jpeg()),
    "jpeg_mpo_broken_second": lambda: Odd(mpo_with_broken_second(), jpeg()),
    "jpeg_jfif_cut": lambda: Odd(with_segment(0xE0, b"JFIF\0"), jpeg()),
    "png_2_MB_of_text": lambda: Odd(with_chunks(text_bomb(2 << 20)), png()),
    "png_texts_of_100_MB": lambda: Odd(with_chunks(*[text_bomb(50 << 20)] * 2), png()),
    "png_many_texts": lambda: Odd(with_chunks(*[chunk(b"tEXt", b"k\0" + b"v" * 900)] * 3000), png()),
    "png_itxt_nonsense": lambda: Odd(with_chunks(chunk(b"iTXt", b"k\0\1\0\0\0no zlib")), png()),
    "png_profile_of_1.5_MB": lambda: Odd(with_chunks(profile(3 << 19)), png()),
    "png_profile_nonsense": lambda: Odd(with_chunks(chunk(b"iCCP", b"x\0\0no zlib")), png()),
    "png_profile_method": lambda: Odd(with_chunks(chunk(b"iCCP", b"x\0\7")), png()),
    **{
        f"png_bad_sum_in_{kind.decode()}": lambda kind=kind, body=body: Odd(with_chunks(chunk(kind, body, 1)), png())
        for kind, body in ((b"tEXt", b"k\0v"), (b"gAMA", b"\0\0\xb1\x8f"), (b"pHYs", bytes(9)), (b"tIME", bytes(7)))
    },
    "png_bad_sum_behind_pixels": lambda: Odd(with_chunks(chunk(b"tEXt", b"k\0v", 1), last=True), png()),
    "png_short_chunks": lambda: Odd(with_chunks(chunk(b"gAMA", b""), chunk(b"pHYs", b"1"), chunk(b"cHRM", b"")), png()),
    "png_transparency_of_another_kind": lambda: Odd(with_chunks(chunk(b"tRNS", b"\0")), png()),
    "png_exif_turned": lambda: Odd(with_chunks(chunk(b"eXIf", odd_exif("zero_resolution", 3))), png(), 3, "rotated"),
    "png_exif_nonsense": lambda: Odd(with_chunks(chunk(b"eXIf", b"nonsense")), png()),
    "png_without_end": lambda: Odd(png()[:-12], png()),
    "png_half_an_end": lambda: Odd(png()[:-5], png()),
    "png_sum_of_pixels_cut": lambda: Odd(png()[:-14], png()),
    "png_bytes_behind": lambda: Odd(png() + _RANDOM[:100_000], png()),
    "png_animated_broken_later": lambda: Odd(animated_png_with_broken_frames(), png(), 1, "animated"),
    "webp_exif_turned": lambda: Odd(
        extended_webp(8, (b"EXIF", b"Exif\0\0" + odd_exif("text_for_a_number", 8))), webp(), 8, "rotated"
    ),
    "webp_exif_nonsense": lambda: Odd(extended_webp(8, (b"EXIF", b"nonsense")), webp()),
    "webp_xmp_nonsense": lambda: Odd(extended_webp(4, (b"XMP ", b"<x" * 5000)), webp()),
    "webp_profile_nonsense": lambda: Odd(extended_webp(32, (b"ICCP", b"no profile")), webp()),
    "webp_flags_without_chunks": lambda: Odd(extended_webp(44), webp()),
    "webp_bytes_behind": lambda: Odd(webp() + _RANDOM[:5000], webp()),
    "webp_animated_cut": lambda: Odd(cut_in_the_last_frame("WEBP"), first_frame("WEBP"), 1, "animated"),
    "gif_bytes_behind": lambda: Odd(
        encoded(picture(1, SIZE), "GIF") + _RANDOM[:5000], encoded(picture(1, SIZE), "GIF")
    ),
    "gif_without_end": lambda: Odd(encoded(picture(1, SIZE), "GIF")[:-1], encoded(picture(1, SIZE), "GIF")),
    "gif_animated_cut": lambda: Odd(cut_in_the_last_frame("GIF"), first_frame("GIF"), 1, "animated"),
    "tiff_resolution_zero": lambda: Odd(
        tiff_with_tags((282, 5, 1, bytes(4)), (283, 5, 1, bytes(4)), (296, 3, 1, b"\x09\0\0\0")), tiff()
    ),
    "tiff_text_for_a_number": lambda: Odd(tiff_with_tags((282, 2, 4, b"72\0\0"), (296, 2, 4, b"in\0\0")), tiff()),
    "tiff_exif_nowhere": lambda: Odd(
        tiff_with_tags((34665, 4, 1, struct.pack("<I", 1 << 30)), (34853, 4, 1, struct.pack("<I", 3))), tiff()
    ),
    "tiff_profile_nowhere": lambda: Odd(tiff_with_tags((34675, 7, 1 << 24, struct.pack("<I", 1 << 30))), tiff()),
    "tiff_turned": lambda: Odd(tiff_with_tags((282, 5, 1, bytes(4)), orientation=6), tiff(), 6, "rotated"),
    "tiff_lzw_turned": lambda: Odd(
        tiff_with_tags(orientation=8, compression="tiff_lzw"), tiff(compression="tiff_lzw"), 8, "rotated"
    ),
    "tiff_broken_second_page": lambda: Odd(two_page_tiff(b"\xff\xff" + _RANDOM[:100]), tiff(), 1, "animated"),
    "tiff_cut_second_page": lambda: Odd(two_page_tiff(b"\x09\0\0"), tiff(), 1, "animated"),
    "tiff_bytes_behind": lambda: Odd(tiff() + _RANDOM[:5001], tiff()),
    **{
        f"bmp_header_of_{size}": lambda size=size: Odd(bmp_with_header(size), bmp())
        for size in (16, 20, 36, 48, 64, 128)
    },
    "bmp_bytes_behind": lambda: Odd(bmp() + _RANDOM[:5000], bmp()),
    "avif_exif_nonsense": lambda: Odd(avif(exif=exif(turned(1))).replace(b"II*\0", b"nope"), avif()),
    "avif_xmp_nonsense": lambda: Odd(avif(xmp=b"\xff\xfe<x:xmpmeta"), avif()),
    "avif_bytes_behind": lambda: Odd(avif() + _RANDOM[:5000], avif()),
}

CUT: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: jpeg()[:-400],
    "jpeg_by_a_few_bytes": lambda: jpeg()[:-8],
    "jpeg_half_an_end": lambda: jpeg()[:-400] + b"\xff",
    "jpeg_zeros_behind": lambda: jpeg()[:-400] + bytes(400),
    "jpeg_progressive": lambda: jpeg(progressive=True)[:-100],
    "jpeg_progressive_between_scans": lambda: (c := jpeg(progressive=True))[: c.rindex(b"\xff\xc4")],
    "jpeg_gray": lambda: jpeg(mode="L")[:-200],
    "jpeg_cmyk": lambda: jpeg(mode="CMYK")[:-200],
    "png": lambda: png()[:-400],
    "png_broken_inside": lambda: (c := png())[:300] + bytes(100) + c[400:],
    "png_of_16_bits": lambda: sixteen_bits(4095, "PNG")[:-400],
    "webp": lambda: webp()[:-400],
    "gif": lambda: gif()[:-400],
    "tiff": lambda: tiff(compression="tiff_lzw")[: len(tiff(compression="tiff_lzw")) // 2],
}

# First bytes of pictures that are not read: a name, and what tells the kind.
FOREIGN: dict[str, tuple[str, bytes]] = {
    "psd": ("PSD", b"8BPS\0\1" + bytes(100)),
    "svg": ("SVG", b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg"></svg>'),
    "pdf": ("PDF", b"%PDF-1.7\n" + bytes(100)),
    "eps": ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    "exr": ("EXR", b"v/1\x01" + bytes(100)),
    "hdr": ("HDR", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n"),
    "dcm": ("DICOM", bytes(128) + b"DICM" + bytes(100)),
    "jxr": ("JPEG XR", b"II\xbc\x01" + bytes(100)),
    "dds": ("DDS", b"DDS " + bytes(124)),
    "cr2": ("RAW", b"II*\0\x10\0\0\0CR\2\0" + bytes(200)),
    "cr3": ("RAW", b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(100)),
    "raf": ("RAW", b"FUJIFILMCCD-RAW 0201" + bytes(100)),
    "dng": ("RAW", tiff_with_tags((50706, 1, 4, b"\1\4\0\0"))),
    "nef": ("RAW", tiff_with_tags((254, 4, 1, b"\1\0\0\0"), (330, 4, 1, struct.pack("<I", 8)))),
    "jls": ("JPEG-LS", b"\xff\xd8\xff\xf7\0\x0b\x08" + bytes(100)),
    "jpg": (
        "JPEG",
        b"\xff\xd8" + segment(0xC1, b"\x0c\0\x48\0\x60\1\1\x11\0") + segment(0xDA, b"\1\1\0\0\x3f\0") + bytes(9),
    ),
}


def sixteen_bits(top: int, format_: str, colours: int = 1, declared: int = 0) -> bytes:
    """A picture of 16 bits a sample whose brightest is `top`, in PNG or TIFF, and what the file says of that."""
    gray = np.asarray(picture(1, SIZE).convert("L" if colours == 1 else "RGB"), np.float64)
    values = np.round((gray - gray.min()) / (gray.max() - gray.min()) * top).astype(np.uint16)
    if format_ == "TIFF":
        return _tiff_of(values, declared)
    body = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", *SIZE, 16, {1: 0, 3: 2}[colours], 0, 0, 0)
    said = [chunk(b"sBIT", bytes([declared] * colours))] if declared else []
    parts = [chunk(b"IHDR", header), *said, chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _tiff_of(values: np.ndarray, declared: int) -> bytes:
    colours = values.shape[2] if values.ndim == 3 else 1
    body = values.astype("<u2").tobytes()
    at = 8 + len(body)
    tags = {256: SIZE[0], 257: SIZE[1], 258: 16, 259: 1, 262: 2 if colours == 3 else 1, 273: 8}
    tags |= {277: colours, 278: SIZE[1], 279: len(body), 284: 1}
    if declared:
        tags[281] = (1 << declared) - 1
    tail = b""
    rows = b""
    end = at + 2 + 12 * len(tags) + 4
    for tag, value in sorted(tags.items()):
        if tag == 258 and colours == 3:
            rows += struct.pack("<HHII", tag, 3, 3, end)
            tail = struct.pack("<HHH", 16, 16, 16)
        else:
            rows += struct.pack("<HHII", tag, 4, 1, value)
    return b"II*\0" + struct.pack("<I", at) + body + struct.pack("<H", len(tags)) + rows + bytes(4) + tail
