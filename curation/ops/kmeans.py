"""k-means on unit vectors (cosine) or points (L2), and the pieces of a Lloyd iteration that is spread over workers.

A Lloyd iteration over parts is `assign` and `partial_sums` on each part, `merge` of the results, `update_centroids`.
No result depends, bit for bit, on the number of threads, the order of the rows or the way they are cut into parts:
`assign` decides ties exactly, and rows are rounded to a multiple of a power of two before they are summed in float64,
so that the sums are exact (up to 2^53 such quanta, where float32 stops at 2^24) and addition is associative.
"""

import heapq
import logging
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numba
import numpy as np

from curation.ops.nearest import Metric, assign, available_threads, check_rows, for_each
from curation.ops.randomness import hash_uint64, hash_uniform

Init = Literal["random", "kmeans++"]

UNIT_QUANTUM = 2.0**-26
"""Rounding step of summed coordinates of unit vectors: sums below 2^27 are exact."""

MIN_FIRST_ROWS = 8
"""Rows per cluster that the first iterations must have to look at a quarter of the rows only."""

logger = logging.getLogger(__name__)


class KMeansResult(NamedTuple):
    """What `kmeans` found.

    Attributes:
        centroids: float32 [K, D]; unit-norm for cosine. Cells that stayed empty repeat another centroid.
        objective: float64 [iterations], per iteration the mean, over the rows that it looked at, of 1 - cosine
            similarity, or of the squared distance, to the centroids at its beginning. Lower is better.
        sizes: int64 [K], rows per cell in the last iteration.
        num_reseeded: cells that were empty and given half of another cell, over all iterations.
    """

    centroids: np.ndarray
    objective: np.ndarray
    sizes: np.ndarray
    num_reseeded: int


class PartialSums(NamedTuple):
    """Per cell, over the rows of some parts: float64 [K, D] sums, int64 [K] counts, float64 [K] sums of scores."""

    sums: np.ndarray
    counts: np.ndarray
    scores: np.ndarray


class Balance(NamedTuple):
    """How evenly rows spread over cells.

    Attributes:
        entropy: of the cell of a random row, over log K: 1 is even, 0 is one cell.
        gini: of the sizes: 0 is even, near 1 is one cell.
        imbalance_factor: K * sum of squared shares, as Faiss defines it: 1 is even, K is one cell.
        num_empty: cells without a row.
        largest: rows of the largest cell.
    """

    entropy: float
    gini: float
    imbalance_factor: float
    num_empty: int
    largest: int


