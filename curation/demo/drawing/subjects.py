"""Scenes about a thing close by: flowers, fruit, fish, butterflies, houses, balloons.

Positions and sizes are in drawing pixels unless said to be fractions of the picture.
"""

import numpy as np

from curation.demo.drawing.canvas import Canvas, Colour, hsv, oval, petal, place, rgb, shade
from curation.demo.drawing.parts import (
    DUSKS,
    SKIES,
    balloon,
    beams,
    bloom,
    bokeh,
    crown,
    far_hills,
    fir,
    floor_of,
    sky,
    wings,
)


def flowers(c: Canvas) -> None:
    bokeh(c, hsv(c.between(0.2, 0.42), c.between(0.25, 0.7), c.between(0.25, 0.75)))
    close = c.chance(0.45)
    number = c.count(1, 3) if close else c.count(5, 22)
    hue, spread = c.between(0.55, 1.15), c.pick((0.02, 0.05, 0.3))  # no green blossoms
    kind = c.count(0, 3)
    for index in range(number):
        near = (index + 1) / number
        size = c.side * (c.between(0.22, 0.46) if close else c.between(0.05, 0.09) + 0.1 * near)
        x = c.between(0.12, 0.88) * c.w
        y = c.between(0.15, 0.75) * c.h if close else (0.2 + 0.65 * near + c.between(-0.1, 0.1)) * c.h
        stalk = shade(hsv(c.between(0.24, 0.36), 0.6, 0.5), 0.7 + 0.4 * near)
        foot = x + c.between(-0.8, 0.8) * size
        c.line(np.array([[x, y], [(x * 2 + foot) / 3 + size * 0.1, (y + c.h) / 2], [foot, c.h]]), stalk, size * 0.11)
        for _ in range(c.count(0, 3)):
            at = c.between(0.3, 0.8)
            c.polygon(
                place(
                    petal(1, 0.4), x + (foot - x) * at, y + (c.h - y) * at, c.between(-3, 0), size * c.between(0.6, 1.3)
                ),
                shade(stalk, c.between(0.8, 1.3)),
            )
        colour = hsv(max(0.55, min(1.17, hue + c.between(-spread, spread))), c.between(0.1, 0.95), c.between(0.75, 1))
        bloom(c, x, y, size, colour, kind if c.chance(0.85) else c.count(0, 3))


def fruit(c: Canvas) -> None:
    wall = hsv(c.between(0, 1), c.between(0.05, 0.45), c.between(0.25, 0.9))
    table = c.between(0.35, 0.7)
    c.gradient([(0, shade(wall, c.between(0.7, 1.1))), (table, wall), (1, wall)], c.between(-0.4, 0.4))
    c.wash(shade(wall, 0.6), c.noise(c.between(2, 9), 3) * c.between(0.1, 0.6))
    wood = c.pick(((150, 104, 66), (196, 160, 118), (92, 62, 44), (214, 210, 202), (70, 72, 78), (176, 60, 50)))
    c.textured(
        np.array([[0, table * c.h], [c.w, (table + c.between(-0.06, 0.06)) * c.h], [c.w, c.h], [0, c.h]]),
        shade(wood, 0.75),
        shade(wood, 1.15),
        c.between(12, 30),
        c.pick((1, 6, 10)),
    )
    light = c.between(-0.6, 0.6)
    x, y = c.between(0.3, 0.7) * c.w, (table + c.between(0.12, 0.3)) * c.h
    bowl = c.side * c.between(0.26, 0.42) if c.chance(0.4) else 0.0
    number = c.count(2, 9)
    size = c.side * c.between(0.1, 0.2) * (1.5 if number < 4 else 1)
    kinds = [c.count(0, 5) for _ in range(c.count(1, 3))]
    spots = sorted(((c.between(-1, 1), c.between(-1, 1)) for _ in range(number)), key=lambda spot: spot[1])
    for across, down in spots:
        if bowl:
            px, py = x + across * bowl * 0.75, y - size * (0.5 - 0.5 * down)
        else:
            px, py = x + across * c.w * 0.38, y + down * c.h * 0.14
            c.disc(px - light * size * 0.6, py + size * 0.85, size * 1.05, shade(wood, 0.45), 0.25)
        piece(c, px, py, size * c.between(0.85, 1.15), c.pick(kinds), light)
    if bowl:
        glaze = hsv(c.between(0, 1), c.between(0, 0.6), c.between(0.4, 0.95))
        half = oval(bowl * 1.1, bowl * c.between(0.55, 0.85), 48)
        c.polygon(half[half[:, 1] >= -1] + [x, y], glaze)
        for stripe in range(c.count(0, 3)):
            c.line(half[(half[:, 1] > 0)] * (0.9 - 0.15 * stripe) + [x, y], shade(glaze, 0.6), c.side * 0.012)
        c.disc(x, y + bowl * 0.02, bowl * 1.1, shade(glaze, 1.2), 0.05)
    if c.chance(0.3):
        c.glow((255, 250, 230), c.pick((0.0, 1.0)), c.between(0, 0.3), c.between(0.4, 0.8), 0.5)


