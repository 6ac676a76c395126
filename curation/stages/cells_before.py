"""Cells that grow: those of the run that is extended keep their centroids and images, and new images find their own.

The images that stay come from that run's files, cell by cell, without those that are compared no more; new ones from
the parts of the pool.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import Cells
from curation.stages.grouped import open_cells, write_cells
from curation.stages.kmeans import assign_rows
from curation.stages.members import CHUNK_ROWS, ImageRows, Members, write_members


@dataclass(frozen=True)
class CellsBefore:
    """Cells or clusters of the run that is extended."""

    folder: Folder
    """of its step"""
    chosen: Callable[[int], np.ndarray]
    """number of a range -> bool by gid: the images that are in them"""
    ranges: Ranges

    @cached_property
    def cells(self) -> Cells:
        return open_cells(self.folder)


@dataclass(frozen=True)
class GrownRows:
    """Vectors of the images that stay in their cells, then those of new ones; a chunk is (is new, first, stop)."""

    cells: Cells
    members: Members
    """images that are compared now"""
    all_rows: ImageRows
    new: ImageRows

    def __len__(self) -> int:
        return len(self.members)

    def chunks(self) -> list[tuple[bool, int, int]]:
        starts = range(0, self.cells.num_rows, CHUNK_ROWS)
        old = [(False, start, min(start + CHUNK_ROWS, self.cells.num_rows)) for start in starts]
        return [*old, *((True, *chunk) for chunk in self.new.chunks())]

    def bounds(self) -> list[tuple[int, int]]:
        """Intervals of gids that hold all rows, whatever chunk they are in."""
        return self.all_rows.bounds()

    def weights(self) -> list[float]:
        """About so many rows of each chunk."""
        new = self.new.weights()
        share = len(self.new) / max(sum(new), 1.0)
        old = [float(stop - start) for is_new, start, stop in self.chunks() if not is_new]
        return [*old, *(share * weight for weight in new)]

    def _stay(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Which of the rows of the cells are compared now, and their gids."""
        gids = self.cells.read_gids(start, stop)
        stay = np.flatnonzero(self.members.include(gids))
        return stay, gids[stay]

    def ids(self, chunk: tuple[bool, int, int]) -> np.ndarray:
        is_new, start, stop = chunk
        return self.new.ids((start, stop)) if is_new else self._stay(start, stop)[1]

    def read(
        self, chunk: tuple[bool, int, int], seed: int = 0, largest: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        is_new, start, stop = chunk
        assert largest is None  # nobody samples them
        if is_new:
            yield from self.new.read((start, stop))
        else:
            stay, gids = self._stay(start, stop)
            yield gids, self.cells.read_half(start, stop)[stay]

    def sketches(self, chunk: tuple[bool, int, int]) -> np.ndarray | None:
        """uint64 [n, 8], of images that stay."""
        is_new, start, stop = chunk
        return None if is_new else self.cells.read_sketches(start, stop)[self._stay(start, stop)[0]]

    def cells_of(self, folder: Folder, names: dict[int, str], number: int, chunk: tuple[bool, int, int]) -> np.ndarray:
        """int64: of the images that stay, the cell that they are in; of new ones, what was found for them, by chunk."""
        is_new, start, stop = chunk
        if is_new:
            return folder.read_array(names[number])
        return self.cells.cell_of_rows(self._stay(start, stop)[0] + start)


def grow_cells(
    folder: Folder,
    rows: ImageRows,
    before: CellsBefore,
    ranges: Ranges,
    chosen: Callable[[int], np.ndarray],
    execution: ExecutionConfig,
) -> list[File]:
    """Write the cells of all rows (`open_cells`), with the centroids of the run that is extended."""
    is_new = partial(added, chosen=chosen, before=before)
    new = write_members(folder / "new", ranges, is_new, execution, "cells: new images")
    centroids = before.cells.centroids
    source = GrownRows(before.cells, rows.members, rows, ImageRows(rows.images, rows.encoder, new))
    names = assign_rows(source.new, centroids, execution, folder / "assigned", "cells: assignment")
    first = len(source.chunks()) - len(names)
    cells_of: Any = partial(source.cells_of, folder / "assigned", dict(enumerate(names, first)))
    files = write_cells(folder, source, cells_of, centroids, execution, "cells", source.sketches)
    (folder / "assigned").clear(("assigned-*.npy",))
    (folder / "new").clear(("members-*.npy",))
    return files


def added(number: int, chosen: Callable[[int], np.ndarray], before: CellsBefore) -> np.ndarray:
    """bool by gid of a range: the chosen images that the earlier cells do not have."""
    bits = chosen(number)
    if number < len(before.ranges):
        was = before.chosen(number)
        bits[: len(was)] &= ~was
    return bits
