"""Nearest centroids of rows: Faiss on CPU threads or torch on a GPU, with ties decided exactly.

A float32 matrix product rounds a row's similarities differently at different places in a batch. So a product finds
candidates, and what is returned is computed from the candidates in float64, row by row, on the processor: results do
not depend, bit for bit, on the device, the number of threads, the size of a batch or the order of the rows.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import faiss
import numba
import numpy as np
from scipy.spatial import cKDTree

Metric = Literal["cosine", "l2"]
T = TypeVar("T")

BLOCK_ROWS = 1024
"""Rows of one Faiss call on a CPU: enough for a fast matrix product, few enough to occupy every core."""

TREE_BLOCK_ROWS = 4096

TREE_WIDTH = 4
"""Points of no more coordinates (a map, a toy) find their centroids in a k-d tree, several times faster, on any device.
"""

NEAR_TIE = 1e-5
"""Similarities closer than this, for unit vectors, are compared in float64; float32 products err by 1e-6 at most."""


def assign(
    x: np.ndarray,
    centroids: np.ndarray,
    metric: Metric = "cosine",
    num_threads: int | None = None,
    device: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each row; equally near ones go to the smallest index.

    Args:
        x: float32 or float16 [N, D], unit-norm rows for cosine; may be memory-mapped, it is read block by block.
        centroids: float32 [K, D], unit-norm for cosine.
        num_threads: changes the time, never the result; Faiss's setting where absent.
        device: of torch, which finds the candidates there; None: Faiss does, on the processor. The result is the same.

    Returns:
        cell int64 [N], and score float32 [N]: the cosine similarity, or the squared distance.

    Raises:
        ValueError: see `nearest_centroids`.
    """
    cells, scores = nearest_centroids(x, centroids, 1, metric, num_threads, device)
    return cells[:, 0], scores[:, 0]


def nearest_centroids(
    x: np.ndarray,
    centroids: np.ndarray,
    k: int,
    metric: Metric = "cosine",
    num_threads: int | None = None,
    device: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest centroids of each row, nearest first: cells int64 [N, k], scores float32 [N, k] as in `assign`.

    Raises:
        ValueError: an unknown metric, widths that differ, k beyond K, a row that is not finite, or not unit-norm
            within 1e-3 under cosine.
    """
    if metric not in ("cosine", "l2"):
        raise ValueError(f"metric={metric!r} is unknown; choose 'cosine' or 'l2'.")
    if x.ndim != 2 or centroids.ndim != 2 or x.shape[1] != centroids.shape[1]:
        raise ValueError(f"rows of shape {x.shape} and centroids of shape {centroids.shape} do not have one width.")
    if not 1 <= k <= len(centroids):
        raise ValueError(f"k={k} nearest centroids were asked of {len(centroids)}.")
    centroids = np.ascontiguousarray(centroids, dtype=np.float32)
    if not np.isfinite(centroids).all():
        raise ValueError("the centroids are not all finite.")
    # |x|^2 - 2xc + |c|^2 loses the digits that x and c share, so L2 is searched around the centroids' mean.
    shift = centroids.mean(axis=0, dtype=np.float64).astype(np.float32) if metric == "l2" else np.float32(0)
    search, block_rows, is_parallel = _searcher(centroids - shift, k, metric, device)
    cells = np.empty((len(x), k), dtype=np.int64)
    scores = np.empty((len(x), k), dtype=np.float32)

    def fill(start: int) -> None:
        rows = np.ascontiguousarray(x[start : start + block_rows], dtype=np.float32)
        check_rows(rows, metric, start)
        out = slice(start, start + len(rows))
        _rescore(rows, centroids, *search(rows - shift), metric == "cosine", cells[out], scores[out])

    for_each(fill, range(0, len(x), block_rows), num_threads if is_parallel else 1)
    return cells, scores


def check_rows(rows: np.ndarray, metric: Metric, start: int = 0) -> None:
    """Raises ValueError naming the first row (counted from start) that is not finite, or not unit-norm for cosine."""
    squared_norms = np.einsum("nd,nd->n", rows, rows)
    if not np.isfinite(squared_norms).all():
        row = start + int(np.argmin(np.isfinite(squared_norms)))
        raise ValueError(f"row {row} is not finite; leave out or replace such rows before clustering.")
    norms = np.sqrt(squared_norms)
    if metric == "cosine" and (np.abs(norms - 1) > 1e-3).any():
        row = int(np.argmax(np.abs(norms - 1) > 1e-3))
        raise ValueError(
            f"row {start + row} has norm {norms[row]:.6g}, cosine k-means needs unit-norm rows; "
            "divide each row by its norm, or use metric='l2'."
        )


def for_each(function: Callable[[T], None], items: Iterable[T], num_threads: int | None) -> None:
    """Call function on each item from threads in which Faiss and its BLAS are single-threaded."""
    threads = available_threads(num_threads)
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(function, items):
            pass


def available_threads(num_threads: int | None) -> int:
    """num_threads, or Faiss's setting where that is None (OMP_NUM_THREADS, which Ray sets to a task's share)."""
    return faiss.omp_get_max_threads() if num_threads is None else num_threads


class _Candidates(NamedTuple):
    """Which centroids may be among the nearest of each row; those that are not are farther for sure."""

    cells: np.ndarray
    """int64, of all rows one after another"""
    starts: np.ndarray
    """int64 [n], the row's own part of cells"""
    stops: np.ndarray
    is_open: np.ndarray
    """bool [n]: others may be as near, so that every centroid is a candidate"""


