"""What a web pool holds besides photographs: screens, charts, comics, documents, emblems. For the demo pool."""

from itertools import pairwise

import numpy as np

from curation.demo.drawing.canvas import Canvas, Colour, hsv, mix, oval, place, rgb, shade

_TEXT = (
    "account amount annual archive average balance before between budget change client column committee copy current "
    "customer date delivery detail district draft edition estimate export figure filter final first forecast form "
    "general growth hours index interest invoice item January journal label ledger limit list margin market measure "
    "member method minutes model month network notice number office order page paper payment period plan policy price "
    "profile project quarter rate receipt record region report result revenue review sales sample schedule section "
    "series service share signed source status summary supply table target tax team term total transfer unit update "
    "value version volume week year "
)
WORDS = _TEXT.split()


def ui(c: Canvas) -> None:
    """A window: bars, a side bar, then a form, a table, cards or a list."""
    dark = c.chance(0.35)
    page = c.vary((34, 36, 42) if dark else (246, 247, 250), 6)
    ink = (222, 224, 230) if dark else (52, 56, 64)
    accent, panel = hsv(c.between(0, 1), c.between(0.4, 0.9), c.between(0.5, 0.9)), mix(page, ink, 0.07)
    box(c, 0, 0, c.w, c.h, page)
    unit = c.side * c.between(0.04, 0.07)
    bar = unit * c.between(1.2, 2.2)
    box(c, 0, 0, c.w, bar, accent if c.chance(0.5) else panel)
    for index in range(c.count(2, 5)):
        c.text(unit * (0.5 + 4 * index), bar * 0.25, word(c).title(), unit * 0.8, (255, 255, 255) if not dark else ink)
    side = c.w * c.between(0.15, 0.3) if c.chance(0.65) else 0.0
    if side:
        box(c, 0, bar, side, c.h, panel)
        for index in range(c.count(4, 12)):
            y = bar + unit * (0.6 + 1.5 * index)
            c.disc(unit * 0.8, y + unit * 0.4, unit * 0.3, c.vary(accent, 40))
            c.text(unit * 1.5, y, word(c), unit * 0.8, ink)
    left, top = side + unit, bar + unit
    c.text(left, top, phrase(c, 2).capitalize(), unit * 1.3, ink)
    top += unit * 2.2
    kind = c.count(0, 3)
    if kind == 0:  # a table
        row, columns = unit * c.between(1.2, 1.8), c.count(3, 6)
        for line in range(int((c.h - top) / row)):
            box(
                c,
                left,
                top + line * row,
                c.w - unit,
                top + (line + 0.92) * row,
                accent if line == 0 else mix(page, ink, 0.03 + 0.05 * (line % 2)),
            )
            for column in range(columns):
                x = left + (c.w - unit - left) * column / columns
                c.text(
                    x + unit * 0.2, top + line * row, word(c) if column else str(c.count(10, 9999)), unit * 0.75, ink
                )
    elif kind == 1:  # a form
        while top < c.h - 3 * unit:
            c.text(left, top, phrase(c, 2), unit * 0.75, ink)
            wide = c.between(0.4, 0.95) * (c.w - left)
            box(c, left, top + unit, left + wide, top + unit * 2.3, mix(page, (255, 255, 255), 0.6), ink)
            top += unit * c.between(2.9, 3.6)
        box(c, left, c.h - 2 * unit, left + unit * 5, c.h - 0.7 * unit, accent)
        c.text(left + unit, c.h - 1.8 * unit, "Save", unit * 0.8, (255, 255, 255))
    elif kind == 2:  # cards
        across, down = c.count(2, 4), c.count(2, 3)
        wide, tall = (c.w - left) / across, (c.h - top) / down
        for index in range(across * down):
            x, y = left + wide * (index % across), top + tall * (index // across)
            box(c, x, y, x + wide * 0.9, y + tall * 0.88, panel, mix(page, ink, 0.25))
            box(c, x, y, x + wide * 0.9, y + tall * c.between(0.2, 0.6), c.vary(accent, 60))
            c.text(x + unit * 0.3, y + tall * 0.62, word(c).title(), unit * 0.8, ink)
    else:  # a conversation
        y = top
        while y < c.h - unit * 2:
            wide, tall = c.between(0.3, 0.65) * (c.w - left), unit * c.pick((1.6, 2.6, 3.6))
            mine = c.chance(0.5)
            x = c.w - unit - wide if mine else left
            c.draw.rounded_rectangle([x, y, x + wide, y + tall], unit * 0.5, fill=rgb(accent if mine else panel))
            for line in range(int(tall / unit)):
                c.text(
                    x + unit * 0.5, y + unit * (0.2 + line), phrase(c, 4), unit * 0.75, (255, 255, 255) if mine else ink
                )
            y += tall + unit * 0.5


def chart(c: Canvas) -> None:
    """Bars, lines, points, or a pie, with axes and a title."""
    page = c.pick(((255, 255, 255), (255, 255, 255), (235, 235, 235), (30, 34, 44), (252, 246, 232)))
    box(c, 0, 0, c.w, c.h, page)
    ink = (220, 224, 230) if page[0] < 100 else (50, 50, 54)
    hue = c.between(0, 1)
    colours = [hsv(hue + 0.618 * index, c.between(0.4, 0.85), c.between(0.55, 0.95)) for index in range(6)]
    size = c.side * 0.055
    c.text(c.w * c.between(0.1, 0.3), size * 0.4, phrase(c, 3).capitalize(), size * 1.2, ink)
    kind = c.count(0, 4)
    if kind == 4:
        x, y, radius = c.w * c.between(0.35, 0.6), c.h * 0.55, c.side * c.between(0.25, 0.38)
        cuts = np.concatenate([[0], np.cumsum(c.rng.dirichlet(np.full(c.count(3, 6), 2.0)))]) * 360 + c.between(0, 360)
        for index, (start, end) in enumerate(pairwise(cuts)):
            c.draw.pieslice([x - radius, y - radius, x + radius, y + radius], start, end, fill=rgb(colours[index]))
            c.text(c.w * 0.8, c.h * (0.25 + 0.09 * index), word(c), size * 0.8, colours[index])
        if c.chance(0.5):
            c.disc(x, y, radius * c.between(0.4, 0.65), page)
        return
    left, right, top, bottom = c.w * c.between(0.1, 0.16), c.w * 0.96, c.h * 0.16, c.h * c.between(0.8, 0.88)
    for step in range(6):
        y = bottom - (bottom - top) * step / 5
        c.line(np.array([[left, y], [right, y]]), mix(ink, (128, 128, 128), 0.7), 1)
        c.text(left * 0.2, y - size / 2, str(step * c.pick((5, 20, 100))), size * 0.75, ink)
    series, points = c.count(1, 3), c.count(4, 14)
    for index in range(series):
        values = np.abs(np.cumsum(c.rng.standard_normal(points))) if kind != 0 else c.rng.random(points)
        values = 0.05 + 0.9 * values / max(float(values.max()), 1e-6)
        x = left + (right - left) * (np.arange(points) + 0.5) / points
        y = bottom - (bottom - top) * values
        if kind == 0:
            wide = (right - left) / points * 0.8 / series
            for px, py in zip(x, y, strict=True):
                box(
                    c,
                    px + wide * (index - series / 2),
                    py,
                    px + wide * (index + 0.95 - series / 2),
                    bottom,
                    colours[index],
                )
        elif kind == 1:
            c.line(np.stack([x, y], 1), colours[index], c.side * c.between(0.008, 0.02))
        elif kind == 2:
            for px, py in zip(
                c.rng.uniform(left, right, 40), bottom - c.rng.beta(2, 2 + index, 40) * (bottom - top), strict=True
            ):
                c.disc(px, py, c.side * 0.013, colours[index])
        else:
            c.polygon(
                np.concatenate([np.stack([x, y], 1), [[x[-1], bottom], [x[0], bottom]]]),
                mix(colours[index], (255, 255, 255), 0.2),
            )
    c.line(np.array([[left, top], [left, bottom], [right, bottom]]), ink, 2)
    c.text((left + right) / 2, bottom + size * 0.7, word(c), size * 0.9, ink)


def cartoon(c: Canvas) -> None:
    """A page of comic panels: flat colours, bold outlines, faces, speech bubbles."""
    rows = c.count(1, 3)
    gap = c.side * 0.025
    cuts = np.concatenate([[0], np.cumsum(c.rng.dirichlet(np.full(rows, 8.0)))]) * (c.h - gap) + gap / 2
    hue = c.between(0, 1)
    for low, high in pairwise(cuts):
        columns = c.count(1, 3)
        edges = np.concatenate([[0], np.cumsum(c.rng.dirichlet(np.full(columns, 8.0)))]) * (c.w - gap) + gap / 2
        for left, right in pairwise(edges):
            panel(c, left + gap / 2, low + gap / 2, right - gap / 2, high - gap / 2, hue)


def panel(c: Canvas, left: float, top: float, right: float, bottom: float, hue: float) -> None:
    part = Canvas(c.rng, max(8, round((right - left) / 2)), max(8, round((bottom - top) / 2)))
    back = hsv(hue + c.between(-0.2, 0.5), c.between(0.2, 0.8), c.between(0.7, 1))
    box(part, 0, 0, part.w, part.h, back)
    ink, style = (20, 18, 24), c.count(0, 3)
    if style == 0:  # halftone
        step = part.side * c.between(0.05, 0.09) + 3
        for row, y in enumerate(np.arange(0, part.h, step)):
            for x in np.arange(0, part.w, step):
                part.disc(x + step / 2 * (row % 2), y, step * 0.32 * (1 - y / part.h), shade(back, 0.7))
    elif style == 1:  # speed lines
        for turn in np.linspace(0, 2 * np.pi, 28):
            ray = np.array([[0.35, -0.015], [2.5, -0.06], [2.5, 0.06]]) * part.w
            part.polygon(place(ray, part.w / 2, part.h / 2, turn), shade(back, 0.8))
    elif style == 2:  # a town
        for x in np.arange(0, part.w, part.w / c.count(3, 7)):
            tall = c.between(0.2, 0.7) * part.h
            box(part, x, part.h - tall, x + part.w * 0.16, part.h, c.vary(shade(back, 0.6), 20), ink)
    for _ in range(c.count(1, 2)):
        x, y, size = c.between(0.25, 0.75) * part.w, c.between(0.5, 0.75) * part.h, part.side * c.between(0.16, 0.3)
        skin, shirt = (
            c.pick(((250, 214, 176), (190, 130, 90), (120, 210, 120), (250, 220, 80))),
            hsv(c.between(0, 1), 0.8, 0.9),
        )
        outlined(part, place(oval(size * 1.1, size * 1.3), x, y + size * 1.9), shirt, ink)
        outlined(part, place(oval(size * 0.85, size), x, y), skin, ink)
        outlined(
            part,
            place(oval(0.95, 0.45, 11) * c.rng.uniform(0.8, 1.3, (11, 1)), x, y - size * 0.75, 0, size),
            c.pick((ink, (150, 80, 30), (240, 200, 60), (200, 50, 50))),
            ink,
        )
        for eye in (-0.32, 0.32):
            outlined(part, place(oval(size * 0.2, size * 0.26), x + eye * size, y - size * 0.1), (255, 255, 255), ink)
            part.disc(x + eye * size + c.between(-0.08, 0.08) * size, y - size * 0.08, size * 0.08, ink)
        smile = np.linspace(0.3, np.pi - 0.3, 9)
        part.line(
            np.stack([x + np.cos(smile) * size * 0.4, y + size * 0.3 + np.sin(smile) * size * c.between(-0.2, 0.3)], 1),
            ink,
            size * 0.07,
        )
    if c.chance(0.75):
        x, y = c.between(0.3, 0.7) * part.w, part.h * 0.16
        bubble = oval(part.w * c.between(0.2, 0.32), part.h * 0.14)
        outlined(
            part,
            np.array([[x, y], [x + part.w * 0.12, y], [x + part.w * c.between(-0.1, 0.2), part.h * 0.4]]),
            (255, 255, 255),
            ink,
        )
        outlined(part, place(bubble, x, y), (255, 255, 255), ink)
        part.text(
            x - part.w * 0.15,
            y - part.h * 0.06,
            c.pick(("Zap!", "What?", "Oh no", "Run!", "Ha ha", "Hm...", "Look!")),
            part.h * 0.1,
            ink,
        )
    c.image.paste(part.image, (round(left), round(top)))
    c.draw.rectangle([left, top, right, bottom], outline=ink, width=max(2, round(c.side * 0.008)))


def document(c: Canvas) -> None:
    """A page of text, a letter or a receipt, sometimes photographed on a desk."""
    desk = c.vary(c.pick(((255, 255, 255), (120, 96, 78), (70, 74, 80))), 12)
    box(c, 0, 0, c.w, c.h, desk)
    receipt = c.chance(0.35)
    margin = c.w * (c.between(0.15, 0.3) if receipt else c.between(0.0, 0.1))
    paper = c.vary(c.pick(((252, 252, 250), (246, 240, 224), (236, 238, 240))), 6)
    box(c, margin, c.h * 0.02, c.w - margin, c.h, paper)
    ink = c.pick(((30, 30, 34), (60, 60, 70), (30, 40, 90)))
    size = c.side * c.between(0.028, 0.05)
    left, right, y = margin + size * 1.5, c.w - margin - size * 1.5, c.h * 0.05
    c.text(left + c.between(0, 0.3) * (right - left), y, phrase(c, 2).upper(), size * 1.5, ink)
    y += size * 3
    while y < c.h - size * 2:
        kind = c.pick((0, 0, 0, 1, 2))
        if receipt:
            c.text(left, y, phrase(c, 2), size, ink)
            c.text(right - size * 3, y, f"{c.between(1, 99):.2f}", size, ink)
            y += size * (1.4 if c.chance(0.85) else 3)
        elif kind == 0:
            indent = c.between(0, 0.1) * c.w
            for _ in range(c.count(2, 6)):
                end = right if c.chance(0.8) else left + c.between(0.3, 0.9) * (right - left)
                line = phrase(c, max(1, int((end - left - indent) / size / 3.4)))
                c.text(left + indent, y, line, size, ink)
                y += size * 1.35
                indent = 0
            y += size
        elif kind == 1:
            c.text(left, y, phrase(c, 2).title(), size * 1.3, ink)
            y += size * 2.2
        else:
            rows, columns = c.count(2, 4), c.count(2, 4)
            for _ in range(rows):
                for column in range(columns):
                    x = left + (right - left) * column / columns
                    box(c, x, y, x + (right - left) / columns, y + size * 1.6, paper, mix(ink, paper, 0.5))
                    c.text(x + size * 0.3, y + size * 0.2, word(c), size * 0.9, ink)
                y += size * 1.6
            y += size
    if c.chance(0.3):
        stamp = hsv(c.pick((0.0, 0.62)), 0.7, 0.7)
        x, top, radius = c.between(0.4, 0.75) * c.w, c.between(0.4, 0.8) * c.h, c.side * c.between(0.08, 0.15)
        c.draw.ellipse([x - radius, top - radius, x + radius, top + radius], outline=rgb(stamp), width=4)
        c.text(x - radius * 0.6, top - radius * 0.25, "PAID", radius * 0.5, stamp)


def emoji(c: Canvas) -> None:
    """One emblem on white: a face, a star, a heart, initials, a drop, stacked shapes."""
    box(c, 0, 0, c.w, c.h, (255, 255, 255))
    x, y, size = c.w * c.between(0.42, 0.58), c.h * c.between(0.42, 0.58), c.side * c.between(0.26, 0.44)
    hue = c.between(0, 1)
    colour, second = (
        hsv(hue, c.between(0.5, 1), c.between(0.6, 1)),
        hsv(hue + c.between(0.2, 0.7), c.between(0.2, 0.9), c.between(0.6, 1)),
    )
    turn, kind = c.between(-0.4, 0.4), c.count(0, 6)
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    if kind == 0:
        c.disc(x, y, size, c.pick(((255, 204, 60), (255, 180, 60), colour)))
        for side in (-0.35, 0.35):
            c.disc(
                x + side * size,
                y - size * c.between(0.1, 0.3),
                size * c.between(0.07, 0.16),
                (70, 44, 20),
                c.between(0.5, 1.8),
            )
        mouth = np.linspace(0.2, np.pi - 0.2, 15)
        curve = np.stack(
            [x + np.cos(mouth) * size * 0.5, y + size * 0.25 + np.sin(mouth) * size * c.between(-0.35, 0.4)], 1
        )
        (c.polygon(curve, (110, 40, 40)) if c.chance(0.5) else c.line(curve, (70, 44, 20), size * 0.09))
    elif kind == 1:
        points = c.count(4, 9)
        radius = np.where(np.arange(2 * points) % 2, c.between(0.35, 0.8), 1.0)
        spokes = np.linspace(0, 2 * np.pi, 2 * points, endpoint=False)
        c.polygon(place(np.stack([np.cos(spokes) * radius, np.sin(spokes) * radius], 1), x, y, turn, size), colour)
        c.disc(x, y, size * c.between(0, 0.4), second)
    elif kind == 2:
        heart = (
            np.stack(
                [
                    16 * np.sin(angle) ** 3,
                    -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)),
                ],
                1,
            )
            / 17
        )
        c.polygon(place(heart, x, y, turn, size), colour)
        c.polygon(place(heart * c.between(0.2, 0.7), x, y, turn, size), second)
    elif kind == 3:
        (c.disc(x, y, size, colour) if c.chance(0.5) else box(c, x - size, y - size, x + size, y + size, colour))
        initials = "".join(c.pick("ABCDEFGHJKLMNOPRSTUVWXYZ") for _ in range(c.count(1, 2)))
        c.text(x - size * 0.32 * len(initials), y - size * 0.62, initials, size, (255, 255, 255))
    elif kind == 4:
        for ring in range(c.count(2, 5)):
            c.disc(
                x + turn * ring * size * 0.2,
                y,
                size * (1 - 0.2 * ring),
                colour if ring % 2 else second,
                c.between(0.8, 1),
            )
    elif kind == 5:
        lobes = c.count(3, 8)
        radius = 0.65 + 0.35 * np.cos(lobes * angle)
        c.polygon(place(np.stack([np.cos(angle) * radius, np.sin(angle) * radius], 1), x, y, turn * 4, size), colour)
        c.disc(x, y, size * 0.25, second)
    else:
        for index in range(c.count(2, 4)):
            shape = oval(c.between(0.3, 1), c.between(0.15, 0.6), c.pick((3, 4, 5, 6, 24)))
            c.polygon(
                place(shape, x + c.between(-0.3, 0.3) * size, y + (index - 1) * size * 0.45, c.between(0, 3), size),
                c.pick((colour, second, shade(colour, 0.6))),
            )


def box(
    c: Canvas, left: float, top: float, right: float, bottom: float, colour: Colour, edge: Colour | None = None
) -> None:
    if right >= left and bottom >= top:
        c.draw.rectangle(
            [left, top, right, bottom], fill=rgb(colour), outline=None if edge is None else rgb(edge), width=2
        )


def outlined(c: Canvas, points: np.ndarray, colour: Colour, ink: Colour) -> None:
    c.polygon(points, colour)
    c.line(np.concatenate([points, points[:1]]), ink, max(2.0, c.side * 0.015))


def word(c: Canvas) -> str:
    return c.pick(WORDS)


def phrase(c: Canvas, length: int) -> str:
    return " ".join(word(c) for _ in range(length))
