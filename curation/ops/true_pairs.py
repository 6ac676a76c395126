"""What brute force finds for a sample of rows, and what the join would need to find the same.

The pool is read once, in ranges that share nothing: each gives the few pairs of every sampled row whose hash is
smallest there, and the smallest of all ranges are the smallest of the pool.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import njit

from curation.ops.cells import Cells, cell_ranks
from curation.ops.join import DEFAULT_MEMORY_BYTES, sketch_columns
from curation.ops.join_kernels import BLOCK, CHUNK, listed, near_masks, passed, rough_dots
from curation.ops.randomness import INCREMENT, hash_uint64, mix, stream_of
from curation.ops.sketches import ROUGH_MARGIN, exact_dot, half_radius, mirrored, products, radius_needed

if TYPE_CHECKING:
    from curation.ops.torch_tiles import Rows

PAIRS_PER_QUERY = 4
"""A placeholder that occurs a thousand times would otherwise outweigh every other image of the sample."""

_TILE_ROWS = 2**14
_ENTRY_BYTES = 64  # of a query and a member of a tile, if all are candidates on a device
_ANY = np.uint64(2**64 - 1)


class Question(NamedTuple):
    """Sampled rows, and what is asked about each.

    Attributes:
        rows, gids: int64 [Q], of the cells.
        vectors: float32 [Q, D].
        threshold: cosine; pairs at or above it are true.
        num_exact: so many of the first are compared by their vectors with every row; the others only where sketches
            are within radius bits.
        mirror: signs [D], or None.
        seed: of the choice among a row's pairs.
    """

    rows: np.ndarray
    gids: np.ndarray
    vectors: np.ndarray
    threshold: float
    num_exact: int
    radius: int
    mirror: np.ndarray | None
    seed: int


class Hits(NamedTuple):
    """Pairs of a sampled row (index into the question) and any other: columns [P]."""

    query: np.ndarray
    row: np.ndarray
    gid: np.ndarray
    similarity: np.ndarray
    mirrored: np.ndarray


class _Few(NamedTuple):
    """The 4 true pairs of smallest hash that each of Q sampled rows has met, one way round.

    A row in a crowd has 300,000 true pairs: a pair is compared exactly only where its hash could enter.

    Attributes:
        stream, salts: of the pairs' hashes (`hashes`); salts uint64 [Q].
        own: int64 [Q], the rows themselves, which are no pair.
        limits: uint64 [Q], the greatest hash that may enter.
        counts: int64 [Q]; hash, row, gid, similarity: [Q, 4], the first counts of them, in no order.
    """

    stream: np.uint64
    salts: np.ndarray
    own: np.ndarray
    limits: np.ndarray
    counts: np.ndarray
    hash: np.ndarray
    row: np.ndarray
    gid: np.ndarray
    similarity: np.ndarray


class TruePairs(NamedTuple):
    """True pairs of a sample of rows.

    Attributes:
        query, gid: the two ends, int64 [P]; at most 4 pairs of each query, chosen by hash.
        similarity: float32 [P].
        rank: int32 [P, 2], how many cells come before the other end's, seen from the query and from the other end.
        distance: int64 [P, 2], the sketch radius that it takes, likewise (they differ for a mirrored pair).
    """

    query: np.ndarray
    gid: np.ndarray
    similarity: np.ndarray
    rank: np.ndarray
    distance: np.ndarray


def hits_in_range(
    cells: Cells,
    start: int,
    stop: int,
    question: Question,
    *,
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES,
    device: str | None = None,
) -> Hits:
    """Compare rows start to stop of the cells, read once, with every sampled row, on one thread.

    Args:
        device: of torch, where the same hits are found; None: the processor's own kernels.

    Returns:
        of each sampled row the pairs of smallest hash, at most 4.
    """
    signs = [None] if question.mirror is None else [None, question.mirror]
    ways = [question.vectors if sign is None else mirrored(question.vectors, sign) for sign in signs]
    own = [cells.sketch(vectors) for vectors in ways]
    on_device = [] if device is None else _rows_on(device, ways, own)
    few = [_no_few(question) for _ in ways]
    for low in range(start, stop, _TILE_ROWS):
        high = min(low + _TILE_ROWS, stop)
        members, gids, sketches = cells.read(low, high), cells.read_gids(low, high), cells.read_sketches(low, high)
        step = max(max_memory_bytes // 2 // (_ENTRY_BYTES * len(members)), 1)
        [tile] = [None] if device is None else _rows_on(device, [members], [sketches])
        words = sketch_columns(sketches)
        for first, last, is_exact in _blocks(question, step):
            for way, vectors in enumerate(ways):
                if tile is not None:
                    radius = None if is_exact else question.radius
                    _meet_on_device(few[way], on_device[way], first, last, tile, low, gids, question, radius)
                elif is_exact:
                    scores = products(vectors[first:last], members)
                    _meet_by_score(few[way], scores, first, vectors, members, low, gids, np.float32(question.threshold))
                else:
                    _meet_by_sketch(
                        few[way], first, last, vectors, own[way], words, members, low, gids, question.radius,
                        half_radius(question.radius), np.float32(question.threshold),
                    )  # fmt: skip
    return fewest(question, [_hits(found, way > 0) for way, found in enumerate(few)])


def fewest(question: Question, batches: Iterable[Hits]) -> Hits:
    """One set out of several: each pair once, as its ends are nearer, and of a sampled row's those of smallest hash."""
    hits = Hits(*(np.concatenate(columns) for columns in zip(*batches, strict=True)))
    order = np.lexsort((hits.mirrored, -hits.similarity, hits.row, hits.query))
    hits = Hits(*(column[order] for column in hits))
    first = np.ones(len(order), bool)
    first[1:] = (hits.query[1:] != hits.query[:-1]) | (hits.row[1:] != hits.row[:-1])
    hits = Hits(*(column[first] for column in hits))
    order = np.lexsort((hashes(question, hits.query, hits.gid), hits.query))
    starts = np.searchsorted(hits.query[order], hits.query[order])
    return Hits(*(column[order[np.arange(len(order)) - starts < PAIRS_PER_QUERY]] for column in hits))


