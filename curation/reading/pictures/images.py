"""Bytes from a hostile pool -> an upright 8-bit RGB image, or the reason why there is none.

    image = open_image(content)     the header alone; raises Damaged
    pixels = image.decode(0.5)      uint8 [H, W, 3], no smaller than half the size

Curation and training read with this one module, so what one keeps the other can train on. Formats are recognised by
content. Sizes are checked in the header, before pixels are allocated. JPEG goes through libjpeg-turbo, which looks at
nothing but pixels and can decode at 1/2, 1/4 or 1/8 of the size for less work; all else, and whatever it refuses, goes
through Pillow, which is given the file without what carries no pixels (bare.py).
"""

import io
import threading
import warnings
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

from configs.ranges import check_ranges
from curation.reading.pictures import jpeg
from curation.reading.pictures.bare import Bare, bare
from curation.reading.pictures.formats import (
    EXTRA_SUFFIXES,
    FOREIGN_SUFFIXES,
    FORMATS,
    SUFFIXES,
    is_read,
    recognise,
    sniff,
)
from curation.reading.pictures.rgb import to_rgb

__all__ = [
    "EXTRA_SUFFIXES",
    "FOREIGN_SUFFIXES",
    "FORMATS",
    "SUFFIXES",
    "Damaged",
    "Decoded",
    "EncodedImage",
    "ImageLimits",
    "Rejected",
    "decode",
    "header_pixels",
    "luma_deviation",
    "open_image",
    "sniff",
]

_MAX_JPEG_SCANS = 100  # a progressive JPEG has about ten; thousands make a small file take minutes
_JPEG_MODES = {"Gray": "L", "YCbCr": "RGB", "RGB": "RGB"}  # others are CMYK: Pillow knows which of them are inverted
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEAD_BYTES = 4096

# The limits below are checked from the header, before pixels are allocated; Pillow's own would only warn.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False


