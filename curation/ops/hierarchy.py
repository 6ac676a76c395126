"""Hierarchical k-means with resampling: clusters of clusters whose density follows the support, not the data.

Plain k-means puts centroids where data is dense. Clustering again, from only a few members of each cluster, those
nearest to its centroid, moves the centroids towards a uniform cover of what is there, and clusters of such centroids
are concepts of about equal standing however many images each has.

Source: Vo et al., "Automatic Data Curation for Self-Supervised Learning", arXiv:2405.15613, sections 3.2 and 3.3.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from curation.ops.kmeans import Init, kmeans
from curation.ops.nearest import Metric, assign
from curation.ops.randomness import hash_uint64


class Level(NamedTuple):
    """One level of a hierarchy; its items are the rows at level 1, the centroids of the level below elsewhere.

    Attributes:
        centroids: float32 [K, D].
        assignment: int64 [items], the cluster of each item of the level below.
        scores: float32 [items], cosine similarity to that cluster's centroid, or squared distance.
        sizes: int64 [K], items per cluster.
    """

    centroids: np.ndarray
    assignment: np.ndarray
    scores: np.ndarray
    sizes: np.ndarray


def hierarchical_kmeans(
    x: np.ndarray,
    levels: Sequence[int],
    num_resamplings: int | Sequence[int] = 10,
    samples_per_cluster: Sequence[int] | None = None,
    num_iterations: int = 50,
    seed: int = 0,
    metric: Metric = "cosine",
    init: Init = "kmeans++",
    split: int = 1,
    clamp: bool = False,
    ids: np.ndarray | None = None,
    num_threads: int | None = None,
    device: str | None = None,
) -> list[Level]:
    """Cluster rows, then the centroids, then theirs, resampling at each level.

    Args:
        x: float32 [N, D]; unit-norm rows for cosine.
        levels: clusters per level, finest first, decreasing.
        num_resamplings: rounds of resampling, one number or one per level.
        samples_per_cluster: members that each cluster contributes to a round, per level; half the mean cluster size
            where absent, as published.
        split: with more than 1, level 1 is k-means to levels[0] / split cells, each then clustered by itself into
            `split` cells, without resampling: about `split` times cheaper. Empty cells are dropped.
        clamp: lower a level's clusters to what the level below can carry (half its items), and drop levels that would
            not be smaller than the one below, instead of raising.
        ids: int64 [N], what random choices depend on; row numbers where absent.
        num_threads, device: as in `kmeans`; they change the time, never the result.

    Raises:
        ValueError: levels that do not decrease, or more clusters than items at a level without `clamp`; a split that
            does not divide levels[0] or is combined with resampling at level 1.
    """
    levels = clamp_levels(len(x), levels) if clamp else list(levels)
    rounds = _per_level(num_resamplings, len(levels), "num_resamplings")
    check_levels(len(x), levels)
    if split > 1 and (levels[0] % split or rounds[0]):
        raise ValueError(
            f"split={split} must divide levels[0]={levels[0]} and needs num_resamplings of 0 at level 1, "
            f"got {rounds[0]}."
        )
    samples = [0] * len(levels)
    if samples_per_cluster is not None:
        samples = _per_level(samples_per_cluster, len(levels), "samples_per_cluster")
    found: list[Level] = []
    items = x
    for number, num_clusters in enumerate(levels):
        item_ids = np.arange(len(items)) if number or ids is None else ids
        level_seed = _stream(seed, number)
        if number == 0 and split > 1:
            centroids = _split_kmeans(
                items,
                num_clusters // split,
                split,
                num_iterations,
                level_seed,
                metric,
                init,
                item_ids,
                num_threads,
                device,
            )
        else:
            per_cluster = samples[number] or len(items) // (2 * num_clusters)
            centroids = resampled_kmeans(
                items,
                num_clusters,
                rounds[number],
                max(per_cluster, 1),
                num_iterations,
                level_seed,
                metric,
                init,
                item_ids,
                num_threads,
                device,
            )
        assignment, scores = assign(items, centroids, metric, num_threads, device)
        found.append(Level(centroids, assignment, scores, np.bincount(assignment, minlength=len(centroids))))
        items = centroids
    return found


def resampled_kmeans(
    x: np.ndarray,
    num_clusters: int,
    num_resamplings: int,
    samples_per_cluster: int,
    num_iterations: int,
    seed: int,
    metric: Metric,
    init: Init = "kmeans++",
    ids: np.ndarray | None = None,
    num_threads: int | None = None,
    device: str | None = None,
) -> np.ndarray:
    """k-means, then `num_resamplings` times k-means of the members nearest to each centroid: centroids float32 [K, D].

    Clusters with fewer members than `samples_per_cluster` give what they have. A round whose sample has fewer rows than
    there are clusters ends the resampling, with the centroids of the round before.
    """
    ids = np.arange(len(x)) if ids is None else ids
    centroids = kmeans(x, num_clusters, num_iterations, seed, metric, init, ids, num_threads, device).centroids
    for step in range(1, num_resamplings + 1):
        cell, score = assign(x, centroids, metric, num_threads, device)
        sample = nearest_members(cell, score, samples_per_cluster, metric, ids)
        if len(sample) < num_clusters:
            break
        centroids = kmeans(
            x[sample], num_clusters, num_iterations, _stream(seed, step), metric, init, ids[sample], num_threads, device
        ).centroids
    return centroids


def nearest_members(cell: np.ndarray, score: np.ndarray, num: int, metric: Metric, ids: np.ndarray) -> np.ndarray:
    """Row numbers, ascending, of up to num members of each cell nearest to its centroid; ties to the smaller id."""
    order = np.lexsort((ids, -score if metric == "cosine" else score, cell))
    return np.sort(order[rank_in_segment(cell[order]) < num])


def rank_in_segment(keys: np.ndarray) -> np.ndarray:
    """Position of each element within its run of equal keys: [5, 5, 7, 7, 7] -> [0, 1, 0, 1, 2]."""
    if len(keys) == 0:
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    lengths = np.diff(np.append(starts, len(keys)))
    return np.arange(len(keys)) - np.repeat(starts, lengths)


def leaf_to_level(levels: Sequence[Level]) -> Iterator[np.ndarray]:
    """The cluster of each original row at each level, finest first: one int64 [N] per level."""
    cluster = None
    for level in levels:
        cluster = level.assignment if cluster is None else level.assignment[cluster]
        yield cluster


def check_levels(num_rows: int, levels: Sequence[int]) -> None:
    """Raises ValueError where a level asks for more clusters than the level below has items, or for none."""
    if not levels:
        raise ValueError("levels is empty; name the clusters of each level, finest first, for example [1000, 300].")
    below, what = num_rows, "rows"
    for number, num_clusters in enumerate(levels, start=1):
        if not 1 <= num_clusters <= below or (number > 1 and num_clusters == below):
            raise ValueError(
                f"level {number} asks for {num_clusters} clusters of {below} {what}; levels must decrease from the "
                f"number of rows: lower it, or allow clamping, which would use {clamp_levels(num_rows, levels)}."
            )
        below, what = num_clusters, f"clusters of level {number}"


def clamp_levels(num_rows: int, levels: Sequence[int]) -> list[int]:
    """Levels that num_rows can carry: each at most half of the level below; levels that do not shrink are dropped."""
    kept: list[int] = []
    below = num_rows
    for num_clusters in levels:
        num_clusters = max(min(num_clusters, below // 2), 1)
        if num_clusters < below or not kept:
            kept.append(num_clusters)
            below = num_clusters
    return kept


def _split_kmeans(
    x: np.ndarray,
    num_coarse: int,
    split: int,
    num_iterations: int,
    seed: int,
    metric: Metric,
    init: Init,
    ids: np.ndarray,
    num_threads: int | None,
    device: str | None,
) -> np.ndarray:
    coarse = kmeans(x, num_coarse, num_iterations, seed, metric, init, ids, num_threads, device).centroids
    cell, _ = assign(x, coarse, metric, num_threads, device)
    members = np.split(np.argsort(cell, kind="stable"), np.cumsum(np.bincount(cell, minlength=num_coarse))[:-1])
    centroids = []
    for number, rows in enumerate(members):
        if len(rows) == 0:
            continue
        clusters = min(split, len(rows))
        own_seed = _stream(seed, number)
        fine = kmeans(x[rows], clusters, num_iterations, own_seed, metric, init, ids[rows], num_threads, device)
        centroids.append(fine.centroids[fine.sizes > 0])
    return np.concatenate(centroids)


def _per_level(value: int | Sequence[int], num_levels: int, name: str) -> list[int]:
    values = [value] * num_levels if isinstance(value, int) else list(value)
    if len(values) < num_levels:
        raise ValueError(f"{name}={values} names {len(values)} levels, there are {num_levels}.")
    return values


def _stream(seed: int, number: int) -> int:
    """A seed independent of the seed that it comes from."""
    return int(hash_uint64(seed, np.int64(number)))
