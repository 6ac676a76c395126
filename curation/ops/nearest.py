"""Nearest centroids of rows: Faiss on every GPU or on CPU threads, with ties decided exactly.

A float32 matrix product rounds a row's similarities differently at different places in a batch. So Faiss finds
candidates, and what is returned is computed from the candidates in float64, row by row: results do not depend, bit for
bit, on the number of threads, the size of a batch or the order of the rows.
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
GPU_BLOCK_ROWS = 65536

MAX_GPU_CANDIDATES = 2048
"""The most neighbours that a Faiss index on a GPU gives."""

TREE_WIDTH = 4
"""Points of no more coordinates (a map, a toy) find their centroids in a k-d tree, several times faster."""

NEAR_TIE = 1e-5
"""Similarities closer than this, for unit vectors, are compared in float64; float32 products err by 1e-6 at most."""


def assign(
    x: np.ndarray, centroids: np.ndarray, metric: Metric = "cosine", num_threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each row; equally near ones go to the smallest index.

    Args:
        x: float32 or float16 [N, D], unit-norm rows for cosine; may be memory-mapped, it is read block by block.
        centroids: float32 [K, D], unit-norm for cosine.
        num_threads: changes the time, never the result; Faiss's setting where absent.

    Returns:
        cell int64 [N], and score float32 [N]: the cosine similarity, or the squared distance.

    Raises:
        ValueError: see `nearest_centroids`.
    """
    cells, scores = nearest_centroids(x, centroids, 1, metric, num_threads)
    return cells[:, 0], scores[:, 0]


def nearest_centroids(
    x: np.ndarray, centroids: np.ndarray, k: int, metric: Metric = "cosine", num_threads: int | None = None
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
    num_candidates = min(k + min(k, 8), len(centroids))  # the k-th may tie with those after it
    search, block_rows, near_tie, is_parallel = _searcher(centroids - shift, num_candidates, metric)
    cells = np.empty((len(x), k), dtype=np.int64)
    scores = np.empty((len(x), k), dtype=np.float32)

    def fill(start: int) -> None:
        rows = np.ascontiguousarray(x[start : start + block_rows], dtype=np.float32)
        check_rows(rows, metric, start)
        shifted = rows - shift
        found, found_scores = search(shifted)
        out = slice(start, start + len(rows))
        tie = np.full(len(rows), near_tie, dtype=np.float32)
        if metric == "l2":
            tie *= 4 * (np.einsum("nd,nd->n", shifted, shifted) + np.abs(found_scores[:, k - 1])) + 1e-30
        unclear = np.abs(found_scores[:, -1] - found_scores[:, k - 1]) <= tie
        unclear &= num_candidates < len(centroids)
        _rescore(rows, centroids, found, unclear, metric == "cosine", cells[out], scores[out])

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


class _Searcher(NamedTuple):
    search: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    """rows to the cells of their k nearest centroids and rough scores"""
    block_rows: int
    """rows to give it at a time"""
    near_tie: float
    """scores closer than this, for unit vectors, are undecided"""
    is_parallel: bool
    """whether several threads may search at once"""


def _searcher(centroids: np.ndarray, k: int, metric: Metric) -> _Searcher:
    width = centroids.shape[1]
    if width <= TREE_WIDTH:
        tree = cKDTree(centroids)

        def search(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            distances, cells = tree.query(rows, k=np.arange(1, k + 1))
            return cells, np.square(distances)

        return _Searcher(search, TREE_BLOCK_ROWS, 1e-12, True)
    faiss_metric = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    if faiss.get_num_gpus() > 0 and k <= MAX_GPU_CANDIDATES:
        index = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(width, faiss_metric))
        index.add(centroids)
        # One thread: an index on a GPU may not be searched by several at once.
        return _Searcher(lambda rows: index.search(rows, k)[::-1], GPU_BLOCK_ROWS, NEAR_TIE, False)
    return _Searcher(lambda rows: faiss.knn(rows, centroids, k, metric=faiss_metric)[::-1], BLOCK_ROWS, NEAR_TIE, True)


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
def _rescore(rows, centroids, found, unclear, cosine, cells, scores):  # pragma: no cover, compiled
    """The best by exact score, equal ones by index: of the candidates, or of all centroids where those are unclear."""
    k = cells.shape[1]
    sign = -1.0 if cosine else 1.0
    best_cell = np.empty(k, dtype=np.int64)
    best_cost = np.empty(k, dtype=np.float64)
    for i in range(len(rows)):
        best_cell[:], best_cost[:] = len(centroids), np.inf
        for j in range(len(centroids) if unclear[i] else found.shape[1]):
            cell = j if unclear[i] else found[i, j]
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
            if k == 1 and not unclear[i] and len(centroids) > found.shape[1]:
                break  # a clear winner needs its score only
        cells[i] = best_cell
        for j in range(k):
            scores[i, j] = sign * best_cost[j]