def fish(c: Canvas) -> None:
    hue = c.between(0.45, 0.63)
    c.gradient(
        [(0, hsv(hue, c.between(0.3, 0.6), c.between(0.7, 1))), (1, hsv(hue + 0.04, 0.8, c.between(0.15, 0.5)))],
        c.between(-0.4, 0.4),
    )
    c.wash(hsv(hue, 0.25, 1), np.clip(c.noise(c.between(3, 8), 3) * 2 - 1, 0, 1) * 0.4)
    if c.chance(0.6):
        beams(c, c.between(0.1, 0.9), -0.15)
    if c.chance(0.75):
        sand = c.pick(((214, 196, 150), (120, 130, 120), (70, 100, 120)))
        floor_of(c, c.between(0.78, 0.92), shade(sand, 0.7), sand)
        for _ in range(c.count(2, 9)):
            coral(c, c.between(0, c.w), c.between(0.9, 1.03) * c.h, c.side * c.between(0.12, 0.4))
    number = c.pick((1, 1, 2, 3, 5, 9, 14))
    size = c.side * min(0.34, c.between(0.3, 0.5) / number**0.45)
    colours = [hsv(c.between(0, 1), c.between(0.4, 1), c.between(0.6, 1)) for _ in range(3)]
    kind, way, lean = c.count(0, 3), c.pick((-1, 1)), c.between(-0.4, 0.4)
    for _ in range(number):
        swimmer(
            c,
            c.between(0.15, 0.85) * c.w,
            c.between(0.15, 0.8) * c.h,
            size * c.between(0.7, 1.2),
            way if c.chance(0.8) else -way,
            lean + c.between(-0.25, 0.25),
            colours,
            kind,
        )
    for _ in range(c.count(0, 16)):
        x, y, radius = c.between(0, c.w), c.between(0, c.h), c.side * c.between(0.006, 0.03)
        c.draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=(220, 244, 255), width=2)


def butterfly(c: Canvas) -> None:
    bokeh(c, hsv(c.between(0.1, 0.62), c.between(0.15, 0.65), c.between(0.35, 0.95)))
    for _ in range(c.count(0, 6)):
        x, y = c.between(0, c.w), c.between(0.3, 1.1) * c.h
        c.polygon(
            place(petal(1, c.between(0.2, 0.5)), x, y, c.between(-3.0, 0.2), c.side * c.between(0.3, 0.8)),
            hsv(c.between(0.2, 0.4), 0.6, c.between(0.25, 0.6)),
        )
    number = c.pick((1, 1, 1, 2, 3))
    for _ in range(number):
        if c.chance(0.4):
            bloom(
                c,
                c.between(0.2, 0.8) * c.w,
                c.between(0.4, 0.9) * c.h,
                c.side * c.between(0.14, 0.3),
                hsv(c.between(0, 1), 0.7, 0.95),
                c.count(0, 3),
            )
        wings(c, c.between(0.28, 0.72) * c.w, c.between(0.3, 0.7) * c.h, c.side * c.between(0.34, 0.6) / number**0.6)


