"""Clusters that stay: a run that extends another keeps its levels, and only new images look for their cluster.

So an image of the earlier release is in the cluster that it was in, and draws by cluster go on from there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from curation.engine.folder import Folder
from curation.engine.ranges import Ranges
from curation.engine.store import take_files
from curation.engine.workers import ExecutionConfig, run_pieces
from curation.stages.cells_before import CellsBefore, new_images
from curation.stages.kmeans import assign_rows
from curation.stages.members import ImageRows, Members, assigned_ids, count_ids
from curation.stages.split import group_base, place_rows

_FIRST = "level-1"
_LABEL = "cluster: new images"


def was_clustered(number: int, folder: Folder) -> np.ndarray:
    """bool by gid of a range: the images that a cluster step put into clusters."""
    return (folder / _FIRST).read_array(f"assignment-{number:05d}.npy") >= 0


def num_clusters(folder: Folder) -> int:
    """Clusters of the finest level of a cluster step."""
    level = folder / _FIRST
    return sum(len(level.read_array(name)) for name in level.names() if name.startswith("sizes-"))


def keep_levels(
    folder: Folder,
    rows: ImageRows,
    before: CellsBefore,
    ranges: Ranges,
    chosen: Callable[[int], np.ndarray],
    execution: ExecutionConfig,
) -> None:
    """Write all levels (`Clustering`) with the clusters of the run that is extended, for all rows."""
    names = [name for name in before.folder.names() if name.startswith("level-")]
    ours = (f"{_FIRST}/assignment-", f"{_FIRST}/sizes-")
    take_files([name for name in names if not name.startswith(ours)], folder, before.folder, execution)
    new = new_images(folder, rows, before, ranges, chosen, execution, "cluster")
    level, kept = folder / _FIRST, before.folder / _FIRST
    is_split = level.exists("groups.npy")
    chunks: list[tuple[tuple[int, int], Any, str]] = []
    if is_split:
        place_rows(new, kept, ranges, execution, level / "placed", _LABEL)
        base = group_base(kept, len(level.read_array("groups.npy")))
    else:
        centroids = level.read_array("centroids-00000.npy")
        found = assign_rows(new, centroids, execution, level / "assigned", f"{_LABEL}, assignment")
        chunks = list(zip(new.bounds(), new.chunks(), found, strict=True))
        base = np.array([0, len(centroids)])
    items = []
    for number in range(len(ranges)):
        start, stop = ranges.bounds(number)
        here = [(chunk, name) for (first, last), chunk, name in chunks if first < stop and last > start]
        items.append((number, here))
    outputs = [f"assignment-{number:05d}.npy" for number in range(len(ranges))]
    run_pieces(
        _grow_range, items, outputs, level, new, rows.members, before, ranges, is_split, execution=execution,
        label=f"{_LABEL}, ranges", unit="ranges",
    )  # fmt: skip
    sizes = count_ids(partial(assigned_ids, level), range(len(ranges)), int(base[-1]), execution, f"{_LABEL}, sizes")
    for number in range(len(base) - 1):
        level.write_array(f"sizes-{number:05d}.npy", sizes[base[number] : base[number + 1]])
    (level / "placed").clear(("assignment-*.npy", "assigned/assigned-*.parquet"))
    (folder / "new").clear(("members-*.npy",))


def _grow_range(
    item: tuple[int, list[tuple[Any, str]]],
    level: Folder,
    name: str,
    new: ImageRows,
    members: Members,
    before: CellsBefore,
    ranges: Ranges,
    is_split: bool,
) -> None:
    """One range of gids: those that stay where they were, and the new ones."""
    number, chunks = item
    start, stop = ranges.bounds(number)
    assignment = np.full(stop - start, -1, np.int32)
    if number < len(before.ranges):
        was = (before.folder / _FIRST).read_array(name)
        assignment[: len(was)] = was
    gone = np.ones(stop - start, bool)
    gone[members.between(start, stop) - start] = False
    assignment[gone] = -1
    if is_split:
        placed = (level / "placed").read_array(name)
        assignment = np.where(placed >= 0, placed, assignment)
    for chunk, chunk_name in chunks:
        ids, cells = new.ids(chunk), (level / "assigned").read_array(chunk_name)
        own = slice(*np.searchsorted(ids, [start, stop]))
        assignment[ids[own] - start] = cells[own]
    level.write_array(name, assignment)
