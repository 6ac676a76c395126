"""Charts as inline SVG or HTML bars; every colour is a class, so that one style sheet serves light and dark."""

import html
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence

import numpy as np

_MAP_WIDTH, _MAP_HEIGHT, _MAP_MARGIN, _MAP_PICTURE = 1000, 640, 34, 58
_PLOT = (46, 12, 430, 236)  # left, top, right, bottom of the axes in a view box of 440 x 270


def clean(value: object) -> str:
    """Text from anywhere -> safe HTML text: escaped, and without the characters that reorder or hide what follows."""
    hidden = {*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F}
    shown = "".join("\ufffd" if ord(c) in hidden or 0xD800 <= ord(c) < 0xE000 else c for c in str(value))
    return html.escape(shown, quote=True)


def percent(part: float, whole: float) -> str:
    """For people: `28%`, `0.4%`, `< 0.1%`; a part that is not everything is never 100%, nor nothing unless it is."""
    share = 100 * part / whole if whole else 0.0
    if share == 0:
        return "0%"
    if share < 0.1:
        return "< 0.1%"
    if share < 10:
        return f"{share:.1f}%"
    return f"{share:.0f}%" if part == whole or share < 99.5 else f"{min(share, 99.9):.1f}%"


def bars(rows: Sequence[tuple[str, float, str, str]], whole: float) -> str:
    """Horizontal bars: (label, value, what is written beside it, colour class) each; `whole` fills the width."""
    lines = []
    for label, value, note, colour in rows:
        width = 100 * value / whole if whole else 0
        lines.append(
            f'<div class="bar"><span class="name">{clean(label)}</span><span class="track">'
            f'<span class="fill {colour}" style="width:{width:.2f}%"></span></span><span class="note">{clean(note)}</span></div>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def stacked_bar(shares: Mapping[str, int]) -> str:
    """One bar of all images, a colour for each name, and its legend with counts."""
    whole = sum(shares.values())
    parts = "".join(
        f'<span class="fill {name}" style="width:{100 * count / whole:.3f}%" title="{clean(words(name))} {count:,}"></span>'
        for name, count in shares.items()
        if count
    )
    legend = "".join(
        f'<li><i class="{name}"></i>{clean(words(name))} <b>{count:,}</b> <small>{percent(count, whole)}</small></li>'
        for name, count in shares.items()
    )
    return f'<div class="stack">{parts}</div><ul class="legend">{legend}</ul>'


def words(name: str) -> str:
    """A column's value as words: `not_retrieved` -> `not retrieved`."""
    return name.replace("_", " ")


def rank_sizes(before: Sequence[int], after: Sequence[int]) -> str:
    """Cluster sizes, largest first, on logarithmic axes: before selection and after. Empty clusters have no point."""
    series = [("before", [s for s in before if s > 0]), ("after", [s for s in after if s > 0])]
    decades_x = max(1, math.ceil(math.log10(max(2, *(len(sizes) for _, sizes in series)))))
    decades_y = max(1, math.ceil(math.log10(max(2, *(max(sizes, default=1) for _, sizes in series)))))
    left, top, right, bottom = _PLOT

    def x(rank: float) -> float:
        return left + (right - left) * math.log10(rank) / decades_x

    def y(size: float) -> float:
        return bottom - (bottom - top) * math.log10(size) / decades_y

    ticks = [
        f'<path class="grid" d="M{x(10**d):.1f} {top}V{bottom}"/><text x="{x(10**d):.1f}" y="{bottom + 14}" class="mid">{10**d:,}</text>'
        for d in range(decades_x + 1)
    ] + [
        f'<path class="grid" d="M{left} {y(10**d):.1f}H{right}"/><text x="{left - 5}" y="{y(10**d) + 4:.1f}" class="end">{10**d:,}</text>'
        for d in range(decades_y + 1)
    ]
    lines = []
    for name, sizes in series:
        if sizes:
            ranks = np.unique(np.geomspace(1, len(sizes), 240).round().astype(int))
            steps = " ".join(f"{x(rank):.1f},{y(sizes[rank - 1]):.1f}" for rank in ranks)
            lines.append(f'<polyline class="line {name}" points="{steps}"/>')
            if len(sizes) == 1:
                lines.append(f'<circle class="dot {name}" cx="{x(1):.1f}" cy="{y(sizes[0]):.1f}" r="4"/>')
    return (
        '<svg class="chart" viewBox="0 0 440 270" role="img" aria-label="Cluster sizes by rank, before and after">'
        f"{''.join(ticks)}{''.join(lines)}"
        f'<text x="{(left + right) / 2}" y="{bottom + 30}" class="mid">rank of the cluster</text>'
        f'<text x="-{(top + bottom) / 2}" y="12" transform="rotate(-90)" class="mid">images in it</text></svg>'
    )


def scatter_map(
    points: np.ndarray, status: np.ndarray, order: Sequence[str], pictures: Sequence[tuple[int, bytes, str]]
) -> str:
    """Points [N, 2] in the unit square, coloured by status (drawn in `order`), and pictures at some of them.

    Args:
        pictures: (number of the point, JPEG bytes, what to say of it).
    """
    at = points * [_MAP_WIDTH - 2 * _MAP_MARGIN, _MAP_HEIGHT - 2 * _MAP_MARGIN] + _MAP_MARGIN
    layers = []
    for name in order:
        # A path of zero-length strokes with round ends: a tenth of the bytes of as many circles.
        dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in at[status == name])
        if dots:
            layers.append(f'<path class="points {name}" d="{dots}"/>')
    half = _MAP_PICTURE / 2
    for number, jpeg, title in pictures:
        x, y = at[number]
        layers.append(
            f'<g class="spot {status[number]}"><title>{clean(title)}</title>'
            f'<rect x="{x - half - 3:.0f}" y="{y - half - 3:.0f}" width="{_MAP_PICTURE + 6}" height="{_MAP_PICTURE + 6}" rx="6"/>'
            f'<image x="{x - half:.0f}" y="{y - half:.0f}" width="{_MAP_PICTURE}" height="{_MAP_PICTURE}" '
            f'preserveAspectRatio="xMidYMid slice" href="{jpeg_url(jpeg)}"/></g>'
        )
    return (
        f'<svg class="map" viewBox="0 0 {_MAP_WIDTH} {_MAP_HEIGHT}" role="img" aria-label="Map of the pool">'
        f"{''.join(layers)}</svg>"
    )


def jpeg_url(content: bytes) -> str:
    return f"data:image/jpeg;base64,{b64encode(content).decode()}"
