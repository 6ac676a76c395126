"""A canvas for small procedural pictures: gradients, noise, shaded shapes, light. Pillow and NumPy only.

Shapes are drawn at twice the size and averaged down, which smooths their edges; soft things (sky, mist, glow) are
arrays at the final size. Every function takes its randomness from the canvas' generator, which belongs to one picture.
"""

import colorsys
import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[float, ...]  # red, green, blue, 0 to 255
SUPERSAMPLE = 2


class Canvas:
    """One picture in the making: `w` x `h` drawing pixels, SUPERSAMPLE times the final `width` x `height`."""

    def __init__(self, rng: np.random.Generator, width: int, height: int, colour: Colour = (255, 255, 255)) -> None:
        self.rng = rng
        self.width, self.height = width, height
        self.w, self.h = width * SUPERSAMPLE, height * SUPERSAMPLE
        self.side = min(self.w, self.h)
        self.image = Image.new("RGB", (self.w, self.h), rgb(colour))
        self.draw = ImageDraw.Draw(self.image)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def count(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, choices):
        return choices[int(self.rng.integers(len(choices)))]

    def vary(self, colour: Colour, amount: float = 18.0) -> Colour:
        """The colour moved by up to `amount` in brightness and half of that in each channel."""
        shift = self.rng.uniform(-1, 1, 4)
        return tuple(float(c + amount * shift[3] + amount / 2 * s) for c, s in zip(colour, shift[:3], strict=True))

    def noise(self, cells: float, octaves: int = 3, stretch: float = 1.0) -> np.ndarray:
        """Value noise at the final size, float32 (height, width) in [0, 1]; `stretch` > 1 draws it out sideways."""
        field = np.zeros((self.height, self.width), np.float32)
        for octave in range(octaves):
            across = max(2, round(cells * 2**octave / stretch))
            down = max(2, round(cells * 2**octave * self.height / self.width))
            grid = Image.fromarray(self.rng.random((down, across), dtype=np.float32))
            field += 0.55**octave * np.asarray(grid.resize((self.width, self.height), Image.Resampling.BICUBIC))
        low, high = field.min(), field.max()
        return (field - low) / max(float(high - low), 1e-6)

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixel centres as fractions of the picture: x (1, width) and y (height, 1)."""
        x = (np.arange(self.width, dtype=np.float32) + 0.5)[None, :] / self.width
        return x, (np.arange(self.height, dtype=np.float32) + 0.5)[:, None] / self.height

    def gradient(self, stops: list[tuple[float, Colour]], tilt: float = 0.0) -> None:
        """Fill the picture with colours from top (0) to bottom (1); `tilt` leans the bands."""
        x, y = self.axes()
        t = y + tilt * (x - 0.5)
        where = [position for position, _ in stops]
        bands = [np.interp(t, where, [colour[channel] for _, colour in stops]) for channel in range(3)]
        self.paint(np.stack(bands, axis=-1))

    def paint(self, pixels: np.ndarray) -> None:
        """Replace the picture by (height, width, 3) values in 0..255."""
        small = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        self.image = small.resize((self.w, self.h), Image.Resampling.NEAREST)
        self.draw = ImageDraw.Draw(self.image)

    def wash(self, colour: Colour, alpha: np.ndarray) -> None:
        """Lay a colour over the picture, `alpha` (height, width) in 0..1."""
        mask = Image.fromarray((np.clip(alpha, 0, 1) * 255).astype(np.uint8))
        box = mask.getbbox()
        if box is not None:
            left, top, right, bottom = (edge * SUPERSAMPLE for edge in box)
            mask = mask.crop(box).resize((right - left, bottom - top), Image.Resampling.NEAREST)
            self.image.paste(rgb(colour), (left, top, right, bottom), mask)

    def glow(self, colour: Colour, x: float, y: float, radius: float, strength: float = 1.0) -> None:
        """A soft light around (x, y), fractions of the picture; radius in fractions of its shorter side."""
        across, down = self.axes()
        short = min(self.width, self.height)
        distance = ((across - x) * self.width / short) ** 2 + ((down - y) * self.height / short) ** 2
        self.wash(colour, strength * np.exp(-distance / (radius * radius)))

    def polygon(self, points: np.ndarray, colour: Colour) -> None:
        self.draw.polygon(np.asarray(points, np.float64).ravel().tolist(), fill=rgb(colour))

    def line(self, points: np.ndarray, colour: Colour, thickness: float) -> None:
        thickness = max(1, round(thickness))
        self.draw.line(
            np.asarray(points, np.float64).ravel().tolist(), fill=rgb(colour), width=thickness, joint="curve"
        )

    def disc(self, x: float, y: float, radius: float, colour: Colour, flat: float = 1.0) -> None:
        """An upright ellipse around (x, y) in drawing pixels, `flat` times as high as wide."""
        self.draw.ellipse([x - radius, y - radius * flat, x + radius, y + radius * flat], fill=rgb(colour))

    def textured(self, points: np.ndarray, dark: Colour, light: Colour, cells: float, stretch: float = 1.0) -> None:
        """A polygon filled with noise between two colours."""
        mask = Image.new("L", (self.w, self.h))
        ImageDraw.Draw(mask).polygon(np.asarray(points, np.float64).ravel().tolist(), fill=255)
        field = Image.fromarray((self.noise(cells, stretch=stretch) * 255).astype(np.uint8))
        ramps = np.linspace(rgb(dark), rgb(light), 256).round().astype(int).T.tolist()
        fill = Image.merge("RGB", [field.point(ramp) for ramp in ramps])
        box = mask.getbbox()
        if box is not None:
            fill = fill.resize((self.w, self.h), Image.Resampling.NEAREST)
            self.image.paste(fill.crop(box), box, mask.crop(box))

    def ball(self, x: float, y: float, radius: float, colour: Colour, flat: float = 1.0, light: float = -0.4) -> None:
        """A shaded sphere around (x, y) in drawing pixels, lit from the side `light` (-1 left, 1 right) and above."""
        size = max(4, round(2 * radius))
        axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
        across, down = axis[None, :], axis[:, None]
        inside = across**2 + down**2
        height = np.sqrt(np.clip(1 - inside, 0, 1))
        lit = np.clip(light * across - 0.55 * down + 0.7 * height, 0, 1.2)[..., None]
        pixels = np.float32(colour) * (0.35 + 0.72 * lit) + 150 * np.clip(lit - 0.88, 0, 1) ** 1.5
        tall = max(2, round(size * flat))
        sprite = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize((size, tall))
        mask = Image.fromarray((np.clip((1 - inside) * size / 4, 0, 1) * 255).astype(np.uint8)).resize((size, tall))
        self.image.paste(sprite, (round(x - size / 2), round(y - tall / 2)), mask)

    def text(self, x: float, y: float, words: str, size: float, colour: Colour) -> None:
        self.draw.text((x, y), words, fill=rgb(colour), font=font(max(6, round(size))))

    def flat(self) -> Image.Image:
        """The finished picture as drawn: for screens and paper."""
        return self.image.reduce(SUPERSAMPLE)

    def photograph(self) -> Image.Image:
        """The picture through a hand-held camera, under uneven light, with a vignette and grain: for scenes."""
        pixels = np.asarray(self._framed(), np.float32)
        x, y = self.axes()
        light = 1 + self.between(0.15, 0.4) * (self.noise(self.between(2, 4), 2) - 0.5)
        light += self.between(-0.25, 0.25) * (x - 0.5) + self.between(-0.15, 0.15) * (y - 0.5)
        light -= self.between(0.0, 0.7) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
        balance = np.float32(self.rng.uniform(0.93, 1.07, 3))
        grain = self.rng.standard_normal((self.height, self.width, 1), dtype=np.float32) * self.between(1.0, 5.0)
        return Image.fromarray(np.clip(pixels * light[..., None] * balance + grain, 0, 255).astype(np.uint8))

    def _framed(self) -> Image.Image:
        """A part of the drawing, a little rolled, at the final size: no two pictures share their frame."""
        roll = np.radians(np.clip(self.rng.standard_normal() * 2.5, -6, 6))
        cos, sin = float(np.cos(roll)), float(np.sin(roll))
        fits_x = cos + abs(sin) * self.height / self.width
        fits_y = cos + abs(sin) * self.width / self.height
        scale = SUPERSAMPLE / max(fits_x, fits_y) * self.between(0.72, 1.0)  # drawing pixels for each final one
        slack_x = (self.w - scale * (self.width * cos + self.height * abs(sin))) / 2
        slack_y = (self.h - scale * (self.height * cos + self.width * abs(sin))) / 2
        x, y = self.w / 2 + self.between(-1, 1) * slack_x, self.h / 2 + self.between(-1, 1) * slack_y
        a, b, d, e = scale * cos, -scale * sin, scale * sin, scale * cos
        c, f = x - a * self.width / 2 - b * self.height / 2, y - d * self.width / 2 - e * self.height / 2
        size = (self.width, self.height)
        return self.image.transform(size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)


def rgb(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(float(c)))) for c in colour)
    return red, green, blue


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Hue in turns (any real), saturation and value in 0..1."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return red * 255, green * 255, blue * 255


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """a at t = 0, b at t = 1."""
    return tuple(p + (q - p) * t for p, q in zip(a, b, strict=True))


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(c * factor for c in colour)


def oval(rx: float, ry: float, corners: int = 24) -> np.ndarray:
    """An ellipse around the origin, (corners, 2)."""
    turn = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return np.stack([rx * np.cos(turn), ry * np.sin(turn)], axis=1)


def petal(length: float, width: float, corners: int = 16) -> np.ndarray:
    """A leaf from the origin along +x, pointed at both ends, (2 * corners, 2)."""
    t = np.linspace(0, 1, corners)
    edge = width / 2 * np.sin(np.pi * t**0.8)
    return np.concatenate([np.stack([length * t, edge], 1), np.stack([length * t, -edge], 1)[::-1]])


def place(shape: np.ndarray, x: float, y: float, turn: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """The (N, 2) shape scaled, turned by radians, and moved to (x, y)."""
    cos, sin = np.cos(turn), np.sin(turn)
    return shape @ np.array([[cos, sin], [-sin, cos]]) * scale + np.array([x, y])


def ridge(rng: np.random.Generator, corners: int, roughness: float = 0.55) -> np.ndarray:
    """A skyline by midpoint displacement: `corners` heights in [0, 1]."""
    heights = rng.random(3)
    spread = 0.5
    while len(heights) < corners:
        spread *= roughness
        middle = (heights[1:] + heights[:-1]) / 2 + spread * rng.uniform(-1, 1, len(heights) - 1)
        heights = np.insert(heights, range(1, len(heights)), middle)
    heights = heights[:corners]
    return (heights - heights.min()) / max(float(np.ptp(heights)), 1e-6)


@functools.lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size)
