"""Drawing images from clusters: balanced over a hierarchy, or a few from each cluster that a seed set touches.

Every draw orders images by a hash of (seed, id), so the same ids are drawn whatever order or parts they come in.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numba
import numpy as np

from curation.ops.hierarchy import Level, rank_in_segment
from curation.ops.nearest import Metric
from curation.ops.randomness import hash_uint64


class ClusterDraw(NamedTuple):
    """What `sample_per_cluster` drew.

    Attributes:
        ids: int64, ascending, distinct.
        num_drawn: images drawn before the cap.
        shortfall: int64 per hot cluster, how many images it lacked of per_cluster.
    """

    ids: np.ndarray
    num_drawn: int
    shortfall: np.ndarray


def hierarchical_sample(
    levels: Sequence[Level],
    target: int,
    seed: int,
    ids: np.ndarray | None = None,
    multiplier: int = 1,
    leaf: Literal["random", "closest"] = "random",
    metric: Metric = "cosine",
) -> np.ndarray:
    """Draw a balanced sample top-down: each cluster shares what it is given evenly among its children.

    Args:
        levels: a hierarchy, finest first, as `hierarchical_kmeans` returns it.
        target: images to draw; reached exactly, unless the hierarchy holds fewer than that.
        ids: int64 [N] of the rows of levels[0].assignment; row numbers where absent.
        multiplier: the most times that one image may be drawn.
        leaf: which images of a finest cluster: by hash, or those closest to its centroid.
        metric: of the hierarchy; it says whether the closest have the largest score or the smallest.

    Returns:
        int64 ids, ascending, repeated where drawn more than once.

    Source: hierarchical sampling of Vo et al., arXiv:2405.15613, section 3.4.
    """
    if leaf not in ("random", "closest"):
        raise ValueError(f"leaf={leaf!r} is unknown; choose 'random' or 'closest'.")
    quotas = leaf_quotas(levels[0].sizes, [level.assignment for level in levels[1:]], target, seed, multiplier)
    closeness = None
    if leaf == "closest":
        closeness = levels[0].scores if metric == "cosine" else -levels[0].scores
    return draw_from_leaves(levels[0].assignment, quotas, seed, ids, closeness)


def leaf_quotas(
    leaf_sizes: np.ndarray, parents: Sequence[np.ndarray], target: int, seed: int, multiplier: int = 1
) -> np.ndarray:
    """How many images to draw from each finest cluster; the top-down half of `hierarchical_sample`.

    Args:
        leaf_sizes: int64 [K1], images per finest cluster, which may have been counted part by part.
        parents: the cluster of each cluster of the level below, from level 2 up: int64 [K1], [K2], ...

    Returns:
        int64 [K1], summing to min(target, multiplier * images).
    """
    if target < 0 or multiplier < 1:
        raise ValueError(f"target={target} must not be negative and multiplier={multiplier} must be at least 1.")
    capacities = [multiplier * np.asarray(leaf_sizes, dtype=np.int64)]
    for above in parents:
        capacities.append(_sum_by(above, capacities[-1]))
    quotas = np.array([target], dtype=np.int64)
    one_root = np.zeros(len(capacities[-1]), dtype=np.int64)
    for number, above in reversed(list(enumerate([*parents, one_root]))):
        priority = hash_uint64(int(hash_uint64(seed, np.int64(number))), np.arange(len(above)))
        quotas = _share_out(above, capacities[number], quotas, priority)
    return quotas


def waterfill(capacities: np.ndarray, target: int, priority: np.ndarray) -> np.ndarray:
    """Share target among children as evenly as their capacities allow.

    Each child gets min(cut, capacity) for the largest integer cut that does not exceed the target; what remains goes,
    one each, to the children with room left that come first by priority.

    Args:
        capacities: int64 [n], not negative.
        priority: [n], smaller first; a hash of the child.

    Returns:
        int64 [n], summing to min(target, sum of capacities).
    """
    parents = np.zeros(len(capacities), dtype=np.int64)
    return _share_out(parents, np.asarray(capacities, dtype=np.int64), np.array([target], dtype=np.int64), priority)


def draw_from_leaves(
    cluster_of_row: np.ndarray,
    quotas: np.ndarray,
    seed: int,
    ids: np.ndarray | None = None,
    closeness: np.ndarray | None = None,
) -> np.ndarray:
    """Draw quotas[c] images of each cluster c, by hash or closest first: int64 ids, ascending.

    A quota beyond the cluster's size draws all its images as often as it goes, and the remainder as above.
    """
    ids = np.arange(len(cluster_of_row)) if ids is None else np.asarray(ids, dtype=np.int64)
    sizes = np.bincount(cluster_of_row, minlength=len(quotas))
    copies, remainder = np.divmod(quotas, np.maximum(sizes, 1))
    keys = (ids, hash_uint64(seed, ids)) if closeness is None else (ids, hash_uint64(seed, ids), -closeness)
    order = np.lexsort((*keys, cluster_of_row))
    cluster = cluster_of_row[order]
    times = copies[cluster] + (rank_in_segment(cluster) < remainder[cluster])
    return np.sort(np.repeat(ids[order], times))


def sample_per_cluster(
    cluster_of_row: np.ndarray,
    hot_clusters: np.ndarray,
    per_cluster: int,
    cap: int | None,
    seed: int,
    ids: np.ndarray | None = None,
) -> ClusterDraw:
    """Draw up to per_cluster images of each hot cluster, then up to cap of all of them, both by hash.

    Args:
        cluster_of_row: int64 [N].
        hot_clusters: int64, the clusters that a seed set touches often enough; repeats count once.
        ids: int64 [N]; row numbers where absent.

    Source: the cluster-based retrieval of DINOv2, arXiv:2304.07193, appendix A.4; that draws are uniform, without
    repetition, is our choice, the paper does not say.
    """
    ids = np.arange(len(cluster_of_row)) if ids is None else np.asarray(ids, dtype=np.int64)
    hot_clusters = np.asarray(hot_clusters, dtype=np.int64)
    rows = np.flatnonzero(np.isin(cluster_of_row, hot_clusters))
    drawn = first_of_each(ids[rows], cluster_of_row[rows], per_cluster, seed)
    sizes = np.bincount(cluster_of_row[rows], minlength=int(hot_clusters.max(initial=-1)) + 1)
    shortfall = np.maximum(per_cluster - sizes[hot_clusters], 0)
    return ClusterDraw(np.sort(capped(drawn, cap, seed)), len(drawn), shortfall)


def first_of_each(ids: np.ndarray, cluster: np.ndarray, per_cluster: int, seed: int) -> np.ndarray:
    """Up to per_cluster ids of each cluster, those of smallest hash, by cluster."""
    order = np.lexsort((ids, hash_uint64(seed, ids), cluster))
    return ids[order][rank_in_segment(cluster[order]) < per_cluster]


def capped(ids: np.ndarray, cap: int | None, seed: int) -> np.ndarray:
    """Up to cap of what `first_of_each` drew.

    By another hash: the first is small among the images of large clusters, being the best of many.
    """
    return ids[np.lexsort((ids, hash_uint64(int(hash_uint64(seed, np.int64(0))), ids)))[:cap]]


def _sum_by(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """int64 sums of values by key; np.bincount would go through float64."""
    sums = np.zeros(int(keys.max(initial=-1)) + 1, dtype=np.int64)
    np.add.at(sums, keys, values)
    return sums


def _share_out(parents: np.ndarray, capacities: np.ndarray, quotas: np.ndarray, priority: np.ndarray) -> np.ndarray:
    """`waterfill` of each parent's quota among its children: int64, one per child."""
    order = np.lexsort((np.arange(len(parents)), priority, parents))
    bounds = np.searchsorted(parents[order], np.arange(len(quotas) + 1))
    given = np.empty(len(parents), dtype=np.int64)
    given[order] = _fill_segments(capacities[order], bounds, quotas)
    return given


@numba.njit(nogil=True, cache=True)
def _fill_segments(capacities, bounds, quotas):  # pragma: no cover, compiled
    given = np.zeros(len(capacities), dtype=np.int64)
    for parent in range(len(quotas)):
        segment = capacities[bounds[parent] : bounds[parent + 1]]
        if len(segment) == 0:
            continue
        low, high = 0, max(segment.max(), 0)  # the largest cut lies in [low, high]
        while low < high:
            middle = low + (high - low + 1) // 2
            if np.minimum(segment, middle).sum() <= quotas[parent]:
                low = middle
            else:
                high = middle - 1
        share = np.minimum(segment, low)
        left = min(quotas[parent], segment.sum()) - share.sum()
        for child in range(len(segment)):
            if left > 0 and segment[child] > low:
                share[child] += 1
                left -= 1
        given[bounds[parent] : bounds[parent + 1]] = share
    return given
