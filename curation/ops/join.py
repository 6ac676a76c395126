"""The one join: which pool vectors are near these query vectors?

Vectors lie grouped by k-means cell. Each query probes its nprobe nearest cells; for each cell, all the queries that
probe it meet its members in one tile; 512-bit sign sketches may shorten the candidate list; an exact similarity decides
every pair. Decontamination and retrieval are two reducers of that; self-deduplication, whose queries are the pool, has
a module of its own (curation.ops.neighbours).

Vectors are unit-norm and stored as float16 (queries are rounded to float16 too, so that everything is measured with one
ruler). The similarity of two such vectors is computed exactly and rounded once to float32, and which cells are probed
depends on the query and the centroids alone: results are the same bits for any tile, range, thread or order.

Source: curation.md 3.7 for the measurements behind the layout; FAISS's big_batch_search, for turning the loop round.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import faiss
import numpy as np

from curation.ops.cells import Cells, nearest_cells
from curation.ops.join_kernels import BLOCK, grouped_by_cell, insert_nearest, pairs_by_score, pairs_by_sketch
from curation.ops.nearest import available_threads
from curation.ops.sketches import (
    SKETCH_BITS,
    SKETCH_WORDS,
    check_mirror,
    check_unit_rows,
    half_radius,
    mirrored,
    products,
)

DEFAULT_MEMORY_BYTES = 2**29


class Pairs(NamedTuple):
    """Near-duplicate pairs, sorted by (a, b), each once, a < b.

    Attributes:
        a, b: gids, int64 [P].
        similarity: float32 [P], exact.
        mirrored: bool [P]; the pair is nearer when one image is flipped.
    """

    a: np.ndarray
    b: np.ndarray
    similarity: np.ndarray
    mirrored: np.ndarray


class Matches(NamedTuple):
    """Pool rows near queries, sorted by (query, gid); columns as in Pairs, query being an index into the queries."""

    query: np.ndarray
    gid: np.ndarray
    similarity: np.ndarray
    mirrored: np.ndarray


class _Queries(NamedTuple):
    """What the kernels need of a block of queries."""

    vectors: np.ndarray  # float32 [Q, D], float16 values
    sketches: np.ndarray  # uint64 [Q, 8]
    order: np.ndarray  # int32, query indices grouped by the cell that they probe
    starts: np.ndarray  # int64 [K], the part of order for each cell
    stops: np.ndarray


class _Tile(NamedTuple):
    """A run of rows that are worked on at once: whole cells, or a piece of a large one."""

    start: int
    stop: int
    first_cell: int
    last_cell: int  # inclusive


def pairs_above(
    queries: np.ndarray,
    cells: Cells,
    similarity_threshold: float,
    nprobe: int,
    sketch_radius: int | None = None,
    *,
    mirror: np.ndarray | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    num_threads: int | None = None,
) -> Matches:
    """The pool rows at or above the threshold for each query, unit rows [Q, D].

    With nprobe = cells.num_cells and no sketch_radius this is brute force. A pool row that is the query itself is a
    match as any other.

    Args:
        similarity_threshold: cosine; pairs at or above it are kept.
        nprobe: how many of its nearest cells a query looks into.
        sketch_radius: pairs whose sketches differ in more bits are not looked at; None looks at all.
        mirror: signs [D] that turn an embedding into that of the flipped image; each query is then asked both ways, and
            the larger similarity of a pair is kept (the unflipped one when equal).
        max_memory_bytes: of queries and tiles together; the pairs themselves come on top.
        num_threads: changes the time, never the result; Faiss's setting where absent.
    """
    check_join(cells, nprobe, sketch_radius)
    check_unit_rows(queries, "queries")
    step = _queries_at_once(cells.dim, nprobe, cells.num_cells, max_memory_bytes)
    columns: list[tuple[np.ndarray, ...]] = []
    for low in range(0, len(queries), step):
        vectors = _stored(queries[low : low + step])
        for query, row, similarity, flipped in _both_ways(
            vectors, cells, similarity_threshold, nprobe, sketch_radius, mirror, max_memory_bytes, num_threads
        ):
            columns.append((low + query, row, similarity, np.full(len(row), flipped)))
    query, row, similarity, flipped = _concatenated(columns)
    return Matches(*_unique(query, cells.gids_of_rows(row), similarity, flipped))


def nearest(
    queries: np.ndarray,
    cells: Cells,
    k: int,
    nprobe: int,
    *,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    num_threads: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest pool rows of each query, unit rows [Q, D], among its nprobe nearest cells.

    Returns:
        gids int64 [Q, k] and similarities float32 [Q, k], nearest first, equal ones by smaller gid; where the probed
        cells hold fewer than k rows, gid -1 and similarity -inf.
    """
    check_join(cells, nprobe, None)
    check_unit_rows(queries, "queries")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    gids = np.full((len(queries), k), -1, np.int64)
    similarities = np.full((len(queries), k), -np.inf, np.float32)
    threads = available_threads(num_threads)
    tile_rows = _tile_rows(cells.dim, max_memory_bytes, threads)
    step = _queries_at_once(cells.dim + 3 * k, nprobe, cells.num_cells, max_memory_bytes // threads)
    step = max(min(step, -(-len(queries) // threads)), 1)

    def answer(low: int) -> None:  # blocks of queries share nothing, so each thread has its own
        rows = slice(low, low + step)
        asked = _stored(queries[rows])
        block = _block(asked, _no_sketches(len(asked)), cells, nprobe, 1)
        for tile in _tiles(cells, block, tile_rows):
            vectors, tile_gids = cells.read(tile.start, tile.stop), cells.read_gids(tile.start, tile.stop)
            for asking, members, scores in _scored(block, vectors, cells, tile, max_memory_bytes // threads):
                insert_nearest(
                    scores, asking, members.start, block.vectors, vectors, tile_gids, similarities[rows], gids[rows]
                )

    _in_threads(answer, range(0, len(queries), step), threads)
    return gids, similarities


def merge_pairs(batches: list[Pairs]) -> Pairs:
    """One sorted set out of several: each pair once, with its larger similarity (the unflipped one when equal)."""
    return Pairs(*_unique(*_concatenated([tuple(batch) for batch in batches])))


def _both_ways(
    vectors: np.ndarray,
    cells: Cells,
    threshold: float,
    nprobe: int,
    radius: int | None,
    mirror: np.ndarray | None,
    max_memory_bytes: int,
    num_threads: int | None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, bool]]:
    """(query index, row, similarity, mirrored) of one block of queries as they are, then mirrored."""
    if mirror is not None:
        check_mirror(mirror, cells.dim)
    for signs in (None,) if mirror is None else (None, mirror):
        asked = vectors if signs is None else mirrored(vectors, signs)
        sketches = _no_sketches(len(asked)) if radius is None else cells.sketch(asked)
        block = _block(asked, sketches, cells, nprobe, num_threads)
        query, row, similarity = _block_pairs(block, cells, threshold, radius, max_memory_bytes, num_threads)
        yield query, row, similarity, signs is not None


def _block_pairs(
    block: _Queries, cells: Cells, threshold: float, radius: int | None, max_memory_bytes: int, num_threads: int | None
) -> tuple[np.ndarray, ...]:
    threads = available_threads(num_threads)

    def work(tile: _Tile) -> tuple[np.ndarray, ...]:
        vectors = cells.read(tile.start, tile.stop)
        if radius is None:
            return _exact_tile(block, vectors, cells, tile, threshold, max_memory_bytes // threads)
        bounds = np.clip(cells.offsets[tile.first_cell : tile.last_cell + 2], tile.start, tile.stop) - tile.start
        own = slice(tile.first_cell, tile.last_cell + 1)
        words = sketch_columns(cells.read_sketches(tile.start, tile.stop))
        found = pairs_by_sketch(
            words, vectors, bounds, *block[:3], block.starts[own], block.stops[own], radius,
            half_radius(radius), np.float32(threshold), max(len(vectors), 1024),
        )  # fmt: skip
        return found[0].astype(np.int64), found[1] + tile.start, found[2]

    tiles = _tiles(cells, block, _tile_rows(cells.dim, max_memory_bytes, threads))
    return _concatenated(_in_threads(work, tiles, threads) or [_no_pairs()])


def _block(vectors: np.ndarray, sketches: np.ndarray, cells: Cells, nprobe: int, num_threads: int | None) -> _Queries:
    num_queries = len(vectors)
    if nprobe == cells.num_cells:
        everyone = np.arange(num_queries, dtype=np.int32)
        starts = np.zeros(cells.num_cells, np.int64)
        return _Queries(vectors, sketches, everyone, starts, starts + num_queries)
    order, bounds = grouped_by_cell(nearest_cells(vectors, cells.centroids, nprobe, num_threads), cells.num_cells)
    return _Queries(vectors, sketches, order, bounds[:-1], bounds[1:])


def _tiles(cells: Cells, block: _Queries, tile_rows: int) -> Iterator[_Tile]:
    """Runs of at most tile_rows rows that cover every cell that some query probes."""
    first, start = 0, 0
    asked = block.stops > block.starts
    while first < cells.num_cells:
        if not asked[first] or start == cells.offsets[first + 1]:
            first += 1
            start = int(cells.offsets[first])
            continue
        last = int(np.searchsorted(cells.offsets, start + tile_rows, side="right")) - 2  # last cell that fits whole
        last = max(min(last, cells.num_cells - 1), first)
        stop = min(int(cells.offsets[last + 1]), start + tile_rows)
        yield _Tile(start, stop, first, last)
        first = last if stop < cells.offsets[last + 1] else last + 1
        start = stop


def sketch_columns(sketches: np.ndarray) -> np.ndarray:
    """Sketches [n, 8] as words [8, n + padding]: the kernel always reads whole blocks of members."""
    columns = np.zeros((SKETCH_WORDS, len(sketches) + BLOCK), np.uint64)
    columns[:, : len(sketches)] = sketches.T
    return columns


def _exact_tile(
    block: _Queries, vectors: np.ndarray, cells: Cells, tile: _Tile, threshold: float, max_memory_bytes: int
) -> tuple[np.ndarray, ...]:
    """Pairs of a tile without sketches: a matrix product with a margin, then the exact similarity."""
    found = [_no_pairs()]
    for asking, members, scores in _scored(block, vectors, cells, tile, max_memory_bytes):
        query, member, similarity = pairs_by_score(
            scores, asking, members.start, block.vectors, vectors, np.float32(threshold)
        )
        found.append((query, member + tile.start, similarity))
    return _concatenated(found)


def _scored(
    block: _Queries, vectors: np.ndarray, cells: Cells, tile: _Tile, max_memory_bytes: int
) -> Iterator[tuple[np.ndarray, range, np.ndarray]]:
    """(query indices [q], members of the tile [n], rough similarities [q, n]) for all that meet in a tile."""
    together = len(block.order) == len(block.vectors) and np.all(block.stops - block.starts == len(block.order))
    spans = (
        [(tile.first_cell, tile.start, tile.stop)]  # everyone asks every cell: one large product
        if together
        else [
            (cell, max(int(cells.offsets[cell]), tile.start), min(int(cells.offsets[cell + 1]), tile.stop))
            for cell in range(tile.first_cell, tile.last_cell + 1)
        ]
    )
    for cell, start, stop in spans:
        members = range(start - tile.start, stop - tile.start)
        if not len(members):
            continue
        step = max(max_memory_bytes // 4 // (4 * (len(members) + cells.dim)), 1)
        for low in range(int(block.starts[cell]), int(block.stops[cell]), step):
            asking = block.order[low : min(low + step, int(block.stops[cell]))]
            yield asking, members, products(block.vectors[asking], vectors[members.start : members.stop])


def _unique(
    a: np.ndarray, b: np.ndarray, similarity: np.ndarray, flipped: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sort by (a, b) and keep, of equal ones, the most similar, the unflipped first."""
    order = np.lexsort((flipped, -similarity, b, a))
    a, b = a[order], b[order]
    first = np.ones(len(a), bool)
    first[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    kept = order[first]
    return a[first], b[first], similarity[kept], flipped[kept]


def _concatenated(columns: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    columns = columns or [(*_no_pairs(), np.empty(0, bool))]
    return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


def _no_pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)


def _no_sketches(num_queries: int) -> np.ndarray:
    return np.empty((num_queries, SKETCH_WORDS), np.uint64)


def _stored(queries: np.ndarray) -> np.ndarray:
    """Queries as the pool stores its vectors: float32 of float16 values."""
    return np.ascontiguousarray(queries.astype(np.float16).astype(np.float32))


def _in_threads(work: Callable, items: Iterator | range, num_threads: int) -> list:
    """Results in the order of the items, from threads in which Faiss and its BLAS are single-threaded."""
    with ThreadPoolExecutor(num_threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, items))


def _queries_at_once(dim: int, nprobe: int, num_cells: int, max_memory_bytes: int) -> int:
    """Queries in half of the memory: a vector twice (as it is and mirrored), a sketch, and its probes twice."""
    probes = 8 * nprobe if nprobe < num_cells else 8
    return max(max_memory_bytes // 2 // (8 * dim + 16 * SKETCH_WORDS + probes), 1)


def _tile_rows(dim: int, max_memory_bytes: int, num_threads: int) -> int:
    """Rows of a tile, so that every thread's takes an eighth of the memory at most, and 8 MiB is enough for any."""
    return max(min(max_memory_bytes // 8 // num_threads, 2**23) // (6 * dim + 16 * SKETCH_WORDS), 1)


def check_join(cells: Cells, nprobe: int, sketch_radius: int | None) -> None:
    if not 1 <= nprobe <= cells.num_cells:
        raise ValueError(f"nprobe must be between 1 and the number of cells, {cells.num_cells}, got {nprobe}.")
    if sketch_radius is not None and not 0 <= sketch_radius <= SKETCH_BITS:
        raise ValueError(f"sketch_radius must be between 0 and {SKETCH_BITS} bits, or None, got {sketch_radius}.")
