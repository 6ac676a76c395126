"""Bytes from a hostile pool -> an upright RGB image, decoded no larger than it is needed, or the reason why not.

Formats are recognised by content, sizes are checked in the header before pixels are allocated. JPEG goes through
libjpeg-turbo, which can decode at 1/2, 1/4 or 1/8 of the size for less work; all else, and whatever it refuses,
through Pillow.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from configs.ranges import check_ranges

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO")
_MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; thousands make a small file take minutes
_JPEG = b"\xff\xd8\xff"
_ORIENTATION = 0x0112


class Damaged(ValueError):
    """No image in these bytes. `reason` is one of a short list of words, to be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is refused before its pixels are decoded."""

    max_file_bytes: int = 64 << 20
    """bytes of the encoded image; a larger one is not even read"""
    max_pixels: int = 90_000_000
    """width x height from the header; 3 bytes of memory each"""

    def __post_init__(self) -> None:
        check_ranges(self, "data.limits", dict.fromkeys(("max_file_bytes", "max_pixels"), "[1, inf)"))


@dataclass(frozen=True)
class EncodedImage:
    """An image whose header is sound. `height` and `width` are the upright ones, in pixels, at full size."""

    content: bytes
    height: int
    width: int
    orientation: int
    """EXIF, 1 to 8; from 5 on, height and width are swapped in the file"""
    is_plain_jpeg: bool

    def decode(self, scale: float = 1.0) -> np.ndarray:
        """uint8 RGB [H, W, 3], C-contiguous, at least `scale` times the full size and at most full size.

        Raises:
            Damaged: the pixels cannot be decoded.
        """
        if self.is_plain_jpeg:
            swapped = self.orientation >= 5
            height, width = (self.width, self.height) if swapped else (self.height, self.width)
            divisor = next((d for d in (8, 4, 2) if scale * d <= 1), 1)
            try:
                image = simplejpeg.decode_jpeg(
                    self.content,
                    "RGB",
                    min_height=-(-height // divisor),
                    min_width=-(-width // divisor),
                    min_factor=divisor,
                )
                return _upright(image, self.orientation)
            except ValueError:  # strict about recoverable errors; Pillow decides which are
                pass
        return _decode_with_pillow(self.content, self.orientation)


def open_image(content: bytes, limits: ImageLimits | None = None) -> EncodedImage:
    """Look at the header only.

    Raises:
        Damaged: empty, file_too_large, not_an_image, too_many_pixels, too_many_scans or damaged.
    """
    limits = limits or ImageLimits()
    if not content:
        raise Damaged("empty")
    if len(content) > limits.max_file_bytes:
        raise Damaged("file_too_large")
    plain = _plain_jpeg_size(content)
    height, width, orientation = plain or _open_with_pillow(content)
    if content.startswith(_JPEG) and _count_scans(content) > _MAX_JPEG_SCANS:
        raise Damaged("too_many_scans")
    if height < 1 or width < 1:
        raise Damaged("damaged")
    if height * width > limits.max_pixels:
        raise Damaged("too_many_pixels")
    if orientation >= 5:
        height, width = width, height
    return EncodedImage(content, height, width, orientation, is_plain_jpeg=plain is not None)


def _count_scans(content: bytes) -> int:
    """Start-of-scan markers; a few times faster than bytes.count, which stops at each of a JPEG's many 0xFF."""
    data = np.frombuffer(content, np.uint8)
    return int(np.count_nonzero((data[:-1] == 0xFF) & (data[1:] == 0xDA)))


def _plain_jpeg_size(content: bytes) -> tuple[int, int, int] | None:
    """(height, width, orientation) as they stand in a JPEG that libjpeg-turbo turns into RGB; None for all else."""
    if not content.startswith(_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError:
        return None
    if colours not in ("YCbCr", "Gray", "RGB"):  # CMYK: Pillow knows which of its kinds are inverted
        return None
    return int(height), int(width), _exif_orientation(content) if _may_have_exif(content) else 1


def _may_have_exif(content: bytes) -> bool:
    """Whether a JPEG's header has an EXIF segment, or is too odd to tell. Pillow takes longer to say so."""
    start = 2
    while content[start : start + 1] == b"\xff":
        marker = content[start + 1 : start + 2]
        if marker == b"\xda":  # the scan: the header is over
            return False
        if marker == b"\xe1" and content[start + 4 : start + 8] == b"Exif":
            return True
        start += 2 + max(int.from_bytes(content[start + 2 : start + 4], "big"), 2)
    return True


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the EXIF orientation. image [H, W, 3]."""
    if orientation == 1:
        return image
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    # After the transposition: 2, 3 and their likes mirror left-right; 3, 4 and theirs top-bottom.
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _exif_orientation(content: bytes) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _orientation(Image.open(io.BytesIO(content), formats=FORMATS))
        except Exception:  # Pillow cannot read this header; libjpeg-turbo could
            return 1


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where EXIF is absent or points nowhere: the picture itself is fine."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever Pillow raises on hostile EXIF
        return 1
    return orientation if orientation in range(1, 9) else 1


def _open_with_pillow(content: bytes) -> tuple[int, int, int]:
    """(height, width, orientation) as they stand in the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF, palettes and large sizes; our limits decide
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError:
            raise Damaged("too_many_pixels") from None
        except Exception:  # whatever a decoder raises on hostile bytes, the answer is the same
            raise Damaged("not_an_image") from None
        return image.height, image.width, _orientation(image)


def _decode_with_pillow(content: bytes, orientation: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.seek(0)  # of an animation, the first frame
            image.load()
            return _upright(_to_rgb(image), orientation)
        except MemoryError:
            raise Damaged("too_many_pixels") from None
        except Exception:
            raise Damaged("damaged") from None


def _to_rgb(image: Image.Image) -> np.ndarray:
    """8-bit RGB [H, W, 3], an array of its own: 16 bits are scaled, transparency is composited over white."""
    if image.mode.startswith("I"):  # 16 bits a pixel (PNG gives I;16, some files I)
        values = np.clip(np.asarray(image, np.float32) / 257.0 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(values[:, :, None], 3, axis=2)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float32))
        values = np.clip(values * (255 if values.max() <= 1 else 1), 0, 255).astype(np.uint8)
        return np.repeat(values[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return np.array(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
