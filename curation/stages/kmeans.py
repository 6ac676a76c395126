"""k-means over an image set's embeddings: in one process on a hash sample, or over Ray tasks when that is too big."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from configs.ranges import SEEDS, check_ranges
from curation.engine.devices import run_on, task_device
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops import kmeans as ops
from curation.ops.randomness import hash_sample

_SHARES = 64


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """Spherical k-means; every choice is a hash of (seed, gid)."""

    num_iterations: int = 15
    """Lloyd iterations"""
    points_per_cluster: int = 256
    """training rows per cluster, a hash sample of the pool; stated, because too few ruin small clusters"""
    max_points_in_memory: int = 4_000_000
    """a larger training sample is iterated over Ray tasks, one a part, instead of in one process"""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("num_iterations", "points_per_cluster", "max_points_in_memory")
        check_ranges("kmeans", self, **dict.fromkeys(at_least_one, "[1, inf)"), seed=SEEDS)


def train_centroids(
    images: ImageSet,
    encoder: str,
    gids: np.ndarray,
    num_clusters: int,
    config: KMeansConfig,
    execution: ExecutionConfig,
    label: str,
) -> np.ndarray:
    """float32 [num_clusters, D] unit-norm centroids of the images `gids` (int64, ascending)."""
    sample = hash_sample(config.seed, gids, config.points_per_cluster * num_clusters)
    device = task_device(execution)
    # Beyond what fits, the start is a k-means of that; the iterations then see the whole sample.
    fits = len(sample) <= config.max_points_in_memory
    start = sample if fits else hash_sample(config.seed, gids, config.max_points_in_memory)
    shared = images, encoder, num_clusters, config, device
    if device is None:
        centroids = _centroids_of(start, *shared)
    else:  # the driver need not have a GPU
        told = {"label": label, "unit": "images", "weights": [len(start)]}
        [centroids] = run_on(device, _centroids_of, [start], *shared, execution=execution, **told)
    if fits:
        return centroids
    # A task adds up many parts, so that the driver merges a few sums of num_clusters x D, not one a part.
    by_part = split_by_part(images, sample)
    shares = [share for i in range(_SHARES) if (share := by_part[i::_SHARES])]
    for iteration in range(config.num_iterations):
        sums = run_on(
            device,
            _add_up,
            shares,
            images,
            encoder,
            centroids,
            device,
            execution=execution,
            label=f"{label} iteration {iteration + 1}/{config.num_iterations}",
            unit="images",
            weights=[sum(len(rows) for _, rows in share) for share in shares],
        )
        centroids, _ = ops.update_centroids(ops.merge(sums), centroids, "cosine", config.seed + iteration)
    return centroids


def assign_parts(
    images: ImageSet,
    encoder: str,
    gids: np.ndarray,
    centroids: np.ndarray,
    execution: ExecutionConfig,
    label: str,
) -> np.ndarray:
    """int32 [num_images]: the nearest centroid of each image in `gids`, -1 for the others."""
    by_part = split_by_part(images, gids)
    device = task_device(execution)
    cells = run_on(
        device,
        _part_cells,
        by_part,
        images,
        encoder,
        centroids,
        device,
        execution=execution,
        label=label,
        unit="images",
        weights=[len(rows) for _, rows in by_part],
    )
    assignment = np.full(images.num_images, -1, np.int32)
    for (part, rows), cell in zip(by_part, cells, strict=True):
        assignment[images.part_base[part] + rows] = cell
    return assignment


def split_by_part(images: ImageSet, gids: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Ascending gids -> (part, rows within it) for every part that has any."""
    cuts = np.searchsorted(gids, images.part_base)
    parts = [(p, gids[cuts[p] : cuts[p + 1]] - images.part_base[p]) for p in range(images.num_parts)]
    return [(part, rows) for part, rows in parts if len(rows)]


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """float16 rows as stored -> float32 rows of norm 1; rounding to float16 moved the norm by up to 5e-4."""
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _centroids_of(
    gids: np.ndarray, images: ImageSet, encoder: str, num_clusters: int, config: KMeansConfig, device: str | None
) -> np.ndarray:
    rows = unit_rows(images.take_embeddings(encoder, gids))
    return ops.kmeans(rows, num_clusters, config.num_iterations, config.seed, ids=gids, device=device).centroids


def _add_up(
    share: list[tuple[int, np.ndarray]], images: ImageSet, encoder: str, centroids: np.ndarray, device: str | None
) -> ops.PartialSums:
    def sums() -> Iterator[ops.PartialSums]:
        for part, rows_of_part in share:
            rows = unit_rows(images.embeddings(encoder, part)[rows_of_part])
            cell, score = ops.assign(rows, centroids, num_threads=1, device=device)
            yield ops.partial_sums(rows, cell, score, len(centroids), num_threads=1, device=device)

    return ops.merge(sums())


def _part_cells(
    item: tuple[int, np.ndarray], images: ImageSet, encoder: str, centroids: np.ndarray, device: str | None
) -> np.ndarray:
    rows = unit_rows(images.embeddings(encoder, item[0])[item[1]])
    return ops.assign(rows, centroids, num_threads=1, device=device)[0].astype(np.int32)