def kmeans(
    x: np.ndarray,
    num_clusters: int,
    num_iterations: int = 20,
    seed: int = 0,
    metric: Metric = "cosine",
    init: Init = "random",
    ids: np.ndarray | None = None,
    num_threads: int | None = None,
    device: str | None = None,
) -> KMeansResult:
    """Lloyd's algorithm from a seeded start; stops early where no row changes its cell.

    With enough rows the first two fifths of the iterations look at a quarter of them, chosen by hash: far from the
    goal the direction is as good, and the end is the same within 1% (benchmarks/kmeans.py) for 70% of the products.
    Where there are fewer distinct rows than clusters, the surplus cells stay empty and a warning says so.

    Args:
        x: float32 or float16 [N, D]; unit-norm rows for cosine (spherical k-means, unit-norm centroids).
        init: see `initial_centroids`.
        ids: int64 [N], what random choices depend on; row numbers where absent.
        num_threads: changes the time, never the result; Faiss's setting where absent.
        device: of torch, for products and sums; None: the processor's own kernels. The result is the same.

    Raises:
        ValueError: fewer rows than clusters, a row that is not finite, or not unit-norm under cosine.
    """
    if not 1 <= num_clusters <= len(x):
        raise ValueError(
            f"num_clusters={num_clusters} needs 1 to {len(x)} clusters for the {len(x)} rows given; "
            "ask for fewer clusters or pass more rows."
        )
    if num_iterations < 1:
        raise ValueError(f"num_iterations={num_iterations} must be at least 1.")
    x = np.ascontiguousarray(x, dtype=np.float32)
    check_rows(x, metric)
    quantum = UNIT_QUANTUM if metric == "cosine" else sum_quantum(max(float(x.max()), -float(x.min())))
    centroids = initial_centroids(x, num_clusters, seed, init, ids, num_threads, device)
    num_first = 2 * num_iterations // 5 if len(x) // 4 >= MIN_FIRST_ROWS * num_clusters else 0
    first_rows = x[_hash_order(seed, ids, len(x))[: len(x) // 4]] if num_first else x
    objective, num_reseeded, previous = [], 0, None
    for iteration in range(num_iterations):
        rows = first_rows if iteration < num_first else x
        cell, score = assign(rows, centroids, metric, num_threads, device)
        total = partial_sums(rows, cell, score, num_clusters, quantum, num_threads, device)
        objective.append(mean_error(total, metric))
        if iteration > num_first and np.array_equal(cell, previous):
            break
        centroids, reseeded = update_centroids(total, centroids, metric, seed + iteration)
        num_reseeded += reseeded
        previous = cell
    num_empty = int(np.count_nonzero(total.counts == 0))
    if num_empty:
        logger.warning(
            "k-means leaves %d of %d cells empty: too few distinct rows.",
            num_empty,
            num_clusters,
        )
    return KMeansResult(centroids, np.array(objective), total.counts, num_reseeded)


def partial_sums(
    x: np.ndarray,
    cell: np.ndarray,
    score: np.ndarray,
    num_clusters: int,
    quantum: float = UNIT_QUANTUM,
    num_threads: int | None = None,
    device: str | None = None,
) -> PartialSums:
    """One part's contribution to the next centroids, exact: see the head of this file.

    Args:
        x: float32 or float16 [N, D].
        cell, score: what `assign` returned for these rows.
        quantum: the rounding step, one for all parts; `sum_quantum` names it for rows that are not unit-norm.
        device: of torch, which adds up there; None: the processor's own kernel does.
    """
    score_quantum = quantum * quantum / UNIT_QUANTUM  # squared distances scale as the square of the rows
    counts = np.bincount(cell, minlength=num_clusters)
    if device is not None:
        from curation.ops.torch_kmeans import cell_sums

        sums, scores = cell_sums(x, cell, score, num_clusters, quantum, score_quantum, device)
        return PartialSums(sums, counts, scores)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    order = np.argsort(cell, kind="stable")
    sums = np.zeros((num_clusters, x.shape[1]), dtype=np.float64)
    scores = np.zeros(num_clusters, dtype=np.float64)
    x, score = (
        np.ascontiguousarray(x, dtype=np.float32),
        np.ascontiguousarray(score, dtype=np.float32),
    )
    # Cells are shared out so that each thread has about as many rows, and none writes where another does.
    num_shares = 4 * available_threads(num_threads)
    cuts = np.unique(np.searchsorted(bounds, np.linspace(0, len(x), num_shares + 1)).clip(0, num_clusters))
    shares = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))

    def add_up(share: tuple[int, int]) -> None:
        _sum_cells(x, score, order, bounds, *share, quantum, score_quantum, sums, scores)

    for_each(add_up, shares, num_threads)
    return PartialSums(sums, counts, scores)


def merge(parts: Iterable[PartialSums]) -> PartialSums:
    """Add up the sums of several parts, in any order and grouping; memory is that of two parts."""
    parts = iter(parts)
    first = next(parts, None)
    if first is None:
        raise ValueError("merge needs the sums of at least one part, got none.")
    total = PartialSums(*(field.copy() for field in first))
    for part in parts:
        add(total, part)
    return total


def add(total: PartialSums, part: PartialSums) -> PartialSums:
    """Add a part's sums to a total, in place: the total."""
    for into, field in zip(total, part, strict=True):
        into += field
    return total


def sum_quantum(max_abs: float) -> float:
    """The rounding step for sums of coordinates up to max_abs: UNIT_QUANTUM, scaled by a power of two."""
    if not math.isfinite(max_abs):
        raise ValueError(f"coordinates up to {max_abs} are not finite; leave out or replace such rows.")
    return UNIT_QUANTUM * 2.0 ** math.ceil(math.log2(max_abs)) if max_abs > 0 else UNIT_QUANTUM


def mean_error(total: PartialSums, metric: Metric) -> float:
    """Mean over rows of 1 - cosine similarity, or of the squared distance: the objective of `kmeans`."""
    num_rows = int(total.counts.sum())
    score = float(total.scores.sum()) / max(num_rows, 1)
    return 1.0 - score if metric == "cosine" else score


