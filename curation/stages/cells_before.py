"""Cells that grow: those of the run that is extended keep their centroids and images, and new images find their own.

The images that stay come from that run's files, cell by cell, without those that are compared no more; new ones from
the parts of the pool.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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

_BLOCK_ROWS = 2**22  # of cells, whose images are looked up together


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
    staying: Members
    """rows of the cells whose images are compared now"""
    all_rows: ImageRows
    new: ImageRows

    def __len__(self) -> int:
        return len(self.staying) + len(self.new)

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

    def _stay(self, start: int, stop: int) -> np.ndarray:
        """Which of the rows of the cells are compared now, counted from start."""
        return self.staying.between(start, stop) - start

    def ids(self, chunk: tuple[bool, int, int]) -> np.ndarray:
        is_new, start, stop = chunk
        return self.new.ids((start, stop)) if is_new else self.cells.read_gids(start, stop)[self._stay(start, stop)]

    def read(
        self, chunk: tuple[bool, int, int], seed: int = 0, largest: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        is_new, start, stop = chunk
        assert largest is None  # nobody samples them
        if is_new:
            yield from self.new.read((start, stop))
        else:
            stay = self._stay(start, stop)
            yield self.cells.read_gids(start, stop)[stay], self.cells.read_half(start, stop)[stay]

    def sketches(self, chunk: tuple[bool, int, int]) -> np.ndarray | None:
        """uint64 [n, 8], of images that stay."""
        is_new, start, stop = chunk
        return None if is_new else self.cells.read_sketches(start, stop)[self._stay(start, stop)]

    def cells_of(self, folder: Folder, names: dict[int, str], number: int, chunk: tuple[bool, int, int]) -> np.ndarray:
        """int64: of the images that stay, the cell that they are in; of new ones, what was found for them, by chunk."""
        is_new, start, stop = chunk
        if is_new:
            return folder.read_array(names[number])
        return self.cells.cell_of_rows(self.staying.between(start, stop))


def grow_cells(
    folder: Folder,
    rows: ImageRows,
    before: CellsBefore,
    ranges: Ranges,
    chosen: Callable[[int], np.ndarray],
    execution: ExecutionConfig,
) -> list[File]:
    """Write the cells of all rows (`open_cells`), with the centroids of the run that is extended."""
    new = new_images(folder, rows, before, ranges, chosen, execution, "cells")
    staying = write_rows(folder / "staying", before.cells, rows.members, True, execution, "cells: those that stay")
    source, centroids = GrownRows(before.cells, staying, rows, new), before.cells.centroids
    names = assign_rows(source.new, centroids, execution, folder / "assigned", "cells: assignment")
    first = len(source.chunks()) - len(names)
    cells_of: Any = partial(source.cells_of, folder / "assigned", dict(enumerate(names, first)))
    files = write_cells(folder, source, cells_of, centroids, execution, "cells", source.sketches)
    (folder / "assigned").clear(("assigned-*.npy",))
    for name in ("new", "staying"):
        (folder / name).clear(("members-*.npy",))
    return files


def new_images(
    folder: Folder,
    rows: ImageRows,
    before: CellsBefore,
    ranges: Ranges,
    chosen: Callable[[int], np.ndarray],
    execution: ExecutionConfig,
    label: str,
) -> ImageRows:
    """Those of the rows' images that the earlier cells or clusters do not have; who they are is kept in `new/`."""
    is_new = partial(added, chosen=chosen, before=before)
    return replace(rows, members=write_members(folder / "new", ranges, is_new, execution, f"{label}: new images"))


def write_rows(
    folder: Folder, cells: Cells, members: Members, inside: bool, execution: ExecutionConfig, label: str
) -> Members:
    """Rows of the cells whose images are among the members, or are not.

    They lie anywhere in the pool, and each block of rows reads who all the members are: once, and in large blocks.
    """
    blocks = Ranges(cells.num_rows, _BLOCK_ROWS)
    return write_members(folder, blocks, partial(_among, blocks, cells, members, inside), execution, label)


def _among(blocks: Ranges, cells: Cells, members: Members, inside: bool, number: int) -> np.ndarray:
    return members.include(cells.read_gids(*blocks.bounds(number))) == inside


def added(number: int, chosen: Callable[[int], np.ndarray], before: CellsBefore) -> np.ndarray:
    """bool by gid of a range: the chosen images that the earlier cells do not have."""
    bits = chosen(number)
    if number < len(before.ranges):
        was = before.chosen(number)
        bits[: len(was)] &= ~was
    return bits
