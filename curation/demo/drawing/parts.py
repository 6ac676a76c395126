"""What the scenes are made of: skies, hills, ground, light, trees, flowers, wings, balloons.

Positions and sizes are in drawing pixels unless said to be fractions of the picture.
"""

from itertools import pairwise

import numpy as np

from curation.demo.drawing.canvas import Canvas, Colour, hsv, mix, oval, petal, place, ridge, shade

SKIES = (  # top, middle, horizon
    ((66, 126, 204), (136, 184, 232), (214, 232, 244)),
    ((38, 92, 168), (96, 158, 214), (190, 218, 232)),
    ((120, 156, 186), (176, 196, 208), (222, 222, 214)),
    ((84, 110, 150), (168, 172, 190), (240, 206, 178)),
    ((110, 190, 220), (170, 220, 230), (240, 244, 226)),
    ((96, 104, 122), (142, 150, 162), (196, 198, 196)),
)


DUSKS = (
    ((40, 44, 104), (198, 84, 92), (255, 190, 92)),
    ((92, 40, 96), (226, 98, 72), (255, 214, 120)),
    ((24, 62, 110), (120, 142, 172), (250, 200, 140)),
    ((70, 30, 60), (178, 54, 54), (250, 140, 60)),
    ((66, 92, 140), (206, 150, 170), (252, 216, 190)),
    ((150, 96, 40), (234, 160, 60), (255, 226, 140)),
)


def sky(c: Canvas, horizon: float, palettes: tuple = SKIES) -> None:
    top, middle, low = (c.vary(colour, 20) for colour in c.pick(palettes))
    c.gradient([(0, top), (horizon * 0.55, middle), (horizon, low), (1.01, low)], c.between(-0.25, 0.25))
    clouds(c, mix(low, (255, 255, 255), c.between(0.3, 0.9)), c.between(0.25, 1.2), 0, horizon)


def clouds(c: Canvas, colour: Colour, amount: float, top: float, bottom: float) -> None:
    """Cover between two heights (fractions), from a few wisps (0) to overcast (1)."""
    _, down = c.axes()
    field = c.noise(c.between(3, 6), 4, c.between(1.0, 2.6))
    fade = np.clip((bottom - down) / 0.12, 0, 1) * np.clip((down - top) / 0.05 + 1, 0, 1)
    c.wash(colour, np.clip((field - 0.85 + 0.45 * amount) * 3.2, 0, 0.92) * fade)
    lit = np.clip((field - 1.0 + 0.45 * amount) * 3.0, 0, 0.8) * fade
    c.wash(mix(colour, (255, 255, 255), 0.5) if c.chance(0.6) else shade(colour, 0.75), lit)


def far_hills(c: Canvas, base: float, colour: Colour, tall: float, to: float | None = None) -> None:
    """A skyline standing on `base`, filled down to `to` (both fractions; `to` is the base when not given)."""
    line = (base - ridge(c.rng, 33, c.between(0.4, 0.6)) * tall) * c.h
    bottom = (base if to is None else max(to, base)) * c.h
    points = np.concatenate([np.stack([np.linspace(0, c.w, 33), line], 1), [[c.w, bottom], [0, bottom]]])
    c.textured(points, shade(colour, 0.85), shade(colour, 1.12), c.between(6, 14))


def floor_of(c: Canvas, level: float, dark: Colour, light: Colour, stretch: float = 2.0) -> None:
    """Textured ground from `level` (fraction) to the bottom."""
    c.textured(
        np.array([[0, level * c.h], [c.w, level * c.h], [c.w, c.h], [0, c.h]]), dark, light, c.between(10, 26), stretch
    )


def bokeh(c: Canvas, colour: Colour) -> None:
    """An out-of-focus background."""
    other = c.vary(mix(colour, hsv(c.between(0, 1), 0.5, 0.7), c.between(0.1, 0.5)), 40)
    field = c.noise(c.between(1.5, 5), 3)[..., None]
    c.paint(np.float32(shade(colour, c.between(0.5, 1.0))) * (1 - field) + np.float32(other) * field)
    for _ in range(c.count(0, 14)):
        light = mix(colour, (255, 255, 230), c.between(0.1, 0.6))
        c.glow(light, c.between(0, 1), c.between(0, 1), c.between(0.03, 0.2), c.between(0.2, 0.7))


def beams(c: Canvas, x: float, y: float) -> None:
    """Rays of light from (x, y), fractions."""
    across, down = c.axes()
    angle = np.arctan2(across - x, np.abs(down - y) + 0.05)
    rays = np.interp(angle, np.linspace(-1.6, 1.6, 40), c.rng.random(40))
    c.wash((255, 255, 235), np.clip(rays * 1.6 - 0.8, 0, 1) * np.clip(1.1 - down, 0, 1) * c.between(0.2, 0.5))


