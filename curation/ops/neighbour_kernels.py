"""The compiled inner loops of the self-join: which rows probe a tile's cells, whom they meet there, whom they keep.

The join has two halves. The first makes candidates, (asking row, member) pairs whose rough similarity reaches the
floor: `meet_by_sketch` here, or a matrix product anywhere. The second, `settle`, is one for all: it computes the exact
similarity, stops a row that has found enough, and keeps the most similar.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from curation.ops.join_kernels import BLOCK, CHUNK, listed, near_masks, passed, rough_dots
from curation.ops.sketches import ROUGH_MARGIN, SKETCH_WORDS, exact_dot

MAX_NEIGHBOURS = 64
"""The most neighbours that a row keeps, and the most hits that it takes from one cell."""

MAX_HITS = 256
"""Once a row has so many hits, each further cell gives it one."""

_SKIP = 255  # a byte of a probe code: no cell, 255 further


class Lists(NamedTuple):
    """What each of Q rows has found. The arrays [S] have an entry for a row with any hit, in the order of first hits.

    Attributes:
        entry: int32 [Q], its index into the arrays [S]; -1 where nothing was found.
        used: int64 [1], how many entries are taken.
        size: uint8 [S], neighbours kept.
        neighbour: int64 [S, 64], gid * 2 + mirrored.
        similarity: float32 [S, 64].
        leader_row, leader, leader_similarity: [S], of the hit of smallest row.
        capped: uint8 [Q], 1 where the row did not look at all members of some cell, or has more neighbours than it
            keeps.
    """

    entry: np.ndarray
    used: np.ndarray
    size: np.ndarray
    neighbour: np.ndarray
    similarity: np.ndarray
    leader_row: np.ndarray
    leader: np.ndarray
    leader_similarity: np.ndarray
    capped: np.ndarray


class Counts(NamedTuple):
    """Hits of each of Q rows, asking as they are or mirrored: in all cells so far (int32), and in this one (uint8)."""

    total: np.ndarray
    in_cell: np.ndarray


class Asking(NamedTuple):
    """The rows that ask.

    Attributes:
        vectors: uint16 [Q, D], the bits of their float16 values.
        signs: uint16 [D], 0x8000 where the mirror turns a coordinate; all 0 for the rows as they are.
        sketches: uint64 [Q, 8], of the turned vectors.
        rows: int64 [Q], which rows of the cells they are, ascending.
    """

    vectors: np.ndarray
    signs: np.ndarray
    sketches: np.ndarray
    rows: np.ndarray


def empty_lists(num_rows: int) -> Lists:
    """Memory is touched as entries are taken, not before."""
    rows, wide = (num_rows,), (num_rows, MAX_NEIGHBOURS)
    return Lists(
        np.full(rows, -1, np.int32), np.zeros(1, np.int64), np.empty(rows, np.uint8), np.empty(wide, np.int64),
        np.empty(wide, np.float32), np.empty(rows, np.int64), np.empty(rows, np.int64), np.empty(rows, np.float32),
        np.zeros(rows, np.uint8),
    )  # fmt: skip


def code_width(nprobe: int, num_cells: int) -> int:
    """Bytes of one row's probes."""
    return nprobe + num_cells // _SKIP


@njit(cache=True, nogil=True)
def encode_probes(probes, codes, asked):
    """Ascending cell ids [n, nprobe] as the gaps between them, a byte each; adds up in asked [K] who probes a cell."""
    for row in range(probes.shape[0]):
        at, following = 0, 0
        for cell in probes[row]:
            gap = cell - following
            while gap >= _SKIP:
                codes[row, at] = _SKIP
                gap -= _SKIP
                at += 1
            codes[row, at] = gap
            at += 1
            following = cell + 1
            asked[cell] += 1
        codes[row, at:] = _SKIP


