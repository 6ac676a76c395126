"""Unit vectors grouped by k-means cell, on disk or in memory, read by offset: what the join works on."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

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
_SCORE_BYTES = 16 * 2**20  # one block of row-by-centroid products


@dataclass(frozen=True)
class RowFile:
    """A file of fixed-size rows; slicing reads just those rows. A path, not a handle: it travels between processes.

    Read by offset and never mapped, so that pages of the file do not count as the process's memory.
    """

    path: Path
    dtype: np.dtype
    width: int
    first: int = 0
    """the row that counts as row 0"""

    def __getitem__(self, rows: slice) -> np.ndarray:
        count = max(rows.stop - rows.start, 0) * self.width
        offset = (self.first + rows.start) * self.width * self.dtype.itemsize
        values = np.fromfile(self.path, self.dtype, count, offset=offset)
        if values.size != count:
            raise OSError(
                f"{self.path} is shorter than its cells.json says: delete its folder to have it written again."
            )
        return values.reshape(-1, self.width)


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
    _vectors: RowFile | np.ndarray  # float16 [N, D]
    _sketches: RowFile | np.ndarray  # uint64 [N, 8]
    _gids: RowFile | np.ndarray  # int64 [N, 1]

    @property
    def num_cells(self) -> int:
        return len(self.centroids)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop: float32 [n, D], exactly the stored float16 values."""
        return widened(self._vectors[start:stop])

    def read_half(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as they are stored: float16 [n, D]."""
        return self._vectors[start:stop]

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored row: vector, sketch and gid."""
        return 2 * self.dim + 8 * SKETCH_WORDS + 8

    def read_sketches(self, start: int, stop: int) -> np.ndarray:
        """Sketches of rows start to stop: uint64 [n, 8]."""
        return self._sketches[start:stop]

    def read_gids(self, start: int, stop: int) -> np.ndarray:
        """gids of rows start to stop: int64 [n], ascending within each cell."""
        return self._gids[start:stop].reshape(-1)

    def read_rows(self, rows: np.ndarray) -> np.ndarray:
        """The vectors of any rows, in any order: float32 [n, D], a read for each, so keep them few."""
        out = np.empty((len(rows), self.dim), np.float32)
        for i, row in enumerate(rows.tolist()):
            out[i] = self.read(row, row + 1)
        return out

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
        columns = (
            replace(rows, first=rows.first + start) if isinstance(rows, RowFile) else rows[start:end]
            for rows in (self._vectors, self._sketches, self._gids)
        )
        offsets = self.offsets[first : stop + 1] - start
        return Cells(end - start, self.dim, offsets, self.centroids[first:stop], self.directions, *columns)

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
    """Group vectors in memory. Same arguments and errors as write_cells, whole arrays in any order."""
    half = np.asarray(vectors, np.float16)
    _check_centroids(centroids, half.shape[1])
    order = np.lexsort((gids, cell_of_row))
    ordered_gids = np.asarray(gids, np.int64)[order].reshape(-1, 1)
    if len(np.unique(ordered_gids)) != len(ordered_gids):
        raise ValueError(
            f"gids must be distinct, got {len(ordered_gids) - len(np.unique(ordered_gids))} repeated ones."
        )
    sizes = np.bincount(cell_of_row, minlength=len(centroids))
    directions = sketch_directions(half.shape[1], seed)
    half = np.ascontiguousarray(half[order])
    sketches = np.empty((len(half), SKETCH_WORDS), np.uint64)
    for start in range(0, len(half), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        wide = widened(half[rows])
        check_unit_rows(wide, "vectors")
        sketches[rows] = sketch(wide, directions)
    return Cells(
        *half.shape, _offsets(sizes), np.asarray(centroids, np.float32), directions, half, sketches, ordered_gids
    )


def write_cells(
    folder: Path,
    blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    sizes: np.ndarray,
    centroids: np.ndarray,
    *,
    seed: int = 0,
    buffer_bytes: int = 2**28,
) -> Cells:
    """Group vectors on disk: a counting sort by cell that holds buffer_bytes of rows, in one pass over the blocks.

    The files do not depend on how the rows were divided into blocks.

    Args:
        folder: a local folder, made if missing; cells.json is written last.
        blocks: (gids int64 [n], vectors [n, D] unit-norm, cell of each row [n]), gids ascending over all blocks.
        sizes: rows in each cell [K]; must agree with the blocks.
        centroids: [K, D].
        seed: of the sketches.

    Raises:
        ValueError: rows not of unit norm, gids not ascending, or sizes that disagree with the blocks.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    centroids = np.ascontiguousarray(centroids, np.float32)
    num_cells, dim = centroids.shape
    _check_centroids(centroids, dim)
    if len(sizes) != num_cells:
        raise ValueError(f"sizes names {len(sizes)} cells and centroids {num_cells}: they must be the same clustering.")
    directions = sketch_directions(dim, seed)
    offsets = _offsets(sizes)
    paths = [folder / name for name in ("vectors.f16", "sketches.u64", "gids.i64")]
    handles = [os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644) for path in paths]
    try:
        filled = offsets[:-1].copy()
        rows_per_buffer = max(buffer_bytes // (2 * (2 * dim + 8 * SKETCH_WORDS + 8)), 1)
        for gids, vectors, cell_of_row in _regrouped(blocks, rows_per_buffer):
            sketches = np.empty((len(gids), SKETCH_WORDS), np.uint64)
            for start in range(0, len(gids), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                wide = widened(vectors[rows])
                check_unit_rows(wide, "vectors")
                sketches[rows] = sketch(wide, directions)
            order = np.argsort(cell_of_row, kind="stable")
            columns = (vectors[order], sketches[order], gids[order])
            _scatter(handles, columns, cell_of_row[order], filled)
        if not np.array_equal(filled, offsets[1:]):
            wrong = int(np.flatnonzero(filled != offsets[1:])[0])
            found, asked = filled[wrong] - offsets[wrong], sizes[wrong]
            raise ValueError(f"the blocks put {found} rows in cell {wrong} and sizes says {asked}: cluster again.")
        for handle in handles:
            os.fsync(handle)
    finally:
        for handle in handles:
            os.close(handle)
    for name, array in (("offsets", offsets), ("centroids", centroids), ("directions", directions)):
        with open(folder / f"{name}.npy", "wb") as file:
            # Not the file itself: NumPy would write to it in C, and tell of a full disk by a count of items.
            np.save(SimpleNamespace(write=file.write), array)
    temporary = folder / "cells.json.tmp"
    temporary.write_text(json.dumps({"num_rows": int(offsets[-1]), "dim": dim, "num_cells": num_cells, "seed": seed}))
    temporary.replace(folder / "cells.json")
    return open_cells(folder)


def open_cells(folder: Path) -> Cells:
    """Open what write_cells wrote. Raises ValueError where no finished cells lie."""
    folder = Path(folder)
    try:
        shape = json.loads((folder / "cells.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no finished cells (no cells.json): write them first.") from None
    return Cells(
        shape["num_rows"],
        shape["dim"],
        np.load(folder / "offsets.npy"),
        np.load(folder / "centroids.npy"),
        np.load(folder / "directions.npy"),
        RowFile(folder / "vectors.f16", np.dtype(np.float16), shape["dim"]),
        RowFile(folder / "sketches.u64", np.dtype(np.uint64), SKETCH_WORDS),
        RowFile(folder / "gids.i64", np.dtype(np.int64), 1),
    )


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


def _check_centroids(centroids: np.ndarray, dim: int) -> None:
    if centroids.ndim != 2 or centroids.shape[1] != dim or not len(centroids):
        raise ValueError(f"centroids must be [K, {dim}] with K >= 1, got shape {centroids.shape}.")
    check_unit_rows(centroids, "centroids")


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _regrouped(
    blocks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], rows_per_buffer: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The same rows in buffers of about rows_per_buffer: long runs for each cell make few and large writes."""
    held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    num_held, last_gid = 0, -1
    for gids, vectors, cell_of_row in blocks:
        steps = np.diff(gids, prepend=last_gid)
        if np.any(steps <= 0):
            raise ValueError(f"gids must ascend over all blocks: {gids[np.argmax(steps <= 0)]} comes too late.")
        last_gid = gids[-1] if len(gids) else last_gid
        for start in range(0, len(gids), rows_per_buffer):
            rows = slice(start, start + rows_per_buffer)
            held.append((gids[rows].astype(np.int64), vectors[rows].astype(np.float16), cell_of_row[rows]))
            num_held += len(held[-1][0])
            if num_held >= rows_per_buffer:
                yield _concatenated(held)
                held, num_held = [], 0
    if held:
        yield _concatenated(held)


def _concatenated(held: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    gids, vectors, cell_of_row = (np.concatenate(column) for column in zip(*held, strict=True))
    return gids, vectors, cell_of_row


def _scatter(handles: list[int], columns: tuple[np.ndarray, ...], cell_of_row: np.ndarray, filled: np.ndarray) -> None:
    """Write each cell's run of the sorted columns where the cell's last one ended."""
    starts = np.flatnonzero(np.diff(cell_of_row, prepend=-1))
    stops = np.append(starts[1:], len(cell_of_row))
    for handle, column in zip(handles, columns, strict=True):
        row_bytes = column.itemsize * (column.shape[1] if column.ndim == 2 else 1)
        data = memoryview(np.ascontiguousarray(column).reshape(-1)).cast("B")
        for start, stop, cell in zip(starts.tolist(), stops.tolist(), cell_of_row[starts].tolist(), strict=True):
            _write_all(handle, data[start * row_bytes : stop * row_bytes], int(filled[cell]) * row_bytes)
    np.add.at(filled, cell_of_row[starts], stops - starts)


def _write_all(handle: int, data: memoryview, offset: int) -> None:
    """os.pwrite may write less than it was given (a signal, 2 GiB)."""
    while len(data):
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


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