def fir(c: Canvas, x: float, y: float, tall: float, colour: Colour) -> None:
    wide, tiers = tall * c.between(0.2, 0.32), c.count(3, 5)
    c.draw.rectangle([x - tall * 0.03, y - tall * 0.2, x + tall * 0.03, y], fill=(60, 44, 34))
    for tier in range(tiers):
        low, high = y - tall * (0.12 + 0.7 * tier / tiers), y - tall * (0.45 + 0.55 * (tier + 1) / tiers)
        half = wide * (1 - 0.75 * tier / tiers)
        c.polygon(np.array([[x - half, low], [x, high], [x + half, low]]), shade(colour, 0.85 + 0.08 * tier))
        c.polygon(np.array([[x, low], [x, high], [x + half, low]]), shade(colour, 0.68 + 0.08 * tier))


def crown(c: Canvas, x: float, y: float, tall: float, colour: Colour) -> None:
    c.draw.rectangle([x - tall * 0.035, y - tall * 0.5, x + tall * 0.035, y], fill=(84, 62, 46))
    for index in range(9):
        lift = c.between(0.4, 0.85)
        dx, radius = c.between(-0.26, 0.26) * tall, tall * c.between(0.12, 0.24)
        c.disc(x + dx, y - tall * lift, radius, shade(colour, 0.62 + 0.05 * index + 0.3 * (lift - 0.6)))


def rocks(c: Canvas, colour: Colour, level: float) -> None:
    for _ in range(c.count(2, 7)):
        shape = oval(c.side * c.between(0.06, 0.28), c.side * c.between(0.04, 0.16), 11)
        shape *= c.rng.uniform(0.75, 1.2, (11, 1))
        shape += [c.between(0, c.w), (level + c.between(-0.06, 0.06)) * c.h]
        c.polygon(shape, colour)
        c.polygon((shape - shape.mean(0)) * 0.6 + shape.mean(0) - [0, c.side * 0.015], shade(colour, 1.35))


def birds(c: Canvas, below: float, colour: Colour) -> None:
    for _ in range(c.count(2, 9)):
        x, y, size = c.between(0.05, 0.95) * c.w, c.between(0.05, below) * c.h, c.side * c.between(0.015, 0.04)
        c.line(np.array([[x - size, y - size * 0.5], [x, y], [x + size, y - size * 0.6]]), colour, size * 0.22)


def boat(c: Canvas, across: float, down: float, size: float, hull: Colour, sails: Colour) -> None:
    """A sailing boat whose keel is at (across, down); all three are fractions."""
    x, y, s = across * c.w, down * c.h, size * c.side
    way = c.pick((-1, 1))
    c.disc(x, y, s * 0.5, shade(hull, 0.4), 0.08)
    lean = c.between(-0.12, 0.12)
    for shape, colour in (
        (((-0.5, -0.16), (0.55, -0.18), (0.36, 0.02), (-0.4, 0.02)), hull),
        (((-0.02, -1.15), (0.02, -1.15), (0.02, -0.15), (-0.02, -0.15)), shade(hull, 0.6)),
        (((0.04, -1.1), (0.04, -0.25), (c.between(0.42, 0.6), -0.25)), sails),
        (((-0.04, -1.0), (-0.04, -0.25), (c.between(-0.5, -0.25), -0.22)), shade(sails, 0.86)),
    ):
        c.polygon(place(np.array(shape) * [way, 1], x, y, lean, s), colour)


def bloom(c: Canvas, x: float, y: float, size: float, colour: Colour, kind: int) -> None:
    """A flower head: 0 daisy, 1 rose, 2 tulip, 3 broad petals."""
    turn, number = c.between(0, 1), c.count(9, 18) if kind == 0 else c.count(5, 7)
    squeeze = np.array([1, c.between(0.55, 1)])
    if kind in (0, 3):
        for ring in range(2):
            for index in range(number):
                shape = place(
                    petal(1, (0.3 if kind == 0 else 0.95) * (1 - 0.2 * ring)),
                    0,
                    0,
                    turn + 2 * np.pi * (index + ring / 2) / number,
                )
                c.polygon(
                    shape * squeeze * size * (1 - 0.3 * ring) + [x, y], c.vary(shade(colour, 0.85 + 0.2 * ring), 14)
                )
        c.ball(x, y, size * c.between(0.18, 0.3), c.pick(((240, 196, 50), (110, 70, 30), (250, 240, 190))), squeeze[1])
    elif kind == 1:
        for ring in np.linspace(1, 0.2, c.count(5, 8)):
            shape = oval(ring, ring, 14) * c.rng.uniform(0.85, 1.1, (14, 1)) * squeeze
            c.polygon(
                shape * size * 0.8 + [x + c.between(-0.06, 0.06) * size, y - size * 0.1 * (1 - ring)],
                shade(colour, 0.62 + 0.5 * ring * c.between(0.7, 1)),
            )
    else:
        for dx, tone in ((-0.28, 0.8), (0.28, 0.88), (0, 1.05)):
            c.polygon(
                place(petal(1.3, 0.75), x + dx * size * 0.5, y + size * 0.5, -np.pi / 2 + dx * 0.7, size),
                shade(colour, tone),
            )


