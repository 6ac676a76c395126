"""cluster: concepts. One level or a hierarchy of k-means over the surviving images, with the retrieval encoder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.ranges import check_ranges
from curation.engine.devices import run_on, task_device
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.hierarchy import Level, hierarchical_kmeans
from curation.ops.kmeans import balance
from curation.ops.randomness import hash_sample
from curation.stages.cells import local_files, write_grouped
from curation.stages.kmeans import KMeansConfig, assign_parts, train_centroids, unit_rows

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Source: DINOv2 (one level of 100,000) and DINOv3 (five levels), arXiv:2304.07193, arXiv:2508.10104."""

    levels: list[int] = field(default_factory=lambda: [100_000])
    """clusters per level, finest first"""
    scale: float = 1.0
    """multiplies the levels, to run a published hierarchy on a smaller pool"""
    min_images_per_cluster: int = 4
    """the finest level is lowered to the pool's images over this, and higher levels in proportion"""
    num_resamplings: list[int] = field(default_factory=lambda: [1, 10, 10, 10, 10])
    """rounds of resampling per level; published for four levels"""
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)

    def __post_init__(self) -> None:
        check_ranges(
            "cluster",
            self,
            levels="[1, inf)",
            scale="(0, inf)",
            min_images_per_cluster="[1, inf)",
            num_resamplings="[0, inf)",
        )
        if not self.num_resamplings:
            raise ValueError("cluster.num_resamplings=[] must name a number of rounds for each level, for example [1].")
        if not self.levels or any(a <= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(
                f"cluster.levels={list(self.levels)} must be decreasing numbers of clusters, finest first."
            )

    def levels_for(self, num_images: int) -> list[int]:
        """The levels, scaled, and lowered together where the pool cannot carry them; at least one cluster."""
        wanted = [max(1, round(level * self.scale)) for level in self.levels]
        ceiling = max(1, num_images // self.min_images_per_cluster)
        factor = min(1.0, ceiling / wanted[0])
        levels = [max(1, round(level * factor)) for level in wanted]
        return [level for i, level in enumerate(levels) if i == 0 or level < levels[i - 1]]


@dataclass(frozen=True)
class Clustering:
    """What the cluster stage wrote, read back."""

    folder: Folder

    def assignment(self) -> np.ndarray:
        """int32 [num_images]: the finest cluster of each surviving image, -1 for the others."""
        return self.folder.read_array("assignment.npy")

    def levels(self) -> list[Level]:
        """The hierarchy above the finest clusters included; level 1's items are the surviving images in gid order."""
        return [
            Level(*(self.folder.read_array(f"level-{i + 1}/{name}.npy") for name in Level._fields))
            for i in range(
                len([n for n in self.folder.names() if n.startswith("level-") and n.endswith("/centroids.npy")])
            )
        ]


def cluster_survivors(
    folder: Folder,
    grouped: Path,
    images: ImageSet,
    encoder: str,
    gids: np.ndarray,
    config: ClusterConfig,
    execution: ExecutionConfig,
) -> tuple[list[File], dict[str, Any]]:
    """Cluster the images `gids` (int64, ascending); write levels, assignment, and vectors grouped by cluster."""
    levels = config.levels_for(len(gids))
    k = config.kmeans
    sample = hash_sample(k.seed, gids, k.points_per_cluster * levels[0])
    resamplings = (list(config.num_resamplings) + [config.num_resamplings[-1]] * len(levels))[: len(levels)]
    if len(levels) > 1 and len(sample) <= k.max_points_in_memory:
        hierarchy = _hierarchy((images, encoder), levels, resamplings, k, sample, execution)
        finest, upper = hierarchy[0].centroids, hierarchy[1:]
    else:  # the finest level over Ray workers, without resampling; those above it cluster its centroids
        finest = train_centroids(images, encoder, gids, levels[0], k, execution, "cluster: k-means")
        upper = _hierarchy(finest, levels[1:], resamplings[1:], k, None, execution) if len(levels) > 1 else []
    assignment = assign_parts(images, encoder, gids, finest, execution, "cluster: assign")
    sizes = np.bincount(assignment[gids], minlength=len(finest))
    # Above the finest level the items are its centroids; at the finest, all images rather than the training sample.
    scores = np.zeros(0, np.float32)  # leaves are drawn by hash, so similarities to centroids are not kept
    hierarchy = [Level(finest, assignment[gids].astype(np.int64), scores, sizes), *upper]
    files = [folder.write_array("assignment.npy", assignment)]
    for number, level in enumerate(hierarchy, start=1):
        for name, values in zip(Level._fields, level, strict=True):
            files.append(folder.write_array(f"level-{number}/{name}.npy", values))
    write_grouped(grouped, images, encoder, gids, assignment, finest, execution)
    figures = {
        "levels": [len(level.centroids) for level in hierarchy],
        "balance": {name: float(value) for name, value in balance(sizes)._asdict().items()},
    }
    return files + local_files(grouped, "cells"), figures


def _hierarchy(
    items: np.ndarray | tuple[ImageSet, str],
    levels: list[int],
    resamplings: list[int],
    config: KMeansConfig,
    ids: np.ndarray | None,
    execution: ExecutionConfig,
) -> list[Level]:
    """Cluster rows, or the images `ids` of a set by an encoder: here, or where there is a GPU."""
    device = task_device(execution)
    job = items, levels, resamplings, config, ids
    if device is None:
        return _levels_of(job, None)
    options = {"execution": execution, "label": "cluster: hierarchy", "unit": "levels", "weights": [len(levels)]}
    return run_on(device, _levels_of, [job], device, **options)[0]


def _levels_of(job: tuple, device: str | None) -> list[Level]:
    items, levels, resamplings, config, ids = job
    return hierarchical_kmeans(
        items if isinstance(items, np.ndarray) else unit_rows(items[0].take_embeddings(items[1], ids)),
        levels,
        num_resamplings=resamplings,
        num_iterations=config.num_iterations,
        seed=config.seed,
        metric="cosine",
        clamp=True,
        ids=ids,
        device=device,
    )
