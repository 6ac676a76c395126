"""retrieve: what of the surviving pool resembles a seed set, image by image or cluster by cluster.

Neighbours are found among all distinct images, leaks too, deeper than can be drawn; leaks are left out when draws are
made. So the neighbours stay where an evaluation set comes or goes. Seed sets that are not done yet share two passes
over the pool's vectors: one in which a sample of each is compared with all of them, which tells how many clusters the
others must look into, and one for those others.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.engine.devices import run_on, task_device
from curation.engine.exchange import BUCKET, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.workers import ExecutionConfig, run_pieces, run_tasks
from curation.ops.cells import Cells, cell_ranks, nearest_cells, rows_of_gids
from curation.ops.hierarchy import rank_in_segment
from curation.ops.join import nearest
from curation.ops.join_kernels import grouped_by_cell
from curation.ops.randomness import hash_sample
from curation.ops.retrieval import (
    SAMPLED_QUERIES,
    SPARE,
    SPARE_SHARE,
    RetrievalCertificate,
    certify_probes,
    first_neighbours,
    resolve_collisions,
)
from curation.ops.sampling import capped, first_of_each
from curation.reading.seeds import RetrievalRule
from curation.stages.asking import Asked, pieces
from curation.stages.cluster import Clustering
from curation.stages.draws import draw_by_cluster
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
_BLOCK = 2**16  # seed images whose neighbours are one file
_BLOCK_PIECES = 8  # into which a block is cut for its draws
_MOST_SLICES = 1024
_SLICE_ROWS = 2**16
_FLUSH_ROWS = 2**22  # neighbours of a block that are held before they are cut to the nearest
_DEPTH = 8  # next_neighbor looks this many times deeper than k
_FILE, _SAMPLE, _CERTIFICATE = "matches.parquet", "sample.parquet", "certificate.json"


@dataclass(frozen=True)
class SeedQueries:
    """A seed set in sample mode, and the folder of its step."""

    folder: Folder
    asked: Asked
    rule: RetrievalRule

    @property
    def num_drawable(self) -> int:
        """Neighbours that may be drawn for one seed image."""
        return self.rule.k * (_DEPTH if self.rule.collisions == "next_neighbor" else 1)

    def depth(self, cells: Cells) -> int:
        """Neighbours that are looked for."""
        return min(cells.num_rows, SPARE_SHARE * self.num_drawable + SPARE)

    def sample(self) -> np.ndarray:
        """int64, ascending: the seed images that are compared with the whole pool."""
        return hash_sample(0, self.asked.gids, SAMPLED_QUERIES)

    def blocks(self) -> list[np.ndarray]:
        """The other seed images, in blocks."""
        others = np.setdiff1d(self.asked.gids, self.sample(), assume_unique=True)
        return [others[start : start + _BLOCK] for start in range(0, len(others), _BLOCK)]

    def taking(self, gids: np.ndarray) -> Asked:
        return Asked(self.asked.images, gids, self.asked.encoder)


def find_neighbours(sets: Sequence[SeedQueries], cells: Cells, execution: ExecutionConfig) -> None:
    """Write the nearest pool images of several seed sets: sample.parquet, and neighbours-*.parquet for each block."""
    if not sets:
        return
    named = sha256(" ".join(one.folder.url for one in sets).encode()).hexdigest()[:8]
    device = task_device(execution)
    slices = cells.slices(_MOST_SLICES, _SLICE_ROWS)
    weights = [float(cells.offsets[stop] - cells.offsets[start]) for start, stop in slices]
    root = Folder(sets[0].folder.url.rsplit("/", 1)[0])
    own = [one.folder.url.rsplit("/", 1)[1] for one in sets]

    def one_pass(what: str, queries: list["_Block"], names: list[str]) -> None:
        if queries:
            exchange(
                slices, _nearest_in_slice, len(queries), _write_nearest, queries, cells, root, names, device,
                scratch=sets[0].folder / f"pass-{named}-{what}", outputs=(root, names), sort_by=["query", "gid"],
                execution=execution, label=f"retrieve: {what}", unit="images", weights=weights,
                map_device=device,
            )  # fmt: skip

    samples = [_Block(one.taking(one.sample()), one.depth(cells), None, cells.num_cells) for one in sets]
    one_pass("sample", samples, [f"{name}/{_SAMPLE}" for name in own])
    queries, names = [], []
    for one, name in zip(sets, own, strict=True):
        blocks = one.blocks()
        nprobe = certificate(one, cells).nprobe
        probes = [f"probes-{number:05d}.bin" for number in range(len(blocks))]
        outputs = [f"neighbours-{number:05d}.parquet" for number in range(len(blocks))]
        if nprobe < cells.num_cells and not set(outputs) <= set(one.folder.names()):
            run_pieces(
                _write_probes, [one.taking(gids) for gids in blocks], probes, one.folder, cells, nprobe,
                device, execution=execution, label=f"retrieve: clusters of {name}", unit="blocks",
                run=partial(run_on, device),
            )  # fmt: skip
        for gids, file, output in zip(blocks, probes, outputs, strict=True):
            asked = one.folder / file if nprobe < cells.num_cells else None
            queries.append(_Block(one.taking(gids), one.depth(cells), asked, nprobe))
            names.append(f"{name}/{output}")
    one_pass("neighbours", queries, names)
    for one in sets:
        for file in one.folder.names():
            if file.startswith(("probes-", "pass-")):  # of an interrupted pass of other sets as well
                one.folder.delete(file)


def certificate(one: SeedQueries, cells: Cells) -> RetrievalCertificate:
    """What the sample of a seed set says: see `certify_probes`. Pairs that cannot be drawn do not count."""
    if one.folder.exists(_CERTIFICATE):
        return RetrievalCertificate(**json.loads(one.folder.read_bytes(_CERTIFICATE)))
    found = _certified(one, cells)
    one.folder.write_bytes(_CERTIFICATE, json.dumps(asdict(found)).encode())
    return found


def _certified(one: SeedQueries, cells: Cells) -> RetrievalCertificate:
    sample = one.sample()
    if len(sample) == len(one.asked.gids):
        return RetrievalCertificate(
            nprobe=cells.num_cells, num_queries=len(sample), num_pairs=0, recall=1.0, lower_bound=1.0, basis="exact"
        )
    found = one.folder.read_table(_SAMPLE)
    seed, gid, similarity = (found[name].to_numpy() for name in ("seed_gid", "gid", "similarity"))
    chosen = similarity >= one.rule.min_similarity
    query, gid = np.searchsorted(sample, seed[chosen]), gid[chosen]
    own_cell = cells.cell_of_rows(rows_of_gids(cells, gid))
    rank = cell_ranks(one.taking(sample).vectors()[query], cells.centroids, own_cell)
    return certify_probes(query, rank, cells.num_cells, one.rule.target_recall, len(sample))


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

    The driver holds the numbers of the seed images, 8 bytes each, a bit for each image of the pool, and the draws of
    one range of gids (those of mode `cluster`, of which there are at most `max_images`).
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
    files = [folder.described(_FILE, num_draws)]
    return files + pieces(folder, (_SAMPLE, "neighbours-"), execution, label), figures


# --- the passes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Some seed images that are asked together."""

    asked: Asked
    depth: int
    probes: Folder | None
    """the file of the clusters that they look into; None: all"""
    nprobe: int


