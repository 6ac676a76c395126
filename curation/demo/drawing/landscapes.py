"""Scenes without a subject close by: sunsets, forests, mountains, nights, sails, deserts.

Positions and sizes are in drawing pixels unless said to be fractions of the picture.
"""

import numpy as np
from PIL import Image

from curation.demo.drawing.canvas import Canvas, Colour, hsv, mix, petal, place, rgb, ridge, shade
from curation.demo.drawing.parts import (
    DUSKS,
    SKIES,
    beams,
    birds,
    boat,
    clouds,
    crown,
    far_hills,
    fir,
    floor_of,
    rocks,
    sky,
)


def sunset(c: Canvas) -> None:
    top, middle, low = (c.vary(colour, 24) for colour in c.pick(DUSKS))
    horizon, x = c.between(0.35, 0.82), c.between(0.08, 0.92)
    c.gradient([(0, top), (horizon * 0.6, middle), (horizon, low), (1, low)], c.between(-0.15, 0.15))
    y = horizon - c.between(-0.02, 0.3)
    c.glow((255, 236, 190), x, y, c.between(0.2, 0.5), 0.8)
    if c.chance(0.8):
        c.disc(
            x * c.w, y * c.h, c.side * c.between(0.03, 0.13), c.pick(((255, 244, 210), (255, 150, 80), (255, 220, 120)))
        )
    for _ in range(c.count(1, 2)):
        clouds(c, mix(top, low, c.between(0.0, 0.9)), c.between(0.5, 1.1), 0, horizon)
    if c.chance(0.65):
        far_hills(c, horizon, mix(top, low, 0.35), c.between(0.05, 0.3))
    across, down = c.axes()
    depth = np.clip((down - horizon) / (1 - horizon), 0, 1)
    water = (down > horizon) * np.ones_like(across)
    sea = mix(top, middle, c.between(0.2, 0.7))
    c.wash(shade(sea, 0.75), water * (0.45 + 0.5 * depth))
    waves = c.noise(c.between(14, 30), 3, c.between(3, 6)) - 0.5
    c.wash(low, water * np.clip(waves * 2.2, 0, 1) * c.between(0.3, 0.8))
    trail = np.exp(-(((across - x) / (0.04 + 0.14 * depth)) ** 2)) * (0.25 + 1.6 * np.clip(waves + 0.2, 0, 1))
    c.wash((255, 232, 180), water * np.clip(trail, 0, 0.9))
    dark = shade(top, 0.28)
    for foreground in c.rng.permutation(5)[: c.count(1, 2)]:
        if foreground == 0:
            palms(c, dark)
        elif foreground == 1:
            rocks(c, dark, c.between(0.7, 0.95))
        elif foreground == 2:
            for _ in range(c.count(1, 4)):
                boat(c, c.between(0.1, 0.9), horizon + c.between(0.02, 0.2), c.between(0.08, 0.4), dark, dark)
        elif foreground == 3:
            pier(c, horizon, dark)
        else:
            base = horizon + c.between(0.0, 0.12)
            cliff(c, c.pick((0.0, 1.0)), base, c.between(0.25, 0.7), c.between(0.15, 0.5), dark)
    if c.chance(0.4):
        birds(c, horizon * 0.8, dark)