class Damaged(ValueError):
    """No image in these bytes. `reason` is one of a short list of words, to be counted; the size where it is known."""

    def __init__(self, reason: str, width: int = 0, height: int = 0, format_: str = "") -> None:
        super().__init__(reason)
        self.reason, self.width, self.height, self.format = reason, width, height, format_

    def __reduce__(self) -> tuple[type["Damaged"], tuple[str, int, int, str]]:
        return Damaged, (self.reason, self.width, self.height, self.format)


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What is refused before its pixels are decoded."""

    max_file_bytes: int = 64 << 20
    """bytes of the encoded image; a larger one is not even read"""
    max_pixels: int = 90_000_000
    """width x height from the header; 3 bytes of memory each"""

    def __post_init__(self) -> None:
        # Named as training does: curation has checked its own settings before it comes here.
        check_ranges("data.limits", self, max_file_bytes="[1, inf)", max_pixels="[1, inf)")


@dataclass(frozen=True)
class EncodedImage:
    """An image whose header is sound. `height` and `width` are the upright ones, in pixels, at full size."""

    content: bytes
    """the file as it came"""
    height: int
    width: int
    orientation: int
    """EXIF, 1 to 8; from 5 on, height and width are swapped in the file"""
    format: str
    mode: str
    """the mode in the file: L, RGB, CMYK, P, I;16 ..."""
    bare: Bare = field(repr=False)
    jpeg: "jpeg.Header | None" = field(default=None, repr=False)
    opened: list[Image.Image] = field(default_factory=list, repr=False, compare=False)
    """what Pillow opened for the header, until it is decoded"""
    is_plain_jpeg: bool = False
    """libjpeg-turbo turns it into RGB by itself"""
    notes: list[str] = field(default_factory=list)
    """what is odd, though the image is good: animated, rotated; once decoded dark_16_bit, jpeg_without_end, too"""

    def decode(self, scale: float = 1.0) -> np.ndarray:
        """uint8 RGB [H, W, 3], C-contiguous, at least `scale` times the full size and at most full size.

        Raises:
            Damaged: the pixels cannot be decoded.
        """
        pixels = self._pixels(scale)
        return _upright(pixels if isinstance(pixels, np.ndarray) else np.array(pixels), self.orientation)

    def image(self) -> Image.Image:
        """The same at full size as a Pillow image.

        Raises:
            Damaged: the pixels cannot be decoded.
        """
        pixels = self._pixels(1.0)
        image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
        turn = _TURNS.get(self.orientation)
        return image if turn is None else image.transpose(turn)

    def _pixels(self, scale: float) -> np.ndarray | Image.Image:
        """As they lie in the file, not turned; whichever of the two is there without a copy."""
        if self.is_plain_jpeg:
            try:
                return self._turbo(self.content, scale)
            except ValueError:  # strict about recoverable errors; Pillow decides which are
                pass
        content = self.bare.content if self.jpeg is None else jpeg.without_extras(self.content, self.jpeg)
        try:
            return self._pillow(content)
        except Damaged:
            whole = None if self.jpeg is None else self._with_end(content, self.jpeg)
            if whole is None:
                raise
        self.notes.append("jpeg_without_end")
        return self._turbo(whole, scale) if self.is_plain_jpeg else self._pillow(whole)

    def _turbo(self, content: bytes, scale: float) -> np.ndarray:
        """
        Raises:
            ValueError: libjpeg-turbo had to guess.
        """
        height, width = (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)
        divisor = next((d for d in (8, 4, 2) if scale * d <= 1), 1)
        return simplejpeg.decode_jpeg(
            content, "RGB", min_height=-(-height // divisor), min_width=-(-width // divisor), min_factor=divisor
        )

    def _pillow(self, content: bytes) -> Image.Image:
        with _quiet:
            try:
                image = self.opened.pop() if self.opened else _reader(content, self.format)
                image.load()
                bits = self.bare.depth, self.bare.significant
                rgb, is_dark = to_rgb(image, *bits, lambda: _reader(content, self.format))
            except MemoryError:
                raise Damaged("too_many_pixels", self.width, self.height, self.format) from None
            except Exception:  # whatever a decoder raises on hostile bytes, the answer is the same
                raise Damaged("damaged", self.width, self.height, self.format) from None
        if is_dark and "dark_16_bit" not in self.notes:
            self.notes.append("dark_16_bit")
        return rgb

    def _with_end(self, content: bytes, header: "jpeg.Header") -> bytes | None:
        """A JPEG that lacks nothing but its end marker, with one; None for one that is cut in its pixels."""
        if not jpeg.says_it_all(self.content, header):
            return None
        for end in (content, content.rstrip(b"\0"), content.removesuffix(b"\xff")):
            whole = end + jpeg.END
            try:
                simplejpeg.decode_jpeg(whole, "RGB" if self.is_plain_jpeg else "CMYK")
                return whole
            except ValueError:  # a row of blocks is missing, or cut
                continue
        return None


def open_image(content: bytes, limits: ImageLimits | None = None) -> EncodedImage:
    """Look at the header only.

    Raises:
        Damaged: empty, file_too_large, not_an_image, unsupported_format, too_many_pixels, too_many_scans or damaged.
    """
    limits = limits or ImageLimits()
    if not content:
        raise Damaged("empty")
    if len(content) > limits.max_file_bytes:
        raise Damaged("file_too_large")
    kind = recognise(content[:_HEAD_BYTES])
    if kind and not is_read(kind):
        raise Damaged("unsupported_format", format_=kind)
    if kind == "ICO" and _icon_pixels(content) > limits.max_pixels:  # Pillow decodes it as it opens it
        raise Damaged("too_many_pixels", format_=kind)
    image = _open_jpeg(content, kind) if kind == "JPEG" else _open_other(content, kind)
    width, height = image.width, image.height
    if width < 1 or height < 1:
        raise Damaged("damaged", width, height, image.format)
    if width * height > limits.max_pixels:
        raise Damaged("too_many_pixels", width, height, image.format)
    if image.jpeg is not None and jpeg.count_scans(content, image.jpeg, _MAX_JPEG_SCANS) > _MAX_JPEG_SCANS:
        raise Damaged("too_many_scans", width, height, image.format)
    if image.bare.animated:
        image.notes.append("animated")
    if image.orientation != 1:
        image.notes.append("rotated")
    return image


def header_pixels(content: bytes) -> int:
    """Width x height from the header; 0 where there is none to be read."""
    try:
        image = open_image(content)
    except Damaged as damage:
        return damage.width * damage.height
    return image.width * image.height


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
    """what was odd, though the image is good: 'dark_16_bit', 'jpeg_without_end', 'animated' or 'rotated'"""


@dataclass(frozen=True)
class Rejected:
    """No image: a reason from a short list (counted in reports) and, where the header was readable, its size."""

    reason: str
    width: int = 0
    height: int = 0
    format: str = ""


def decode(content: bytes, limits: ImageLimits) -> Decoded | Rejected:
    """Decode an image, or say why not, in the words of `open_image`.

    CMYK is converted, 16-bit is scaled to 8, palettes and alpha are composited over white, of an animation the first
    frame counts, EXIF orientation is applied. Never raises for content.
    """
    try:
        encoded = open_image(content, limits)
        image = encoded.image()
    except Damaged as damage:
        return Rejected(damage.reason, damage.width, damage.height, damage.format)
    notes = [note for note in ("dark_16_bit", "jpeg_without_end", "animated", "rotated") if note in encoded.notes]
    warning = notes[0] if notes else None
    return Decoded(image, image.width, image.height, encoded.format, encoded.mode, warning)


def luma_deviation(image: Image.Image) -> float:
    """Standard deviation of brightness at no more than 64 px, in 0..127.5: near 0, there is nothing to see."""
    small = image.convert("L")
    small.thumbnail((64, 64), Image.Resampling.BOX)
    return float(np.asarray(small, np.float32).std())


class _Quiet:
    """Python's warnings are off while any thread is inside: Pillow warns of odd palettes and tags; the result counts.

    `warnings.catch_warnings` alone would leave them off for good where two threads leave in the order they came.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)


