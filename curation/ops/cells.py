"""Unit vectors grouped by k-means cell, in memory or in files, read by offset: what the join works on."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numba import njit

from curation.ops.nearest import for_each
from curation.ops.sketches import (
    SKETCH_WORDS,
    check_unit_rows,
    products,
    round_directions,
    round_rows,
    sketch,
    sketch_directions,
    widened,
)

_ROWS_AT_ONCE = 2**14  # widened to float32 at once
_READS_AT_ONCE = 16
_SCORE_BYTES = 16 * 2**20  # one block of row-by-centroid products


class Rows(Protocol):
    """Rows [N, width], in memory or wherever slicing reads them from; cheap to pickle where they are not in memory."""

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Cells:
    """N unit vectors sorted by (cell, gid), with their sign sketches. A *row* is a position in that order.

    Attributes:
        num_rows, dim: N and D.
        offsets: int64 [K + 1]; cell c holds rows offsets[c] to offsets[c + 1].
        centroids: float32 [K, D].
        directions: float32 [512, D], what the sketches were made with.
    """

    num_rows: int
    dim: int
    offsets: np.ndarray
    centroids: np.ndarray
    directions: np.ndarray
    _vectors: Rows  # float16 [N, D]
    _sketches: Rows  # uint64 [N, 8]
    _gids: Rows  # int64 [N, 1]
    _first: int = 0
    """of these, the one that counts as row 0"""

    @property
    def num_cells(self) -> int:
        return len(self.centroids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop: float32 [n, D], exactly the stored float16 values."""
        return widened(self.read_half(start, stop))

    def read_half(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as they are stored: float16 [n, D]."""
        return self._vectors[self._first + start : self._first + stop]

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row: vector, sketch and gid."""
        return 2 * self.dim + 8 * SKETCH_WORDS + 8

    def read_sketches(self, start: int, stop: int) -> np.ndarray:
        """Sketches of rows start to stop: uint64 [n, 8]."""
        return self._sketches[self._first + start : self._first + stop]

    def read_gids(self, start: int, stop: int) -> np.ndarray:
        """gids of rows start to stop: int64 [n], ascending within each cell."""
        return self._gids[self._first + start : self._first + stop].reshape(-1)

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of any rows, in any order: float32 [n, D], a read for each, several at once, so keep them few."""
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            found = list(pool.map(lambda row: self.read(row, row + 1), rows.tolist()))
        return np.concatenate([np.empty((0, self.dim), np.float32), *found])

    def gids_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """gids of any rows, int64 [n], one cell-ordered pass over the gids that never holds more than a block."""
        out = np.empty(len(rows), np.int64)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        for start in range(0, self.num_rows, 1 << 20):
            stop = min(start + (1 << 20), self.num_rows)
            low, high = np.searchsorted(ordered, [start, stop])
            if low < high:
                out[order[low:high]] = self.read_gids(start, stop)[ordered[low:high] - start]
        return out

    def cell_of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The cell of each row: int64."""
        return np.searchsorted(self.offsets, rows, side="right") - 1

    def between(self, first: int, stop: int) -> "Cells":
        """Cells first to stop alone, their rows counted from 0; nothing is read or copied."""
        start, end = int(self.offsets[first]), int(self.offsets[stop])
        offsets = self.offsets[first : stop + 1] - start
        return replace(
            self,
            num_rows=end - start,
            offsets=offsets,
            centroids=self.centroids[first:stop],
            _first=self._first + start,
        )

    def slices(self, most: int, least_rows: int) -> list[tuple[int, int]]:
        """Runs of whole cells, (first, stop), that hold all rows: at most `most`, of at least about `least_rows`."""
        number = max(1, min(most, self.num_rows // least_rows, self.num_cells))
        cuts = np.searchsorted(self.offsets, np.linspace(0, self.num_rows, number + 1)[1:-1], side="left")
        cuts = np.unique(np.concatenate([[0], cuts, [self.num_cells]]))
        return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))

    def sketch(self, vectors: np.ndarray) -> np.ndarray:
        """Sketches of unit vectors [n, D] that compare with those of the cells: uint64 [n, 8]."""
        return sketch(vectors, self.directions)


def cells_from_arrays(
    vectors: np.ndarray, gids: np.ndarray, cell_of_row: np.ndarray, centroids: np.ndarray, *, seed: int = 0
) -> Cells:
    """Group vectors in memory. Whole arrays in any order.

    Args:
        vectors: [n, D], unit-norm; kept as float16.
        centroids: [K, D], unit-norm.
        seed: of the sketches.

    Raises:
        ValueError: rows not of unit norm, or gids that are not distinct.
    """
    half = np.asarray(vectors, np.float16)
    check_centroids(centroids, half.shape[1])
    order = np.lexsort((gids, cell_of_row))
    ordered_gids = np.asarray(gids, np.int64)[order].reshape(-1, 1)
    if len(np.unique(ordered_gids)) != len(ordered_gids):
        raise ValueError(
            f"gids must be distinct, got {len(ordered_gids) - len(np.unique(ordered_gids))} repeated ones."
        )
    sizes = np.bincount(cell_of_row, minlength=len(centroids))
    directions = sketch_directions(half.shape[1], seed)
    half = np.ascontiguousarray(half[order])
    sketches = sketches_of(half, directions)
    num_rows, dim = half.shape
    offsets, centroids = cell_offsets(sizes), np.asarray(centroids, np.float32)
    return Cells(num_rows, dim, offsets, centroids, directions, half, sketches, ordered_gids)


def sketches_of(half: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Sketches of float16 unit rows [N, D], uint64 [N, 8]. Raises ValueError where a row is not of unit norm."""
    sketches = np.empty((len(half), SKETCH_WORDS), np.uint64)
    for start in range(0, len(half), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        wide = widened(half[rows])
        check_unit_rows(wide, "vectors")
        sketches[rows] = sketch(wide, directions)
    return sketches


def nearest_cells(
    vectors: np.ndarray, centroids: np.ndarray, nprobe: int, num_threads: int | None = None, device: str | None = None
) -> np.ndarray:
    """The nprobe nearest centroids of each unit vector [n, D] by cosine: int32 [n, nprobe], ascending cell ids.

    Similarities are those of round_rows and round_directions, and equal ones go to the smaller id, so the answer
    depends on the vector and the centroids alone, not on the device: of torch, or None for the processor's own kernels.
    """
    if device is not None:
        from curation.ops import torch_tiles

        return torch_tiles.nearest_cells(vectors, centroids, nprobe, device)
    probes = np.empty((len(vectors), nprobe), np.int32)
    directions = round_directions(centroids)

    def choose(start: int) -> None:
        rows = slice(start, start + step)
        _largest(products(round_rows(vectors[rows]), directions), probes[rows])

    step = _rows_at_once(len(centroids))
    for_each(choose, range(0, len(vectors), step), num_threads)
    return probes


def cell_ranks(vectors: np.ndarray, centroids: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """How many centroids come before each vector's named cell: int32 [n]; cell c is probed when its rank < nprobe."""
    ranks = np.empty(len(vectors), np.int32)
    directions = round_directions(centroids)
    step = _rows_at_once(len(centroids))
    for start in range(0, len(vectors), step):
        scores = products(round_rows(vectors[start : start + step]), directions)
        own = cells[start : start + step]
        at_own = np.take_along_axis(scores, own[:, None], axis=1)
        before = np.arange(scores.shape[1]) < own[:, None]
        ranks[start : start + len(scores)] = (scores > at_own).sum(axis=1) + ((scores == at_own) & before).sum(axis=1)
    return ranks


def _rows_at_once(num_cells: int) -> int:
    return max(_SCORE_BYTES // (4 * num_cells), 1)


@njit(cache=True, nogil=True)
def _largest(scores: np.ndarray, chosen: np.ndarray) -> None:
    """Column ids of the chosen.shape[1] largest scores of each row, equal ones by smaller id, in ascending order.

    A histogram finds the bin of the last one taken; only that bin is sorted.
    """
    num_bins = 1024
    width, count = scores.shape[1], chosen.shape[1]
    bins = np.empty(width, np.int16)
    in_last = np.empty(width, np.int32)
    for row in range(scores.shape[0]):
        line = scores[row]
        low, high = line[0], line[0]
        for i in range(width):
            low = min(low, line[i])
            high = max(high, line[i])
        scale = np.float32(num_bins - 1) / max(high - low, np.float32(1.0))
        for i in range(width):
            bins[i] = np.int16((line[i] - low) * scale)
        histogram = np.zeros(num_bins, np.int32)
        for i in range(width):
            histogram[bins[i]] += 1
        last, above = num_bins - 1, 0
        while above + histogram[last] < count:
            above += histogram[last]
            last -= 1
        taken = 0
        for i in range(width):
            if bins[i] == last:
                in_last[taken] = i
                taken += 1
        missing = count - above
        floor = np.sort(-line[in_last[:taken]])[missing - 1] * np.float32(-1.0)
        equal = missing
        for i in range(taken):
            equal -= line[in_last[i]] > floor
        taken = 0
        for i in range(width):
            if bins[i] >= last:
                if line[i] > floor:
                    chosen[row, taken] = i
                    taken += 1
                elif line[i] == floor and equal > 0:
                    equal -= 1
                    chosen[row, taken] = i
                    taken += 1


def check_centroids(centroids: np.ndarray, dim: int) -> None:
    if centroids.ndim != 2 or centroids.shape[1] != dim or not len(centroids):
        raise ValueError(f"centroids must be [K, {dim}] with K >= 1, got shape {centroids.shape}.")
    check_unit_rows(centroids, "centroids")


def cell_offsets(sizes: np.ndarray) -> np.ndarray:
    """int64 [K + 1]: the first row of each cell, from their sizes [K]; then the number of rows."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def rows_of_gids(cells: Cells, gids: np.ndarray, rows_at_once: int = 1 << 20) -> np.ndarray:
    """Row of each gid, which must be there: int64. One pass over the pool's gids."""
    wanted, back = np.unique(gids, return_inverse=True)
    rows = np.full(len(wanted), -1, np.int64)
    for start in range(0, cells.num_rows if len(wanted) else 0, rows_at_once):
        block = cells.read_gids(start, min(start + rows_at_once, cells.num_rows))
        at = np.minimum(np.searchsorted(wanted, block), len(wanted) - 1)
        here = np.flatnonzero(wanted[at] == block)
        rows[at[here]] = start + here
    return rows[back]