def hashes(question: Question, query: np.ndarray, gid: np.ndarray) -> np.ndarray:
    """What decides among the pairs of a sampled row: uint64 [P]."""
    seed = question.seed
    return hash_uint64(seed, hash_uint64(seed, question.gids)[query] + gid.astype(np.uint64))


def no_hits() -> Hits:
    none = np.empty(0, np.int64)
    return Hits(none, none, none, np.empty(0, np.float32), np.empty(0, bool))


def needs(cells: Cells, question: Question, hits: Hits) -> TruePairs:
    """What the join would need to find each of the pairs; one read for each other end."""
    ends = (question.rows[hits.query], question.vectors[hits.query]), (hits.row, cells.read_rows(hits.row))
    ranks, distances = [], []
    for (_, asking), (rows, asked) in (ends, ends[::-1]):
        if question.mirror is not None:
            asking = np.where(hits.mirrored[:, None], mirrored(asking, question.mirror), asking)
        ranks.append(cell_ranks(asking, cells.centroids, cells.cell_of_rows(rows)))
        distances.append(radius_needed(cells.sketch(asking), cells.sketch(asked)))
    return TruePairs(
        question.gids[hits.query], hits.gid, hits.similarity, np.stack(ranks, axis=1), np.stack(distances, axis=1)
    )


def _rows_on(device: str, vectors: list[np.ndarray], sketches: list[np.ndarray]) -> "list[Rows]":
    from curation.ops.torch_tiles import Rows

    return [Rows(x, y, device) for x, y in zip(vectors, sketches, strict=True)]


def _meet_on_device(
    few: _Few,
    queries: "Rows",
    first: int,
    last: int,
    tile: "Rows",
    low: int,
    gids: np.ndarray,
    question: Question,
    radius: int | None,
) -> None:
    """Queries first to last meet a tile: what the kernels below do."""
    from curation.ops.torch_tiles import HashesBelow, near_pairs

    below = HashesBelow(few.stream, few.salts[first:last], gids, queries.device)
    below.set_limits(few.limits[first:last])
    asking = np.arange(first, last)
    for query, member, similarity in near_pairs(
        queries, asking, tile, 0, len(tile), question.threshold, radius, passes=below
    ):
        _settle(few, query, member, similarity, first, low, gids)
        below.set_limits(few.limits[first:last])


def _no_few(question: Question) -> _Few:
    shape = len(question.rows), PAIRS_PER_QUERY
    return _Few(
        np.uint64(stream_of(question.seed)),
        hash_uint64(question.seed, question.gids),
        question.rows,
        np.full(len(question.rows), _ANY, np.uint64),
        np.zeros(len(question.rows), np.int64),
        np.empty(shape, np.uint64),
        np.empty(shape, np.int64),
        np.empty(shape, np.int64),
        np.empty(shape, np.float32),
    )


def _hits(few: _Few, is_mirrored: bool) -> Hits:
    query, place = np.nonzero(np.arange(PAIRS_PER_QUERY) < few.counts[:, None])
    row, gid, similarity = (values[query, place] for values in (few.row, few.gid, few.similarity))
    return Hits(query, row, gid, similarity, np.full(len(query), is_mirrored))


def _blocks(question: Question, step: int) -> Iterable[tuple[int, int, bool]]:
    bounds = [(0, min(question.num_exact, len(question.rows)), True), (question.num_exact, len(question.rows), False)]
    for start, stop, is_exact in bounds:
        for first in range(start, stop, step):
            yield first, min(first + step, stop), is_exact


