"""retrieve: what of the surviving pool resembles a seed set, image by image or cluster by cluster.

Neighbours (stages/seed_neighbours.py) are found among leaks too; those are left out here, when draws are made.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.engine.devices import task_device
from curation.engine.exchange import BUCKET, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.cells import Cells
from curation.ops.hierarchy import rank_in_segment
from curation.ops.join import nearest
from curation.ops.retrieval import (
    BLOCK_PIECES,
    SAMPLED_QUERIES,
    first_neighbours,
    resolve_collisions,
)
from curation.ops.sampling import capped, first_of_each
from curation.reading.seeds import RetrievalRule
from curation.stages.asking import pieces
from curation.stages.cluster import Clustering
from curation.stages.draws import draw_by_cluster
from curation.stages.members import Members, write_members
from curation.stages.seed_neighbours import BLOCK, SAMPLE, SeedQueries, certificate, flat, joined
from curation.stages.survivors import Survivors

VERSION = 4
_MATCHES = pa.schema(
    [
        ("gid", pa.int64()),  # the pool image
        ("seed_gid", pa.int64()),  # row of the seed set; -1 when its cluster was hit
        ("similarity", pa.float32()),  # cosine to the seed image; null for a cluster
        ("rank", pa.int32()),  # 0: the seed image's nearest
        ("cluster", pa.int64()),
    ]
)
_FILE = "matches.parquet"


def retrieve_set(
    folder: Folder,
    one: SeedQueries,
    cells: Cells,
    clustering: Clustering,
    survivors: Survivors,
    execution: ExecutionConfig,
    label: str,
) -> tuple[list[File], dict[str, Any]]:
    """Draw survivors for one seed set; write matches.parquet (see _MATCHES), one row for each draw that counts, by gid.

    The driver holds the numbers of the seed images, 8 bytes each, and the draws of one range of gids (those of mode
    `cluster`, of which there are at most `max_images`).
    """
    tables, figures = iter(()), {}
    if one.rule.mode == "sample":
        tables, figures = _by_sample(one, cells, clustering, survivors, execution, label)
    elif one.rule.mode == "cluster":
        tables, figures = _by_cluster(one, clustering, survivors, execution, label)
    num_draws = num_images = 0
    with folder.writing(_FILE) as file, pq.ParquetWriter(file, _MATCHES, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table.select(_MATCHES.names).cast(_MATCHES))
            num_draws += table.num_rows
            num_images += len(np.unique(table["gid"].to_numpy()))  # no image is in two of them
    if "num_wanted" in figures:
        figures["shortfall"] = max(0, figures["num_wanted"] - num_draws)
    figures |= {"mode": one.rule.mode, "num_seeds": len(one.asked.gids), "num_draws": num_draws}
    figures["num_images"] = num_images
    for name in folder.names():
        if name.startswith("drawn-"):
            folder.delete(name)
    (folder / "left").clear(("members-*.npy",))
    files = [folder.described(_FILE, num_draws)]
    return files + pieces(folder, (SAMPLE, "neighbours-"), execution, label), figures


@dataclass(frozen=True)
class _Draws:
    """What the tasks know that draw for one seed set."""

    one: SeedQueries
    cells: Cells
    clustering: Clustering
    left: Members
    """the survivors"""
    nprobe: int
    device: str | None
    names: list[str]
    everything: str

    def surviving(
        self, query: np.ndarray, gid: np.ndarray, similarity: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        kept = self.left.include(gid)
        return query[kept], gid[kept], similarity[kept]


def _by_sample(
    one: SeedQueries, cells: Cells, clustering: Clustering, survivors: Survivors, execution: ExecutionConfig, label: str
) -> tuple[Iterator[pa.Table], dict[str, Any]]:
    """Draws by range of gids, each range in the order of (gid, seed image)."""
    told, device = certificate(one, cells), task_device(execution)
    left, named = _left(one, survivors, execution, label)
    lists = [(SAMPLE, 1)]
    lists += [(name, BLOCK_PIECES) for name in one.folder.names() if name.startswith("neighbours-")]
    items = [(name, part, parts, named) for name, parts in lists for part in range(parts)]
    outputs = [f"drawn-{named}-{number:05d}.parquet" for number in range(len(left.ranges))]
    everything = f"drawn-{named}.parquet"
    work = _Draws(one, cells, clustering, left, told.nprobe, device, outputs, everything)
    is_greedy = one.rule.collisions == "next_neighbor"
    told_as = {"execution": execution, "label": f"retrieve {label}: draws", "unit": "pieces", "map_device": device}
    if is_greedy:  # one task meets all claims: those that are won decide what is asked for next
        exchange(
            items, _claims, 1, _resolve, work, True, scratch=one.folder / "moved", outputs=(one.folder, [everything]),
            sort_by=["seed_gid", "rank"], **told_as,
        )  # fmt: skip
        exchange(
            [everything], _by_range, len(outputs), _write_draws, work, True, scratch=one.folder / "back",
            outputs=(one.folder, outputs), sort_by=["gid", "seed_gid"], execution=execution,
            label=f"retrieve {label}: ranges", unit="files",
        )  # fmt: skip
    else:
        exchange(
            items, _claims, len(outputs), _write_draws, work, False, scratch=one.folder / "moved",
            outputs=(one.folder, outputs), sort_by=["gid", "seed_gid"], **told_as,
        )  # fmt: skip
    figures = {"num_wanted": one.rule.k * len(one.asked.gids), "target_recall": one.rule.target_recall}
    return map(one.folder.read_table, outputs), figures | asdict(told)


def _left(one: SeedQueries, survivors: Survivors, execution: ExecutionConfig, label: str) -> tuple[Members, str]:
    """Who is left, and a name for them: pieces stay where only survivors changed, so those of draws are told apart."""
    label = f"retrieve {label}: left"
    left = write_members(one.folder / "left", survivors.ranges, partial(_survive, survivors), execution, label)
    digests = "".join(file.sha256 for file in pieces(one.folder / "left", "members-", execution, label))
    return left, sha256(digests.encode()).hexdigest()[:8]


def _survive(survivors: Survivors, number: int) -> np.ndarray:
    return survivors.representative(number) == np.arange(*survivors.ranges.bounds(number))


def _claims(item: tuple[str, int, int, str], work: _Draws, to_one: bool) -> Iterator[pa.Table]:
    """What some seed images want, nearest first."""
    name, part, parts, _ = item
    table, one = work.one.folder.read_table(name), work.one
    seed = table["seed_gid"].to_numpy()
    seeds = np.array_split(np.unique(seed), parts)[part]
    own = np.isin(seed, seeds)
    query, (gid, similarity) = (
        np.searchsorted(seeds, seed[own]),
        (table[name].to_numpy()[own] for name in ("gid", "similarity")),
    )
    nprobe = work.cells.num_cells if name == SAMPLE else work.nprobe
    query, gid, similarity = _behind_leaks(seeds, query, gid, similarity, nprobe, work)
    near = similarity >= one.rule.min_similarity
    depth = one.num_drawable if to_one else one.rule.k
    query, gid, similarity = first_neighbours(query[near], gid[near], similarity[near], depth)
    rank = rank_in_segment(query).astype(np.int32)
    bucket = np.zeros(len(gid), np.int32) if to_one else work.left.ranges.of(gid).astype(np.int32)
    yield pa.table({"gid": gid, "seed_gid": seeds[query], "similarity": similarity, "rank": rank, BUCKET: bucket})


def _behind_leaks(
    seeds: np.ndarray, query: np.ndarray, gid: np.ndarray, similarity: np.ndarray, nprobe: int, work: _Draws
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The survivors among neighbours; where leaks took too much of a list that was full, it is looked for deeper."""
    one, cells = work.one, work.cells
    listed = np.bincount(query, minlength=len(seeds))
    query, gid, similarity = work.surviving(query, gid, similarity)
    depth = one.depth(cells)
    while True:
        left = np.bincount(query, minlength=len(seeds))
        again = np.flatnonzero((left < one.num_drawable) & (listed >= depth) & (depth < cells.num_rows))
        if not len(again):
            return query, gid, similarity
        depth = min(4 * depth, cells.num_rows)
        deeper = []
        for some in np.array_split(again, -(-len(again) // SAMPLED_QUERIES)):
            vectors = one.taking(seeds[some]).vectors()
            number, *found = flat(*nearest(vectors, cells, depth, nprobe, num_threads=1, device=work.device))
            deeper.append((some[number], *found))
        more = joined(deeper)
        listed[again] = 0
        listed += np.bincount(more[0], minlength=len(listed))
        kept = ~np.isin(query, again)
        query, gid, similarity = joined(
            [(query[kept], gid[kept], similarity[kept]), work.surviving(*more)]
        )  # fmt: skip


def _resolve(_: int, table: pa.Table, work: _Draws, to_one: bool) -> None:
    """The draws among all claims: about 100 bytes a claim, of which a seed image has `num_drawable`."""
    work.one.folder.write_table(work.everything, _counting(table, work.one.rule) if table.num_rows else table)


def _counting(table: pa.Table, rule: RetrievalRule) -> pa.Table:
    seed, rank, gid, similarity = (table[name].to_numpy() for name in ("seed_gid", "rank", "gid", "similarity"))
    return table.filter(pa.array(resolve_collisions(seed, rank, gid, similarity, rule.k, rule.collisions)))


def _by_range(name: str, work: _Draws, to_one: bool) -> Iterator[pa.Table]:
    table = work.one.folder.read_table(name)
    if table.num_rows:
        yield table.append_column(BUCKET, pa.array(work.left.ranges.of(table["gid"].to_numpy()).astype(np.int32)))


def _write_draws(number: int, table: pa.Table, work: _Draws, to_one: bool) -> None:
    """The draws among a range's images, and their clusters."""
    if not table.num_rows:
        table = _MATCHES.empty_table().select(["gid", "seed_gid", "similarity", "rank"])
    elif not to_one:
        table = _counting(table, work.one.rule)
    cluster = work.clustering.assignment(number)[table["gid"].to_numpy() - work.left.ranges.bounds(number)[0]]
    work.one.folder.write_table(work.names[number], table.append_column("cluster", pa.array(cluster.astype(np.int64))))


def _by_cluster(
    one: SeedQueries, clustering: Clustering, survivors: Survivors, execution: ExecutionConfig, label: str
) -> tuple[Iterator[pa.Table], dict[str, Any]]:
    rule, hits = one.rule, np.zeros(len(clustering.sizes()), np.int64)
    starts = list(range(0, len(one.asked.gids), BLOCK))
    for found, counts in run_tasks(
        _hits, starts, one, clustering, execution=execution, label=f"retrieve {label}: clusters", unit="blocks"
    ):
        hits[found] += counts
    quotas = np.where(hits >= rule.min_hits, rule.images_per_cluster, 0)
    names = draw_by_cluster(
        one.folder, survivors, clustering, quotas, _first_by_hash, execution, f"retrieve {label}",
        _left(one, survivors, execution, label)[1],
    )  # fmt: skip
    gids, clusters = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for name in names:  # what is held is never more than one file and the cap
        table = one.folder.read_table(name)
        gids = np.concatenate([gids, table["gid"].to_numpy()])
        clusters = np.concatenate([clusters, table["cluster"].to_numpy()])
        chosen = np.isin(gids, capped(gids, rule.max_images, 0))
        gids, clusters = gids[chosen], clusters[chosen]
        one.folder.delete(name)
    order = np.argsort(gids)
    columns = {
        "gid": gids[order],
        "seed_gid": np.full(len(gids), -1, np.int64),
        "similarity": pa.nulls(len(gids), pa.float32()),
        "rank": np.zeros(len(gids), np.int32),
        "cluster": clusters[order],
    }
    num_hot = int(np.count_nonzero(quotas))
    wanted = min(num_hot * rule.images_per_cluster, rule.max_images)
    return iter([pa.table(columns)]), {"num_hit_clusters": num_hot, "num_wanted": wanted}


def _hits(start: int, one: SeedQueries, clustering: Clustering) -> tuple[np.ndarray, np.ndarray]:
    """Clusters that some seed images fall into, and how many of them do."""
    rows = one.taking(one.asked.gids[start : start + BLOCK]).vectors()
    return np.unique(clustering.finest_of(rows), return_counts=True)


def _first_by_hash(gids: np.ndarray, cluster: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    return first_of_each(gids, cluster, int(quotas.max()), 0)