def forest(c: Canvas) -> None:
    season = c.pick(
        (
            (0.28, 0.5, 0.45),
            (0.33, 0.6, 0.35),
            (0.08, 0.75, 0.65),
            (0.13, 0.7, 0.6),
            (0.24, 0.4, 0.55),
            (0.45, 0.3, 0.45),
        )
    )
    hue, saturation, value = (v + c.between(-0.04, 0.04) for v in season)
    haze = mix(hsv(hue + 0.03, saturation * 0.35, 0.92), c.pick(SKIES)[2], 0.4)
    if c.chance(0.55):  # among the trunks
        x, y = c.between(0.1, 0.9), c.between(0.2, 0.6)
        c.gradient([(0, hsv(hue, saturation, value)), (0.5, haze), (1, hsv(hue, saturation, value * 0.6))])
        c.glow((255, 252, 224), x, y, c.between(0.25, 0.6), 0.85)
        c.wash(hsv(hue, saturation, value * 0.8), np.clip(c.noise(c.between(8, 16), 4) * 2 - 0.9, 0, 0.9))
        bark = c.pick(((64, 48, 38), (90, 76, 62), (44, 44, 40), (196, 190, 180)))
        ground = c.between(0.62, 0.85)
        floor_of(c, ground, hsv(hue + c.between(-0.08, 0.02), saturation, value * 0.55), hsv(hue, saturation, value))
        layers = c.count(3, 4)
        for layer in range(layers):
            near = (layer + 1) / layers
            for _ in range(c.count(2, 7 if near < 0.7 else 3)):
                trunk(c, ground + (1 - ground) * near * 0.7, near, mix(haze, bark, 0.25 + 0.75 * near))
            c.wash(haze, np.full((c.height, c.width), 0.12, np.float32))
        leaves(c, hue, saturation, value)
        if c.chance(0.35):
            beams(c, x, y - 0.3)
    else:  # rows of trees on a slope
        sky(c, c.between(0.3, 0.6))
        rows = c.count(3, 6)
        start = c.between(0.2, 0.45)
        floor_of(
            c,
            start + c.between(0, 0.1),
            mix(haze, hsv(hue, saturation, value * 0.6), 0.5),
            mix(haze, hsv(hue, saturation, value), 0.35),
        )
        round_crowns = c.chance(0.45)
        for row in range(rows):
            near = (row + 1) / rows
            base = start + (1.12 - start) * near
            line = ridge(c.rng, 17) * c.between(0.05, 0.22)
            size = 0.1 + 0.26 * near * c.between(0.7, 1.2)
            order = c.rng.permutation(max(4, round(c.w / c.side * c.between(4, 8) / (0.4 + near))))
            for index in order:
                x = (index + c.between(0.1, 0.9)) / len(order)
                colour = c.vary(hsv(hue + c.between(-0.05, 0.05), saturation, value * c.between(0.7, 1.2)), 12)
                y = base - line[int(x * 16)]
                (crown if round_crowns else fir)(
                    c, x * c.w, y * c.h, size * c.side * c.between(0.7, 1.25), mix(haze, colour, 0.25 + 0.7 * near)
                )


def mountains(c: Canvas) -> None:
    dusk = c.chance(0.3)
    palette = c.pick(DUSKS if dusk else SKIES)
    c.gradient([(0, palette[0]), (0.35, palette[1]), (0.75, palette[2]), (1, palette[2])], c.between(-0.2, 0.2))
    clouds(c, mix(palette[2], (255, 255, 255), 0.6), c.between(0.1, 1.0), 0, 0.6)
    rock = c.vary(c.pick(((98, 104, 122), (110, 96, 88), (84, 96, 112), (130, 106, 88))), 20)
    layers = c.count(2, 4)
    top = c.between(0.08, 0.4)
    lake = c.between(0.62, 0.8) if c.chance(0.4) else 1.0
    snow = c.between(-0.2, 0.6)
    for layer in range(layers):
        near = (layer + 1) / layers
        heights = ridge(c.rng, 65, c.between(0.45, 0.62))
        base = top + (lake - top) * (0.35 + 0.65 * near)
        peaks = base - heights * (lake - top) * c.between(0.35, 0.75) * (1.15 - 0.6 * near)
        colour = mix(palette[2], rock if near < 1 or c.chance(0.4) else (58, 84, 52), 0.35 + 0.6 * near)
        x = np.linspace(0, c.w, 65)
        line = np.stack([x, peaks * c.h], 1)
        c.textured(
            np.concatenate([line, [[c.w, lake * c.h], [0, lake * c.h]]]),
            shade(colour, 0.6),
            shade(colour, 1.2),
            c.between(8, 20),
        )
        drop = np.clip(heights - (0.25 + near * 0.5) + snow * 0.5, 0, 1) * c.between(0.35, 0.7) * (lake - top)
        zigzag = drop * c.rng.uniform(0.25, 1.0, 65)
        cap = np.stack([x, (peaks + zigzag) * c.h], 1)
        if snow > 0 and near < 1:
            c.polygon(np.concatenate([line, cap[::-1]]), (240, 244, 250))
            half = c.pick((-1, 1)) * c.w / 130  # the side away from the light
            c.polygon(np.concatenate([line, (line + [half, 0] + (cap - line) * 0.55)[::-1]]), (196, 208, 228))
    if lake < 1:
        reflect(c, lake, palette[1])
    elif c.chance(0.6):
        green = hsv(c.between(0.16, 0.36), c.between(0.3, 0.6), c.between(0.3, 0.6))
        floor_of(c, c.between(0.75, 0.92), shade(green, 0.6), green)
    if c.chance(0.5):
        for _ in range(c.count(3, 12)):
            fir(
                c,
                c.between(0, c.w),
                c.between(0.88, 1.08) * c.h,
                c.side * c.between(0.12, 0.32),
                shade((44, 70, 56), c.between(0.5, 1.1)),
            )


