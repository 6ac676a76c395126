"""The self-join: for a run of rows, the near rows in the cells that each probes, at most 64 and the first of all.

A run is as long as memory allows, millions of rows: its vectors stay as float16 with their sketches and their probes,
a byte each, and the cells pass by in tiles, once for the rows as they are and mirrored together. So N rows are read
N / run times, and nothing that is found depends on the length of a run, a tile or a call.

Rows that are alike by the hundred thousand would find each other 10^11 times. So a row looks at the members of a cell
in their order until it has found 64 there, and once it has found 256, each further cell gives it one: the first, which
those like it find as well. It keeps the 64 most similar and the hit of smallest row, its leader.

Hits are counted at or above the floor, whatever threshold is used later: pairs at a threshold are those edges that
reach it. Only a row that is `capped` may have had others.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from curation.ops.cells import Cells, nearest_cells
from curation.ops.join import DEFAULT_MEMORY_BYTES, Pairs, check_join, merge_pairs, sketch_columns
from curation.ops.neighbour_kernels import (
    MAX_NEIGHBOURS,
    Asking,
    Counts,
    Lists,
    code_width,
    decode_probes,
    empty_lists,
    encode_probes,
    listed_once,
    meet_by_sketch,
    pairs_in_scores,
    settle,
    start_cell,
    still_asking,
    widen_rows,
)
from curation.ops.sketches import (
    ROUGH_MARGIN,
    SKETCH_WORDS,
    check_mirror,
    half_radius,
    products,
    radius_needed,
    widened,
)

PIECE_ROWS = 2**16
"""Rows, in the cells' order, whose edges are listed together: a file of the join, whatever run they were found in."""

_MAX_TILE_BYTES = 2**25
_MEMBERS_AT_ONCE = 2**10  # of a cell in one product: a row that has found enough is left out of the next
_ROWS_AT_ONCE = 2**14  # whose probes are found at once

Candidates = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
"""(asking float32 [q, D], members float32 [n, D], rough floor) -> int64 [P, 2], ascending: all pairs (row of asking,
row of members) of similarity at or above the rough floor, which is lower than the floor by more than the error of a
float32 product; pairs below it do no harm."""