@njit(cache=True, nogil=True)
def decode_probes(codes, position, following, first_cell, last_cell, size):
    """Which rows probe the cells first to last (inclusive): rows by cell, and where each cell's begin and end.

    position and following say how far each row's code was read; cells are asked for in ascending order.
    """
    num_cells = last_cell - first_cell + 1
    rows = np.empty(size, np.int32)
    cells = np.empty(size, np.int32)
    bounds = np.zeros(num_cells + 1, np.int64)
    count = 0
    for row in range(codes.shape[0]):
        at, base = position[row], following[row]
        while at < codes.shape[1] and base <= last_cell:
            step = np.int64(codes[row, at])
            if step == _SKIP:
                base += _SKIP
            elif base + step > last_cell:
                break
            else:
                cell = base + step
                base = cell + 1
                if cell >= first_cell:
                    rows[count] = row
                    cells[count] = cell - first_cell
                    bounds[cell - first_cell + 1] += 1
                    count += 1
            at += 1
        position[row], following[row] = at, base
    bounds = np.cumsum(bounds)
    filled = bounds[:-1].copy()
    order = np.empty(count, np.int32)
    for i in range(count):
        order[filled[cells[i]]] = rows[i]
        filled[cells[i]] += 1
    return order, bounds[:-1], bounds[1:]


@njit(cache=True, nogil=True)
def widen_row(half, signs, out):
    """One row of float16 bits, turned by signs, to float32; as curation.ops.sketches.widened."""
    bits = out.view(np.uint32)
    for i in range(half.size):
        word = np.uint32(half[i] ^ signs[i])
        bits[i] = ((word & np.uint32(0x7FFF)) << np.uint32(13)) | ((word & np.uint32(0x8000)) << np.uint32(16))
    scale = np.float32(2.0**112)
    for i in range(half.size):
        out[i] *= scale


@njit(cache=True, nogil=True)
def widen_rows(asking, rows):
    """The vectors of some of the asking rows: float32 [n, D]."""
    out = np.empty((rows.size, asking.vectors.shape[1]), np.float32)
    for i in range(rows.size):
        widen_row(asking.vectors[rows[i]], asking.signs, out[i])
    return out


@njit(cache=True, nogil=True)
def start_cell(rows, counts):
    """Begin a cell for the rows that probe it."""
    for row in rows:
        counts.in_cell[row] = 0


@njit(cache=True, nogil=True)
def is_done(row, counts):
    """Whether a row looks no further in this cell."""
    before = counts.total[row] - counts.in_cell[row]
    return counts.in_cell[row] >= (1 if before >= MAX_HITS else MAX_NEIGHBOURS)


@njit(cache=True, nogil=True)
def still_asking(rows, counts):
    """Those of the rows that look further in this cell."""
    out = np.empty_like(rows)
    count = 0
    for row in rows:
        out[count] = row
        count += not is_done(row, counts)
    return out[:count]


@njit(cache=True, nogil=True)
def settle(pairs, rows, vectors, members, gids, member_row, asking_rows, floor, mirrored, counts, lists):
    """Decide candidates of one cell by their exact similarity, and keep them; returns how many rows are done.

    Args:
        pairs: int64 [P, 2]: index into rows, and into members; the members of a row ascending, within a call and
            from one call to the next.
        rows: the asking rows; vectors float32 [len(rows), D] are theirs.
        members: float32 [n, D], gids [n]; row member_row and following of the cells.
        asking_rows: row of the cells that each asking row is, which is no match of itself.
    """
    num_done = 0
    for i in range(pairs.shape[0]):
        row, member = rows[pairs[i, 0]], pairs[i, 1]
        if asking_rows[row] == member_row + member or is_done(row, counts):
            continue
        similarity = exact_dot(vectors[pairs[i, 0]], members[member])
        if similarity >= floor:
            num_done += _take(row, gids[member] * 2 + mirrored, similarity, member_row + member, counts, lists)
    return num_done


@njit(cache=True, nogil=True)
def settle_exact(query, member, similarity, rows, gids, member_row, asking_rows, mirrored, counts, lists):
    """`settle` for pairs whose exact similarity [P] is known, and reaches the floor: index into rows, and members."""
    for i in range(query.size):
        row = rows[query[i]]
        if asking_rows[row] != member_row + member[i] and not is_done(row, counts):
            _take(row, gids[member[i]] * 2 + mirrored, similarity[i], member_row + member[i], counts, lists)


@njit(cache=True, nogil=True)
def _take(row, neighbour, similarity, neighbour_row, counts, lists):
    """A hit; returns whether the row is done with it."""
    counts.in_cell[row] += 1
    counts.total[row] += 1
    _keep(row, neighbour, similarity, neighbour_row, lists)
    if is_done(row, counts):
        lists.capped[row] = 1
        return True
    return False