def night(c: Canvas) -> None:
    hue = c.between(0.55, 0.78)
    low = c.pick((hsv(hue, 0.6, 0.35), hsv(hue, 0.35, 0.45), (90, 60, 70), (30, 70, 80)))
    c.gradient([(0, hsv(hue, 0.8, c.between(0.06, 0.2))), (1, low)], c.between(-0.4, 0.4))
    across, down = c.axes()
    if c.chance(0.6):  # the Milky Way
        lean, middle = c.between(-1.5, 1.5), c.between(0.25, 0.75)
        band = np.exp(-(((across - middle + lean * (down - 0.5)) / c.between(0.08, 0.2)) ** 2))
        c.wash(hsv(hue + c.between(-0.1, 0.2), 0.35, 0.85), band * c.noise(6, 4) * 0.75)
        c.wash((8, 8, 20), band * np.clip(c.noise(7, 3) * 2 - 1.1, 0, 1) * 0.8)
    if c.chance(0.35):  # an aurora
        for _ in range(c.count(1, 3)):
            wave = (
                c.between(0.1, 0.5)
                + 0.12 * np.sin(across * c.between(3, 9) + c.between(0, 6))
                + 0.1 * (c.noise(3)[:1] - 0.5)
            )
            curtain = np.where(down < wave, np.exp((down - wave) * c.between(4, 8)), np.exp((wave - down) * 30))
            c.wash(hsv(c.between(0.3, 0.5), 0.7, 0.9), curtain * c.between(0.35, 0.7) * c.noise(12, 2))
    for _ in range(c.count(40, 220)):
        bright = c.between(0.4, 1) ** 2
        colour = mix((120, 130, 170), c.pick(((255, 255, 255), (255, 236, 200), (200, 220, 255))), bright)
        c.disc(c.between(0, c.w), c.between(0, c.h), c.between(0.6, 1.4) + 1.6 * bright**3, colour)
    if c.chance(0.6):
        x, y, radius = c.between(0.1, 0.9), c.between(0.1, 0.5), c.between(0.05, 0.16)
        c.glow((220, 224, 240), x, y, radius * 2.4, 0.6)
        c.ball(x * c.w, y * c.h, radius * c.side, (240, 236, 216), light=c.between(-1, 1))
        for _ in range(c.count(2, 6)):
            c.disc(
                (x * c.w) + c.between(-0.5, 0.5) * radius * c.side,
                y * c.h + c.between(-0.5, 0.5) * radius * c.side,
                radius * c.side * c.between(0.06, 0.2),
                (206, 200, 184),
            )
    ground = c.count(0, 3)
    black = hsv(hue, 0.5, c.between(0.02, 0.09))
    if ground != 3:
        far_hills(c, c.between(0.85, 1.05), mix(black, low, 0.35), c.between(0.1, 0.35), to=1.0)
        far_hills(c, c.between(0.95, 1.1), black, c.between(0.1, 0.25), to=1.0)
    if ground == 1:
        for _ in range(c.count(4, 16)):
            fir(c, c.between(0, c.w), c.between(0.95, 1.1) * c.h, c.side * c.between(0.15, 0.5), black)
    elif ground == 2:
        x, y, size = c.between(0.2, 0.8) * c.w, c.between(0.86, 0.96) * c.h, c.side * c.between(0.08, 0.2)
        c.glow((255, 180, 80), x / c.w, y / c.h, size / c.side * 1.2, 0.7)
        c.polygon(np.array([[x - size, y], [x, y - size], [x + size, y]]), (250, 176, 82))
        c.polygon(np.array([[x - size * 0.25, y], [x, y - size], [x + size * 0.25, y]]), (150, 84, 40))


def sailing(c: Canvas) -> None:
    horizon = c.between(0.3, 0.7)
    sky(c, horizon)
    if c.chance(0.55):
        far_hills(c, horizon, hsv(c.between(0.25, 0.6), 0.25, c.between(0.45, 0.75)), c.between(0.04, 0.25))
    water = hsv(c.between(0.46, 0.62), c.between(0.35, 0.8), c.between(0.4, 0.85))
    floor_of(c, horizon, shade(water, 0.75), shade(water, 1.2), stretch=c.between(3, 6))
    across, down = c.axes()
    foam = np.clip(c.noise(c.between(14, 30), 3, 4) * 3 - c.between(1.9, 2.4), 0, 1) * (down > horizon)
    c.wash((244, 250, 252), foam * c.between(0.4, 1.0) * np.ones_like(across))
    number = c.pick((1, 1, 2, 3, 6))
    places = sorted(c.between(0.02, (0.95 - horizon) * 0.75) for _ in range(number))
    for index, below in enumerate(places):
        sails = c.pick(((250, 250, 246), (250, 250, 246), hsv(c.between(0, 1), 0.7, 0.9)))
        hull = c.pick(((240, 240, 240), (150, 40, 40), (30, 50, 90), (110, 70, 40), (40, 40, 44)))
        size = c.between(0.28, 0.55) if number == 1 else 0.08 + 0.3 * (index + 1) / number * c.between(0.7, 1.1)
        boat(c, c.between(0.15, 0.85), horizon + below, size, hull, sails)
    if c.chance(0.3):
        birds(c, horizon, (70, 76, 84))
    if c.chance(0.25):
        rocks(c, c.vary((92, 84, 76), 20), c.between(0.85, 0.97))


