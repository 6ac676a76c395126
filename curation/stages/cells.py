"""cells: the join's index. One-level k-means of the copy-detection vectors, and the vectors grouped by cell on disk."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from configs.ranges import check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import Cells, write_cells
from curation.stages.heads import is_head
from curation.stages.kmeans import FILES, KMeansConfig, assign_rows, train_centroids
from curation.stages.members import ImageRows, write_members

VERSION = 2


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
    scratch: Folder,
    images: ImageSet,
    encoder: str,
    heads: Folder,
    ranges: Ranges,
    config: CellsConfig,
    execution: ExecutionConfig,
) -> list[File]:
    """Cluster the heads (stages/heads.py) and write their vectors grouped by cell to a local folder.

    Args:
        scratch: what is finished on the way; emptied at the end.
    """
    chosen = partial(is_head, folder=heads, ranges=ranges)
    members = write_members(scratch / "members", ranges, chosen, execution, "cells: images")
    source = ImageRows(images, encoder, members)
    num_cells = config.num_cells(len(source))
    centroids = train_centroids(source, num_cells, config.kmeans, execution, scratch / "kmeans", "cells: k-means")
    names = assign_rows(source, centroids, execution, scratch / "assigned", "cells: assignment")
    starts = np.array([start for start, _ in source.bounds()])

    def cells_of(part_gids: np.ndarray) -> np.ndarray:
        number = int(np.searchsorted(starts, part_gids[0], side="right")) - 1
        ids = source.ids(source.chunks()[number])
        return (scratch / "assigned").read_array(names[number])[np.searchsorted(ids, part_gids)]

    sizes = np.zeros(num_cells, np.int64)
    for name in names:
        sizes += np.bincount((scratch / "assigned").read_array(name), minlength=num_cells)
    write_grouped(folder, source, cells_of, sizes, centroids, execution)
    (scratch / "kmeans").clear(FILES)
    (scratch / "assigned").clear(("assigned-*.npy",))
    (scratch / "members").clear(("members-*.npy",))
    return local_files(folder, "cells")


def write_grouped(
    folder: Path,
    source: ImageRows,
    cells_of: Callable[[np.ndarray], np.ndarray],
    sizes: np.ndarray,
    centroids: np.ndarray,
    execution: ExecutionConfig,
) -> Cells:
    """The vectors of a set's members grouped by cell, with at most a quarter of execution.memory_gb held.

    Args:
        cells_of: the cells of some members, all of one part.
        sizes: int64, members of each cell.
    """

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for chunk in source.chunks():
            for gids, rows in source.read(chunk):
                yield gids, rows, cells_of(gids)

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
