"""Damaged, hostile and odd files as a crawl brings them, each with what a tolerant reader should do with it.

`expect` is one of: ok (decodes), ok_convert (decodes to 8-bit RGB), ok_first_frame, ok_rotate (EXIF orientation to be
applied; width and height are those after it), ok_filter (decodes; a filter may drop it), ok_or_reject (either, but no
crash), reject (a row with a reason), reject_no_alloc (refused from the header, no pixels allocated).
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from curation.demo.drawing import SCENES, draw_scene

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """One sample: the image member (`ext`, `data`; no image when data is None), other members, and the expectation."""

    defect: str
    expect: str
    ext: str = "jpg"
    data: bytes | None = None
    members: dict[str, bytes] | None = None
    """suffix -> bytes in place of the usual json; None for the usual one, {} for none"""
    width: int | None = None
    height: int | None = None
    mean_luma: float | None = None
    """0 to 255, where a wrong conversion would show"""


def damaged_files(rng: np.random.Generator) -> list[Damaged]:
    """Some fifty samples, always the same defects in the same order; no two show the same picture."""

    def fresh(width: int = 168, height: int = 120) -> Image.Image:
        return draw_scene(list(SCENES)[rng.integers(len(SCENES))], rng, width, height)

    broken = _broken(rng, encode(fresh(), "JPEG"), encode(fresh(), "PNG"))
    return broken + _hostile() + _mislabelled(fresh) + _modes(fresh) + _members(fresh)


def _broken(rng: np.random.Generator, jpeg: bytes, png: bytes) -> list[Damaged]:
    """Bytes missing or changed."""
    html = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><circle cx="32" cy="32" r="30"/></svg>\n'
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 48213\n"
    flipped = np.frombuffer(jpeg, np.uint8).copy()
    flipped[rng.integers(len(jpeg) // 2, len(jpeg) - 2, 12)] ^= 0x15
    crc = bytearray(png)
    crc[png.index(b"IDAT") + 64] ^= 0xFF
    cut = [("truncated_jpeg_10", 0.1), ("truncated_jpeg_50", 0.5), ("truncated_jpeg_90", 0.9)]
    return [
        Damaged(defect="zero_bytes", expect="reject", data=b""),
        *(Damaged(defect=name, expect="reject", data=jpeg[: int(len(jpeg) * part)]) for name, part in cut),
        Damaged(defect="truncated_png", expect="reject", ext="png", data=png[: len(png) // 2]),
        Damaged(defect="png_bad_crc", expect="reject", ext="png", data=bytes(crc)),
        Damaged(defect="bit_flips", expect="ok_or_reject", data=flipped.tobytes()),
        Damaged(defect="trailing_garbage", expect="ok", data=jpeg + rng.bytes(600), width=168, height=120),
        Damaged(defect="random_bytes", expect="reject", data=rng.bytes(3000)),
        Damaged(defect="jpeg_magic_only", expect="reject", data=b"\xff\xd8\xff"),
        Damaged(defect="html_as_jpg", expect="reject", data=html),
        Damaged(defect="svg_as_png", expect="reject", ext="png", data=svg),
        Damaged(defect="lfs_pointer_as_jpg", expect="reject", data=pointer),
    ]


def _hostile() -> list[Damaged]:
    """Few bytes that claim many pixels, and shapes that no filter should let through."""
    header = png_file(60000, 60000, 8, 2, zlib.compress(b"\0" * 100))
    rows = zlib.compressobj(9)
    pixels = b"".join(rows.compress(b"\0" * (1 + 20000 // 8)) for _ in range(20000)) + rows.flush()
    jpeg = bytearray(encode(Image.new("RGB", (64, 64), (90, 120, 60)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return [
        Damaged(defect="bomb_header", expect="reject_no_alloc", ext="png", data=header, width=60000, height=60000),
        Damaged(
            defect="bomb_real",
            expect="reject_no_alloc",
            ext="png",
            data=png_file(20000, 20000, 1, 0, pixels),
            width=20000,
            height=20000,
        ),
        Damaged(defect="jpeg_huge_dims", expect="reject_no_alloc", data=bytes(jpeg), width=65500, height=65500),
        Damaged(defect="zero_width", expect="reject", ext="png", data=png_file(0, 10, 8, 2, zlib.compress(b""))),
        _plain("aspect_4000x3", "png", Image.new("RGB", (4000, 3), (120, 60, 30))),
        _plain("aspect_5x2600", "jpg", Image.new("RGB", (5, 2600), (30, 60, 120))),
        _plain("one_pixel", "png", Image.new("RGB", (1, 1), (255, 255, 255))),
        _plain("tracking_pixel_gif", "gif", Image.new("P", (1, 1))),
        _plain("solid_colour", "jpg", Image.new("RGB", (256, 256), (64, 128, 192))),
    ]


def _mislabelled(fresh: Callable[..., Image.Image]) -> list[Damaged]:
    """A sound picture under another format's suffix, turned by EXIF, or with metadata that points nowhere."""
    ways: list[tuple[str, str, str, dict, tuple[int, int]]] = [
        ("png_named_jpg", "jpg", "PNG", {}, (168, 120)),
        ("jpeg_named_png", "png", "JPEG", {}, (120, 168)),
        ("webp_named_jpg", "jpg", "WEBP", {}, (100, 120)),
        ("bmp_named_jpg", "jpg", "BMP", {}, (96, 96)),
        ("progressive_jpeg", "jpg", "JPEG", {"progressive": True}, (168, 120)),
        ("broken_exif", "jpg", "JPEG", {"exif": b"Exif\0\0MM\0\x2a\xff\xff\xff\xf0" + b"\0" * 20}, (150, 112)),
        ("broken_icc", "jpg", "JPEG", {"icc_profile": b"not a profile" * 9}, (160, 120)),
    ]
    found = []
    for defect, ext, kind, options, size in ways:
        picture = fresh(*size)
        found.append(_seen(defect, "ok", ext, encode(picture, kind, **options), picture))
    turned = {6: Image.Transpose.ROTATE_90, 3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE}
    for orientation, undo in turned.items():
        upright, exif = fresh(), Image.Exif()
        exif[_EXIF_ORIENTATION] = orientation
        data = encode(upright.transpose(undo), "JPEG", exif=exif)
        found.append(_seen(f"exif_orientation_{orientation}", "ok_rotate", "jpg", data, upright, luma(upright)))
    return found