def house(c: Canvas) -> None:
    horizon = c.between(0.55, 0.78)
    winter, evening = c.chance(0.2), c.chance(0.25)
    sky(c, horizon, DUSKS if evening else SKIES)
    if c.chance(0.6):
        far_hills(c, horizon, hsv(c.between(0.2, 0.6), 0.25, c.between(0.4, 0.7)), c.between(0.06, 0.3))
    ground = (228, 234, 242) if winter else hsv(c.between(0.18, 0.36), c.between(0.35, 0.6), c.between(0.35, 0.65))
    floor_of(c, horizon, shade(ground, 0.75), ground)
    leaf = hsv(c.between(0.05, 0.38), 0.55, c.between(0.3, 0.6))
    for _ in range(c.count(0, 5)):
        tree = fir if c.chance(0.4) else crown
        tree(c, c.between(0, c.w), (horizon + c.between(0, 0.05)) * c.h, c.side * c.between(0.2, 0.5), c.vary(leaf, 25))
    number = c.pick((1, 1, 2, 3, 5))
    base = horizon + c.between(0.04, 0.18)
    wide = c.w * (c.between(0.35, 0.6) if number == 1 else 0.9 / number)
    start = c.between(0.05, 0.9 - wide / c.w) * c.w if number == 1 else c.w * c.between(0, 0.08)
    for index in range(number):
        cottage(
            c,
            start + wide * index,
            base * c.h + c.between(-0.01, 0.01) * c.h,
            wide * c.between(0.8, 1.0),
            winter,
            evening,
        )
    if c.chance(0.5):
        path_x = start + wide * c.between(0.3, 0.7)
        spread = c.w * c.between(0.08, 0.25)
        c.polygon(
            np.array(
                [
                    [path_x - spread / 5, base * c.h],
                    [path_x + spread / 5, base * c.h],
                    [path_x + spread * 2, c.h],
                    [path_x - spread, c.h],
                ]
            ),
            c.vary((170, 156, 138), 30),
        )
    if c.chance(0.35):
        y = (base + c.between(0.06, 0.14)) * c.h
        white = c.pick(((240, 240, 236), (120, 84, 58)))
        for x in np.arange(0, c.w, c.side * 0.07):
            c.draw.rectangle([x, y - c.side * 0.07, x + c.side * 0.025, y + c.side * 0.05], fill=white)
        c.draw.rectangle([0, y - c.side * 0.03, c.w, y - c.side * 0.01], fill=white)
    for _ in range(c.count(0, 4)):
        crown(c, c.between(0, c.w), c.between(0.92, 1.1) * c.h, c.side * c.between(0.15, 0.3), c.vary(leaf, 25))


def balloons(c: Canvas) -> None:
    sky(c, 1.0, c.pick((SKIES, SKIES, DUSKS)))
    ground = c.between(0.75, 1.2)
    if ground < 1:
        land = hsv(c.between(0.08, 0.4), c.between(0.2, 0.55), c.between(0.3, 0.6))
        far_hills(c, ground, shade(land, 1.25), c.between(0.04, 0.2), to=1.0)
        far_hills(c, ground + 0.1, land, c.between(0.04, 0.2), to=1.0)
    number = c.pick((1, 1, 2, 4, 7, 12))
    size = c.side * c.between(0.3, 0.46) / number**0.5
    for index in range(number):
        radius = size * (c.between(0.35, 0.8) + 0.5 * index / number)
        balloon(c, c.between(0.08, 0.92) * c.w, c.between(0.15, 0.72) * c.h, radius)


