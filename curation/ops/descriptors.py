"""The offline encoders' arithmetic: two embeddings from one raw descriptor, no weights learned from photographs.

Raw: gradient histograms at four scales and a colour grid.

`embed_copies` (copy detection): one fixed linear projection of it. The projection is a linear discriminant analysis on
procedural images ("dead leaves") and their random edits, so it keeps the directions in which images differ and drops
those in which an image differs from its own crop or rotation. It is made once by benchmarks/fit_descriptors.py and
shipped, hence the same function of an image in every run, whatever the pool: cosines compare between pools, and new
shards need no refit. Mirroring an image permutes the raw descriptor, and the projection's rows are even or odd under
that permutation: the embedding of the mirror image is the embedding times a vector of signs.

`embed_likeness` (retrieval): the same rows joined with what kind of picture it is: its map of gradient energy, its
gradient magnitudes and its colours, as histograms.

Sources: histograms of oriented gradients, N. Dalal and B. Triggs, CVPR 2005 (here with signed orientation, cubic
B-spline cells in place of blocks, and a square root as in RootSIFT, R. Arandjelovic and A. Zisserman, CVPR 2012);
discriminant analysis of descriptors, K. Mikolajczyk and J. Matas, ICCV 2007; dead leaves, A. Lee, D. Mumford and J.
Huang, IJCV 2001.
"""

import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np

VIEW_PX = 128
STATE_PATH = Path(__file__).with_name("descriptors.npz")
NUM_BINS = 12  # signed orientations, 30 degrees apart; even, so that mirroring maps bins to bins
# (image side in pixels, cells per side), finest first; each side is half the one before.
SCALES = ((128, 8), (64, 8), (32, 8), (16, 4))
COLOUR_CELLS = 8
# Mean gradient, in grey levels over two pixels, below which a cell counts as flat rather than being scaled up.
_FLAT_GRADIENT = 2.0
# No orientation may hold more than this share of its neighbourhood: overlaid text and borders are strong edges.
_MAX_SHARE = 0.3
_COLOUR_WEIGHT = 0.4  # brings the colour grid to the scale of the gradient entries
RAW_DIM = NUM_BINS * sum(cells * cells for _, cells in SCALES) + 3 * COLOUR_CELLS * COLOUR_CELLS
COPY_DIM = 256
# Gradient energy: the cells of the scale at this index. Gradient magnitudes: 16 bins of log2 at three sizes.
_ENERGY_SCALE = 2
_MAGNITUDE_SIDES, _MAGNITUDE_BINS = (128, 64, 32), 16
# Bins of luma and of the two colour differences, which are taken within 64 of grey.
_COLOUR_BINS = (4, 6, 6)
_ENERGY_CELLS = SCALES[_ENERGY_SCALE][1] ** 2
LIKENESS_DIM = COPY_DIM + _ENERGY_CELLS + len(_MAGNITUDE_SIDES) * _MAGNITUDE_BINS + math.prod(_COLOUR_BINS)
_ROWS_PER_BLOCK = 256


def embed_copies(views: np.ndarray) -> np.ndarray:
    """Unit-norm rows [B, 256] float32 of views uint8 [B, 128, 128, 3], for copy detection.

    Each row depends on its own view only, to the last bit: no batched matrix product, whose order of summation changes
    with the batch.
    """
    return by_block(views, lambda _, raw: _projected(raw), COPY_DIM)


def embed_likeness(views: np.ndarray) -> np.ndarray:
    """Unit-norm rows [B, 512] float32 of views uint8 [B, 128, 128, 3], for retrieval of similar pictures.

    A cosine is 0.4 of the cosine of `embed_copies` plus 0.2 each of those of gradient energy, gradient magnitudes and
    colours. Equal row by row for any batch, as there.
    """
    return by_block(views, _likeness, LIKENESS_DIM)


def mirror_signs() -> np.ndarray:
    """Signs float32 [256]: embed_copies(mirrored) == embed_copies(view) * signs, up to the rounding of sums (1e-6)."""
    return load_projection(STATE_PATH).mirror.copy()


def fingerprint() -> str:
    """sha256 of the projection and of what decides the raw descriptor; the 1 stands for the code of this file."""
    settings = repr((1, VIEW_PX, NUM_BINS, SCALES, COLOUR_CELLS, _FLAT_GRADIENT, _MAX_SHARE, _COLOUR_WEIGHT))
    return hashlib.sha256(settings.encode() + STATE_PATH.read_bytes()).hexdigest()


