"""The colours of photometric.py on a processor: one crop at a time, while its three planes are in the cache.

The same operations in float32 as there, some of them in another order of additions; a test holds the two together.
"""

from collections.abc import Callable

import numba
import numpy as np

_BRIGHTNESS, _CONTRAST, _SATURATION = 0, 1, 2  # 3 is hue
_ONE, _ZERO = np.float32(1), np.float32(0)
_RED, _GREEN, _BLUE = np.float32(0.299), np.float32(0.587), np.float32(0.114)
_SOLARIZE_FROM = np.float32(128 / 255)
_THIRD, _SIXTH, _TINY = np.float32(1 / 3), np.float32(1 / 6), np.float32(1e-12)
_TWO, _THREE, _FOUR, _SIX = np.float32(2), np.float32(3), np.float32(4), np.float32(6)
_LEVELS = np.float32(255)
_REACH = 4  # nine taps


def _compile(function: Callable) -> Callable:
    # Fused multiply-adds and vectorised sums and extrema; all values are finite. A division stays a division.
    return numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz", "nnan", "ninf"})(function)


@_compile
def distort(crops, factors, order, gray, sigma, solarize, out):
    """crops uint8 [n, H, W, 3] -> out float32 [n, 3, H, W] in 0..1; the parameters as in Photometric, n rows each."""
    n, height, width, _ = crops.shape
    above_below = np.empty((height + 2 * _REACH, width), np.float32)
    left_right = np.empty(width + 2 * _REACH, np.float32)
    for i in range(n):
        x = out[i].reshape(3, height * width)
        _to_float(crops[i].reshape(-1), x)
        for kind in order[i]:
            factor = factors[i, kind]
            if kind == _BRIGHTNESS and factor != _ONE:
                _scale(x, factor, _ZERO)
            elif kind == _CONTRAST and factor != _ONE:
                _scale(x, factor, (_ONE - factor) * _mean_luma(x))
            elif kind == _SATURATION and factor != _ONE:
                _saturate(x, factor)
            elif kind > _SATURATION and factor != _ZERO:
                _shift_hue(x, factor)
        if gray[i]:
            _saturate(x, _ZERO)
        if sigma[i] > 0:
            taps = np.exp(np.float32(-0.5) * (np.arange(_REACH + 1).astype(np.float32) / sigma[i]) ** 2)
            taps /= taps[0] + _TWO * taps[1:].sum()
            for channel in range(3):
                _blur(out[i, channel], taps, above_below, left_right)
        if solarize[i]:
            _solarize(x)


@_compile
def _to_float(pixels, x):
    for p in range(x.shape[1]):
        x[0, p] = np.float32(pixels[3 * p]) / _LEVELS
        x[1, p] = np.float32(pixels[3 * p + 1]) / _LEVELS
        x[2, p] = np.float32(pixels[3 * p + 2]) / _LEVELS


@_compile
def _mean_luma(x):
    red, green, blue = x[0], x[1], x[2]
    total = _ZERO
    for p in range(len(red)):
        total += _RED * red[p] + _GREEN * green[p] + _BLUE * blue[p]
    return total / np.float32(len(red))


@_compile
def _scale(x, factor, offset):
    for channel in range(3):
        plane = x[channel]
        for p in range(len(plane)):
            plane[p] = min(max(factor * plane[p] + offset, _ZERO), _ONE)


@_compile
def _saturate(x, factor):
    red, green, blue = x[0], x[1], x[2]
    for p in range(len(red)):
        r, g, b = red[p], green[p], blue[p]
        luma = (_ONE - factor) * (_RED * r + _GREEN * g + _BLUE * b)
        red[p] = min(max(factor * r + luma, _ZERO), _ONE)
        green[p] = min(max(factor * g + luma, _ZERO), _ONE)
        blue[p] = min(max(factor * b + luma, _ZERO), _ONE)


@_compile
def _shift_hue(x, shift):
    red, green, blue = x[0], x[1], x[2]
    for p in range(len(red)):
        r, g, b = red[p], green[p], blue[p]
        value = max(max(r, g), b)
        chroma = value - min(min(r, g), b)
        scale = _SIXTH / max(chroma, _TINY)
        hue = (b - r) * scale + _THIRD if value == g else (r - g) * scale + _TWO * _THIRD
        hue = (g - b) * scale if value == r else hue
        hue += shift
        hue = _SIX * (hue - np.floor(hue))
        red[p] = value - chroma * min(max(_TWO - abs(hue - _THREE), _ZERO), _ONE)
        green[p] = value - chroma * min(max(abs(hue - _TWO) - _ONE, _ZERO), _ONE)
        blue[p] = value - chroma * min(max(abs(hue - _FOUR) - _ONE, _ZERO), _ONE)


@_compile
def _blur(plane, taps, above_below, left_right):
    """plane [H, W] in place; taps [5], the middle one first; edges mirrored. Two buffers, longer by the reach."""
    height, width = plane.shape
    t0, t1, t2, t3, t4 = taps[0], taps[1], taps[2], taps[3], taps[4]
    for y in range(height + 2 * _REACH):
        above_below[y] = plane[_mirrored(y - _REACH, height)]
    for y in range(height):
        a, b, c, d, e = above_below[y], above_below[y + 1], above_below[y + 2], above_below[y + 3], above_below[y + 4]
        f, g, h, i = above_below[y + 5], above_below[y + 6], above_below[y + 7], above_below[y + 8]
        for x in range(width):
            left_right[_REACH + x] = (
                t4 * (a[x] + i[x]) + t3 * (b[x] + h[x]) + t2 * (c[x] + g[x]) + t1 * (d[x] + f[x]) + t0 * e[x]
            )
        for x in range(_REACH):
            left_right[x] = left_right[_REACH + _mirrored(x - _REACH, width)]
            left_right[_REACH + width + x] = left_right[_REACH + _mirrored(width + x, width)]
        row, s = plane[y], left_right
        for x in range(width):
            row[x] = (
                t4 * (s[x] + s[x + 8])
                + t3 * (s[x + 1] + s[x + 7])
                + t2 * (s[x + 2] + s[x + 6])
                + t1 * (s[x + 3] + s[x + 5])
                + t0 * s[x + 4]
            )


@_compile
def _mirrored(place, size):
    """A place up to the reach outside 0..size-1, mirrored at the first and last, which are not repeated."""
    while place < 0 or place >= size:
        place = -place if place < 0 else 2 * (size - 1) - place
        if size == 1:
            return 0
    return place


@_compile
def _solarize(x):
    for channel in range(3):
        plane = x[channel]
        for p in range(len(plane)):
            plane[p] = _ONE - plane[p] if plane[p] >= _SOLARIZE_FROM else plane[p]