@njit(cache=True, nogil=True)
def _keep(row, neighbour, similarity, neighbour_row, lists):
    entry = np.int64(lists.entry[row])
    if entry < 0:
        entry = lists.used[0]
        lists.used[0] += 1
        lists.entry[row] = entry
        lists.size[entry] = 0
        lists.leader_row[entry] = np.iinfo(np.int64).max
    if neighbour_row < lists.leader_row[entry] or (
        neighbour_row == lists.leader_row[entry]
        and _is_better(similarity, neighbour, lists.leader_similarity[entry], lists.leader[entry])
    ):
        lists.leader_row[entry] = neighbour_row
        lists.leader[entry] = neighbour
        lists.leader_similarity[entry] = similarity
    size = np.int64(lists.size[entry])
    neighbours, similarities = lists.neighbour[entry], lists.similarity[entry]
    for i in range(size):  # asking mirrored, the same neighbour comes again
        if neighbours[i] >> 1 == neighbour >> 1:
            if _is_better(similarity, neighbour, similarities[i], neighbours[i]):
                neighbours[i], similarities[i] = neighbour, similarity
            return
    if size < MAX_NEIGHBOURS:
        neighbours[size], similarities[size] = neighbour, similarity
        lists.size[entry] = size + 1
        return
    lists.capped[row] = 1
    worst = 0
    for i in range(1, size):
        if _is_better(similarities[worst], neighbours[worst], similarities[i], neighbours[i]):
            worst = i
    if _is_better(similarity, neighbour, similarities[worst], neighbours[worst]):
        neighbours[worst], similarities[worst] = neighbour, similarity


@njit(cache=True, nogil=True)
def _is_better(similarity, neighbour, than, other):
    """More similar; if equal, the smaller gid, and as it is rather than mirrored."""
    return similarity > than or (similarity == than and neighbour < other)


@njit(cache=True, nogil=True)
def meet_by_sketch(
    words, members, gids, bounds, continues, asking, order, starts, stops, first_row, radius, half, floor, mirrored,
    counts, lists,
):  # fmt: skip
    """A tile's cells against the rows that probe them: sketches within radius, then a rough similarity, then settle.

    Args:
        words: uint64 [8, n + padding], the members' sketches by word.
        bounds: [cells + 1], each cell's members in the tile.
        continues: the tile's first cell began in the tile before.
        order, starts, stops: asking rows by cell.
    """
    rough_floor = floor - ROUGH_MARGIN
    limit, half_limit = np.int64(radius) + 1, np.int64(half) + 1
    sketches = np.empty((CHUNK, SKETCH_WORDS), np.uint64)
    slots = np.empty(CHUNK, np.int64)  # place in the chunk of each row that still asks
    wide = np.empty((CHUNK, members.shape[1]), np.float32)
    is_wide = np.empty(CHUNK, np.bool_)
    hits = np.empty(CHUNK + 1, np.int64)
    masks = np.empty(CHUNK + 1, np.uint64)
    candidates = np.empty((CHUNK * BLOCK, 2), np.int64)
    rough = np.empty(CHUNK * BLOCK, np.float32)
    for cell in range(starts.size):
        if cell > 0 or not continues:
            start_cell(order[starts[cell] : stops[cell]], counts)
        for chunk in range(starts[cell], stops[cell], CHUNK):
            rows = order[chunk : min(chunk + CHUNK, stops[cell])]
            num_asking = 0
            for slot in range(rows.size):
                slots[num_asking] = slot
                sketches[num_asking] = asking.sketches[rows[slot]]
                is_wide[slot] = False
                num_asking += not is_done(rows[slot], counts)
            for base in range(bounds[cell], bounds[cell + 1], BLOCK):
                num_members = min(BLOCK, bounds[cell + 1] - base)
                w0, w1 = words[0, base : base + BLOCK], words[1, base : base + BLOCK]
                w2, w3 = words[2, base : base + BLOCK], words[3, base : base + BLOCK]
                w4, w5 = words[4, base : base + BLOCK], words[5, base : base + BLOCK]
                w6, w7 = words[6, base : base + BLOCK], words[7, base : base + BLOCK]
                num_near = near_masks(
                    sketches[:num_asking], w0, w1, w2, w3, w4, w5, w6, w7, half_limit, limit, hits, masks
                )
                real = (np.uint64(1) << np.uint64(num_members)) - np.uint64(1)
                num_candidates = listed(masks[:num_near], real, hits, slots, base, candidates)
                if num_candidates == 0:
                    continue
                for i in range(num_candidates):
                    slot = candidates[i, 0]
                    if not is_wide[slot]:
                        widen_row(asking.vectors[rows[slot]], asking.signs, wide[slot])
                        is_wide[slot] = True
                rough_dots(wide, members, candidates[:num_candidates], rough)
                num_candidates = passed(rough[:num_candidates], rough_floor, candidates)
                num_done = settle(
                    candidates[:num_candidates], rows, wide, members, gids, first_row, asking.rows, floor,
                    mirrored, counts, lists,
                )  # fmt: skip
                if num_done > 0:
                    kept = 0
                    for i in range(num_asking):
                        if not is_done(rows[slots[i]], counts):
                            slots[kept] = slots[i]
                            sketches[kept] = sketches[i]
                            kept += 1
                    num_asking = kept


