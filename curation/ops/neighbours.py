"""The self-join: for some rows, the near rows in the cells that each probes, at most 64 and the first of all.

All rows ask, or, where others have asked before, the new ones alone. A run of those that ask is as long as memory
allows, millions of rows: its vectors stay as float16 with their sketches and their probes,
a byte each, and the cells pass by in tiles, once for the rows as they are and mirrored together. So N rows are read
N / run times, and nothing that is found depends on the length of a run, a tile or a call.

Rows that are alike by the hundred thousand would find each other 10^11 times. So a row looks at the members of a cell
in their order until it has found 64 there, and once it has found 256, each further cell gives it one: the first, which
those like it find as well. It keeps the 64 most similar and the hit of smallest row, its leader.

Hits are counted at or above the floor, whatever threshold is used later: pairs at a threshold are those edges that
reach it. Only a row that is `capped` may have had others.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

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
    settle_exact,
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
    widened,
)

if TYPE_CHECKING:
    from curation.ops.torch_tiles import Rows

PIECE_ROWS = 2**16
"""Rows that ask, in the cells' order, whose edges are listed together: a file of the join, whatever run found them."""

_MAX_TILE_BYTES = 2**25
_MEMBERS_AT_ONCE = 2**10  # of a cell in one product: a row that has found enough is left out of the next
_ROWS_AT_ONCE = 2**14  # whose probes are found at once


class Neighbours(NamedTuple):
    """What a run of rows has found.

    Attributes:
        start, stop: the run, counted among all rows that ask.
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
    rows: np.ndarray,
    floor: float,
    nprobe: int,
    sketch_radius: int | None = None,
    *,
    start: int = 0,
    mirror: np.ndarray | None = None,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    device: str | None = None,
) -> Neighbours:
    """Ask for some rows of the cells, on one thread: each looks at all rows, those that do not ask too.

    A pair is found when one end looks at the other: over all runs, either may be the one, if both ask.

    Args:
        rows: int64 [Q], ascending, a run of those that ask.
        start: how many ask before them; it cuts the pieces, and changes nothing that is found.
        floor: cosine; pairs at or above it are found.
        sketch_radius: pairs whose sketches differ in more bits are not looked at; None looks at all.
        mirror: signs [D] that turn an embedding into that of the flipped image; each row then asks both ways, and the
            larger similarity of a pair is kept (the unflipped one when equal).
        max_memory_bytes: see run_rows; it changes the size of a tile, never the result.
        device: of torch, where products find the same pairs; None: the processor's sketches, or with no radius BLAS.
    """
    check_join(cells, nprobe, sketch_radius)
    if mirror is not None:
        check_mirror(mirror, cells.dim)
    half, own_sketches, own_gids = _read_at(cells, rows)
    signs = [None] if mirror is None else [None, mirror]
    ways = [_way(cells, rows, half, own_sketches, nprobe, sign, device) for sign in signs]
    asked = None if device is None else _asked_on(device, half, ways, mirror, sketch_radius)
    lists = empty_lists(len(rows))
    bytes_read = len(rows) * cells.row_bytes
    for tile in _tiles(cells, ways, max_memory_bytes):
        bytes_read += (tile.stop - tile.start) * cells.row_bytes
        if asked is not None:
            _meet_on_device(asked, cells, tile, ways, floor, sketch_radius, lists)
            continue
        members, gids = cells.read(tile.start, tile.stop), cells.read_gids(tile.start, tile.stop)
        sketches = None if sketch_radius is None else cells.read_sketches(tile.start, tile.stop)
        bounds = np.clip(cells.offsets[tile.first_cell : tile.last_cell + 2], tile.start, tile.stop) - tile.start
        for mirrored, way in enumerate(ways):
            order, starts, stops = way.probes.of(tile.first_cell, tile.last_cell)
            if sketches is not None:
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
                    _meet_by_product(
                        members[piece], gids[piece], way, order[low:high], tile.start + first, floor, mirrored, lists,
                        max_memory_bytes,
                    )  # fmt: skip
    return Neighbours(start, start + len(rows), own_gids, lists, bytes_read)


def run_rows(cells: Cells, nprobe: int, mirror: bool, max_memory_bytes: int) -> int:
    """How many rows may ask at once: whole pieces, at least one, that fill three quarters of the memory at most.

    Counted as if each had found all that it can keep; memory for that is touched only as it is found.
    """
    ways = 2 if mirror else 1
    probes = code_width(nprobe, cells.num_cells) + 8 if nprobe < cells.num_cells else 4
    row = 2 * cells.dim + ways * (8 * SKETCH_WORDS + probes + 5) + 12 * MAX_NEIGHBOURS + 42
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
    device: str | None = None,
) -> Pairs:
    """The edges of the rows start to stop, sorted and each once: see near_rows. For pools whose edges fit in memory."""
    step = run_rows(cells, nprobe, mirror is not None, max_memory_bytes)
    found = []
    for low in range(start, stop, step):
        run = near_rows(
            cells, np.arange(low, min(low + step, stop)), similarity_threshold, nprobe, sketch_radius, start=low,
            mirror=mirror, max_memory_bytes=max_memory_bytes, device=device,
        )  # fmt: skip
        found += [edges for _, edges, _ in run.pieces()]
    return merge_pairs(found)


def near_by_product(asking: np.ndarray, members: np.ndarray, floor: float) -> np.ndarray:
    """Candidates of float32 rows [q, D] and [n, D] by BLAS: int64 [P, 2], ascending, all pairs that reach the floor."""
    return pairs_in_scores(products(asking, members), np.float32(floor) - ROUGH_MARGIN, 0)


def _meet_by_product(
    members: np.ndarray,
    gids: np.ndarray,
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
        pairs = near_by_product(vectors, members, floor)
        settle(
            pairs, rows, vectors, members, gids, first_row, way.asking.rows, np.float32(floor), mirrored,
            way.counts, lists,
        )  # fmt: skip


def _asked_on(
    device: str, half: np.ndarray, ways: list[_Way], mirror: np.ndarray | None, radius: int | None
) -> "list[Rows]":
    """The asking rows of each way, on the device."""
    from curation.ops.torch_tiles import Rows

    sketches = [None if radius is None else way.asking.sketches for way in ways]
    rows = Rows(half, sketches[0], device)
    return [rows] if mirror is None else [rows, rows.mirrored(mirror, sketches[1])]


def _meet_on_device(
    asked: "list[Rows]",
    cells: Cells,
    tile: _Tile,
    ways: list[_Way],
    floor: float,
    radius: int | None,
    lists: Lists,
) -> None:
    """A tile's cells against the rows that probe them: what meet_by_sketch does, by products on the device."""
    from curation.ops.torch_tiles import Rows, near_pairs

    gids = cells.read_gids(tile.start, tile.stop)
    sketches = None if radius is None else cells.read_sketches(tile.start, tile.stop)
    members = Rows(cells.read_half(tile.start, tile.stop), sketches, asked[0].device)
    bounds = np.clip(cells.offsets[tile.first_cell : tile.last_cell + 2], tile.start, tile.stop) - tile.start
    for mirrored, (way, rows_on_device) in enumerate(zip(ways, asked, strict=True)):
        order, starts, stops = way.probes.of(tile.first_cell, tile.last_cell)
        for cell, (low, high) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            if cell > 0 or not tile.continues:
                start_cell(order[low:high], way.counts)
            rows = still_asking(order[low:high], way.counts)
            # A row takes no more than this of a cell, and itself does not count.
            for query, member, similarity in near_pairs(
                rows_on_device, rows, members, int(bounds[cell]), int(bounds[cell + 1]), floor, radius,
                most=MAX_NEIGHBOURS + 1,
            ):  # fmt: skip
                settle_exact(
                    query, member, similarity, rows, gids, tile.start, way.asking.rows, mirrored, way.counts, lists
                )


