"""Nearest centroids of rows: Faiss on every GPU or on CPU threads, with ties decided exactly.

A float32 matrix product rounds a row's similarities differently at different places in a batch. So Faiss finds
candidates, and what is returned is computed from the candidates in float64, row by row: results do not depend, bit for
bit, on the number of threads, the size of a batch or the order of the rows.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import faiss
import numba
import numpy as np
from scipy.spatial import cKDTree

Metric = Literal["cosine", "l2"]
T = TypeVar("T")

BLOCK_ROWS = 1024
"""Rows of one Faiss call on a CPU: enough for a fast matrix product, few enough to occupy every core."""

GPU_BLOCK_ROWS = 65536

TREE_WIDTH = 4
"""Points of few coordinates (a map, a toy) find their centroids in a k-d tree, several times faster than by products."""

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
    shift = centroids.mean(axis=0, dtype=np.float64).astype(np.float32) if metric == "l2" else None
    num_candidates = min(k + min(k, 8), len(centroids))  # the k-th may tie with those after it
    search, block_rows = _searcher(centroids if shift is None else centroids - shift, num_candidates, metric)
    cells = np.empty((len(x), k), dtype=np.int64)
    scores = np.empty((len(x), k), dtype=np.float32)

    def fill(start: int) -> None:
        rows = np.ascontiguousarray(x[start : start + block_rows], dtype=np.float32)
        squared_norms = np.einsum("nd,nd->n", rows, rows)
        _check_rows(squared_norms, start, metric)
        found, found_scores = search(rows if shift is None else rows - shift)
        out = slice(start, start + len(rows))
        tie = np.full(len(rows), NEAR_TIE, dtype=np.float32)
        if metric == "l2":
            tie *= 4 * np.square(rows - shift).sum(axis=1) + 1e-30
        _rescore(rows, centroids, found, found_scores, tie, metric == "cosine", cells[out], scores[out])

    for_each(fill, range(0, len(x), block_rows), num_threads)
    return cells, scores


def for_each(function: Callable[[T], None], items: Iterable[T], num_threads: int | None) -> None:
    """Call function on each item from threads in which Faiss and its BLAS are single-threaded."""
    threads = available_threads(num_threads)
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        for _ in pool.map(function, items):
            pass


def available_threads(num_threads: int | None) -> int:
    """num_threads, or Faiss's setting where that is None (OMP_NUM_THREADS, which Ray sets to a task's share)."""
    return faiss.omp_get_max_threads() if num_threads is None else num_threads


def _searcher(centroids: np.ndarray, k: int, metric: Metric) -> tuple[Callable, int]:
    """A function from rows to (cells, approximate scores) of their k nearest centroids, and how many rows to give it."""
    if centroids.shape[1] <= TREE_WIDTH:
        tree = cKDTree(centroids)

        def search(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            distances, cells = tree.query(rows, k=np.arange(1, k + 1))
            return cells, np.square(distances)

        return search, BLOCK_ROWS
    faiss_metric = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(centroids.shape[1], faiss_metric))
        index.add(centroids)
        return lambda rows: index.search(rows, k)[::-1], GPU_BLOCK_ROWS
    return lambda rows: faiss.knn(rows, centroids, k, metric=faiss_metric)[::-1], BLOCK_ROWS


def _check_rows(squared_norms: np.ndarray, start: int, metric: Metric) -> None:
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
def _rescore(rows, centroids, found, found_scores, tie, cosine, cells, scores):  # pragma: no cover, compiled
    """Exact scores of the candidates, best first, equal ones by index; one clear winner is not compared again."""
    num_candidates, k = found.shape[1], cells.shape[1]
    sign = -1.0 if cosine else 1.0
    kept_cell = np.empty(num_candidates, dtype=np.int64)
    kept_cost = np.empty(num_candidates, dtype=np.float64)
    for i in range(len(rows)):
        num = num_candidates
        if k == 1 and num_candidates > 1 and abs(found_scores[i, 1] - found_scores[i, 0]) > tie[i]:
            num = 1
        for j in range(num):
            cell = found[i, j]
            cost = sign * _exact_score(rows[i], centroids[cell], cosine)
            place = j
            while place > 0 and (
                kept_cost[place - 1] > cost or (kept_cost[place - 1] == cost and kept_cell[place - 1] > cell)
            ):
                kept_cell[place], kept_cost[place] = kept_cell[place - 1], kept_cost[place - 1]
                place -= 1
            kept_cell[place], kept_cost[place] = cell, cost
        for j in range(k):
            cells[i, j] = kept_cell[j]
            scores[i, j] = sign * kept_cost[j]
