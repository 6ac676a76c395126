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
from curation.ops.randomness import hash_sample, hash_uint64


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
    split: int | Sequence[int] = 1,
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
        split: with more than 1, level 1 is k-means to levels[0] / split groups, each then clustered by itself into
            `split` clusters: about `split` times cheaper. Empty clusters are dropped. One number a level: each so.
        clamp: lower a level's clusters to what the level below can carry (half its items), and drop levels that would
            not be smaller than the one below, instead of raising.
        ids: int64 [N], what random choices depend on; row numbers where absent.
        num_threads, device: as in `kmeans`; they change the time, never the result.

    Raises:
        ValueError: levels that do not decrease, or more clusters than items at a level without `clamp`; a split that
            does not divide its level.
    """
    levels = clamp_levels(len(x), levels) if clamp else list(levels)
    rounds = _per_level(num_resamplings, len(levels), "num_resamplings")
    splits = [split] + [1] * (len(levels) - 1) if isinstance(split, int) else _per_level(split, len(levels), "split")
    check_levels(len(x), levels)
    samples = [0] * len(levels)
    if samples_per_cluster is not None:
        samples = _per_level(samples_per_cluster, len(levels), "samples_per_cluster")
    found: list[Level] = []
    items = x
    for number, num_clusters in enumerate(levels):
        item_ids = np.arange(len(items)) if number or ids is None else ids
        found.append(
            cluster_level(
                items, num_clusters, rounds[number], samples[number], num_iterations, stream(seed, number), metric,
                init, splits[number], item_ids, num_threads, device,
            )
        )  # fmt: skip
        items = found[-1].centroids
    return found


def cluster_level(
    x: np.ndarray,
    num_clusters: int,
    num_resamplings: int,
    samples_per_cluster: int,
    num_iterations: int,
    seed: int,
    metric: Metric = "cosine",
    init: Init = "kmeans++",
    split: int = 1,
    ids: np.ndarray | None = None,
    num_threads: int | None = None,
    device: str | None = None,
) -> Level:
    """One level of a hierarchy; the arguments are those of `hierarchical_kmeans`, of this level alone.

    With a split, an item belongs to a cluster of its own group, though one of another group may be as near: what lies
    in different groups never meets.
    """
    ids = np.arange(len(x)) if ids is None else ids
    if num_clusters % split:
        raise ValueError(f"split={split} must divide the level's number of clusters, {num_clusters}.")
    if split == 1:
        per_cluster = samples_per_cluster or max(len(x) // (2 * num_clusters), 1)
        centroids = resampled_kmeans(
            x, num_clusters, num_resamplings, per_cluster, num_iterations, seed, metric, init, ids, num_threads, device
        )
        assignment, scores = assign(x, centroids, metric, num_threads, device)
        return Level(centroids, assignment, scores, np.bincount(assignment, minlength=len(centroids)))
    num_groups = num_clusters // split
    coarse = kmeans(x, num_groups, num_iterations, seed, metric, "random", ids, num_threads, device).centroids
    group, _ = assign(x, coarse, metric, num_threads, device)
    assignment, scores = np.empty(len(x), np.int64), np.empty(len(x), np.float32)
    centroids, sizes, base = [], [], 0
    for number in range(len(coarse)):
        rows = np.flatnonzero(group == number)
        if len(rows):
            level = cluster_group(
                x[rows], split, num_resamplings, samples_per_cluster, num_iterations, stream(seed, number), metric,
                init, ids[rows], num_threads=num_threads, device=device,
            )  # fmt: skip
            assignment[rows], scores[rows] = base + level.assignment, level.scores
            centroids.append(level.centroids)
            sizes.append(level.sizes)
            base += len(level.centroids)
    return Level(np.concatenate(centroids), assignment, scores, np.concatenate(sizes))


def cluster_group(
    x: np.ndarray,
    num_clusters: int,
    num_resamplings: int,
    samples_per_cluster: int,
    num_iterations: int,
    seed: int,
    metric: Metric,
    init: Init,
    ids: np.ndarray,
    most_rows: int | None = None,
    num_threads: int | None = None,
    device: str | None = None,
) -> Level:
    """One group of a level that is split: up to num_clusters, as many as there are rows and none that is empty.

    Args:
        most_rows: rows to learn from, a hash sample; all are assigned.
    """
    chosen = np.arange(len(x))
    if most_rows is not None and most_rows < len(x):
        chosen = np.flatnonzero(np.isin(ids, hash_sample(seed, ids, most_rows)))
    num_clusters = min(num_clusters, len(chosen))
    per_cluster = samples_per_cluster or max(len(chosen) // (2 * num_clusters), 1)
    centroids = resampled_kmeans(
        x[chosen], num_clusters, num_resamplings, per_cluster, num_iterations, seed, metric, init, ids[chosen],
        num_threads, device,
    )  # fmt: skip
    assignment, scores = assign(x, centroids, metric, num_threads, device)
    sizes = np.bincount(assignment, minlength=num_clusters)
    kept = np.cumsum(sizes > 0) - 1
    return Level(centroids[sizes > 0], kept[assignment], scores, sizes[sizes > 0])


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
            x[sample], num_clusters, num_iterations, stream(seed, step), metric, init, ids[sample], num_threads, device
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


def _per_level(value: int | Sequence[int], num_levels: int, name: str) -> list[int]:
    values = [value] * num_levels if isinstance(value, int) else list(value)
    if len(values) < num_levels:
        raise ValueError(f"{name}={values} names {len(values)} levels, there are {num_levels}.")
    return values


def stream(seed: int, number: int) -> int:
    """A seed independent of the seed that it comes from."""
    return int(hash_uint64(seed, np.int64(number)))
