"""Line charts over the steps as inline SVG; every colour is a class, so that one style sheet serves light and dark."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WIDTH, _HEIGHT = 440, 210
_LEFT, _TOP, _RIGHT, _BOTTOM = 48, 14, 418, 182
_POINTS = 360  # of one curve: more than the pixels that it gets say nothing
_SMOOTHED = 40  # windows across a smoothed curve


@dataclass(frozen=True)
class Curve:
    """Values over steps; what is None or not finite leaves a gap."""

    name: str
    colour: str
    """class in the style sheet"""
    steps: Sequence[float]
    values: Sequence[float | None]
    smooth: bool = False
    """draw the raw values thin, and a running mean over them"""
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line with its name."""

    name: str
    colour: str
    value: float


@dataclass(frozen=True)
class Mark:
    """A vertical line: where a phase starts (`phase`), or an alarm (`alarm`)."""

    step: float
    name: str
    kind: str


def line_chart(
    title: str,
    curves: Sequence[Curve],
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
    form: str = "{:.4g}",
    from_zero: bool = False,
) -> str:
    """One chart with its legend; empty when no curve has a finite value.

    Args:
        form: of the numbers on the vertical axis.
        from_zero: the vertical axis starts at 0.
    """
    drawn = [(curve, *_finite(curve)) for curve in curves]
    drawn = [(curve, steps, values) for curve, steps, values in drawn if len(steps)]
    if not drawn:
        return ""
    shown = [_running_mean(values) if curve.smooth else values for curve, _, values in drawn]
    low = min([float(values.min()) for values in shown] + [level.value for level in levels])
    high = max([float(values.max()) for values in shown] + [level.value for level in levels])
    low = 0.0 if from_zero else low - 0.06 * (high - low)
    high += 0.06 * (high - low)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = (0.0, 1.0) if high == 0 else (min(0.0, 2 * high), max(0.0, 2 * high))
    first = min([float(steps[0]) for _, steps, _ in drawn] + [mark.step for mark in marks])
    last = max(float(steps[-1]) for _, steps, _ in drawn)
    last = last if last > first else first + 1

    def x(step: np.ndarray | float) -> np.ndarray | float:
        return _LEFT + (_RIGHT - _LEFT) * (step - first) / (last - first)

    def y(value: np.ndarray | float) -> np.ndarray | float:
        return np.clip(_BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low), _TOP - 4, _BOTTOM + 4)

    parts = [
        f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_RIGHT}"/>'
        f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" class="end">{form.format(tick)}</text>'
        for tick in ticks(low, high, 4)
    ]
    parts += [
        f'<text x="{x(tick):.1f}" y="{_BOTTOM + 16}" class="mid">{short_number(tick)}</text>'
        for tick in ticks(first, last, 5)
    ]
    for mark in marks:
        if first <= mark.step <= last:
            parts.append(
                f'<path class="mark {mark.kind}" d="M{x(mark.step):.1f} {_TOP}V{_BOTTOM}">'
                f"<title>{_clean(mark.name)}</title></path>"
            )
    for level in levels:
        parts.append(f'<path class="level {level.colour}" d="M{_LEFT} {y(level.value):.1f}H{_RIGHT}"/>')
    for (curve, steps, values), smooth in zip(drawn, shown, strict=True):
        if curve.smooth and len(values) > 8:
            parts.append(_polyline(f"raw {curve.colour}", x(steps), y(values)))
        parts.append(_polyline(curve.colour, x(steps), y(smooth)))
        if curve.dots or len(values) == 1:
            parts += [
                f'<circle class="dot {curve.colour}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
                f"<title>step {step:,.0f}: {form.format(value)}</title></circle>"
                for a, b, step, value in zip(x(steps), y(values), steps, values, strict=True)
            ]
    alone = len(drawn) == 1 and not levels  # then the title has said what it is
    names = ["last" if alone else _clean(curve.name) for curve, _, _ in drawn]
    legend = "".join(
        f'<li><i class="line {curve.colour}"></i>{name} <b>{form.format(values[-1])}</b></li>'
        for name, (curve, _, values) in zip(names, drawn, strict=True)
    ) + "".join(
        f'<li><i class="line dashed {level.colour}"></i>{_clean(level.name)} <b>{form.format(level.value)}</b></li>'
        for level in levels
    )
    return (
        f'<figure class="plot"><h3>{_clean(title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{_clean(title)} over the steps">{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )


def _finite(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values without gaps, thinned by means over even runs of points."""
    pairs = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if v is not None and math.isfinite(v)]
    if not pairs:
        return np.empty(0), np.empty(0)
    steps, values = np.array(pairs, np.float64).T
    if len(steps) <= _POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _POINTS + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(steps, edges[:-1]) / counts, np.add.reduceat(values, edges[:-1]) / counts


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window, which is shorter at the ends."""
    half = len(values) // (2 * _SMOOTHED)
    if not half:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    start = np.maximum(np.arange(len(values)) - half, 0)
    stop = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def _polyline(colour: str, xs: np.ndarray | float, ys: np.ndarray | float) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True))  # pyright: ignore
    return f'<polyline class="{colour}" points="{points}"/>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) / count
    power = 10.0 ** math.floor(math.log10(span))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def short_number(value: float) -> str:
    """`500`, `20k`, `1.5M`."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (10 if letter == "k" else 1):
            return f"{value / size:g}{letter}"
    return f"{value:,g}"


def _clean(text: object) -> str:
    return html.escape(str(text), quote=True)
