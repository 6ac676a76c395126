"""A level of more clusters than one k-means can have: its items move to groups, and each group is clustered by itself.

Groups are k-means cells of the items. One exchange brings every item to its group, whose task learns from a hash sample
of them and says the cluster of each; a second one brings the answers back to the order of the items. Both resume from
finished files, so that a finished group is never clustered again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curation.engine.devices import task_device
from curation.engine.exchange import BUCKET, exchange
from curation.engine.folder import Folder
from curation.engine.ranges import Ranges
from curation.engine.workers import ExecutionConfig
from curation.ops.hierarchy import cluster_group, stream
from curation.ops.nearest import assign
from curation.stages.kmeans import KMeansConfig, train_centroids
from curation.stages.members import RowSource, unit


@dataclass(frozen=True)
class Group:
    """How each group of a level is clustered."""

    num_clusters: int
    num_resamplings: int
    num_iterations: int
    most_rows: int
    seed: int


def split_level(
    source: RowSource,
    num_groups: int,
    group: Group,
    config: KMeansConfig,
    ranges: Ranges,
    execution: ExecutionConfig,
    folder: Folder,
    label: str,
) -> None:
    """Cluster the rows into num_groups times group.num_clusters; as `cluster_level` of curation/ops/hierarchy.py.

    Writes to `folder`: groups.npy float32 [G, D], centroids-GGGGG.npy float32 of each group, sizes-GGGGG.npy int64, and
    assignment-RRRRR.npy int32 for each range of ids, the cluster of every row, -1 where there is none. Clusters are
    numbered through the groups.
    """
    coarse = train_centroids(source, num_groups, config, execution, folder / "kmeans", f"{label}: groups", group.seed)
    folder.write_array("groups.npy", coarse)
    device = task_device(execution)
    exchange(
        source.chunks(), _to_groups, num_groups, _cluster_group, source, coarse, group, folder, device,
        scratch=folder / "moved", outputs=(folder, [f"centroids-{number:05d}.npy" for number in range(num_groups)]),
        sort_by=["id"], execution=execution, label=label, unit="rows", weights=source.weights(),
        map_device=device, reduce_device=device,
    )  # fmt: skip
    base = group_base(folder, num_groups)
    exchange(
        range(num_groups), _to_ranges, len(ranges), _write_range, folder, base, ranges,
        scratch=folder / "back", outputs=(folder, [f"assignment-{number:05d}.npy" for number in range(len(ranges))]),
        sort_by=["id"], execution=execution, label=f"{label}: assignment", unit="groups",
    )  # fmt: skip


def place_rows(
    source: RowSource, kept: Folder, ranges: Ranges, execution: ExecutionConfig, folder: Folder, label: str
) -> None:
    """Find the clusters of rows in a level that is made: their group, and in it the nearest centroid.

    Writes to `folder`: assignment-RRRRR.npy int32 for each range of ids, -1 for all that are no rows of the source.

    Args:
        kept: what `split_level` wrote.
    """
    coarse = kept.read_array("groups.npy")
    device, num_groups = task_device(execution), len(coarse)
    exchange(
        source.chunks(), _to_groups, num_groups, _place_group, source, coarse, kept, folder, device,
        scratch=folder / "moved",
        outputs=(folder / "assigned", [f"assigned-{number:05d}.parquet" for number in range(num_groups)]),
        sort_by=["id"], execution=execution, label=label, unit="rows", weights=source.weights(),
        map_device=device, reduce_device=device,
    )  # fmt: skip
    exchange(
        range(num_groups), _to_ranges, len(ranges), _write_range, folder, group_base(kept, num_groups), ranges,
        scratch=folder / "back", outputs=(folder, [f"assignment-{number:05d}.npy" for number in range(len(ranges))]),
        sort_by=["id"], execution=execution, label=f"{label}: assignment", unit="groups",
    )  # fmt: skip


def group_base(folder: Folder, num_groups: int) -> np.ndarray:
    """int64 [G + 1]: the number of each group's first cluster, then that of all clusters."""
    sizes = [len(folder.read_array(f"sizes-{number:05d}.npy")) for number in range(num_groups)]
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _to_groups(
    chunk: Any, source: RowSource, coarse: np.ndarray, _: Group | Folder, folder: Folder, device: str | None
) -> Iterator[pa.Table]:
    parts = list(source.read(chunk))
    if not parts:
        return
    ids, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    cell = assign(unit(rows), coarse, num_threads=1, device=device)[0]
    width = rows.shape[1] * rows.itemsize
    vectors = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(rows.tobytes())])
    yield pa.table({"id": ids, "vector": vectors, BUCKET: cell.astype(np.int32)})