def _modes(fresh: Callable[..., Image.Image]) -> list[Damaged]:
    """Colour modes, bit depths and frames that are not 8-bit RGB."""
    cmyk, gray, deep, bits, deep_rgb = (
        fresh(),
        fresh().convert("L"),
        fresh().convert("L"),
        fresh().convert("1"),
        fresh(),
    )
    deep_rows = b"".join(b"\0" + row.tobytes() for row in (np.asarray(deep_rgb, np.uint16) * 257).astype(">u2"))
    sixteen = encode(Image.fromarray(np.asarray(deep, np.uint16) * 257), "PNG")
    sixteen_rgb = png_file(*deep_rgb.size, 16, 2, zlib.compress(deep_rows))
    palette = fresh().quantize(64, dither=Image.Dither.NONE)
    clear, gray_clear = fresh(), fresh(130, 100)
    for image in (clear, gray_clear):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    found = [
        _seen("cmyk_jpeg", "ok_convert", "jpg", encode(cmyk.convert("CMYK"), "JPEG"), cmyk, luma(cmyk)),
        _seen("gray_jpeg", "ok_convert", "jpg", encode(gray, "JPEG"), gray, luma(gray)),
        _seen("png_16bit_gray", "ok_convert", "png", sixteen, deep, luma(deep)),
        _seen("png_16bit_rgb", "ok_convert", "png", sixteen_rgb, deep_rgb, luma(deep_rgb)),
        _seen("png_1bit", "ok_convert", "png", encode(bits, "PNG"), bits, luma(bits)),
        # With alpha there is no one right picture, only a size.
        _seen(
            "palette_png_alpha",
            "ok_convert",
            "png",
            encode(palette, "PNG", transparency=bytes(range(64, 128))),
            palette,
        ),
        _seen("rgba_png", "ok_convert", "png", encode(clear, "PNG"), clear),
        _seen("la_png", "ok_convert", "png", encode(gray_clear.convert("LA"), "PNG"), gray_clear),
    ]
    for kind in ("GIF", "WEBP"):
        frames = [fresh(96, 72) for _ in range(3)]
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=80)
        found.append(_seen(f"animated_{kind.lower()}", "ok_first_frame", kind.lower(), data, frames[0]))
    return found


def _members(fresh: Callable[..., Image.Image]) -> list[Damaged]:
    """Samples whose other members are missing or broken."""
    jsons: list[tuple[str, str, dict[str, bytes]]] = [
        ("json_missing", "ok", {}),
        ("json_broken", "ok_or_reject", {"json": b'{"width": 96, "height"'}),
        ("json_not_utf8", "ok_or_reject", {"json": b'{"author": "Andr\xe9"}'}),
        ("json_is_list", "ok_or_reject", {"json": b"[1, 2, 3]"}),
    ]
    found = []
    last = fresh()
    for defect, expect, members in jsons:
        data = encode(fresh(112, 96), "JPEG")
        found.append(Damaged(defect=defect, expect=expect, data=data, members=members, width=112, height=96))
    return [
        *found,
        Damaged(defect="text_only", expect="reject", ext="txt", members={"txt": b"a caption alone\n"}),
        Damaged(defect="json_only", expect="reject", ext="json", members={"json": b'{"width": 120}'}),
        _seen("unicode_key", "ok", "jpg", encode(last, "JPEG"), last),
    ]


def _plain(defect: str, ext: str, image: Image.Image) -> Damaged:
    data = encode(image, {"jpg": "JPEG", "png": "PNG", "gif": "GIF"}[ext])
    return _seen(defect, "ok_filter", ext, data, image)


def _seen(defect: str, expect: str, ext: str, data: bytes, seen: Image.Image, mean: float | None = None) -> Damaged:
    """`seen` is the picture as a reader should show it."""
    return Damaged(
        defect=defect, expect=expect, ext=ext, data=data, width=seen.width, height=seen.height, mean_luma=mean
    )


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """The image file's bytes; JPEG and WebP at quality 88 unless told otherwise."""
    if kind in ("JPEG", "WEBP"):
        options = {"quality": 88, **options}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def luma(image: Image.Image) -> float:
    """Mean brightness, 0 to 255."""
    return round(float(np.asarray(image.convert("L"), np.float64).mean()), 1)


def png_file(width: int, height: int, depth: int, colour_type: int, pixels: bytes) -> bytes:
    """A PNG from its header fields and compressed rows, whether or not they agree.

    Source: PNG specification, sections 5.3 (chunk layout) and 11.2.2 (IHDR).
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