def _write_probes(asked: Asked, folder: Folder, name: str, cells: Cells, nprobe: int, device: str | None) -> None:
    """Which queries look into each cluster: bounds int64 [K + 1], then query numbers int32, by cluster."""
    probes = nearest_cells(asked.vectors(), cells.centroids, nprobe, 1, device)
    order, bounds = grouped_by_cell(probes, cells.num_cells)
    folder.write_bytes(name, bounds.astype(np.int64).tobytes() + order.astype(np.int32).tobytes())


def _asking(block: _Block, first: int, stop: int, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Of clusters first to stop, the queries that look into each: query numbers, and bounds among them."""
    assert block.probes is not None
    where, name = Folder(block.probes.url.rsplit("/", 1)[0]), block.probes.url.rsplit("/", 1)[1]
    bounds = np.frombuffer(where.read_range(name, 8 * first, 8 * (stop + 1)), np.int64)
    start = 8 * (num_cells + 1)
    order = np.frombuffer(where.read_range(name, start + 4 * bounds[0], start + 4 * bounds[-1]), np.int32)
    return order.astype(np.int64), bounds - bounds[0]


def _nearest_in_slice(
    slice_: tuple[int, int],
    blocks: list[_Block],
    cells: Cells,
    root: Folder,
    names: list[str],
    device: str | None,
) -> Iterator[pa.Table]:
    own = cells.between(*slice_)
    for number, block in enumerate(blocks):
        found: list[tuple[np.ndarray, ...]] = []
        if block.probes is None:
            depth = min(block.depth, max(own.num_rows, 1))
            lists = nearest(block.asked.vectors(), own, depth, own.num_cells, num_threads=1, device=device)
            found.append(_flat(*lists))
        else:
            order, bounds = _asking(block, *slice_, cells.num_cells)
            asking, back = np.unique(order, return_inverse=True)
            if not len(asking):
                continue
            vectors = Asked(block.asked.images, block.asked.gids[asking], block.asked.encoder).vectors()
            held = 0
            for cell in np.flatnonzero((np.diff(bounds) > 0) & (np.diff(own.offsets) > 0)).tolist():
                some, one_cell = back[bounds[cell] : bounds[cell + 1]], own.between(cell, cell + 1)
                depth = min(block.depth, one_cell.num_rows)
                lists = nearest(vectors[some], one_cell, depth, 1, num_threads=1, device=device)
                query, gid, similarity = _flat(*lists)
                found.append((asking[some[query]], gid, similarity))
                held += len(query)
                if held > _FLUSH_ROWS:
                    found = [first_neighbours(*_joined(found), block.depth)]
                    held = len(found[0][0])
        query, gid, similarity = first_neighbours(*_joined(found), block.depth)
        to = np.full(len(query), number, np.int32)
        yield pa.table({"query": query, "gid": gid, "similarity": similarity, BUCKET: to})


def _flat(gids: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    query, rank = np.nonzero(gids >= 0)
    return query, gids[query, rank], similarities[query, rank]


def _joined(found: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    query, gid, similarity = (np.concatenate(column) for column in zip(none, *found, strict=True))
    return query, gid, similarity


def _write_nearest(
    number: int,
    table: pa.Table,
    blocks: list[_Block],
    cells: Cells,
    root: Folder,
    names: list[str],
    device: str | None,
) -> None:
    block = blocks[number]
    columns = _joined([])
    if table.num_rows:
        columns = tuple(table[name].to_numpy() for name in ("query", "gid", "similarity"))
    query, gid, similarity = first_neighbours(*columns, block.depth)
    root.write_table(
        names[number], pa.table({"seed_gid": block.asked.gids[query], "gid": gid, "similarity": similarity})
    )


# --- draws -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draws:
    """What the tasks know that draw for one seed set."""

    one: SeedQueries
    cells: Cells
    clustering: Clustering
    alive: np.ndarray
    """uint8 [ranges, bytes]: a bit for each image of the pool, set where it is a survivor"""
    range_rows: int
    nprobe: int
    device: str | None
    names: list[str]
    everything: str

    def surviving(
        self, query: np.ndarray, gid: np.ndarray, similarity: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        number, row = np.divmod(gid, self.range_rows)
        kept = self.alive[number, row >> 3] >> (row & 7).astype(np.uint8) & 1 == 1
        return query[kept], gid[kept], similarity[kept]


def _by_sample(
    one: SeedQueries, cells: Cells, clustering: Clustering, survivors: Survivors, execution: ExecutionConfig, label: str
) -> tuple[Iterator[pa.Table], dict[str, Any]]:
    """Draws by range of gids, each range in the order of (gid, seed image)."""
    told, device = certificate(one, cells), task_device(execution)
    alive, named = _alive(survivors, execution, label)
    range_rows = survivors.size if len(alive) > 1 else 8 * alive.shape[1]
    lists = [(_SAMPLE, 1)]
    lists += [(name, _BLOCK_PIECES) for name in one.folder.names() if name.startswith("neighbours-")]
    items = [(name, part, parts, named) for name, parts in lists for part in range(parts)]
    outputs = [f"drawn-{named}-{number:05d}.parquet" for number in range(len(alive))]
    everything = f"drawn-{named}.parquet"
    work = _Draws(one, cells, clustering, alive, range_rows, told.nprobe, device, outputs, everything)
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


def _alive(survivors: Survivors, execution: ExecutionConfig, label: str) -> tuple[np.ndarray, str]:
    """Who is left: uint8 [ranges, bytes], a bit an image. And a name for them: pieces stay where only the survivors
    changed, so those of draws are told apart."""
    numbers, told = list(range(survivors.num_ranges)), {"label": f"retrieve {label}: left", "unit": "ranges"}
    alive = np.stack(run_tasks(_alive_in, numbers, survivors, execution=execution, **told))
    return alive, sha256(alive).hexdigest()[:8]


def _alive_in(number: int, survivors: Survivors) -> np.ndarray:
    first, representative = number * survivors.size, survivors.representative(number)
    survives = np.zeros(max(survivors.size, len(representative)), bool)
    survives[: len(representative)] = representative == np.arange(first, first + len(representative))
    return np.packbits(survives, bitorder="little")


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
    nprobe = work.cells.num_cells if name == _SAMPLE else work.nprobe
    query, gid, similarity = _behind_leaks(seeds, query, gid, similarity, nprobe, work)
    near = similarity >= one.rule.min_similarity
    depth = one.num_drawable if to_one else one.rule.k
    query, gid, similarity = first_neighbours(query[near], gid[near], similarity[near], depth)
    rank = rank_in_segment(query).astype(np.int32)
    bucket = np.zeros(len(gid), np.int32) if to_one else (gid // work.range_rows).astype(np.int32)
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
            number, *found = _flat(*nearest(vectors, cells, depth, nprobe, num_threads=1, device=work.device))
            deeper.append((some[number], *found))
        more = _joined(deeper)
        listed[again] = 0
        listed += np.bincount(more[0], minlength=len(listed))
        kept = ~np.isin(query, again)
        query, gid, similarity = _joined(
            [(query[kept], gid[kept], similarity[kept]), work.surviving(*more)]
        )  # fmt: skip


def _resolve(_: int, table: pa.Table, work: _Draws, to_one: bool) -> None:
    """The draws among all claims: about 100 bytes a claim, of which a seed image has `num_drawable`."""
    work.one.folder.write_table(work.everything, _counting(table, work.one.rule) if table.num_rows else table)


def _counting(table: pa.Table, rule: RetrievalRule) -> pa.Table:
    claims = (table[name].to_numpy() for name in ("seed_gid", "rank", "gid", "similarity"))
    return table.filter(pa.array(resolve_collisions(*claims, rule.k, rule.collisions)))


def _by_range(name: str, work: _Draws, to_one: bool) -> Iterator[pa.Table]:
    table = work.one.folder.read_table(name)
    if table.num_rows:
        yield table.append_column(BUCKET, pa.array((table["gid"].to_numpy() // work.range_rows).astype(np.int32)))


def _write_draws(number: int, table: pa.Table, work: _Draws, to_one: bool) -> None:
    """The draws among a range's images, and their clusters."""
    if not table.num_rows:
        table = _MATCHES.empty_table().select(["gid", "seed_gid", "similarity", "rank"])
    elif not to_one:
        table = _counting(table, work.one.rule)
    cluster = work.clustering.assignment(number)[table["gid"].to_numpy() - number * work.range_rows]
    work.one.folder.write_table(work.names[number], table.append_column("cluster", pa.array(cluster.astype(np.int64))))


def _by_cluster(
    one: SeedQueries, clustering: Clustering, survivors: Survivors, execution: ExecutionConfig, label: str
) -> tuple[Iterator[pa.Table], dict[str, Any]]:
    rule, hits = one.rule, np.zeros(len(clustering.sizes()), np.int64)
    starts = list(range(0, len(one.asked.gids), _BLOCK))
    for found, counts in run_tasks(
        _hits, starts, one, clustering, execution=execution, label=f"retrieve {label}: clusters", unit="blocks"
    ):
        hits[found] += counts
    quotas = np.where(hits >= rule.min_hits, rule.images_per_cluster, 0)
    names = draw_by_cluster(
        one.folder, survivors, clustering, quotas, _first_by_hash, execution, f"retrieve {label}",
        _alive(survivors, execution, label)[1],
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
    rows = one.taking(one.asked.gids[start : start + _BLOCK]).vectors()
    return np.unique(clustering.finest_of(rows), return_counts=True)


def _first_by_hash(gids: np.ndarray, cluster: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    return first_of_each(gids, cluster, int(quotas.max()), 0)