def _cluster_group(
    number: int,
    table: pa.Table,
    source: RowSource,
    coarse: np.ndarray,
    group: Group,
    folder: Folder,
    device: str | None,
) -> None:
    centroids, sizes = np.zeros((0, coarse.shape[1]), np.float32), np.zeros(0, np.int64)
    ids = cluster = np.zeros(0, np.int64)
    if table.num_rows:
        ids = table["id"].to_numpy()
        level = cluster_group(
            _unit_rows(table, coarse.shape[1]), group.num_clusters, group.num_resamplings, 0, group.num_iterations,
            stream(group.seed, number), "cosine", "kmeans++", ids, group.most_rows, num_threads=1,
            device=device,
        )  # fmt: skip
        centroids, cluster, sizes = level.centroids, level.assignment, level.sizes
    folder.write_table(
        f"assigned/assigned-{number:05d}.parquet", pa.table({"id": ids, "cluster": cluster.astype(np.int32)})
    )
    folder.write_array(f"sizes-{number:05d}.npy", sizes)
    folder.write_array(f"centroids-{number:05d}.npy", centroids)


def _place_group(
    number: int,
    table: pa.Table,
    source: RowSource,
    coarse: np.ndarray,
    kept: Folder,
    folder: Folder,
    device: str | None,
) -> None:
    ids = cluster = np.zeros(0, np.int64)
    centroids = kept.read_array(f"centroids-{number:05d}.npy")
    if table.num_rows:
        ids = table["id"].to_numpy()
        cluster, _ = assign(_unit_rows(table, coarse.shape[1]), centroids, num_threads=1, device=device)
    folder.write_table(
        f"assigned/assigned-{number:05d}.parquet", pa.table({"id": ids, "cluster": cluster.astype(np.int32)})
    )


def _unit_rows(table: pa.Table, dim: int) -> np.ndarray:
    """The vectors of moved rows: float32 [N, D] of norm 1."""
    vectors = table["vector"].combine_chunks()
    width = vectors.type.byte_width
    kind = np.float16 if width == 2 * dim else np.float32
    rows = np.frombuffer(vectors.buffers()[1], kind, len(vectors) * width // kind().itemsize, vectors.offset * width)
    return unit(rows.reshape(len(vectors), -1))


def _to_ranges(number: int, folder: Folder, base: np.ndarray, ranges: Ranges) -> Iterator[pa.Table]:
    table = folder.read_table(f"assigned/assigned-{number:05d}.parquet")
    ids, cluster = table["id"].to_numpy(), table["cluster"].to_numpy() + np.int32(base[number])
    yield pa.table({"id": ids, "cluster": cluster, BUCKET: ranges.of(ids).astype(np.int32)})


def _write_range(number: int, table: pa.Table, folder: Folder, base: np.ndarray, ranges: Ranges) -> None:
    start, stop = ranges.bounds(number)
    assignment = np.full(stop - start, -1, np.int32)
    if table.num_rows:
        assignment[table["id"].to_numpy() - start] = table["cluster"].to_numpy()
    folder.write_array(f"assignment-{number:05d}.npy", assignment)