_quiet = _Quiet()


def _open_jpeg(content: bytes, kind: str) -> EncodedImage:
    header = jpeg.read_header(content)
    if header is None:  # no scan: nothing to be seen
        raise Damaged("not_an_image")
    if header.precision not in (0, 8):
        raise Damaged("unsupported_format", format_=kind)
    swapped = header.orientation >= 5
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        mode = _JPEG_MODES.get(colours)
    except ValueError:
        mode = None
    if mode is not None:
        height, width = (width, height) if swapped else (height, width)
        return EncodedImage(
            content=content,
            height=int(height),
            width=int(width),
            orientation=header.orientation,
            format=kind,
            mode=mode,
            bare=Bare(content),
            jpeg=header,
            is_plain_jpeg=True,
        )
    return _open_with_pillow(content, Bare(jpeg.without_extras(content, header), header.orientation), kind, header)


def _open_other(content: bytes, kind: str) -> EncodedImage:
    stripped = bare(content, kind)
    if stripped.is_preview:
        raise Damaged("unsupported_format", format_="RAW")
    return _open_with_pillow(content, stripped, kind)


def _open_with_pillow(content: bytes, stripped: Bare, kind: str, header: "jpeg.Header | None" = None) -> EncodedImage:
    with _quiet:
        try:
            image = _reader(stripped.content, kind)
            width, height, format_, mode = image.width, image.height, image.format or kind, image.mode
            orientation = stripped.orientation
            if kind == "AVIF":  # which Pillow makes of the file's own turns, not of its EXIF
                orientation = image.getexif().get(0x0112, 1)
        except Exception:  # whatever a decoder raises on hostile bytes, the answer is the same
            raise Damaged("not_an_image") from None
    width, height = (height, width) if orientation >= 5 else (width, height)
    return EncodedImage(content, height, width, orientation, format_, mode, bare=stripped, jpeg=header, opened=[image])


def _reader(content: bytes, kind: str) -> Image.Image:
    """A Pillow image, not loaded yet."""
    if kind == "HEIF":
        from pillow_heif import HeifImageFile

        return HeifImageFile(io.BytesIO(content))
    if kind == "JXL":
        from pylibjxl.pillow_plugin import JxlImageFile

        return JxlImageFile(io.BytesIO(content))
    return Image.open(io.BytesIO(content), formats=FORMATS)


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


def _icon_pixels(content: bytes) -> int:
    """Of the largest picture in an icon, as that picture's own header says; the icon's list can say less."""
    most, count = 0, int.from_bytes(content[4:6], "little")
    for at in range(6, 6 + 16 * count, 16):
        start = int.from_bytes(content[at + 12 : at + 16], "little")
        if content.startswith(b"\x89PNG", start):
            width, height = (int.from_bytes(content[start + i : start + i + 4], "big") for i in (16, 20))
        else:
            width, height = (int.from_bytes(content[start + i : start + i + 4], "little", signed=True) for i in (4, 8))
        most = max(most, abs(width) * abs(height))
    return most