class _Searcher(NamedTuple):
    search: Callable[[np.ndarray], _Candidates]
    block_rows: int
    """rows to give it at a time"""
    is_parallel: bool
    """whether several threads may search at once"""


def _searcher(centroids: np.ndarray, k: int, metric: Metric, device: str | None) -> _Searcher:
    num_centroids, width = centroids.shape
    num_found = min(k + min(k, 8), num_centroids)  # the k-th may tie with those after it
    if width <= TREE_WIDTH:
        tree = cKDTree(centroids)

        def from_tree(rows: np.ndarray) -> _Candidates:
            distances, cells = tree.query(rows, k=np.arange(1, num_found + 1))
            return _listed(cells, np.square(distances), k, num_centroids, _ties(rows, np.square(distances), k, 1e-12))

        return _Searcher(from_tree, TREE_BLOCK_ROWS, True)
    if device is not None:
        from curation.ops.torch_kmeans import CentroidSearch

        on_device = CentroidSearch(centroids, k, metric, device)

        def from_device(rows: np.ndarray) -> _Candidates:
            cells, bounds = on_device(rows)
            # No score beats itself where squares are beyond float32.
            return _Candidates(cells, bounds[:-1], bounds[1:], bounds[1:] == bounds[:-1])

        return _Searcher(from_device, on_device.block_rows, False)
    faiss_metric = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2

    def from_faiss(rows: np.ndarray) -> _Candidates:
        scores, cells = faiss.knn(rows, centroids, num_found, metric=faiss_metric)
        ties = np.full(len(rows), NEAR_TIE) if metric == "cosine" else _ties(rows, scores, k, NEAR_TIE)
        return _listed(cells, scores, k, num_centroids, ties)

    return _Searcher(from_faiss, BLOCK_ROWS, True)


def _ties(rows: np.ndarray, squared_distances: np.ndarray, k: int, near_tie: float) -> np.ndarray:
    """How far apart squared distances must be, float32 [n], for the sizes at hand."""
    sizes = np.einsum("nd,nd->n", rows, rows) + np.abs(squared_distances[:, k - 1])
    return (near_tie * 4 * sizes + 1e-30).astype(np.float32)


def _listed(cells: np.ndarray, scores: np.ndarray, k: int, num_centroids: int, ties: np.ndarray) -> _Candidates:
    """The candidates [n, c] that a search gave with rough scores, best first."""
    num_found = cells.shape[1]
    is_open = (np.abs(scores[:, -1] - scores[:, k - 1]) <= ties) & (num_found < num_centroids)
    starts = np.arange(len(cells)) * num_found
    is_clear = k == 1 and num_found < num_centroids  # a clear winner needs its score only
    return _Candidates(cells.reshape(-1), starts, starts + (1 if is_clear else num_found), is_open)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _exact_score(row, centroid, cosine):  # pragma: no cover, compiled
    total = 0.0
    if cosine:
        for d in range(row.shape[0]):
            total += np.float64(row[d]) * np.float64(centroid[d])
    else:
        for d in range(row.shape[0]):
            difference = np.float64(row[d]) - np.float64(centroid[d])
            total += difference * difference
    return total


@numba.njit(nogil=True, cache=True)
def _rescore(rows, centroids, listed, starts, stops, is_open, cosine, cells, scores):  # pragma: no cover, compiled
    """The best by exact score, equal ones by index: of the candidates, or of all centroids where those are open."""
    k = cells.shape[1]
    sign = -1.0 if cosine else 1.0
    best_cell = np.empty(k, dtype=np.int64)
    best_cost = np.empty(k, dtype=np.float64)
    for i in range(len(rows)):
        best_cell[:], best_cost[:] = len(centroids), np.inf
        for j in range(len(centroids) if is_open[i] else stops[i] - starts[i]):
            cell = j if is_open[i] else listed[starts[i] + j]
            cost = sign * _exact_score(rows[i], centroids[cell], cosine)
            place = k
            while place > 0 and (
                cost < best_cost[place - 1] or (cost == best_cost[place - 1] and cell < best_cell[place - 1])
            ):
                place -= 1
            if place < k:
                for after in range(k - 1, place, -1):
                    best_cell[after], best_cost[after] = best_cell[after - 1], best_cost[after - 1]
                best_cell[place], best_cost[place] = cell, cost
        cells[i] = best_cell
        for j in range(k):
            scores[i, j] = sign * best_cost[j]
