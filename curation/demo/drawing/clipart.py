"""Drawings of one thing on a plain ground, as clip art, comics and sketches are: shapes, outlines, hatching, no light.

They share grounds, strokes and places by nature, so they are what a copy detector has to tell apart.
"""

import numpy as np

from curation.demo.drawing.canvas import Canvas, Colour, hsv, mix, oval, place, shade

_WHITE, _BLACK = (255, 255, 255), (18, 16, 22)


def clipart(c: Canvas) -> None:
    """A ground, then one to three things of blobs, limbs, eyes and stripes; filled, outlined, or both."""
    ground = _ground(c)
    hue, flat = c.between(0, 1), c.chance(0.25)
    palette = [hsv(hue + c.between(-0.5, 0.5), 0 if flat else c.between(0.2, 1), c.between(0.3, 1)) for _ in range(4)]
    sketch = c.chance(0.3)  # strokes alone
    ink = _BLACK if c.chance(0.7) else shade(palette[0], 0.4)
    stroke = 0.0 if not sketch and c.chance(0.25) else c.side * np.exp(c.between(np.log(0.004), np.log(0.03)))
    for _ in range(c.pick((1, 1, 1, 2, 3))):
        _thing(c, palette, ground if sketch else None, ink, stroke)


def _ground(c: Canvas) -> Colour:
    """Paint white or a colour, sometimes with a second one, a horizon or rays; returns the first colour."""
    colour = _WHITE if c.chance(0.55) else hsv(c.between(0, 1), c.between(0, 0.7), c.between(0.3, 1))
    c.polygon(np.array([[0, 0], [c.w, 0], [c.w, c.h], [0, c.h]]), colour)
    if c.chance(0.25):
        second = hsv(c.between(0, 1), c.between(0.1, 0.8), c.between(0.3, 1))
        if c.chance(0.5):
            c.gradient([(0, colour), (1, second)], c.between(-1, 1))
        else:
            level = c.h * c.between(0.4, 0.85)
            c.polygon(np.array([[0, level], [c.w, level + c.h * c.between(-0.2, 0.2)], [c.w, c.h], [0, c.h]]), second)
    if c.chance(0.15):  # rays
        turns = np.linspace(0, 2 * np.pi, c.count(8, 24), endpoint=False)
        for turn in turns:
            ray = place(np.array([[0, 0], [2, -0.08], [2, 0.08]]) * c.side, c.w / 2, c.h / 2, turn)
            c.polygon(ray, mix(colour, _any_colour(c), 0.4))
    return colour


def _any_colour(c: Canvas) -> Colour:
    return hsv(c.between(0, 1), c.between(0.2, 0.8), c.between(0.4, 1))


def _thing(c: Canvas, palette: list[Colour], hollow: Colour | None, ink: Colour, stroke: float) -> None:
    """Parts around a centre, half the time in mirrored pairs, as limbs, ears and wheels are.

    Args:
        hollow: what parts are filled with where strokes alone show; None: with colours of the palette.
        stroke: drawing pixels; 0 for none.
    """
    size = c.side * c.between(0.15, 0.42)
    x, y, turn = c.w * c.between(0.3, 0.7), c.h * c.between(0.3, 0.7), c.between(-0.5, 0.5)
    paired = c.chance(0.5)
    for number in range(c.count(2, 11)):
        reach = 0.0 if number == 0 else c.between(0.2, 1.3)
        angle, part = c.between(0, 2 * np.pi), size * (c.between(0.5, 1.0) if number == 0 else c.between(0.1, 0.6))
        shape, kind = _shape(c, part), c.between(0, 1)
        colour = hollow if hollow is not None else c.pick(palette)
        for side in (1, -1) if paired and number else (1,):
            at = np.array([side * reach * np.cos(angle), reach * np.sin(angle)]) * size
            points = place(shape * np.array([side, 1.0]) + at, x, y, turn)
            if kind < 0.12 and number:
                c.line(points[: len(points) // 2], ink, max(stroke, c.side * 0.01))  # a limb, a whisker, a smile
                continue
            c.polygon(points, colour)
            if kind > 0.82:
                _pattern(c, points, shade(colour, 0.6) if hollow is None else ink, ink)
            if stroke:
                c.line(np.concatenate([points, points[:2]]), ink, stroke)
            if kind > 0.7 and number and part > c.side * 0.04:
                eye_x, eye_y = points.mean(axis=0).tolist()
                c.disc(eye_x, eye_y, part * 0.3, ink)
                c.disc(eye_x + part * 0.1, eye_y - part * 0.1, part * 0.1, _WHITE)


def _shape(c: Canvas, radius: float) -> np.ndarray:
    """A closed outline around the origin: an oval, a polygon, a blob, a star, a rounded box."""
    kind, flat = c.count(0, 4), np.exp(c.between(-1.1, 0.5))
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    if kind == 0:
        shape = oval(radius, radius * flat, 32)
    elif kind == 1:
        corners = np.sort(c.rng.uniform(0, 2 * np.pi, c.count(3, 7)))
        shape = np.stack([np.cos(corners), np.sin(corners)], 1) * radius
    elif kind == 2:
        waves = sum(c.rng.normal(0, 0.25) / k * np.cos(k * turn + c.between(0, 6)) for k in range(1, 6))
        shape = np.stack([np.cos(turn), np.sin(turn) * flat], 1) * (1 + waves).clip(0.2, 2)[:, None] * radius
    elif kind == 3:
        spikes = c.count(3, 9)
        length = np.where(np.arange(2 * spikes) % 2, c.between(0.3, 0.85), 1.0) * radius
        around = np.linspace(0, 2 * np.pi, 2 * spikes, endpoint=False)
        shape = np.stack([np.cos(around) * length, np.sin(around) * length], 1)
    else:
        power = c.between(0.25, 0.8)
        cos, sin = np.cos(turn), np.sin(turn)
        shape = np.stack([np.sign(cos) * abs(cos) ** power, flat * np.sign(sin) * abs(sin) ** power], 1) * radius
    return place(shape, 0, 0, c.between(0, 2 * np.pi))


def _pattern(c: Canvas, points: np.ndarray, colour: Colour, ink: Colour) -> None:
    """Stripes or dots over the box of a shape, shrunk so that they stay inside most shapes."""
    low, high = points.min(axis=0), points.max(axis=0)
    middle, half = (low + high) / 2, (high - low) * 0.3
    across = c.count(2, 5)
    for step in np.linspace(-1, 1, across):
        if c.chance(0.5):
            x = middle[0] + step * half[0]
            c.line(np.array([[x, middle[1] - half[1]], [x, middle[1] + half[1]]]), colour, c.side * 0.012)
        else:
            c.disc(middle[0] + step * half[0], middle[1] + c.between(-1, 1) * half[1], float(half.min()) * 0.2, ink)