def piece(c: Canvas, x: float, y: float, size: float, kind: int, light: float) -> None:
    """A fruit: 0 apple, 1 orange, 2 banana, 3 grapes, 4 pear, 5 melon slice."""
    if kind == 0:
        colour = c.pick(((196, 34, 36), (140, 180, 50), (220, 150, 50)))
        c.ball(x, y, size, c.vary(colour, 20), 0.93, light)
        c.line(np.array([[x, y - size * 0.7], [x + size * 0.12, y - size * 1.2]]), (80, 56, 36), size * 0.1)
        c.polygon(place(petal(0.6, 0.3), x, y - size * 0.9, c.between(-0.9, 0.2), size), (92, 140, 52))
    elif kind == 1:
        c.ball(
            x, y, size, c.vary(c.pick(((240, 140, 30), (246, 206, 50), (236, 120, 60))), 16), c.between(0.8, 1), light
        )
        c.disc(x + size * 0.1, y - size * 0.7, size * 0.08, (80, 110, 40))
    elif kind == 2:
        turn = c.between(-0.5, 0.5)
        bend = np.linspace(0.3, 2.6, 14)
        for shift in range(c.count(1, 3)):
            outer = np.stack([np.cos(bend) * 1.35, np.sin(bend) * 0.9 - 0.5], 1)
            inner = np.stack([np.cos(bend) * 1.3, np.sin(bend) * 0.42 - 0.35], 1)
            shape = place(
                np.concatenate([outer, inner[::-1]]), x + shift * size * 0.15, y - shift * size * 0.25, turn, size
            )
            c.polygon(shape, shade((244, 208, 62), 0.78 + 0.12 * shift))
            c.polygon(
                place(
                    np.concatenate([outer * 0.97, (outer * [1, 0.75])[::-1]]),
                    x + shift * size * 0.15,
                    y - shift * size * 0.25,
                    turn,
                    size,
                ),
                shade((252, 222, 92), 0.85 + 0.1 * shift),
            )
    elif kind == 3:
        colour = c.pick(((96, 44, 110), (150, 180, 70), (60, 50, 110), (160, 40, 60)))
        for row in range(4):
            for index in range(5 - row):
                c.ball(
                    x + (index - (4 - row) / 2) * size * 0.42 + c.between(-0.05, 0.05) * size,
                    y + (row - 1.5) * size * 0.4,
                    size * 0.27,
                    c.vary(colour, 14),
                    1,
                    light,
                )
    elif kind == 4:
        colour = c.vary(c.pick(((190, 196, 70), (214, 180, 70), (170, 120, 60))), 14)
        c.ball(x, y - size * 0.65, size * 0.58, colour, 1.2, light)
        c.ball(x, y, size * 0.92, colour, 0.95, light)
        c.line(np.array([[x, y - size * 1.25], [x + size * 0.1, y - size * 1.6]]), (80, 56, 36), size * 0.1)
    else:
        turn = c.between(-0.6, 0.6)
        half = oval(1.3, 1.3, 40)
        half = half[half[:, 1] >= 0]
        for scale, colour in ((1, (50, 110, 50)), (0.9, (230, 240, 200)), (0.82, c.vary((226, 60, 64), 10))):
            c.polygon(place(half * scale, x, y - size * 0.6, turn, size), colour)
        for _ in range(7):
            angle = c.between(0.4, 2.7)
            seed = np.array([np.cos(angle), np.sin(angle)]) * c.between(0.4, 0.9)
            left, top = place(seed, x, y - size * 0.6, turn, size)
            c.disc(left, top, size * 0.06, (40, 24, 20))


def coral(c: Canvas, x: float, y: float, size: float) -> None:
    colour = hsv(c.between(0, 1), c.between(0.3, 0.8), c.between(0.35, 0.8))
    kind = c.count(0, 2)
    if kind == 0:  # weed
        for _ in range(c.count(2, 6)):
            t = np.linspace(0, 1, 9)
            bend = np.sin(t * c.between(3, 7) + c.between(0, 6)) * 0.12 * t + c.between(-0.4, 0.4) * t
            c.line(
                np.stack(
                    [x + bend * size + c.between(-0.2, 0.2) * size * (1 - t), y - t * size * c.between(0.7, 1.3)], 1
                ),
                c.vary(colour, 16),
                size * 0.07,
            )
    elif kind == 1:  # branches
        for turn in np.linspace(-2.6, -0.5, c.count(4, 8)):
            tip = np.array([x, y]) + size * 0.8 * np.array([np.cos(turn), np.sin(turn)]) * c.between(0.6, 1.1)
            c.line(np.array([[x, y], tip]), colour, size * 0.1)
            c.disc(tip[0], tip[1], size * 0.08, shade(colour, 1.25))
    else:  # brain
        c.ball(x, y, size * 0.6, colour, 0.8)