def desert(c: Canvas) -> None:
    horizon = c.between(0.5, 0.75)
    sky(c, horizon, c.pick((SKIES[:3], DUSKS, DUSKS)))
    sand = c.vary(c.pick(((222, 178, 112), (206, 134, 82), (236, 208, 156), (178, 112, 84))), 24)
    if c.chance(0.5):  # table mountains
        for _ in range(c.count(1, 4)):
            x, half, tall = c.between(0, 1) * c.w, c.between(0.06, 0.2) * c.w, c.between(0.08, 0.3) * c.h
            c.textured(
                np.array(
                    [
                        [x - half * 1.4, horizon * c.h],
                        [x - half, horizon * c.h - tall],
                        [x + half, horizon * c.h - tall * c.between(0.9, 1.05)],
                        [x + half * 1.4, horizon * c.h],
                    ]
                ),
                shade(sand, 0.5),
                shade(sand, 0.85),
                10,
            )
    else:
        far_hills(c, horizon, shade(sand, 0.7), c.between(0.05, 0.25))
    floor_of(c, horizon, shade(sand, 0.8), shade(sand, 1.1), stretch=c.between(1, 4))
    for _ in range(c.count(0, 3)):
        far_hills(c, c.between(horizon + 0.05, 1.05), shade(sand, c.between(0.75, 1.1)), c.between(0.05, 0.2), to=1.0)
    for _ in range(c.count(3, 14)):
        stone = shade(sand, c.between(0.4, 0.8))
        c.disc(c.between(0, c.w), c.between(horizon + 0.05, 1) * c.h, c.side * c.between(0.006, 0.04), stone, 0.6)
    green = hsv(c.between(0.24, 0.42), c.between(0.3, 0.6), c.between(0.3, 0.6))
    number = c.pick((1, 2, 3, 5, 8))
    for base in sorted(c.between(horizon + 0.05, 1.0) for _ in range(number)):
        near = (base - horizon) / (1 - horizon)
        tall = c.h * (0.15 + 0.5 * near) * c.between(0.7, 1.2)
        cactus(c, c.between(0.1, 0.9) * c.w, base * c.h, tall, c.vary(green, 16))


def trunk(c: Canvas, base: float, near: float, bark: Colour) -> None:
    x, wide = c.between(-0.05, 1.05) * c.w, c.side * (0.012 + 0.075 * near**1.6) * c.between(0.6, 1.5)
    lean = c.between(-0.12, 0.12) * c.w
    y = base * c.h
    points = np.array(
        [
            [x - wide * 1.4, y],
            [x - wide, y - c.h * 0.12],
            [x + lean - wide * 0.7, 0],
            [x + lean + wide * 0.7, 0],
            [x + wide, y - c.h * 0.12],
            [x + wide * 1.5, y],
        ]
    )
    c.polygon(points, shade(bark, 0.8))
    c.polygon((points - [x, 0]) * [0.45, 1] + [x + wide * c.pick((-0.4, 0.4)), 0], shade(bark, 1.2))
    for _ in range(c.count(0, 3)):
        at = c.between(0.05, 0.6)
        start = np.array([x + lean * (1 - at), y * at])
        c.line(
            np.stack([start, start + c.rng.uniform([-0.2, -0.2], [0.2, 0.0]) * c.side]), shade(bark, 0.9), wide * 0.4
        )


def leaves(c: Canvas, hue: float, saturation: float, value: float) -> None:
    """Foliage hanging into the picture from above and the sides."""
    for _ in range(c.count(20, 120)):
        x, y = c.between(0, c.w), c.h * c.between(0, 1) ** 2.5 * 0.55
        colour = hsv(hue + c.between(-0.05, 0.05), saturation, value * c.between(0.5, 1.4))
        c.disc(x, y, c.side * c.between(0.01, 0.05), colour, c.between(0.5, 1.2))