def _read_at(cells: Cells, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors as they are stored, sketches and gids of ascending rows, read in runs with all that lies between."""
    half = np.empty((len(rows), cells.dim), np.float16)
    sketches, gids = np.empty((len(rows), SKETCH_WORDS), np.uint64), np.empty(len(rows), np.int64)
    low = 0
    while low < len(rows):
        first = int(rows[low])
        high = int(np.searchsorted(rows, first + _ROWS_AT_ONCE))
        span, own = (first, int(rows[high - 1]) + 1), rows[low:high] - first
        half[low:high] = cells.read_half(*span)[own]
        sketches[low:high] = cells.read_sketches(*span)[own]
        gids[low:high] = cells.read_gids(*span)[own]
        low = high
    return half, sketches, gids


def _way(
    cells: Cells,
    rows: np.ndarray,
    half: np.ndarray,
    own_sketches: np.ndarray,
    nprobe: int,
    mirror: np.ndarray | None,
    device: str | None,
) -> _Way:
    """Probes are found, and mirrored sketches made, a few rows at a time."""
    num_rows = len(half)
    signs = np.zeros(cells.dim, np.uint16) if mirror is None else np.where(mirror < 0, 0x8000, 0).astype(np.uint16)
    is_own = mirror is None
    sketches = own_sketches if is_own else np.empty((num_rows, SKETCH_WORDS), np.uint64)
    probes = _Probes(num_rows, nprobe, cells.num_cells)
    for low in range(0, num_rows, _ROWS_AT_ONCE):
        block = slice(low, low + _ROWS_AT_ONCE)
        if is_own and nprobe == cells.num_cells:
            break
        asked = widened(half[block])
        asked = asked if is_own else asked * mirror.astype(np.float32)
        if not is_own:
            sketches[block] = cells.sketch(asked)
        if nprobe < cells.num_cells:
            probes.add(low, nearest_cells(asked, cells.centroids, nprobe, 1, device))
    asking = Asking(half.view(np.uint16), signs, sketches, rows)
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