def swimmer(
    c: Canvas, x: float, y: float, size: float, way: int, lean: float, colours: list[Colour], kind: int
) -> None:
    """A fish, nose towards `way`: 0 slender, 1 round, 2 with a tall fin, 3 with a forked tail."""
    flat = (0.3, 0.72, 0.5, 0.38)[kind] * c.between(0.85, 1.15)
    body, fin, stripe = (c.vary(colour, 14) for colour in colours)

    def part(points: np.ndarray, colour: Colour) -> None:
        c.polygon(place(np.asarray(points, np.float64) * [way, 1], x, y, lean * way, size), colour)

    notch = 0.15 if kind != 3 else 0.35
    part(np.array([[-0.8, 0], [-1.45, -0.5], [-1.3 + notch, 0], [-1.45, 0.5]]), fin)
    part(np.array([[-0.45, -flat * 0.6], [0.05, -flat - (0.55 if kind == 2 else 0.25)], [0.35, -flat * 0.7]]), fin)
    part(np.array([[-0.3, flat * 0.6], [-0.2, flat + 0.3], [0.3, flat * 0.7]]), shade(fin, 0.85))
    outline = oval(1, flat, 36)
    part(outline, body)
    part(np.concatenate([outline[outline[:, 1] >= 0][::-1], [[0, flat * 0.35]]]), shade(body, 1.22))
    for at in np.linspace(-0.5, 0.45, c.count(0, 4)):
        half = flat * np.sqrt(1 - (abs(at) + 0.08) ** 2)
        part(np.array([[at - 0.06, -half], [at + 0.08, -half], [at + 0.05, half], [at - 0.08, half]]), stripe)
    part(place(petal(0.4, 0.3), 0.1, 0.05, 2.6), shade(fin, 0.9))
    eye = place(np.array([0.68 * way, -flat * 0.22]), x, y, lean * way, size)
    c.disc(eye[0], eye[1], size * 0.1, (250, 250, 245))
    c.disc(eye[0], eye[1], size * 0.055, (15, 15, 20))


def cottage(c: Canvas, x: float, y: float, wide: float, winter: bool, evening: bool) -> None:
    """A house whose lower left corner is (x, y)."""
    floors = c.count(1, 3)
    tall = min(wide * c.between(0.4, 0.55) * floors, c.h * 0.42)
    wall = c.vary(
        c.pick(
            (
                (228, 216, 196),
                (196, 92, 70),
                (240, 236, 230),
                (150, 170, 190),
                (226, 190, 110),
                (120, 140, 110),
                (140, 100, 74),
            )
        ),
        16,
    )
    top = y - tall
    c.textured(
        np.array([[x, y], [x, top], [x + wide, top], [x + wide, y]]),
        shade(wall, 0.88),
        shade(wall, 1.06),
        30,
        c.pick((0.5, 1, 8)),
    )
    tile = (236, 240, 246) if winter else c.vary(c.pick(((150, 60, 46), (86, 84, 92), (110, 70, 50), (60, 76, 90))), 14)
    over, rise = wide * 0.07, min(wide * c.between(0.25, 0.5), c.h * 0.25)
    if c.chance(0.4):
        left = x + wide * c.between(0.15, 0.75)
        c.draw.rectangle([left, top - rise, left + wide * 0.1, top], fill=rgb(shade(wall, 0.6)))
    shift = c.pick((0.5, 0.5, 0.25, 0.75))
    roof = [[x - over, top], [x + wide * shift, top - rise], [x + wide + over, top]]
    if c.chance(0.4):
        roof[1:2] = [[x + wide * 0.2, top - rise * 0.8], [x + wide * 0.8, top - rise * 0.8]]
    c.textured(np.array(roof), shade(tile, 0.8), shade(tile, 1.1), 30, 6)
    across = c.count(2, 4)
    lit = (255, 214, 120) if evening else c.vary((120, 150, 176), 30)
    door = c.count(0, across - 1)
    cell, storey = wide / across, tall / floors
    frame = c.pick(((250, 250, 246), (70, 50, 40)))
    for floor in range(floors):
        for column in range(across):
            left, high = x + cell * (column + 0.25), top + storey * (floor + 0.22)
            right, low = left + cell * 0.5, high + storey * 0.52
            if floor == floors - 1 and column == door:
                c.draw.rectangle([left, high, right, y], fill=rgb(hsv(c.between(0, 1), 0.6, 0.5)))
                continue
            edge = max(1.0, cell * 0.05)
            c.draw.rectangle([left - edge, high - edge, right + edge, low + edge], fill=frame)
            c.draw.rectangle([left, high, right, low], fill=rgb(c.vary(lit, 12)))
            c.draw.rectangle([(left + right - edge) / 2, high, (left + right + edge) / 2, low], fill=frame)