mix_one = njit(cache=True, nogil=True)(mix)


@njit(cache=True, nogil=True)
def _hash(few, query, gid):
    return mix_one((few.salts[query] + np.uint64(gid) + np.uint64(1)) * INCREMENT ^ few.stream)


@njit(cache=True, nogil=True)
def _enter(few, query, pair_hash, row, gid, similarity):
    """Put a true pair among the few of its query, if its hash is small enough."""
    if pair_hash > few.limits[query] or few.own[query] == row:
        return
    place, hashes = few.counts[query], few.hash[query]
    if place == PAIRS_PER_QUERY:
        place = np.argmax(hashes)
    else:
        few.counts[query] += 1
    hashes[place] = pair_hash
    few.row[query, place], few.gid[query, place], few.similarity[query, place] = row, gid, similarity
    if few.counts[query] == PAIRS_PER_QUERY:
        few.limits[query] = hashes.max()


@njit(cache=True, nogil=True)
def _settle(few, query, member, similarity, first, low, gids):
    """Enter true pairs of a tile: of query - first and member."""
    for i in range(query.size):
        asking, gid = first + query[i], gids[member[i]]
        _enter(few, asking, _hash(few, asking, gid), low + member[i], gid, similarity[i])


@njit(cache=True, nogil=True)
def _meet_by_score(few, scores, first, vectors, members, low, gids, threshold):
    """A product [q, n] of the queries from first on and a tile; returns how many pairs were compared exactly."""
    rough, compared = threshold - ROUGH_MARGIN, 0
    for j in range(scores.shape[0]):
        query, line = first + j, scores[j]
        for base in range(0, line.size, 64):
            piece = line[base : base + 64]
            near = 0
            for i in range(piece.size):
                near += piece[i] >= rough
            if near == 0:
                continue
            for i in range(piece.size):
                if piece[i] < rough:
                    continue
                gid = gids[base + i]
                pair_hash = _hash(few, query, gid)
                if pair_hash > few.limits[query]:
                    continue
                compared += 1
                similarity = exact_dot(vectors[query], members[base + i])
                if similarity >= threshold:
                    _enter(few, query, pair_hash, low + base + i, gid, similarity)
    return compared


@njit(cache=True, nogil=True)
def _meet_by_sketch(
    few, first, last, vectors, sketches, words, members, low, gids, radius, half, threshold,
):  # fmt: skip
    """Queries first to last and a tile, where sketches are near; returns how many pairs were compared exactly."""
    limit, half_limit, compared = np.int64(radius) + 1, np.int64(half) + 1, 0
    asking, masks = np.empty(CHUNK + 1, np.int64), np.empty(CHUNK + 1, np.uint64)
    pairs, rough = np.empty((CHUNK * BLOCK, 2), np.int64), np.empty(CHUNK * BLOCK, np.float32)
    num_members = members.shape[0]
    for chunk in range(first, last, CHUNK):
        queries = np.arange(chunk, min(chunk + CHUNK, last))
        own = sketches[chunk : chunk + queries.size]
        for base in range(0, num_members, BLOCK):
            w0, w1, w2, w3, w4, w5, w6, w7 = (
                words[0, base : base + BLOCK], words[1, base : base + BLOCK], words[2, base : base + BLOCK],
                words[3, base : base + BLOCK], words[4, base : base + BLOCK], words[5, base : base + BLOCK],
                words[6, base : base + BLOCK], words[7, base : base + BLOCK],
            )  # fmt: skip
            num_near = near_masks(own, w0, w1, w2, w3, w4, w5, w6, w7, half_limit, limit, asking, masks)
            real = (np.uint64(1) << np.uint64(min(BLOCK, num_members - base))) - np.uint64(1)
            count = _below(few, gids, pairs[: listed(masks[:num_near], real, asking, queries, base, pairs)])
            rough_dots(vectors, members, pairs[:count], rough)
            count = passed(rough[:count], threshold - ROUGH_MARGIN, pairs)
            for i in range(count):
                query, member = pairs[i, 0], pairs[i, 1]
                pair_hash = _hash(few, query, gids[member])
                if pair_hash > few.limits[query]:
                    continue
                compared += 1
                similarity = exact_dot(vectors[query], members[member])
                if similarity >= threshold:
                    _enter(few, query, pair_hash, low + member, gids[member], similarity)
    return compared


@njit(cache=True, nogil=True)
def _below(few, gids, pairs):
    """Move the pairs whose hash may enter to the front; returns how many."""
    count = 0
    for i in range(pairs.shape[0]):
        query, member = pairs[i, 0], pairs[i, 1]
        if few.limits[query] != _ANY and _hash(few, query, gids[member]) > few.limits[query]:
            continue
        pairs[count, 0], pairs[count, 1] = query, member
        count += 1
    return count
