"""Bytes from a hostile pool -> an 8-bit RGB image, or the reason why there is none."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, ImageOps

# Formats are recognised by content. Those that run other programs (EPS, PDF) or exist for one vendor are left out.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO")
SUFFIXES = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm", "jp2", "ico"]
)
_MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; thousands make a small file take minutes

# The limits below are checked from the header, before pixels are allocated; Pillow's own would only warn.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is refused before its pixels are decoded."""

    max_file_bytes: int = 64 << 20
    """bytes of the encoded image; a larger one is not even read"""
    max_pixels: int = 90_000_000
    """width x height from the header; 3 bytes of memory each"""


@dataclass(frozen=True)
class Decoded:
    """A good image: 8-bit RGB, upright, transparency over white; width and height are the upright ones, in pixels."""

    image: Image.Image
    width: int
    height: int
    format: str
    mode: str
    """the mode in the file: L, RGB, CMYK, P, I;16 ..."""
    warning: str | None = None
    """what was odd, though the image is good: 'animated', 'rotated'"""


@dataclass(frozen=True)
class Rejected:
    """No image: a reason from a short list (counted in reports) and, where the header was readable, its size."""

    reason: str
    width: int = 0
    height: int = 0
    format: str = ""


def decode(content: bytes, limits: ImageLimits) -> Decoded | Rejected:
    """Decode an image, or say why not: empty, file_too_large, not_an_image, too_many_pixels, too_many_scans, damaged.

    CMYK is converted, 16-bit is scaled to 8, palettes and alpha are composited over white, of an animation the first
    frame counts, EXIF orientation is applied, a broken EXIF or colour profile is ignored. Never raises for content.
    """
    if not content:
        return Rejected("empty")
    if len(content) > limits.max_file_bytes:
        return Rejected("file_too_large")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF and palettes; the result is what counts
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Exception:  # whatever a decoder raises on hostile bytes, the answer is the same
            return Rejected("not_an_image")
        width, height, format_ = image.width, image.height, image.format or ""
        if width < 1 or height < 1:
            return Rejected("damaged", width, height, format_)
        if width * height > limits.max_pixels:
            return Rejected("too_many_pixels", width, height, format_)
        if format_ == "JPEG" and content.count(b"\xff\xda") > _MAX_JPEG_SCANS:
            return Rejected("too_many_scans", width, height, format_)
        mode = image.mode
        try:
            warning = "animated" if getattr(image, "n_frames", 1) > 1 else None
            image.seek(0)
            image.load()
            upright = _apply_orientation(image)
            rgb = _to_rgb(upright)
        except MemoryError:
            return Rejected("too_many_pixels", width, height, format_)
        except Exception:
            return Rejected("damaged", width, height, format_)
        if upright is not image:
            warning = warning or "rotated"
    return Decoded(rgb, rgb.width, rgb.height, format_, mode, warning)


def sniff(head: bytes) -> bool:
    """Whether these first bytes look like an image, whatever the name says."""
    return (
        head[:3] == b"\xff\xd8\xff"
        or head[:8] == b"\x89PNG\r\n\x1a\n"
        or head[:4] in (b"GIF8", b"II*\x00", b"MM\x00*")
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"mif1"))
        or (head[:2] == b"BM" and head[6:10] == bytes(4))  # and not words that begin so
    )


def luma_deviation(image: Image.Image) -> float:
    """Standard deviation of brightness at no more than 64 px, in 0..127.5: near 0, there is nothing to see."""
    small = image.convert("L")
    small.thumbnail((64, 64), Image.Resampling.BOX)
    return float(np.asarray(small, np.float32).std())


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # EXIF that points nowhere: the picture itself is fine
        return image
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel (PNG gives I;16, some files I)
        values = np.asarray(image, np.float32)
        return Image.fromarray(np.clip(values / 257.0 + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float32))
        return Image.fromarray(np.clip(values * (255 if values.max() <= 1 else 1), 0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