@njit(cache=True, nogil=True)
def pairs_in_scores(scores, rough_floor, first_member):
    """(row of scores, column + first_member) where the score reaches the rough floor, in that order: int64 [P, 2]."""
    count = 0
    for j in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            count += scores[j, i] >= rough_floor
    pairs = np.empty((count, 2), np.int64)
    count = 0
    for j in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            if scores[j, i] >= rough_floor:
                pairs[count, 0] = j
                pairs[count, 1] = first_member + i
                count += 1
    return pairs


@njit(cache=True, nogil=True)
def listed_once(lists, gids, by_gid, first, last, out_a, out_b, out_similarity, out_mirrored):
    """The edges of rows first to last as pairs a < b, each once among the Q rows; returns how many.

    Of a pair that both ends keep, the better copy is written, equal ones by the smaller end.

    Args:
        gids: int64 [Q], of the rows; by_gid: their indices in the order of gids.
    """
    count = 0
    for row in range(first, last):
        entry = np.int64(lists.entry[row])
        if entry < 0:
            continue
        size = np.int64(lists.size[entry])
        for i in range(size + 1):
            if i < size:
                neighbour, similarity = lists.neighbour[entry, i], lists.similarity[entry, i]
            else:
                neighbour, similarity = lists.leader[entry], lists.leader_similarity[entry]
                if _place(lists, entry, neighbour >> 1) >= 0:
                    continue
            own, other, mirrored = gids[row], neighbour >> 1, neighbour & 1
            copy_entry = _entry_of_gid(lists, gids, by_gid, other)
            if copy_entry >= 0:
                at = _place(lists, copy_entry, own)
                if at >= 0:
                    is_kept = lists.neighbour[copy_entry, at] >> 1 == own
                    copied, copy_similarity = lists.neighbour[copy_entry, at], lists.similarity[copy_entry, at]
                elif lists.leader[copy_entry] >> 1 == own:
                    is_kept = True
                    copied, copy_similarity = lists.leader[copy_entry], lists.leader_similarity[copy_entry]
                else:
                    is_kept, copied, copy_similarity = False, np.int64(0), np.float32(0.0)
                if is_kept:
                    if copy_similarity > similarity:
                        continue
                    if copy_similarity == similarity and (copied & 1) < mirrored:
                        continue
                    if copy_similarity == similarity and (copied & 1) == mirrored and other < own:
                        continue
            out_a[count], out_b[count] = min(own, other), max(own, other)
            out_similarity[count] = similarity
            out_mirrored[count] = mirrored == 1
            count += 1
    return count


@njit(cache=True, nogil=True)
def _place(lists, entry, gid):
    for i in range(np.int64(lists.size[entry])):
        if lists.neighbour[entry, i] >> 1 == gid:
            return i
    return -1


@njit(cache=True, nogil=True)
def _entry_of_gid(lists, gids, by_gid, gid):
    low, high = 0, by_gid.size
    while low < high:
        middle = (low + high) // 2
        if gids[by_gid[middle]] < gid:
            low = middle + 1
        else:
            high = middle
    if low < by_gid.size and gids[by_gid[low]] == gid:
        return np.int64(lists.entry[by_gid[low]])
    return np.int64(-1)