def wings(c: Canvas, x: float, y: float, size: float) -> None:
    """A butterfly seen from above."""
    turn, squeeze = c.between(-1.2, 1.2), c.between(0.45, 1)
    colour, second = (
        hsv(c.between(0, 1), c.between(0.4, 1), c.between(0.6, 1)),
        hsv(c.between(0, 1), c.between(0, 0.8), c.between(0.7, 1)),
    )
    edge = c.pick(((24, 18, 20), (60, 40, 28), shade(colour, 0.35)))
    fore, hind = c.between(-0.9, -0.45), c.between(0.35, 0.9)
    long, short = c.between(0.85, 1.1), c.between(0.6, 0.85)
    spots = [
        (c.pick((0, 1)), c.between(0.35, 0.85), c.between(-0.12, 0.12), c.between(0.03, 0.1))
        for _ in range(c.count(2, 9))
    ]
    for side in (-1, 1):
        flip = np.array([side * (squeeze if side == 1 else 1), 1])
        for lobe, (angle, length, width) in enumerate(
            ((fore, long, c.between(0.62, 0.7)), (hind, short, c.between(0.6, 0.7)))
        ):
            for scale, tone in (
                (1.0, edge),
                (0.84, colour if lobe == 0 else mix(colour, second, 0.4)),
                (0.5, second if lobe else mix(colour, second, 0.25)),
            ):
                t = np.linspace(0, 1, 20)
                shape = np.concatenate(
                    [
                        np.stack([t, np.sin(np.pi * t**1.5) * width / 2], 1),
                        np.stack([t, -np.sin(np.pi * t**1.9) * width / 2], 1)[::-1],
                    ]
                )
                c.polygon(place(place(shape * length * scale + [0.05, 0], 0, 0, angle) * flip, x, y, turn, size), tone)
        for lobe, along, aside, radius in spots:
            angle, length = (fore, long) if lobe == 0 else (hind, short)
            centre = place(place(np.array([along * length, aside]), 0, 0, angle) * flip, x, y, turn, size)
            c.disc(centre[0], centre[1], radius * size, mix(second, (255, 255, 255), 0.5))
            c.disc(centre[0], centre[1], radius * size * 0.5, edge)
        feeler = np.array([[0.0, -0.3], [0.1, -0.55], [0.22, -0.72]]) * [side, 1]
        c.line(place(feeler, x, y, turn, size), edge, size * 0.02)
    c.polygon(place(oval(0.06, 0.42), x, y, turn, size), edge)


def balloon(c: Canvas, x: float, y: float, radius: float) -> None:
    """A hot-air balloon, its envelope around (x, y)."""
    first, second = (hsv(c.between(0, 1), c.between(0.5, 1), c.between(0.65, 1)) for _ in range(2))
    if c.chance(0.3):
        second = (250, 246, 236)
    turn = np.linspace(0, np.pi, 40)
    rim = np.where(
        turn < np.pi * 0.55,
        np.sin(turn),
        np.sin(np.pi * 0.55) * np.clip((np.pi - turn) / (np.pi * 0.45), 0.16, 1) ** 0.8,
    )
    down = -np.cos(turn) * np.where(turn < np.pi / 2, 1, 1.35)
    edges = np.sin(np.linspace(-np.pi / 2, np.pi / 2, c.count(7, 13)))
    bands = c.chance(0.3)
    for index, (left, right) in enumerate(pairwise(edges)):
        colour = shade(first if index % 2 else second, 1.1 - 0.3 * abs(left + right + 0.4))
        panel = np.concatenate([np.stack([rim * left, down], 1), np.stack([rim * right, down], 1)[::-1]])
        c.polygon(panel * radius + [x, y], colour)
    if bands:
        for low, high in ((10, 14), (18, 20)):
            belt = np.concatenate(
                [np.stack([-rim[low:high], down[low:high]], 1), np.stack([rim[low:high], down[low:high]], 1)[::-1]]
            )
            c.polygon(belt * radius + [x, y], shade(first, 0.75))
    basket = radius * 0.17
    for side in (-1, 1):
        c.line(
            np.array([[x + side * basket, y + radius * 1.33], [x + side * basket * 0.8, y + radius * 1.6]]),
            (80, 66, 50),
            1,
        )
    c.draw.rectangle([x - basket, y + radius * 1.6, x + basket, y + radius * 1.82], fill=(122, 84, 48))
