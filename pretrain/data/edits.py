"""What people do to a picture before they post it again: for backbones that are to find copies (`crops.edits`).

    edited = edit(np.zeros((64, 64, 3), np.uint8), 2, np.random.default_rng(0))

Each takes a crop and gives one of the same size. What keeps a crop whole changes where things lie: turns, frames,
another picture around it; the rest covers or damages it. Colours, mirrors and cuts are those of the crops themselves.
The kinds of edit are those of SSCD (arXiv:2202.10261) and of the image similarity challenge (arXiv:2106.09672).
"""

import functools
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Edit = Callable[[Image.Image, np.random.Generator], Image.Image]
_LETTERS = "ABCDEFGHIJKLMNOPRSTUVWXYZ abcdefghijklmnoprstuvwxyz 0123456789 !?"


def edit(pixels: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """From 0 to `most` different edits, one after another, of a crop uint8 [H, W, 3]; uint8 of the same shape."""
    chosen = rng.permutation(len(EDITS))[: rng.integers(most + 1)]
    if not len(chosen):
        return pixels
    image = Image.fromarray(pixels)
    for index in chosen.tolist():
        image = EDITS[index](image, rng)
    return np.array(image)


def turn(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Upside down, by quarters, or by up to 45 degrees; what comes in from outside is a colour."""
    kind = rng.random()
    if kind < 0.25:
        return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if kind < 0.4:
        quarter = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_180)
        return image.transpose(quarter[rng.integers(3)])
    degrees = float(rng.uniform(-45, 45)) if kind < 0.7 else float(rng.uniform(-8, 8))
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=_colour(rng))


def slant(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Seen from the side: each corner of the picture comes from up to a fifth inside or a tenth outside."""
    inward = rng.uniform(-0.1, 0.2, (4, 2)) * image.size
    x, y = image.size
    (a, b), (c, d), (e, f), (g, h) = inward
    corners = (a, b, c, y - d, x - e, y - f, x - g, h)
    return image.transform(image.size, Image.Transform.QUAD, corners, Image.Resampling.BILINEAR, fillcolor=_colour(rng))


def frame(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Bars or a frame of one colour, of up to a quarter of the side each."""
    edges = rng.uniform(0.02, 0.25, 4) * ((1, 1, 1, 1), (1, 0, 1, 0), (0, 1, 0, 1), (0, 1, 0, 0))[rng.integers(4)]
    return _on(Image.new("RGB", image.size, _colour(rng)), image, edges)


def ground(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """On another picture, as collages and screenshots have it: half to nine tenths of the side."""
    share = rng.uniform(0.5, 0.9, 2) if rng.random() < 0.5 else np.full(2, rng.uniform(0.5, 0.9))
    left, top = rng.random(2) * (1 - share)
    return _on(_scenery(image.size, rng), image, np.array([left, top, 1 - share[0] - left, 1 - share[1] - top]))


def text(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A line or two of letters, half of them on a box."""
    size = max(int(image.height * rng.uniform(0.1, 0.22)), 6)
    lines = ["".join(rng.choice(list(_LETTERS), rng.integers(4, 14))) for _ in range(rng.integers(1, 3))]
    words = "\n".join(lines)
    image, (x, y) = image.copy(), rng.uniform((-0.05, 0), (0.4, 0.85)) * image.size
    draw, font = ImageDraw.Draw(image), _font(size)
    ink, paper = _colour(rng), _colour(rng)
    if rng.random() < 0.5:
        draw.rectangle(draw.textbbox((x, y), words, font), fill=paper)
    draw.text((x, y), words, ink, font, stroke_width=int(rng.integers(2)), stroke_fill=paper)
    return image


def sticker(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One to three shapes that hide up to a quarter of the picture."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 4)):
        width, height = rng.uniform(0.1, 0.5, 2) * image.size
        x, y = rng.uniform(-0.1, 0.8, 2) * image.size
        shape = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        shape((x, y, x + width, y + height), fill=_colour(rng), outline=_colour(rng))
    return image


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Of 4 to 25 grey levels."""
    pixels = np.asarray(image, np.float32)
    pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(4, 25))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def compress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """JPEG of quality 5 to 50."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(5, 51)))
    return Image.open(file).convert("RGB")


def pixelate(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """To a half down to an eighth of the side and back, in blocks or smoothly."""
    small = [max(round(side * rng.uniform(0.125, 0.5)), 1) for side in image.size]
    back = Image.Resampling.NEAREST if rng.random() < 0.5 else Image.Resampling.BICUBIC
    return image.resize(small, Image.Resampling.BOX).resize(image.size, back)


EDITS: tuple[Edit, ...] = (turn, slant, frame, ground, text, sticker, noise, compress, pixelate)


@functools.lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own: the same on every machine."""
    return ImageFont.load_default(size)


def _on(under: Image.Image, image: Image.Image, edges: np.ndarray) -> Image.Image:
    """`image` made smaller and laid on a picture of its size; edges are what it leaves free at the left, top, right and
    bottom, as shares of the sides."""
    width, height = image.size
    left, top = round(edges[0] * width), round(edges[1] * height)
    small = max(width - left - round(edges[2] * width), 1), max(height - top - round(edges[3] * height), 1)
    under.paste(image.resize(small, Image.Resampling.BILINEAR, reducing_gap=2.0), (left, top))
    return under


def _scenery(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A picture of coarse or fine blotches of a few colours, or of blocks."""
    cells = int(rng.integers(1, 13))
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
    coarse = grid.resize(size, Image.Resampling.NEAREST if rng.random() < 0.3 else Image.Resampling.BICUBIC)
    return Image.blend(coarse, Image.new("RGB", size, _colour(rng)), float(rng.uniform(0, 1)))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    """White, black or any."""
    kind = rng.random()
    if kind < 0.5:
        return (255, 255, 255) if kind < 0.25 else (0, 0, 0)
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue
