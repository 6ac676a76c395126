"""Images as a trained backbone is shown them: which ones a name means, and their pixels. Without torch."""

import numpy as np
from PIL import Image

from curation.reading.listing import find_parts
from curation.reading.samples import Part
from pretrain.data.decode import ImageLimits, open_image

_LIMITS = ImageLimits()
_MOST_ASPECT = 8
MAX_PATCHES = 40_000
"""of a square picture: beyond, attention takes longer than anyone waits"""


def find_sets(pattern: str) -> list[Part]:
    """The tars (or folders of images, or Parquet files) of a path, glob, brace pattern or folder, or of several of them
    joined by commas.

    Raises:
        ValueError: one of them matches nothing.
    """
    urls = [url for url in (part.strip() for part in pattern.split(",")) if url]
    if not urls:
        raise ValueError("no evaluation set given: name a tar, a folder, or a glob such as eval/val-*.tar.")
    return [part for url in urls for part in find_parts([url])]


def decoded(content: bytes, short_px: int, limits: ImageLimits = _LIMITS) -> Image.Image:
    """An encoded image with a shorter side of `short_px` or more.

    Read as in training: upright, transparency over white, 16 bits scaled. A JPEG is decoded at a scale that is still
    twice what is needed.

    Raises:
        Damaged: the bytes are no image, or one beyond the limits.
    """
    encoded = open_image(content, limits)
    return Image.fromarray(encoded.decode(min(1.0, 2 * short_px / min(encoded.width, encoded.height))))


def whole_picture(content: bytes, short_px: int, multiple: int = 1) -> np.ndarray:
    """Encoded image -> uint8 [H, W, 3] at its own aspect, its shorter side near `short_px`; antialiased bicubic.

    Args:
        multiple: of which both sides are multiples; a side is at most four times `short_px`, in whole multiples.

    Raises:
        Damaged: the bytes are no image.
    """
    image = decoded(content, short_px)
    scale, most = short_px / min(image.size), max(4 * short_px // multiple, 1)
    width, height = (min(max(round(side * scale / multiple), 1), most) * multiple for side in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def check_px(what: str, px: int, patch_size: int) -> None:
    """Raises ValueError: a picture whose shorter side is `px` would be less than a patch, or more than are borne.

    Args:
        what: the setting as the user wrote it.
    """
    if px < patch_size:
        raise ValueError(f"{what} is less than a patch of {patch_size} px.")
    if (px // patch_size) ** 2 > MAX_PATCHES:
        raise ValueError(f"{what} has more than {MAX_PATCHES:,} patches of {patch_size} px; give a lower --px.")


def short_side(px: int) -> int:
    """Shorter side before a centre crop of `px`, in the proportion 256 : 224 of the published evaluations."""
    return round(px * 256 / 224)


def eval_crop(content: bytes, px: int, resize_px: int, limits: ImageLimits = _LIMITS) -> np.ndarray:
    """Encoded image -> uint8 [px, px, 3]: shorter side to `resize_px` by antialiased bicubic, then the centre.

    Of an image more than eight times as long as wide, or as wide as long, only the middle is resized.

    Raises:
        Damaged: the bytes are no image, or one beyond the limits.
    """
    image = _middle(decoded(content, resize_px, limits))
    scale = resize_px / min(image.size)
    width, height = (max(px, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - px) // 2, (height - px) // 2
    return np.asarray(image.crop((left, top, left + px, top + px)))


def _middle(image: Image.Image) -> Image.Image:
    """At most _MOST_ASPECT times as long as wide: a line of one pixel by millions, resized whole, takes gigabytes."""
    most = _MOST_ASPECT * min(image.size)
    left, top = (max(side - most, 0) // 2 for side in image.size)
    width, height = (min(side, most) for side in image.size)
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))
