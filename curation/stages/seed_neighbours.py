"""The nearest pool images of seed images: two passes over the pool's vectors for all sets that are not done yet.

In the first a sample of each set is compared with all of them, which tells how many clusters the others must look into;
the second is for those others. Neighbours are found among all distinct images, leaks too, deeper than can be drawn, so
they stay where an evaluation set comes or goes.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256

import numpy as np
import pyarrow as pa

from curation.engine.devices import run_on, task_device
from curation.engine.exchange import BUCKET, exchange
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig, run_pieces
from curation.ops.cells import Cells, cell_ranks, nearest_cells, rows_of_gids
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
)
from curation.reading.seeds import RetrievalRule
from curation.stages.asking import Asked

BLOCK = 2**16  # seed images whose neighbours are one file
_MOST_SLICES = 1024
_SLICE_ROWS = 2**16
_FLUSH_ROWS = 2**22  # neighbours of a block that are held before they are cut to the nearest
_DEPTH = 8  # next_neighbor looks this many times deeper than k
SAMPLE, _CERTIFICATE = "sample.parquet", "certificate.json"


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
        return [others[start : start + BLOCK] for start in range(0, len(others), BLOCK)]

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
    one_pass("sample", samples, [f"{name}/{SAMPLE}" for name in own])
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
    found = one.folder.read_table(SAMPLE)
    seed, gid, similarity = (found[name].to_numpy() for name in ("seed_gid", "gid", "similarity"))
    chosen = similarity >= one.rule.min_similarity
    query, gid = np.searchsorted(sample, seed[chosen]), gid[chosen]
    own_cell = cells.cell_of_rows(rows_of_gids(cells, gid))
    rank = cell_ranks(one.taking(sample).vectors()[query], cells.centroids, own_cell)
    return certify_probes(query, rank, cells.num_cells, one.rule.target_recall, len(sample))


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
            found.append(flat(*lists))
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
                query, gid, similarity = flat(*lists)
                found.append((asking[some[query]], gid, similarity))
                held += len(query)
                if held > _FLUSH_ROWS:
                    found = [first_neighbours(*joined(found), block.depth)]
                    held = len(found[0][0])
        query, gid, similarity = first_neighbours(*joined(found), block.depth)
        to = np.full(len(query), number, np.int32)
        yield pa.table({"query": query, "gid": gid, "similarity": similarity, BUCKET: to})


def flat(gids: np.ndarray, similarities: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    query, rank = np.nonzero(gids >= 0)
    return query, gids[query, rank], similarities[query, rank]


def joined(found: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    query, gid, similarity = joined([])
    if table.num_rows:
        query, gid, similarity = (table[name].to_numpy() for name in ("query", "gid", "similarity"))
    query, gid, similarity = first_neighbours(query, gid, similarity, block.depth)
    root.write_table(
        names[number], pa.table({"seed_gid": block.asked.gids[query], "gid": gid, "similarity": similarity})
    )