def update_centroids(total: PartialSums, previous: np.ndarray, metric: Metric, seed: int) -> tuple[np.ndarray, int]:
    """Means of the cells; each empty cell takes half of the cell with the largest error.

    The split is along a random plane through the cell's mean, drawn from (seed, empty cell). A cell of equal rows has
    no error and is never split, however many rows it has: a million copies of one placeholder image take one cell.
    Where nothing is left to split, cells stay empty and keep their previous centroid.

    Returns:
        centroids float32 [K, D], and the number of cells that were re-seeded.
    """
    centroids = cell_means(total.sums, total.counts, previous, metric)
    return reseed_empty(centroids, total.counts, total.scores, metric, seed)


def cell_means(sums: np.ndarray, counts: np.ndarray, previous: np.ndarray, metric: Metric) -> np.ndarray:
    """Means of some cells, of all or of a few of them: float32 [K, D]; an empty cell keeps its previous centroid."""
    occupied = counts > 0
    centroids = np.array(previous, dtype=np.float32)
    means = sums[occupied] / counts[occupied, None]
    if metric == "cosine":
        norms = np.linalg.norm(means, axis=1, keepdims=True)
        means = np.where(norms > 1e-9, means / np.maximum(norms, 1e-9), centroids[occupied])  # opposite rows cancel
    centroids[occupied] = means
    return centroids


