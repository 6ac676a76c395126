"""cells: the join's index. One-level k-means of the copy-detection vectors, and the vectors grouped by cell on disk."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.ranges import check_ranges
from curation.engine.manifest import File
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import Cells, write_cells
from curation.stages.kmeans import KMeansConfig, assign_parts, split_by_part, train_centroids

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CellsConfig:
    """How finely the join's index is cut; recall is certified whatever the choice."""

    rows_per_cell: int = 256
    """mean images in a cell"""
    max_cells: int = 65_536
    kmeans: KMeansConfig = field(default_factory=lambda: KMeansConfig(num_iterations=10, points_per_cluster=64))

    def __post_init__(self) -> None:
        check_ranges("cells", self, rows_per_cell="[1, inf)", max_cells="[1, inf)")

    def num_cells(self, num_images: int) -> int:
        return max(1, min(round(num_images / self.rows_per_cell), self.max_cells))


def build_cells(
    folder: Path,
    images: ImageSet,
    encoder: str,
    gids: np.ndarray,
    config: CellsConfig,
    execution: ExecutionConfig,
) -> list[File]:
    """Cluster the images `gids` (int64, ascending) and write their vectors grouped by cell to a local folder."""
    num_cells = config.num_cells(len(gids))
    centroids = train_centroids(images, encoder, gids, num_cells, config.kmeans, execution, "cells: k-means")
    assignment = assign_parts(images, encoder, gids, centroids, execution, "cells: assign")
    write_grouped(folder, images, encoder, gids, assignment, centroids, execution)
    return local_files(folder, "cells")


def write_grouped(
    folder: Path,
    images: ImageSet,
    encoder: str,
    gids: np.ndarray,
    assignment: np.ndarray,
    centroids: np.ndarray,
    execution: ExecutionConfig,
) -> Cells:
    """The vectors of `gids` grouped by assignment[gid], with at most a quarter of execution.memory_gb held."""

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for part, rows in split_by_part(images, gids):
            block_gids = rows + images.part_base[part]
            yield block_gids, images.embeddings(encoder, part)[rows], assignment[block_gids]

    sizes = np.bincount(assignment[gids], minlength=len(centroids))
    return write_cells(folder, blocks(), sizes, centroids, buffer_bytes=int(execution.memory_gb * 0.25e9))


def local_files(folder: Path, prefix: str) -> list[File]:
    """Manifest entries of the files in a local folder, named below `prefix`, hashed as a stream."""
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".json"):
            continue
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append(File(path=f"{prefix}/{path.name}", rows=0, bytes=os.path.getsize(path), sha256=digest))
    return files