def palms(c: Canvas, colour: Colour) -> None:
    for _ in range(c.count(1, 3)):
        x, foot = c.between(0.05, 0.95) * c.w, c.between(0.1, 0.9) * c.w
        y, size = c.between(0.15, 0.45) * c.h, c.side * c.between(0.2, 0.38)
        c.line(np.array([[x, y], [(2 * x + foot) / 3, (2 * y + c.h) / 3], [foot, c.h]]), colour, c.side * 0.022)
        for turn in np.linspace(-3.6, 0.5, c.count(6, 10)) + c.between(-0.2, 0.2):
            tip = place(petal(1, 0.16), x, y, turn, size * c.between(0.8, 1.1))
            drop = np.linspace(0, 1, len(tip) // 2) ** 2 * size * 0.4
            tip[:, 1] += np.concatenate([drop, drop[::-1]])
            c.polygon(tip, colour)
    far_hills(c, c.between(0.95, 1.05), colour, 0.1, to=1.0)


def cliff(c: Canvas, side: float, base: float, wide: float, tall: float, colour: Colour) -> None:
    """A headland from the left (side 0) or right (1) edge, standing on `base`; sizes are fractions."""
    edge = np.sort(ridge(c.rng, 17))[::-1] * tall
    x = np.linspace(0, wide, 17)
    points = np.stack([(x if side == 0 else 1 - x) * c.w, (base - edge) * c.h], 1)
    c.polygon(np.concatenate([points, [[side * c.w, base * c.h]]]), colour)
    if c.chance(0.5):  # a lighthouse
        x, y, size = points[4, 0], points[4, 1], c.side * c.between(0.1, 0.22)
        c.polygon(
            np.array(
                [
                    [x - size * 0.14, y + 4],
                    [x - size * 0.09, y - size],
                    [x + size * 0.09, y - size],
                    [x + size * 0.14, y + 4],
                ]
            ),
            shade(colour, 1.3),
        )
        c.glow((255, 240, 190), x / c.w, (y - size) / c.h, 0.08, 0.9)


def pier(c: Canvas, horizon: float, colour: Colour) -> None:
    side, y = c.pick((0.0, 1.0)), (horizon + c.between(0.05, 0.2)) * c.h
    far = c.between(0.35, 0.75) * c.w
    start, end = (0.0, far) if side == 0 else (c.w - far, float(c.w))
    c.draw.rectangle([start, y, end, y + c.side * 0.025], fill=rgb(colour))
    for x in np.arange(start, end, c.side * c.between(0.07, 0.16)):
        c.line(np.array([[x, y], [x, y + c.side * 0.18]]), colour, c.side * 0.015)


def cactus(c: Canvas, x: float, y: float, tall: float, green: Colour) -> None:
    """A columnar cactus with arms, or a prickly pear."""
    if c.chance(0.3):
        for _ in range(c.count(4, 9)):
            lift, dx = c.between(0.1, 0.6), c.between(-0.3, 0.3)
            c.ball(x + dx * tall, y - lift * tall, tall * c.between(0.1, 0.16), c.vary(green, 14), 1.3)
            if c.chance(0.5):
                c.disc(x + dx * tall, y - (lift + 0.18) * tall, tall * 0.03, (220, 70, 110))
        return
    thick = tall * c.between(0.11, 0.17)
    limbs = [np.array([[x, y], [x, y - tall]])]
    for side in (-1, 1):
        for _ in range(c.count(0, 2)):
            at, out, up = c.between(0.3, 0.65), c.between(0.18, 0.32), c.between(0.12, 0.4)
            elbow = [x + side * out * tall, y - at * tall]
            limbs.append(np.array([[x, y - at * tall], elbow, [elbow[0], elbow[1] - up * tall]]))
    for tone, width in ((0.65, 1.0), (1.0, 0.62), (1.3, 0.14)):
        for index, limb in enumerate(limbs):
            size = thick * width * (1 if index == 0 else 0.7)
            c.line(place(limb, -(1 - width) * thick * 0.12, 0), shade(green, tone), size)
            for end in limb[1:]:
                c.disc(end[0] - (1 - width) * thick * 0.12, end[1], size / 2, shade(green, tone))


def reflect(c: Canvas, level: float, colour: Colour) -> None:
    """Still water below `level` (fraction): the picture above, mirrored, darker and rippled."""
    y = round(level * c.h)
    above = c.image.crop((0, max(0, 2 * y - c.h), c.w, y)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    c.image.paste(above.resize((c.w, c.h - y)), (0, y))
    _, down = c.axes()
    water = (down > level).astype(np.float32)
    c.wash(shade(colour, 0.55), water * (0.2 + 0.5 * c.noise(20, 3, 6)))