def reseed_empty(
    centroids: np.ndarray, counts: np.ndarray, scores: np.ndarray, metric: Metric, seed: int
) -> tuple[np.ndarray, int]:
    """The second half of `update_centroids`: changes the centroids in place, and returns what that returns."""
    occupied = counts > 0
    error = np.maximum(counts - scores if metric == "cosine" else scores, 0.0)
    # Below this a cell's rows differ by float32 rounding only.
    resolution = 1e-6 if metric == "cosine" else 1e-12 * float(np.square(centroids, dtype=np.float64).sum(1).max())
    largest = [
        (-error[c], int(c), int(counts[c])) for c in np.flatnonzero((counts > 1) & (error > counts * resolution))
    ]
    heapq.heapify(largest)
    num_reseeded = 0
    for empty in np.flatnonzero(~occupied):
        if not largest:
            break
        negative_error, cell, count = heapq.heappop(largest)
        offset = _random_direction(seed, int(empty), centroids.shape[1]) * math.sqrt(-negative_error / count) / 2
        pair = centroids[cell] + np.stack([offset, -offset])
        if metric == "cosine":
            pair /= np.linalg.norm(pair, axis=1, keepdims=True)
        centroids[[cell, empty]] = pair
        for half, half_count in ((cell, count - count // 2), (int(empty), count // 2)):
            if half_count > 1:
                heapq.heappush(largest, (negative_error / 2, half, half_count))
        num_reseeded += 1
    return centroids, num_reseeded


def initial_centroids(
    x: np.ndarray,
    num_clusters: int,
    seed: int,
    init: Init,
    ids: np.ndarray | None = None,
    num_threads: int | None = None,
    device: str | None = None,
) -> np.ndarray:
    """Rows of x to start from, chosen by (seed, id): float32 [K, D]; where too few are distinct, some repeat.

    "random" takes distinct rows uniformly. "kmeans++" draws each in proportion to the squared distance to those before
    it, which covers rare regions too, but in batches that grow by a quarter, so that it costs one Lloyd iteration
    in matrix products; it looks at 32 rows per cluster at most.

    Source: k-means++, Arthur and Vassilvitskii, SODA 2007; batches as in k-means||, Bahmani et al., arXiv:1203.6402,
    without its oversampling.
    """
    if init == "random":
        return distinct_start(x, num_clusters, seed, ids)[0]
    if init != "kmeans++":
        raise ValueError(f"init={init!r} is unknown; choose 'random' or 'kmeans++'.")
    order = _hash_order(seed, ids, len(x))
    chosen = _spread_rows(x, order[: 32 * num_clusters], num_clusters, seed, num_threads, device)
    return _padded(x, chosen, num_clusters)


def distinct_start(
    x: np.ndarray, num_clusters: int, seed: int, ids: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """The random start of `initial_centroids`, and how many of its rows are distinct.

    It depends on the rows of smallest hash alone: those of a sample's, where they are distinct, are the sample's own.
    """
    chosen = _distinct_rows(x, _hash_order(seed, ids, len(x)), num_clusters)
    return _padded(x, chosen, num_clusters), len(chosen)


def _padded(x: np.ndarray, chosen: np.ndarray, num_clusters: int) -> np.ndarray:
    repeats = np.full(num_clusters - len(chosen), chosen[0])
    return np.ascontiguousarray(x[np.concatenate([chosen, repeats])], dtype=np.float32)


def balance(sizes: np.ndarray) -> Balance:
    """Figures of balance of cells with the given numbers of rows.

    Raises:
        ValueError: no row in any cell.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    total = int(sizes.sum())
    if total <= 0:
        raise ValueError(f"balance needs at least one row, got {len(sizes)} cells with {total}.")
    share = np.sort(sizes) / total
    occupied = share[share > 0]
    entropy = -float(np.sum(occupied * np.log(occupied)))
    k = len(sizes)
    return Balance(
        entropy=entropy / math.log(k) if k > 1 else 1.0,
        gini=float(np.sum((2 * np.arange(1, k + 1) - k - 1) * share)) / k,
        imbalance_factor=float(k * np.sum(share**2)),
        num_empty=int(np.count_nonzero(sizes == 0)),
        largest=int(sizes.max()),
    )


def _hash_order(seed: int, ids: np.ndarray | None, num_rows: int) -> np.ndarray:
    ids = np.arange(num_rows) if ids is None else np.asarray(ids)
    return np.lexsort((ids, hash_uint64(seed, ids)))


def _distinct_rows(x: np.ndarray, order: np.ndarray, num: int) -> np.ndarray:
    """The first num row numbers in order whose rows differ; fewer where there are not so many."""
    looked_at = num
    while True:
        candidates = np.ascontiguousarray(x[order[:looked_at]])
        keys = candidates.view(np.dtype((np.void, candidates.itemsize * candidates.shape[1])))[:, 0]
        first = np.sort(np.unique(keys, return_index=True)[1])[:num]
        if len(first) == num or looked_at >= len(order):
            return order[first]
        looked_at *= 4


def _spread_rows(
    x: np.ndarray, order: np.ndarray, num: int, seed: int, num_threads: int | None, device: str | None
) -> np.ndarray:
    """Row numbers drawn from those of order in proportion to squared distances, in growing batches."""
    sample = np.ascontiguousarray(x[order], dtype=np.float32)
    chosen = [0]
    _, nearest = assign(sample, sample[:1], "l2", num_threads, device)
    for step in range(num):
        left = np.flatnonzero(nearest > 0)
        batch = min(max(len(chosen) // 4, 1), num - len(chosen), len(left))
        if batch == 0:
            break
        # The smallest of exponential variables with these rates: a draw without replacement in proportion to them.
        # Places in the hash order stand for ids.
        race = -np.log1p(-hash_uniform(int(hash_uint64(seed, np.int64(step))), left)) / nearest[left]
        new = left[np.sort(np.argpartition(race, batch - 1)[:batch])]
        chosen.extend(new.tolist())
        nearest = np.minimum(nearest, assign(sample, sample[new], "l2", num_threads, device)[1])
    return order[chosen]


def _random_direction(seed: int, index: int, width: int) -> np.ndarray:
    """A unit vector with coordinates of one size and random signs, float32 [D]."""
    bits = hash_uint64(int(hash_uint64(seed, np.int64(index))), np.arange(width)) >> np.uint64(63)
    return ((2.0 * bits - 1.0) / math.sqrt(width)).astype(np.float32)


@numba.njit(nogil=True, cache=True)
def _sum_cells(
    x, score, order, bounds, first, last, quantum, score_quantum, sums, scores
):  # pragma: no cover, compiled
    # Adding this and taking it away rounds to a multiple of the quantum.
    to_grid, score_to_grid = 1.5 * 2.0**52 * quantum, 1.5 * 2.0**52 * score_quantum
    for cell in range(first, last):
        total = sums[cell]
        for i in range(bounds[cell], bounds[cell + 1]):
            row = x[order[i]]
            for d in range(row.shape[0]):
                total[d] += (np.float64(row[d]) + to_grid) - to_grid
            scores[cell] += (np.float64(score[order[i]]) + score_to_grid) - score_to_grid
