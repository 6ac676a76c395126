"""What brute force finds for a sample of rows, and what the join would need to find the same.

The pool is read once, in ranges that share nothing: each gives the few pairs of every sampled row whose hash is
smallest there, and the smallest of all ranges are the smallest of the pool.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numba import njit

from curation.ops.cells import Cells, cell_ranks
from curation.ops.join import DEFAULT_MEMORY_BYTES, sketch_columns
from curation.ops.join_kernels import pairs_by_sketch
from curation.ops.neighbours import Candidates, near_by_product
from curation.ops.randomness import hash_uint64
from curation.ops.sketches import (
    ROUGH_MARGIN,
    exact_dot,
    half_radius,
    mirrored,
    radius_needed,
)

PAIRS_PER_QUERY = 4
"""A placeholder that occurs a thousand times would otherwise outweigh every other image of the sample."""

_TILE_ROWS = 2**14
_HIT_BYTES = 64  # of a hit while its tile is worked on


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
    candidates: Candidates | None = None,
) -> Hits:
    """Compare rows start to stop of the cells, read once, with every sampled row, on one thread.

    Returns:
        of each sampled row the pairs of smallest hash, at most 4.
    """
    ways = []
    for signs in [None] if question.mirror is None else [None, question.mirror]:
        vectors = question.vectors if signs is None else mirrored(question.vectors, signs)
        ways.append((vectors, cells.sketch(vectors)))
    product = candidates or near_by_product
    kept = no_hits()
    for low in range(start, stop, _TILE_ROWS):
        high = min(low + _TILE_ROWS, stop)
        members, gids = cells.read(low, high), cells.read_gids(low, high)
        sketches = cells.read_sketches(low, high)
        words = sketch_columns(sketches)
        step = max(max_memory_bytes // 2 // (_HIT_BYTES * len(members)), 1)
        found = [kept]
        for first, last, is_exact in _blocks(question, step):
            both = []
            for is_mirrored, (vectors, own) in enumerate(ways):
                asked = vectors[first:last]
                if is_exact or candidates is not None:
                    pairs = product(asked, members, question.threshold - float(ROUGH_MARGIN))
                    if not is_exact:
                        needed = radius_needed(own[first:last][pairs[:, 0]], sketches[pairs[:, 1]])
                        pairs = pairs[needed <= question.radius]
                    similarity = _exact(pairs, asked, members)
                    good = similarity >= np.float32(question.threshold)
                    query, member, similarity = pairs[good, 0], pairs[good, 1], similarity[good]
                else:
                    query, member, similarity = pairs_by_sketch(
                        words, members, np.array([0, len(members)]), asked, own[first:last],
                        np.arange(len(asked), dtype=np.int32), np.array([0]), np.array([len(asked)]), question.radius,
                        half_radius(question.radius), np.float32(question.threshold), 1024,
                    )  # fmt: skip
                query, member = first + query.astype(np.int64), member.astype(np.int64)
                few = _few(query, hashes(question, query, gids[member]), first, last, question.rows - low, member)
                query, member = query[few], member[few]
                flipped = np.full(len(few), is_mirrored > 0)
                both.append(Hits(query, low + member, gids[member], similarity[few], flipped))
            found.append(fewest(question, both))
        kept = fewest(question, found)
    return kept


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


def _blocks(question: Question, step: int) -> Iterable[tuple[int, int, bool]]:
    bounds = [(0, min(question.num_exact, len(question.rows)), True), (question.num_exact, len(question.rows), False)]
    for start, stop, is_exact in bounds:
        for first in range(start, stop, step):
            yield first, min(first + step, stop), is_exact


@njit(cache=True, nogil=True)
def _exact(pairs, asked, members):
    out = np.empty(pairs.shape[0], np.float32)
    for i in range(out.size):
        out[i] = exact_dot(asked[pairs[i, 0]], members[pairs[i, 1]])
    return out


@njit(cache=True, nogil=True)
def _few(query, hashes, first, last, own, member):
    """Indices of the 4 smallest hashes of each query from first to last, its own row left out, in no order.

    A row in a crowd has 100,000 hits in each way of asking: sorting them all would take longer than finding them.
    """
    kept = np.empty((last - first, PAIRS_PER_QUERY), np.int64)
    counts = np.zeros(last - first, np.int64)
    for i in range(query.size):
        if own[query[i]] == member[i]:
            continue
        places = kept[query[i] - first]
        count = counts[query[i] - first]
        if count < PAIRS_PER_QUERY:
            places[count] = i
            counts[query[i] - first] = count + 1
            continue
        worst = 0
        for place in range(1, PAIRS_PER_QUERY):
            if hashes[places[place]] > hashes[places[worst]]:
                worst = place
        if hashes[i] < hashes[places[worst]]:
            places[worst] = i
    out = np.empty(counts.sum(), np.int64)
    count = 0
    for row in range(counts.size):
        for place in range(counts[row]):
            out[count] = kept[row, place]
            count += 1
    return out
