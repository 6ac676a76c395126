"""cells: the join's index. One-level k-means of the copy-detection vectors, and the vectors grouped by cell."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from configs.ranges import check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.stages.cells_before import CellsBefore, grow_cells
from curation.stages.grouped import write_cells
from curation.stages.kmeans import FILES, KMeansConfig, assign_rows, train_centroids
from curation.stages.members import ImageRows, write_members

VERSION = 3


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
    folder: Folder,
    images: ImageSet,
    encoder: str,
    ranges: Ranges,
    chosen: Callable[[int], np.ndarray],
    config: CellsConfig,
    execution: ExecutionConfig,
    before: CellsBefore | None = None,
) -> list[File]:
    """Cluster the `chosen` images (`write_members`), and write their vectors grouped by cell (`open_cells`).

    Args:
        before: cells of an earlier run to be kept: only images that it does not have look for theirs. Where there are
            twice as many images or more, cells are made anew.
    """
    members = write_members(folder / "members", ranges, chosen, execution, "cells: images")
    source = ImageRows(images, encoder, members)
    num_cells = config.num_cells(len(source))
    if before is not None and num_cells < 2 * before.cells.num_cells:
        files = grow_cells(folder, source, before, ranges, chosen, execution)
        (folder / "members").clear(("members-*.npy",))
        return files
    centroids = train_centroids(source, num_cells, config.kmeans, execution, folder / "kmeans", "cells: k-means")
    names = assign_rows(source, centroids, execution, folder / "assigned", "cells: assignment")
    files = write_cells(folder, source, partial(_assigned, folder / "assigned", names), centroids, execution, "cells")
    (folder / "kmeans").clear(FILES)
    (folder / "assigned").clear(("assigned-*.npy",))
    (folder / "members").clear(("members-*.npy",))
    return files


def _assigned(folder: Folder, names: list[str], number: int, _chunk: tuple[int, int]) -> np.ndarray:
    return folder.read_array(names[number])
