"""Pixels of any mode -> 8-bit RGB: 16 bits are scaled, transparency lies over white."""

import sys
from collections.abc import Callable

import numpy as np
from PIL import Image

_WHITE_16_BIT = 65535.0
_DARK_16_BIT = 1 << 14  # a picture of 16 bits with no sample above: 14, 12 or 10 bits that were not scaled up


def to_rgb(
    image: Image.Image, depth: int, significant: int, again: Callable[[], Image.Image]
) -> tuple[Image.Image, bool]:
    """An image of mode RGB, and whether it is nearly black since of its 16 bits only the lower ones are used.

    Such a picture is made as bright as it was meant only where its file says how many bits count; a guess would also
    change pictures of the night.

    Args:
        image: loaded.
        depth: bits of a sample in the file.
        significant: of them those that the file declares to carry the picture; 0: it does not.
        again: opens the same image, not loaded.
    """
    if image.mode.startswith("I"):  # 16 bits a pixel (PNG gives I;16, some files I)
        values = np.asarray(image, np.float32)
        white, is_dark = _white(values, depth, significant)
        return _gray(values * (255 / white) + 0.5), is_dark
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, np.float32))
        return _gray(values * (255 if values.max() <= 1 else 1)), False
    is_dark = False
    if depth == 16 and image.mode in ("RGB", "RGBA"):
        image, is_dark = _brightened(image, significant, again)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), is_dark
    return (image if image.mode == "RGB" else image.convert("RGB")), is_dark


def _brightened(image: Image.Image, significant: int, again: Callable[[], Image.Image]) -> tuple[Image.Image, bool]:
    """Colours of 16 bits, of which Pillow keeps the upper 8: where those are dark, the lower ones are looked at."""
    upper = np.asarray(image)
    if upper[:, :, :3].max() >= _DARK_16_BIT >> 8:
        return image, False
    values = upper[:, :, :3].astype(np.float32) * 256 + np.asarray(_lower_bytes(again()))[:, :, :3]
    white, is_dark = _white(values, 16, significant)
    if white == _WHITE_16_BIT:
        return image, is_dark
    colours = np.clip(values * (255 / white) + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(np.concatenate([colours, upper[:, :, 3:]], axis=2)), False


def _lower_bytes(image: Image.Image) -> Image.Image:
    """The lower 8 bits of 16-bit colours: Pillow is told that their bytes come in the other order."""
    other = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
    tiles = []
    for tile in image.tile:
        mode, *more = [tile.args] if isinstance(tile.args, str) else tile.args
        mode = f"{mode[:-3]}{other[mode[-3:]]}"
        tiles.append(tile._replace(args=mode if isinstance(tile.args, str) else (mode, *more)))
    image.tile = tiles
    image.load()
    return image


def _white(values: np.ndarray, depth: int, significant: int) -> tuple[float, bool]:
    """The sample that is white: 65,535, or less where the file declares fewer bits and did not scale them up.

    The second result: nothing is declared, and every sample is small.
    """
    top = int(values.max())
    if depth != 16 or not 0 < top < _DARK_16_BIT:
        return _WHITE_16_BIT, False
    if 8 <= significant < 16 and top < 1 << significant:
        # Scaled up, as PNG asks of its writers, the lower bits of a dark picture would be empty.
        is_scaled_up = not (values.astype(np.int64) & ((1 << (16 - significant)) - 1)).any()
        return (_WHITE_16_BIT if is_scaled_up else float((1 << significant) - 1)), False
    return _WHITE_16_BIT, True


def _gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
