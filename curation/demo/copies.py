"""The edits that make a near-duplicate: what re-uploading, thumbnails, memes and mirrors do to a picture."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from curation.demo.drawing.canvas import SUPERSAMPLE, font

Edit = Callable[[np.random.Generator, Image.Image], tuple[Image.Image, str]]  # the copy and its parameters in words


def copy_of(rng: np.random.Generator, data: bytes, transform: str) -> tuple[bytes, str, str]:
    """A near-duplicate of an image file, encoded anew (`exact`: the same bytes).

    Args:
        data: the original's bytes.
        transform: "exact" or a key of EDITS.

    Returns:
        the copy's bytes, its suffix ("" for exact: the original's), and the parameters in words.
    """
    if transform == "exact":
        return data, "", ""
    image, params = EDITS[transform](rng, Image.open(io.BytesIO(data)).convert("RGB"))
    quality = int(rng.integers(28, 60) if transform == "reencode" else rng.integers(68, 93))
    copy, ext = encode_as(image, _pick(rng, ("jpg",) * 17 + ("png", "webp", "webp")), quality)
    return copy, ext, f"{params}+{ext}_q{quality}".lstrip("+")


def encode_as(image: Image.Image, ext: str, quality: int) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    if ext == "png":
        image.save(buffer, "PNG", compress_level=1)
    elif ext == "webp":
        image.save(buffer, "WEBP", quality=quality, method=1)
    else:
        image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), ext


def _reencode(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    return image, ""


def _resize(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    scale = float(rng.choice([rng.uniform(0.45, 0.85), rng.uniform(1.15, 1.6)]))
    return image.resize(_scaled(image, scale, scale), Image.Resampling.LANCZOS), f"{scale:.2f}"


def _stretch(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    across = float(rng.choice([rng.uniform(0.8, 0.92), rng.uniform(1.08, 1.25)]))
    return image.resize(_scaled(image, across, 1.0), Image.Resampling.BICUBIC), f"{across:.2f}"


def _crop(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    share = float(rng.uniform(0.8, 0.95))
    width, height = _scaled(image, share, share)
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height)), f"{share:.2f}"


def _hflip(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    return ImageOps.mirror(image), ""


def _color(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    brightness, contrast, saturation = rng.uniform((0.8, 0.75, 0.5), (1.25, 1.3, 1.6)).tolist()
    image = ImageEnhance.Color(image).enhance(saturation)
    image = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(brightness)).enhance(contrast)
    tint = rng.uniform(0.9, 1.1, 3)
    pixels = np.clip(np.asarray(image, np.float32) * tint.astype(np.float32), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8)), f"{brightness:.2f}_{contrast:.2f}_{saturation:.2f}"


def _gray(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    return ImageOps.grayscale(image), ""


def _text(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    words = _pick(
        rng, ("BEST DAY EVER", "photo by Sam", "SALE", "www.pictures.example", "when it is Monday", "#nofilter")
    )
    layer = image.resize((image.width * SUPERSAMPLE, image.height * SUPERSAMPLE))
    size = max(8, round(min(layer.width / len(words) * 1.5, layer.height * 0.14)))
    canvas = Image.new("L", layer.size)
    from_top = 0.03 if rng.random() < 0.4 else 0.95 - size / layer.height
    where = (layer.width * rng.uniform(0.04, 0.2), layer.height * from_top)
    ImageDraw.Draw(canvas).text(where, words, fill=255, font=font(size))
    outline = canvas.filter(ImageFilter.MaxFilter(5))
    layer.paste((0, 0, 0), (0, 0), outline)
    layer.paste((255, 255, 255), (0, 0), canvas)
    return layer.reduce(SUPERSAMPLE), words.replace(" ", "_").lower()


def _border(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    edge = max(2, round(min(image.size) * rng.uniform(0.02, 0.06)))
    colour = _pick(rng, ((255, 255, 255), (0, 0, 0), (128, 128, 128)))
    return ImageOps.expand(image, edge, colour), f"{edge}px"


def _rotate(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    degrees = float(rng.choice([-1, 1]) * rng.uniform(1.5, 5.0))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC)
    cut = np.tan(np.radians(abs(degrees))) / 2  # the corners that turned in, cut off
    dx, dy = round(image.height * cut), round(image.width * cut)
    return turned.crop((dx, dy, image.width - dx, image.height - dy)), f"{degrees:.1f}"


def _blur(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    radius = float(rng.uniform(0.7, 1.0) * (1 + min(image.size) / 200))
    return image.filter(ImageFilter.GaussianBlur(radius)), f"{radius:.2f}"


def _noise(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    sigma = float(rng.uniform(6, 16))
    pixels = np.asarray(image, np.float32)
    pixels = pixels + sigma * rng.standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), f"{sigma:.1f}"


def _combo(rng: np.random.Generator, image: Image.Image) -> tuple[Image.Image, str]:
    first, second = rng.choice(["crop", "resize", "color", "text", "border", "stretch"], 2, replace=False).tolist()
    image, _ = EDITS[first](rng, image)
    image, _ = EDITS[second](rng, image)
    return image, f"{first}+{second}"


def _scaled(image: Image.Image, across: float, down: float) -> tuple[int, int]:
    return max(8, round(image.width * across)), max(8, round(image.height * down))


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


EDITS: dict[str, Edit] = {
    "reencode": _reencode,
    "resize": _resize,
    "crop": _crop,
    "hflip": _hflip,
    "color": _color,
    "gray": _gray,
    "text": _text,
    "border": _border,
    "rotate": _rotate,
    "blur": _blur,
    "noise": _noise,
    "stretch": _stretch,
    "combo": _combo,
}