class Neighbours(NamedTuple):
    """What a run of rows has found.

    Attributes:
        start, stop: the run.
        gids: int64 [Q], of its rows.
        lists: see curation.ops.neighbour_kernels.
        bytes_read: of the cells.
    """

    start: int
    stop: int
    gids: np.ndarray
    lists: Lists
    bytes_read: int

    def pieces(self) -> Iterator[tuple[int, Pairs, np.ndarray]]:
        """(number, edges, gids of capped rows) of each PIECE_ROWS rows: edges in no order, each once in its piece."""
        low = self.start
        while low < self.stop:
            high = min((low // PIECE_ROWS + 1) * PIECE_ROWS, self.stop)
            rows = slice(low - self.start, high - self.start)
            lists, gids = self.lists._replace(entry=self.lists.entry[rows]), self.gids[rows]
            entries = lists.entry[lists.entry >= 0]
            size = int(lists.size[entries].astype(np.int64).sum()) + len(entries)
            out = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32), np.empty(size, bool)
            count = listed_once(lists, gids, np.argsort(gids), 0, len(gids), *out)
            yield low // PIECE_ROWS, Pairs(*(column[:count] for column in out)), gids[lists.capped[rows] > 0]
            low = high


class _Tile(NamedTuple):
    """Whole cells, or a piece of a large one."""

    start: int
    stop: int
    first_cell: int
    last_cell: int  # inclusive
    continues: bool  # its cell began in the tile before


class _Way(NamedTuple):
    """The rows as they are, or mirrored."""

    asking: Asking
    probes: "_Probes"
    counts: Counts


def near_rows(
    cells: Cells,
    start: int,
    stop: int,
    floor: float,
    nprobe: int,
    sketch_radius: int | None = None,
    *,
    mirror: np.ndarray | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    candidates: Candidates | None = None,
) -> Neighbours:
    """Ask for the rows start to stop, on one thread.

    A pair is found when one end looks at the other: over all runs, either may be the one.

    Args:
        floor: cosine; pairs at or above it are found.
        sketch_radius: pairs whose sketches differ in more bits are not looked at; None looks at all.
        mirror: signs [D] that turn an embedding into that of the flipped image; each row then asks both ways, and the
            larger similarity of a pair is kept (the unflipped one when equal).
        max_memory_bytes: see run_rows; it changes the size of a tile, never the result.
        candidates: by a matrix product rather than by sketches, the same pairs; with no radius, BLAS where absent.
    """
    check_join(cells, nprobe, sketch_radius)
    if mirror is not None:
        check_mirror(mirror, cells.dim)
    half = cells.read_half(start, stop)
    ways = [_way(cells, half, start, nprobe, signs) for signs in ([None] if mirror is None else [None, mirror])]
    lists = empty_lists(stop - start)
    bytes_read = (stop - start) * cells.row_bytes
    if candidates is None and sketch_radius is None:
        candidates = near_by_product
    for tile in _tiles(cells, ways, max_memory_bytes):
        members, gids = cells.read(tile.start, tile.stop), cells.read_gids(tile.start, tile.stop)
        sketches = None if sketch_radius is None else cells.read_sketches(tile.start, tile.stop)
        bytes_read += (tile.stop - tile.start) * cells.row_bytes
        bounds = np.clip(cells.offsets[tile.first_cell : tile.last_cell + 2], tile.start, tile.stop) - tile.start
        for mirrored, way in enumerate(ways):
            order, starts, stops = way.probes.of(tile.first_cell, tile.last_cell)
            if candidates is None:
                meet_by_sketch(
                    sketch_columns(sketches), members, gids, bounds, tile.continues, way.asking, order, starts, stops,
                    tile.start, sketch_radius, half_radius(sketch_radius), np.float32(floor), mirrored, way.counts,
                    lists,
                )  # fmt: skip
                continue
            for cell, (low, high) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
                if cell > 0 or not tile.continues:
                    start_cell(order[low:high], way.counts)
                for first in range(int(bounds[cell]), int(bounds[cell + 1]), _MEMBERS_AT_ONCE):
                    piece = slice(first, min(first + _MEMBERS_AT_ONCE, int(bounds[cell + 1])))
                    near = None if sketches is None else (sketches[piece], sketch_radius)
                    _meet_by_product(
                        candidates, members[piece], gids[piece], near, way, order[low:high], tile.start + first, floor,
                        mirrored, lists, max_memory_bytes,
                    )  # fmt: skip
    return Neighbours(start, stop, cells.read_gids(start, stop), lists, bytes_read)


def run_rows(cells: Cells, nprobe: int, mirror: bool, max_memory_bytes: int) -> int:
    """How many rows may ask at once: whole pieces, at least one, that fill three quarters of the memory at most.

    Counted as if each had found all that it can keep; memory for that is touched only as it is found.
    """
    ways = 2 if mirror else 1
    probes = code_width(nprobe, cells.num_cells) + 8 if nprobe < cells.num_cells else 4
    row = 2 * cells.dim + ways * (8 * SKETCH_WORDS + probes + 5) + 12 * MAX_NEIGHBOURS + 34
    return max(max_memory_bytes * 3 // 4 // row // PIECE_ROWS, 1) * PIECE_ROWS


def self_pairs(
    cells: Cells,
    start: int,
    stop: int,
    similarity_threshold: float,
    nprobe: int,
    sketch_radius: int | None = None,
    *,
    mirror: np.ndarray | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    candidates: Candidates | None = None,
) -> Pairs:
    """The edges of the rows start to stop, sorted and each once: see near_rows. For pools whose edges fit in memory."""
    step = run_rows(cells, nprobe, mirror is not None, max_memory_bytes)
    found = []
    for low in range(start, stop, step):
        run = near_rows(
            cells, low, min(low + step, stop), similarity_threshold, nprobe, sketch_radius, mirror=mirror,
            max_memory_bytes=max_memory_bytes, candidates=candidates,
        )  # fmt: skip
        found += [edges for _, edges, _ in run.pieces()]
    return merge_pairs(found)


def near_by_product(asking: np.ndarray, members: np.ndarray, rough_floor: float) -> np.ndarray:
    """Candidates by BLAS: see Candidates."""
    return pairs_in_scores(products(asking, members), np.float32(rough_floor), 0)


def _meet_by_product(
    candidates: Candidates,
    members: np.ndarray,
    gids: np.ndarray,
    near: tuple[np.ndarray, int] | None,
    way: _Way,
    order: np.ndarray,
    first_row: int,
    floor: float,
    mirrored: int,
    lists: Lists,
    max_memory_bytes: int,
) -> None:
    """Some members of a cell against all that probe it: what meet_by_sketch does for a tile."""
    asking = still_asking(order, way.counts)
    step = max(max_memory_bytes // 16 // (4 * (len(members) + members.shape[1])), 1)
    for low in range(0, len(asking), step):
        rows = asking[low : low + step]
        vectors = widen_rows(way.asking, rows)
        pairs = candidates(vectors, members, floor - float(ROUGH_MARGIN))
        if near is not None:
            sketches, radius = near
            needed = radius_needed(way.asking.sketches[rows[pairs[:, 0]]], sketches[pairs[:, 1]])
            pairs = pairs[needed <= radius]
        settle(
            pairs, rows, vectors, members, gids, first_row, way.asking.first_row, np.float32(floor), mirrored,
            way.counts, lists,
        )  # fmt: skip


def _way(cells: Cells, half: np.ndarray, start: int, nprobe: int, mirror: np.ndarray | None) -> _Way:
    """Probes are found, and mirrored sketches made, a few rows at a time."""
    num_rows = len(half)
    signs = np.zeros(cells.dim, np.uint16) if mirror is None else np.where(mirror < 0, 0x8000, 0).astype(np.uint16)
    is_own = mirror is None
    sketches = cells.read_sketches(start, start + num_rows) if is_own else np.empty((num_rows, SKETCH_WORDS), np.uint64)
    probes = _Probes(num_rows, nprobe, cells.num_cells)
    for low in range(0, num_rows, _ROWS_AT_ONCE):
        rows = slice(low, low + _ROWS_AT_ONCE)
        if is_own and nprobe == cells.num_cells:
            break
        asked = widened(half[rows])
        asked = asked if is_own else asked * mirror.astype(np.float32)
        if not is_own:
            sketches[rows] = cells.sketch(asked)
        if nprobe < cells.num_cells:
            probes.add(low, nearest_cells(asked, cells.centroids, nprobe, 1))
    asking = Asking(half.view(np.uint16), signs, sketches, start)
    return _Way(asking, probes, Counts(np.zeros(num_rows, np.int32), np.zeros(num_rows, np.uint8)))


class _Probes:
    """Which rows probe which cells, told for runs of cells in ascending order."""

    def __init__(self, num_rows: int, nprobe: int, num_cells: int) -> None:
        self.everyone = np.arange(num_rows, dtype=np.int32) if nprobe == num_cells else None
        self.asked = np.full(num_cells, num_rows if nprobe == num_cells else 0, np.int64)
        width = 0 if nprobe == num_cells else code_width(nprobe, num_cells)
        self._codes = np.empty((num_rows, width), np.uint8)
        self._position = np.zeros(num_rows, np.int32)
        self._following = np.zeros(num_rows, np.int32)
        self._last: tuple[tuple[int, int], tuple[np.ndarray, ...]] | None = None

    def add(self, first_row: int, probes: np.ndarray) -> None:
        encode_probes(probes, self._codes[first_row : first_row + len(probes)], self.asked)

    def of(self, first_cell: int, last_cell: int) -> tuple[np.ndarray, ...]:
        """Rows by cell, and where each cell's begin and end; the same cells may be asked for again at once."""
        if self.everyone is not None:
            starts = np.zeros(last_cell - first_cell + 1, np.int64)
            return self.everyone, starts, starts + len(self.everyone)
        if self._last is None or self._last[0] != (first_cell, last_cell):
            size = int(self.asked[: last_cell + 1].sum() - self.asked[:first_cell].sum())
            found = decode_probes(self._codes, self._position, self._following, first_cell, last_cell, size)
            self._last = (first_cell, last_cell), found
        return self._last[1]


def _tiles(cells: Cells, ways: list[_Way], max_memory_bytes: int) -> Iterator[_Tile]:
    """Every cell that some row probes, in ascending order: as many whole cells as fit, or a piece of one."""
    most_rows = max(
        min(max_memory_bytes // 16, _MAX_TILE_BYTES) // (4 * cells.dim + 2 * cells.row_bytes + 8 * SKETCH_WORDS), 1
    )
    most_asking = max(max_memory_bytes // 16 // (12 * len(ways)), 1)
    asked = np.sum([way.probes.asked for way in ways], axis=0)
    sizes = np.diff(cells.offsets)
    if ways[0].probes.everyone is not None:
        most_asking = int(asked.sum())
    total = np.concatenate([[0], np.cumsum(asked)])
    first = 0
    while first < cells.num_cells:
        if not asked[first] or not sizes[first]:
            first += 1
            continue
        start, end = int(cells.offsets[first]), int(cells.offsets[first + 1])
        if end - start > most_rows:
            for low in range(start, end, most_rows):
                yield _Tile(low, min(low + most_rows, end), first, first, low > start)
            first += 1
            continue
        last = min(
            int(np.searchsorted(cells.offsets, start + most_rows, side="right")) - 2,
            int(np.searchsorted(total, total[first] + most_asking, side="right")) - 2,
        )
        last = min(max(last, first), cells.num_cells - 1)
        yield _Tile(start, int(cells.offsets[last + 1]), first, last, False)
        first = last + 1
