"""Images of clusters: survivors move to where their cluster draws, and what is drawn moves back to its range."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from curation.engine.exchange import BUCKET, buckets_for, exchange
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig
from curation.stages.cluster import Clustering
from curation.stages.members import count_ids
from curation.stages.survivors import Survivors

_ROW_BYTES = 64  # of a survivor and its cluster while they are sorted

Draw = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(gids, cluster of each counted from 0, quota of each of those clusters) -> the gids that are drawn"""


def draw_by_cluster(
    folder: Folder,
    survivors: Survivors,
    clustering: Clustering,
    quotas: np.ndarray,
    draw: Draw,
    execution: ExecutionConfig,
    label: str,
    named: str = "all",
) -> list[str]:
    """Draw from every cluster that has a quota (int64 [K]): names of tables gid, cluster in `folder`, by cluster.

    A name tells how many there are, which depends on memory_gb; rows of all of them together do not. Where pieces may
    stay though the survivors change, `named` tells whose they are.
    """
    number = min(buckets_for(_ROW_BYTES * sum(survivors.counts()), execution), len(quotas))
    names = [f"drawn-{named}-{number}-{bucket:05d}.parquet" for bucket in range(number)]
    exchange(
        [(number, named) for number in range(survivors.num_ranges)], _with_clusters, number, _write_drawn,
        survivors, clustering, quotas, draw, folder, names, scratch=folder / "moved", outputs=(folder, names),
        sort_by=["gid"], execution=execution, label=label, unit="images",
        weights=[float(count) for count in survivors.counts()],
    )  # fmt: skip
    return names


def to_ranges(
    folder: Folder, names: list[str], survivors: Survivors, into: str, execution: ExecutionConfig, label: str
) -> list[str]:
    """Put tables with a column gid in the order of gids: the names of INTO-RRRRR.parquet, one a range."""
    outputs = [f"{into}-{number:05d}.parquet" for number in range(survivors.num_ranges)]
    exchange(
        names, _by_range, len(outputs), _write_range, folder, survivors.size, outputs,
        scratch=folder / "back", outputs=(folder, outputs), sort_by=["gid"], execution=execution,
        label=f"{label}: ranges", unit="files",
    )  # fmt: skip
    return outputs


def sizes_of_survivors(survivors: Survivors, clustering: Clustering, execution: ExecutionConfig) -> np.ndarray:
    """int64 [K]: survivors in each finest cluster."""
    clusters = partial(_clusters_of_survivors, survivors, clustering)
    return count_ids(clusters, range(survivors.num_ranges), len(clustering.sizes()), execution, "survivors by cluster")


def _clusters_of_survivors(survivors: Survivors, clustering: Clustering, number: int) -> np.ndarray:
    return clustering.assignment(number)[survivors.gids(number) - number * survivors.size]


def _with_clusters(
    item: tuple[int, str], survivors: Survivors, clustering: Clustering, quotas: np.ndarray, *rest: object
) -> Iterator[pa.Table]:
    number, names = item[0], rest[-1]
    assert isinstance(names, list)
    gids = survivors.gids(number)
    cluster = clustering.assignment(number)[gids - number * survivors.size].astype(np.int64)
    wanted = quotas[cluster] > 0
    gids, cluster = gids[wanted], cluster[wanted]
    yield pa.table({"gid": gids, "cluster": cluster, BUCKET: (cluster * len(names) // len(quotas)).astype(np.int32)})


def _write_drawn(
    bucket: int, table: pa.Table, survivors: Survivors, clustering: Clustering, quotas: np.ndarray, draw: Draw,
    folder: Folder, names: list[str],
) -> None:  # fmt: skip
    gids = cluster = drawn = np.zeros(0, np.int64)
    if table.num_rows:
        gids, cluster = table["gid"].to_numpy(), table["cluster"].to_numpy()
        first = int(cluster.min())
        drawn = draw(gids, cluster - first, quotas[first : int(cluster.max()) + 1])
    columns = {"gid": drawn, "cluster": cluster[np.searchsorted(gids, drawn)]}
    folder.write_table(names[bucket], pa.table(columns))


def _by_range(name: str, folder: Folder, size: int, outputs: list[str]) -> Iterator[pa.Table]:
    table = folder.read_table(name)
    yield table.append_column(BUCKET, pa.array((table["gid"].to_numpy() // size).astype(np.int32)))


def _write_range(number: int, table: pa.Table, folder: Folder, size: int, outputs: list[str]) -> None:
    empty = pa.table({"gid": pa.array([], pa.int64()), "cluster": pa.array([], pa.int64())})
    folder.write_table(outputs[number], table if table.num_rows else empty)
