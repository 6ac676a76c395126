"""Charts as inline SVG or HTML bars; every colour is a class, so that one style sheet serves light and dark."""

import html
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence

import numpy as np

from curation.account.report.wording import visible, words

_MAP_WIDTH, _MAP_HEIGHT, _MAP_MARGIN, _MAP_PICTURE = 1000, 640, 34, 58
_PLOT = (46, 12, 430, 236)  # left, top, right, bottom of the axes in a view box of 440 x 270


def clean(value: object) -> str:
    """Text from anywhere -> text that is safe in HTML, in attributes too."""
    return html.escape(visible(value), quote=True)


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
            f'<span class="fill {colour}" style="width:{width:.2f}%"></span></span>'
            f'<span class="note">{clean(note)}</span></div>'
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def stacked_bar(shares: Mapping[str, int]) -> str:
    """One bar of all images, a colour for each name, and its legend with counts."""
    whole = sum(shares.values())
    parts = "".join(
        f'<span class="fill {name}" style="width:{100 * count / whole:.3f}%"></span>'
        for name, count in shares.items()
        if count
    )
    legend = "".join(
        f'<li><i class="{name}"></i>{clean(words(name))} <b>{count:,}</b> <small>{percent(count, whole)}</small></li>'
        for name, count in shares.items()
    )
    return f'<div class="stack">{parts}</div><ul class="legend">{legend}</ul>'


def rank_sizes(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> str:
    """Cluster sizes, largest first, on logarithmic axes: before selection and after. Empty clusters have no point.

    Args:
        before, after: (size, how many clusters have it), the largest first.
    """
    series = [(name, [row for row in rows if row[0] > 0]) for name, rows in (("before", before), ("after", after))]
    number = {name: sum(clusters for _, clusters in rows) for name, rows in series}
    span_x = math.log10(max(2, *number.values())) * 1.02
    span_y = math.log10(max(2, *(max((size for size, _ in rows), default=1) for _, rows in series))) * 1.06
    left, top, right, bottom = _PLOT

    def x(rank: float) -> float:
        return left + (right - left) * math.log10(rank) / span_x

    def y(size: float) -> float:
        return bottom - (bottom - top) * math.log10(size) / span_y

    ticks = [
        f'<path class="grid" d="M{x(rank):.1f} {top}V{bottom}"/>'
        f'<text x="{x(rank):.1f}" y="{bottom + 14}" class="mid">{rank:,}</text>'
        for rank in _ticks(span_x)
    ] + [
        f'<path class="grid" d="M{left} {y(size):.1f}H{right}"/>'
        f'<text x="{left - 5}" y="{y(size) + 4:.1f}" class="end">{size:,}</text>'
        for size in _ticks(span_y)
    ]
    lines = []
    for name, rows in series:
        if rows:
            ranks = np.unique(np.geomspace(1, number[name], 240).round().astype(int))
            sizes = np.array(rows)[np.searchsorted(np.cumsum([clusters for _, clusters in rows]), ranks), 0]
            steps = " ".join(f"{x(rank):.1f},{y(size):.1f}" for rank, size in zip(ranks, sizes, strict=True))
            lines.append(f'<polyline class="line {name}" points="{steps}"/>')
            if number[name] == 1:
                lines.append(f'<circle class="dot {name}" cx="{x(1):.1f}" cy="{y(rows[0][0]):.1f}" r="4"/>')
    return (
        '<svg class="chart" viewBox="0 0 440 270" role="img" aria-label="Cluster sizes by rank, before and after">'
        f"{''.join(ticks)}{''.join(lines)}"
        f'<text x="{(left + right) / 2}" y="{bottom + 30}" class="mid">rank of the cluster</text>'
        f'<text x="-{(top + bottom) / 2}" y="12" transform="rotate(-90)" class="mid">images in it</text></svg>'
    )


def _ticks(span: float) -> list[int]:
    """Round numbers on a logarithmic axis of `span` decades: powers of ten, and 2 and 5 times them on a short one."""
    factors = (1,) if span > 2.5 else (1, 2, 5)
    return [f * 10**d for d in range(math.floor(span) + 1) for f in factors if math.log10(f * 10**d) <= span]


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
    half, frame = _MAP_PICTURE / 2, _MAP_PICTURE + 6
    for number, jpeg, title in pictures:
        x, y = at[number]
        layers.append(
            f'<g class="spot {status[number]}"><title>{clean(title)}</title>'
            f'<rect x="{x - frame / 2:.0f}" y="{y - frame / 2:.0f}" width="{frame}" height="{frame}" rx="6"/>'
            f'<image x="{x - half:.0f}" y="{y - half:.0f}" width="{_MAP_PICTURE}" height="{_MAP_PICTURE}" '
            f'preserveAspectRatio="xMidYMid slice" href="{jpeg_url(jpeg)}"/></g>'
        )
    return (
        f'<svg class="map" viewBox="0 0 {_MAP_WIDTH} {_MAP_HEIGHT}" role="img" aria-label="Map of the pool">'
        f"{''.join(layers)}</svg>"
    )


def jpeg_url(content: bytes) -> str:
    return f"data:image/jpeg;base64,{b64encode(content).decode()}"
