"""cluster: concepts. One level or a hierarchy of k-means over the distinct images, with the retrieval encoder.

Leaks of evaluation sets are clustered too, and left out of every draw: which clusters there are, and who is in them,
hangs on no evaluation set, so that a new one costs no clustering.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from configs.ranges import check_ranges
from curation.engine.devices import call_on, task_device
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import RANGE_ROWS, Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_pieces
from curation.ops.hierarchy import clamp_levels, cluster_level, stream
from curation.ops.kmeans import balance
from curation.ops.nearest import assign
from curation.stages.asking import pieces
from curation.stages.cells_before import CellsBefore
from curation.stages.cluster_before import keep_levels, num_clusters
from curation.stages.grouped import write_cells
from curation.stages.kmeans import FILES, KMeansConfig, assign_rows, read_sample, train_centroids, write_sample
from curation.stages.members import CentroidRows, ImageRows, RowSource, assigned_ids, count_ids, write_members
from curation.stages.split import Group, split_level

VERSION = 3


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
    clusters_per_group: int = 2048
    """a level of a hierarchy that is learned from more than kmeans.max_points_in_memory rows is split into groups that
    are given this many clusters each, and clustered one by one"""
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)

    def __post_init__(self) -> None:
        check_ranges(
            "cluster",
            self,
            levels="[1, inf)",
            scale="(0, inf)",
            min_images_per_cluster="[1, inf)",
            num_resamplings="[0, inf)",
            clusters_per_group="[2, inf)",
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

    def shapes_for(self, num_images: int) -> "list[LevelShape]":
        """The levels that will be made of so many images: of a hierarchy, each at most half as many as its items."""
        levels = self.levels_for(num_images)
        if len(levels) == 1:
            return [LevelShape(levels[0], 1, min(num_images, self.kmeans.points_per_cluster * levels[0]), 0)]
        items = min(num_images, self.kmeans.points_per_cluster * levels[0])
        levels = clamp_levels(items, levels)
        shapes = []
        for number, level in enumerate(levels):
            groups = 1
            if items > self.kmeans.max_points_in_memory:
                groups = max(1, round(level / self.clusters_per_group))
                level = groups * min(level, self.clusters_per_group)
            rounds = self.num_resamplings[min(number, len(self.num_resamplings) - 1)]
            shapes.append(LevelShape(level, groups, items, rounds))
            items = level
        return shapes


@dataclass(frozen=True)
class LevelShape:
    """One level of a hierarchy, before it is made."""

    num_clusters: int
    num_groups: int
    """groups that it is split into; 1: it is not"""
    num_rows: int
    """rows that it is learned from"""
    num_resamplings: int


@dataclass(frozen=True)
class Clustering:
    """What the cluster stage wrote, read back by ranges of gids."""

    folder: Folder

    @cached_property
    def _names(self) -> list[str]:
        return self.folder.names()

    @cached_property
    def num_levels(self) -> int:
        return len({name.split("/")[0] for name in self._names if name.startswith("level-")})

    def centroid_files(self, level: int = 1) -> list[str]:
        """The files of a level's centroids, in their order; several where the level was split."""
        return [name for name in self._names if name.startswith(f"level-{level}/centroids-")]

    def sizes(self, level: int = 1) -> np.ndarray:
        """int64 [clusters]: items of each cluster of a level; at level 1, all distinct images, leaks too."""
        names = [name for name in self._names if name.startswith(f"level-{level}/sizes-")]
        return np.concatenate([self.folder.read_array(name) for name in names])

    def num_ranges(self) -> int:
        return len([name for name in self._names if name.startswith("level-1/assignment-")])

    def assignment(self, number: int) -> np.ndarray:
        """int32: the finest cluster of each gid of a range; -1 for images that stand for no group."""
        return self.folder.read_array(f"level-1/assignment-{number:05d}.npy")

    @cached_property
    def _size(self) -> int:
        """gids of a range."""
        return len(self.assignment(0)) if self.num_ranges() > 1 else RANGE_ROWS

    def between(self, start: int, stop: int) -> np.ndarray:
        """int32: `assignment` of the images start <= gid < stop."""
        numbers = range(start // self._size, -(-stop // self._size))
        found = np.concatenate([np.zeros(0, np.int32), *map(self.assignment, numbers)])
        return found[start - numbers.start * self._size :][: stop - start]

    def clusters_of(self, gids: np.ndarray) -> np.ndarray:
        """int64: the finest clusters of some images, in their order, one range in memory at a time."""
        found = np.full(len(gids), -1, np.int64)
        for number in np.unique(gids // self._size).tolist():
            own = np.flatnonzero(gids // self._size == number)
            found[own] = self.assignment(number)[gids[own] - number * self._size]
        return found

    def parents(self) -> list[np.ndarray]:
        """From level 2 up, int64: the cluster of each cluster of the level below."""
        found = []
        for level in range(2, self.num_levels + 1):
            names = [name for name in self._names if name.startswith(f"level-{level}/assignment-")]
            found.append(np.concatenate([self.folder.read_array(name) for name in names]).astype(np.int64))
        return found

    def finest_of(self, rows: np.ndarray) -> np.ndarray:
        """int64: the finest cluster of unit rows [N, D] that are no images of the pool, as the pool's are found."""
        names = self.centroid_files()
        if not self.folder.exists("level-1/groups.npy"):
            return assign(rows, self.folder.read_array(names[0]), num_threads=1)[0]
        group = assign(rows, self.folder.read_array("level-1/groups.npy"), num_threads=1)[0]
        bounds = np.cumsum([0] + [len(self.folder.read_array(n.replace("centroids", "sizes"))) for n in names])
        found = np.empty(len(rows), np.int64)
        for number in np.unique(group).tolist():
            own = np.flatnonzero(group == number)
            found[own] = bounds[number] + assign(rows[own], self.folder.read_array(names[number]), num_threads=1)[0]
        return found


def cluster_images(
    folder: Folder,
    images: ImageSet,
    encoder: str,
    ranges: Ranges,
    chosen: Callable[[int], np.ndarray],
    config: ClusterConfig,
    execution: ExecutionConfig,
    before: CellsBefore | None = None,
) -> tuple[list[File], dict[str, Any]]:
    """Cluster the `chosen` images (`write_members`): write the levels (`Clustering`), and vectors grouped by cluster.

    Where the finest level is split, vectors are grouped by its groups.

    Args:
        before: clusters of an earlier run of this config, to be kept unless so many images are there that twice as many
            clusters would be made.
    """
    members = write_members(folder / "members", ranges, chosen, execution, "cluster: images")
    rows = ImageRows(images, encoder, members)
    source: RowSource = rows
    shapes = config.shapes_for(len(members))
    if before is not None and shapes[0].num_clusters < 2 * num_clusters(before.folder):
        keep_levels(folder, rows, before, ranges, chosen, execution)
    else:
        for number, shape in enumerate(shapes):
            level = folder / f"level-{number + 1}"
            _make_level(level, source, shape, number, len(shapes) == 1, ranges, config, execution)
            source = _centroids_of(level)
            ranges = Ranges(len(source))
    clustering, first = Clustering(folder), folder / "level-1"
    sizes, num_levels = clustering.sizes(), clustering.num_levels
    centroids, base = first.read_array("centroids-00000.npy"), None
    if first.exists("groups.npy"):
        centroids, base = first.read_array("groups.npy"), _centroids_of(first).base
    cells_of = partial(_clusters_of_chunk, clustering, rows, base)
    files = write_cells(folder, rows, cells_of, centroids, execution, "cluster: vectors")
    figures = {
        "levels": [len(clustering.sizes(level + 1)) for level in range(num_levels)],
        "balance": {name: float(value) for name, value in balance(sizes)._asdict().items()},
    }
    for number in range(num_levels):
        (folder / f"level-{number + 1}/kmeans").clear(FILES)
        (folder / f"level-{number + 1}/assigned").clear(("assigned-*",))
    (folder / "members").clear(("members-*.npy",))
    return pieces(folder, "level-", execution, "cluster") + files, figures


def _clusters_of_chunk(
    clustering: Clustering, rows: ImageRows, base: np.ndarray | None, _number: int, chunk: tuple[int, int]
) -> np.ndarray:
    """Cells of a chunk's images: their clusters, or the groups of them that begin at `base`."""
    found = clustering.clusters_of(rows.ids(chunk))
    return found if base is None else np.searchsorted(base, found, side="right") - 1


def _make_level(
    level: Folder,
    source: RowSource,
    shape: LevelShape,
    number: int,
    is_only: bool,
    ranges: Ranges,
    config: ClusterConfig,
    execution: ExecutionConfig,
) -> None:
    """Write one level, from what is finished of it; `sizes-*` is written last, but where the level is split."""
    k, label = config.kmeans, f"cluster: level {number + 1}"
    seed = stream(k.seed, number)
    num_clusters = min(shape.num_clusters, len(source))
    if shape.num_groups > 1:
        most = min(k.max_points_in_memory, k.points_per_cluster * config.clusters_per_group)
        each = num_clusters // shape.num_groups
        group = Group(each, shape.num_resamplings, k.num_iterations, most, seed)
        split_level(source, shape.num_groups, group, k, ranges, execution, level, label)
        return
    if level.exists("sizes-00000.npy"):
        return
    if is_only:
        centroids = train_centroids(source, num_clusters, k, execution, level / "kmeans", label)
    else:
        kept = level / "kmeans"
        if not kept.exists("centroids.npy"):
            names = write_sample(source, shape.num_rows, k.seed, execution, kept, label)
            device = task_device(execution)
            arguments = kept, names, num_clusters, shape.num_resamplings, k.num_iterations, seed, device
            found = call_on(device, _centroids_from, *arguments, execution=execution, label=label)
            kept.write_array("centroids.npy", found)
        centroids = kept.read_array("centroids.npy")
    names = assign_rows(source, centroids, execution, level / "assigned", f"{label}: assignment")
    outputs = [f"assignment-{number:05d}.npy" for number in range(len(ranges))]
    chunks = list(zip(source.bounds(), source.chunks(), names, strict=True))
    gathered = [_within(*ranges.bounds(number), chunks) for number in range(len(ranges))]
    run_pieces(
        _gather_range, gathered, outputs, level, source, execution=execution,
        label=f"{label}: ranges", unit="ranges",
    )  # fmt: skip
    sizes = count_ids(partial(assigned_ids, level), range(len(ranges)), len(centroids), execution, f"{label}: sizes")
    level.write_array("centroids-00000.npy", centroids)
    level.write_array("sizes-00000.npy", sizes)


def _centroids_from(
    kept: Folder,
    names: list[str],
    num_clusters: int,
    num_resamplings: int,
    num_iterations: int,
    seed: int,
    device: str | None,
) -> np.ndarray:
    rows, ids = read_sample(kept, names)
    return cluster_level(rows, num_clusters, num_resamplings, 0, num_iterations, seed, ids=ids, device=device).centroids


@dataclass(frozen=True)
class _Gathered:
    """A range of ids [start, stop), and the chunks that have rows in it, each with the file of its assignment."""

    start: int
    stop: int
    chunks: list[tuple[Any, str]]


def _within(start: int, stop: int, chunks: Sequence[tuple[tuple[int, int], Any, str]]) -> _Gathered:
    here = [(chunk, name) for (first, last), chunk, name in chunks if first < stop and last > start]
    return _Gathered(start, stop, here)


def _gather_range(item: _Gathered, level: Folder, name: str, source: RowSource) -> None:
    """One range of ids, from the chunks of rows that lie in it."""
    assignment = np.full(item.stop - item.start, -1, np.int32)
    for chunk, chunk_name in item.chunks:
        ids, cells = source.ids(chunk), (level / "assigned").read_array(chunk_name)
        own = slice(*np.searchsorted(ids, [item.start, item.stop]))
        assignment[ids[own] - item.start] = cells[own]
    level.write_array(name, assignment)


def _centroids_of(level: Folder) -> CentroidRows:
    names = [name for name in level.names() if name.startswith("centroids-")]
    counts = [len(level.read_array(name.replace("centroids", "sizes"))) for name in names]
    return CentroidRows(level, tuple(names), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