def raw_descriptors(views: np.ndarray) -> np.ndarray:
    """[B, RAW_DIM] float32: for each scale [cells, cells, bins], then colour [cells, cells, 3].

    Args:
        views: uint8 [B, 128, 128, 3].

    Raises:
        ValueError: another shape or type.
    """
    if views.dtype != np.uint8 or views.shape[1:] != (VIEW_PX, VIEW_PX, 3):
        raise ValueError(f"views must be uint8 [B, {VIEW_PX}, {VIEW_PX}, 3], got {views.dtype} {list(views.shape)}.")
    out = np.empty((len(views), RAW_DIM), np.float32)
    for view, row in zip(views, out, strict=True):
        level = _luma(view)
        offset = 0
        for side, cells in SCALES:
            if side != len(level):
                level = _halve(level)
            histograms = _orientation_histograms(level, *_cell_weights(side, cells))
            offset = _append_normalised(histograms, row, offset)
        _append_colour(view, row, offset)
    return out


def mirror_permutation() -> np.ndarray:
    """int64 [RAW_DIM]: raw(mirrored view) == raw(view)[permutation]."""
    parts, offset = [], 0
    mirrored_bins = (NUM_BINS // 2 - np.arange(NUM_BINS)) % NUM_BINS  # angle a becomes 180 degrees - a
    for cells, channels in [*((cells, mirrored_bins) for _, cells in SCALES), (COLOUR_CELLS, np.arange(3))]:
        index = offset + np.arange(cells * cells * len(channels)).reshape(cells, cells, len(channels))
        parts.append(index[:, ::-1, channels].ravel())
        offset += index.size
    return np.concatenate(parts)


def by_block(views: np.ndarray, rows_of: Callable[[np.ndarray, np.ndarray], np.ndarray], dim: int) -> np.ndarray:
    """rows_of(views, raw descriptors), float32 [B, dim], by blocks: raw descriptors are ten times as large."""
    out = np.empty((len(views), dim), np.float32)
    for start in range(0, len(views), _ROWS_PER_BLOCK):
        block = np.ascontiguousarray(views[start : start + _ROWS_PER_BLOCK])
        out[start : start + len(block)] = rows_of(block, raw_descriptors(block))
    return out


class Projection(NamedTuple):
    """A linear map of raw descriptors whose rows are even or odd under mirroring (benchmarks/fit_descriptors.py)."""

    mean: np.ndarray
    """float32 [RAW_DIM]"""
    matrix: np.ndarray
    """float32 [D, RAW_DIM]"""
    mirror: np.ndarray
    """signs float32 [D]"""


@functools.cache
def load_projection(path: Path) -> Projection:
    """Stored for one entry of each pair that mirroring exchanges; the other is equal up to the row's sign."""
    with np.load(path) as file:
        mean, half, mirror = (file[name].astype(np.float32) for name in ("mean", "half_projection", "mirror"))
    permutation = mirror_permutation()
    left = np.flatnonzero(np.arange(RAW_DIM) < permutation)
    matrix = np.empty((len(half), RAW_DIM), np.float32)
    matrix[:, left] = half
    matrix[:, permutation[left]] = half * mirror[:, None]
    return Projection(mean, matrix, mirror)


def project(raw: np.ndarray, projection: Projection) -> np.ndarray:
    """Unit rows float32 [B, D] of (raw [B, RAW_DIM] - mean) @ matrix.T."""
    rows = np.empty((len(raw), len(projection.matrix)), np.float32)
    _project(raw, projection.mean, projection.matrix, rows)
    return rows


def _projected(raw: np.ndarray) -> np.ndarray:
    return project(raw, load_projection(STATE_PATH))


def _likeness(views: np.ndarray, raw: np.ndarray) -> np.ndarray:
    first = NUM_BINS * sum(cells * cells for _, cells in SCALES[:_ENERGY_SCALE])
    energy = raw[:, first : first + _ENERGY_CELLS * NUM_BINS].reshape(len(raw), _ENERGY_CELLS, NUM_BINS).sum(axis=2)
    magnitudes = np.empty((len(views), len(_MAGNITUDE_SIDES), _MAGNITUDE_BINS), np.float32)
    colours = np.empty((len(views), math.prod(_COLOUR_BINS)), np.float32)
    for view, magnitude_row, colour_row in zip(views, magnitudes, colours, strict=True):
        level = _luma(view)
        for k, side in enumerate(_MAGNITUDE_SIDES):
            level = level if side == len(level) else _halve(level)
            _magnitude_histogram(level, magnitude_row[k])
        _colour_histogram(view, colour_row)
    # Square roots of shares: a dot product of two histograms is then their Bhattacharyya coefficient.
    histograms = np.sqrt(magnitudes.reshape(len(views), -1)), np.sqrt(colours)
    parts = [_projected(raw), *(unit(part) for part in (energy, *histograms))]
    weights = np.sqrt(np.array([0.4, 0.2, 0.2, 0.2], np.float32))
    return unit(np.concatenate([part * weight for part, weight in zip(parts, weights, strict=True)], axis=1))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows [B, D] of length 1; a row of zeros stays one."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))


@functools.cache
def _cell_weights(side: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Cubic B-spline windows (standard deviation 0.58 cells), each summing to 1 over the pixels of a side.

    Returns:
        first int64 [side]: first of the four cells that a pixel touches, counted from two cells outside the image;
        weights float32 [side, 4].
    """
    centre = (np.arange(side) + 0.5) * cells / side - 0.5
    first = np.floor(centre).astype(np.int64) - 1
    distance = np.abs(centre[:, None] - (first[:, None] + np.arange(4)))
    weights = np.where(distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6)
    total = np.zeros(cells + 4)
    np.add.at(total, first[:, None] + np.arange(4) + 2, weights)
    total[:2] = total[-2:] = np.inf  # cells outside the image
    return first + 2, (weights / total[first[:, None] + np.arange(4) + 2]).astype(np.float32)


def _compile(function: Callable) -> Callable:
    # Contraction into fused multiply-adds and vectorised sums; NaN and infinity keep their meaning.
    return numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})(function)


@_compile
def _luma(view):
    side = view.shape[0]
    out = np.empty((side, side), np.float32)
    for y in range(side):
        for x in range(side):
            r, g, b = np.float32(view[y, x, 0]), np.float32(view[y, x, 1]), np.float32(view[y, x, 2])
            out[y, x] = np.float32(0.299) * r + np.float32(0.587) * g + np.float32(0.114) * b
    return out


@_compile
def _halve(level):
    side = level.shape[0] // 2
    out = np.empty((side, side), np.float32)
    for y in range(side):
        for x in range(side):
            top = level[2 * y, 2 * x] + level[2 * y, 2 * x + 1]
            bottom = level[2 * y + 1, 2 * x] + level[2 * y + 1, 2 * x + 1]
            out[y, x] = np.float32(0.25) * (top + bottom)
    return out


@_compile
def _row_gradient(above, row, below, magnitude, position):
    """Central differences of one row: magnitudes, and orientations in bins [0, NUM_BINS].

    The arc tangent is a polynomial within 0.003 bins (Abramowitz and Stegun 4.4.47, cut): no branch, no call, so that
    the loop becomes vector instructions.
    """
    side = len(row)
    for x in range(side):
        gx = row[min(x + 1, side - 1)] - row[max(x - 1, 0)]
        gy = below[x] - above[x]
        ax, ay = abs(gx), abs(gy)
        ratio = min(ax, ay) / max(max(ax, ay), np.float32(1e-12))
        s = ratio * ratio
        angle = (np.float32(-0.0464964749) * s + np.float32(0.15931422)) * s - np.float32(0.327622764)
        angle = (angle * s * ratio + ratio) * np.float32(NUM_BINS / (2 * np.pi))
        angle = np.float32(NUM_BINS / 4) - angle if ay > ax else angle
        angle = np.float32(NUM_BINS / 2) - angle if gx < 0 else angle
        position[x] = np.float32(NUM_BINS) - angle if gy < 0 else angle
        magnitude[x] = np.sqrt(gx * gx + gy * gy)


@_compile
def _orientation_histograms(level, first, weights):
    """Mean gradient magnitude by cell and orientation, [cells, cells, bins], split linearly between two bins."""
    side = level.shape[0]
    cells = first[side - 1]  # the last pixel's first cell is the last but two, and two lie outside
    out = np.zeros((cells + 4, cells, NUM_BINS), np.float32)
    row = np.empty((cells + 4, NUM_BINS), np.float32)
    magnitude, position = np.empty(side, np.float32), np.empty(side, np.float32)
    for y in range(side):
        _row_gradient(level[max(y - 1, 0)], level[y], level[min(y + 1, side - 1)], magnitude, position)
        row[:] = 0
        for x in range(side):
            lower = int(position[x])
            upper_part = magnitude[x] * (position[x] - np.float32(lower))
            lower_part = magnitude[x] - upper_part
            lower = lower - NUM_BINS if lower >= NUM_BINS else lower
            upper = 0 if lower == NUM_BINS - 1 else lower + 1
            for near in range(4):
                row[first[x] + near, lower] += weights[x, near] * lower_part
                row[first[x] + near, upper] += weights[x, near] * upper_part
        for near in range(4):
            for cell in range(cells):
                for k in range(NUM_BINS):
                    out[first[y] + near, cell, k] += weights[y, near] * row[cell + 2, k]
    return out[2 : cells + 2]


@_compile
def _append_normalised(histograms, row, offset):
    """Square roots of each cell's histogram over the energy around it; returns the offset after them."""
    cells = histograms.shape[0]
    energy = np.empty((cells, cells), np.float32)
    for y in range(cells):
        for x in range(cells):
            energy[y, x] = 0
            for k in range(NUM_BINS):
                energy[y, x] += histograms[y, x, k] * histograms[y, x, k]
    for y in range(cells):
        for x in range(cells):
            around = np.float32(0)
            for dy in range(-1, 2):
                for dx in range(-1, 2):
                    near = energy[min(max(y + dy, 0), cells - 1), min(max(x + dx, 0), cells - 1)]
                    around += near * np.float32(0.58 if dy == 0 else 0.21) * np.float32(0.58 if dx == 0 else 0.21)
            scale = 1 / np.sqrt(around + np.float32(_FLAT_GRADIENT**2))
            for k in range(NUM_BINS):
                row[offset] = np.sqrt(min(histograms[y, x, k] * scale, np.float32(_MAX_SHARE)))
                offset += 1
    return offset


@_compile
def _append_colour(view, row, offset):
    """Box means of luma (standardised) and of the two colour differences (over their root mean square)."""
    step = view.shape[0] // COLOUR_CELLS
    means = np.empty((COLOUR_CELLS, COLOUR_CELLS, 3), np.float32)
    for y in range(COLOUR_CELLS):
        for x in range(COLOUR_CELLS):
            r, g, b = 0, 0, 0  # integer sums: exact in any order
            for v in range(y * step, (y + 1) * step):
                for u in range(x * step, (x + 1) * step):
                    r += view[v, u, 0]
                    g += view[v, u, 1]
                    b += view[v, u, 2]
            luma = 0.299 * r + 0.587 * g + 0.114 * b
            means[y, x, 0] = luma / (step * step)
            means[y, x, 1] = 0.713 * (r - luma) / (step * step)
            means[y, x, 2] = 0.564 * (b - luma) / (step * step)
    luma_mean = means[:, :, 0].mean()
    luma_scale = _COLOUR_WEIGHT / (means[:, :, 0].std() + 8)
    colour_scale = _COLOUR_WEIGHT / np.sqrt((means[:, :, 1:] ** 2).mean() + 50)
    for y in range(COLOUR_CELLS):
        for x in range(COLOUR_CELLS):
            row[offset] = (means[y, x, 0] - luma_mean) * luma_scale
            row[offset + 1] = means[y, x, 1] * colour_scale
            row[offset + 2] = means[y, x, 2] * colour_scale
            offset += 3
    return offset


@_compile
def _project(raw, mean, projection, out):
    """out = unit rows of (raw - mean) @ projection.T, one row at a time."""
    for row in range(raw.shape[0]):
        centred = raw[row] - mean
        norm = np.float32(0)
        for k in range(projection.shape[0]):
            total = np.float32(0)
            for d in range(projection.shape[1]):
                total += projection[k, d] * centred[d]
            out[row, k] = total
            norm += total * total
        out[row] /= np.sqrt(norm) + np.float32(1e-12)


@_compile
def _magnitude_histogram(level, out):
    """Shares of pixels by log2(1 + gradient magnitude), in steps of 0.54 over 0..8.6."""
    side = level.shape[0]
    out[:] = 0
    for y in range(side):
        for x in range(side):
            gx = level[y, min(x + 1, side - 1)] - level[y, max(x - 1, 0)]
            gy = level[min(y + 1, side - 1), x] - level[max(y - 1, 0), x]
            step = int(np.log2(1 + np.sqrt(gx * gx + gy * gy)) * np.float32(_MAGNITUDE_BINS / 8.6))
            out[min(step, _MAGNITUDE_BINS - 1)] += 1
    out /= side * side


@_compile
def _colour_histogram(view, out):
    """Shares of pixels by luma and the two colour differences."""
    bins_y, bins_b, bins_r = _COLOUR_BINS
    side = view.shape[0]
    out[:] = 0
    for y in range(side):
        for x in range(side):
            r, g, b = np.float32(view[y, x, 0]), np.float32(view[y, x, 1]), np.float32(view[y, x, 2])
            luma = np.float32(0.299) * r + np.float32(0.587) * g + np.float32(0.114) * b
            cb = (np.float32(0.564) * (b - luma) + 64) * np.float32(bins_b / 128)
            cr = (np.float32(0.713) * (r - luma) + 64) * np.float32(bins_r / 128)
            at_y = min(int(luma * np.float32(bins_y / 256)), bins_y - 1)
            at_b = min(max(int(cb), 0), bins_b - 1)
            at_r = min(max(int(cr), 0), bins_r - 1)
            out[(at_y * bins_b + at_b) * bins_r + at_r] += 1
    out /= side * side
