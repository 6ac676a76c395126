"""Certified recall: how far the join must probe to find the pairs that brute force finds, with a lower bound.

A pair is found when one end probes the other's cell and their sketches are near enough, so one brute-force answer for a
sample of rows tells the recall of *every* setting: for each true pair, the rank of the other end's cell and the
distance of the sketches, in both directions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv
from scipy.stats import binom

from curation.ops.cells import Cells, cell_ranks
from curation.ops.join import Pairs, pairs_above
from curation.ops.randomness import hash_uint64
from curation.ops.sketches import HALF_BITS, SKETCH_BITS, half_radius, mirrored, radius_needed

_CONFIDENCE = 0.95
_PAIRS_PER_QUERY = 4
_FIRST_QUERIES = 1024
_QUERIES_AT_ONCE = 8192
_TRUTH_LOSS = 1e-4  # of the sketches that find the truth for all but the first queries
_EXACT_ROWS = 2**14  # below this every pair is looked at in less time than a sample takes


class TruePairs(NamedTuple):
    """What brute force found for a sample of rows.

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


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """Settings for the join and the evidence for them."""

    nprobe: int
    sketch_radius: int | None
    # bits; None where sketches are not used
    num_queries: int
    # rows sampled
    num_pairs: int
    # true pairs among them, at most 4 a query
    recall: float
    # share of those pairs that the settings find
    lower_bound: float
    # of pair recall, one-sided, 95%
    basis: str
    # "sample": measured; "law": too few pairs to measure, all cells and the law of sign sketches; "exact": all pairs


def certify(
    cells: Cells,
    similarity_threshold: float,
    target_recall: float = 0.99,
    *,
    seed: int = 0,
    max_queries: int = 65_536,
    mirror: np.ndarray | None = None,
    num_threads: int | None = None,
) -> tuple[Certificate, TruePairs]:
    """The smallest nprobe whose pair recall is at least target_recall with 95% confidence.

    The sketch radius is the one expected to lose a tenth of what may be lost, given the similarities of the sampled
    pairs (sketch_radius); then nprobe descends from all cells, and stops before the first value whose lower bound
    misses the target. A fixed descending sequence needs no correction for testing many values (Maurer, Hothorn and
    Lehmacher 1995). The sample grows until it would certify with a few pairs missed; when max_queries (or the whole
    pool) hold too few pairs, all cells are probed, and the law of sketches alone, which holds for any vectors, bounds
    the recall.

    The first 1,024 sampled rows are compared with the whole pool by matrix product; further ones, too, but with
    sketches of a radius that loses one pair in 10,000 at worst, which the bound accounts for.

    Returns:
        the certificate, and the true pairs to check the finished join with (measured_recall).
    """
    if not 0 < target_recall < 1:
        raise ValueError(f"target_recall must lie between 0 and 1, got {target_recall}.")
    if cells.num_rows <= _EXACT_ROWS:
        certificate = Certificate(
            nprobe=cells.num_cells, sketch_radius=None, num_queries=0, num_pairs=0, recall=1.0, lower_bound=1.0,
            basis="exact",
        )  # fmt: skip
        return certificate, _no_true_pairs()
    enough = 3 * np.log(1 - _CONFIDENCE) / np.log(target_recall)  # thrice what certifies when every pair is found
    nprobe, recall, bound, radius = None, 1.0, 0.0, SKETCH_BITS
    truth, num_queries = _no_true_pairs(), 0
    for rows, truth_radius in _sample(cells, similarity_threshold, max_queries, seed):
        more = true_pairs(
            cells, rows, similarity_threshold, truth_radius, seed=seed, mirror=mirror, num_threads=num_threads
        )
        truth = TruePairs(*(np.concatenate(columns) for columns in zip(truth, more, strict=True)))
        num_queries += len(rows)
        if effective_size(truth.query) >= enough:
            radius = sketch_radius(truth.similarity, (1 - target_recall) / 10)
            nprobe, recall, bound = _descend(truth, cells.num_cells, radius, target_recall)
            if nprobe is not None:
                break
    basis = "sample"
    if nprobe is None:
        nprobe, basis, law_loss = cells.num_cells, "law", (1 - target_recall) / 10
        radius = sketch_radius(np.array([similarity_threshold]), law_loss)
        recall = float(found_by(truth, nprobe, radius).mean()) if len(truth.gid) else 1.0
        bound = 1 - law_loss
    certificate = Certificate(
        nprobe=nprobe, sketch_radius=radius, num_queries=num_queries, num_pairs=len(truth.gid), recall=recall,
        lower_bound=bound, basis=basis,
    )  # fmt: skip
    return certificate, truth


def true_pairs(
    cells: Cells,
    rows: np.ndarray,
    similarity_threshold: float,
    truth_radius: int | None = None,
    *,
    seed: int = 0,
    mirror: np.ndarray | None = None,
    num_threads: int | None = None,
) -> TruePairs:
    """Compare the given rows with the whole pool, and say what the join would need to find each pair.

    A query keeps at most 4 of its pairs, those of smallest hash: a placeholder image that occurs a thousand times
    would otherwise outweigh every other image of the sample.
    """
    vectors, gids = cells.read_rows(rows), cells.gids_of_rows(rows)
    found = [np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, bool)]
    for start in range(0, len(rows), _QUERIES_AT_ONCE):
        block = slice(start, start + _QUERIES_AT_ONCE)
        matches = pairs_above(
            vectors[block], cells, similarity_threshold, cells.num_cells, truth_radius, mirror=mirror,
            num_threads=num_threads,
        )  # fmt: skip
        kept = np.flatnonzero(gids[block][matches.query] != matches.gid)
        query, gid = start + matches.query[kept], matches.gid[kept]
        chosen = kept[_first_few(query, hash_uint64(seed, hash_uint64(seed, gids[query]) + gid.astype(np.uint64)))]
        columns = (
            start + matches.query[chosen],
            matches.gid[chosen],
            matches.similarity[chosen],
            matches.mirrored[chosen],
        )
        found = [np.concatenate(both) for both in zip(found, columns, strict=True)]
    query, gid, similarity, flipped = found
    others = rows_of_gids(cells, gid)
    rank, distance = _ranks_and_distances(
        cells, (rows[query], vectors[query]), (others, cells.read_rows(others)), flipped, mirror
    )
    return TruePairs(gids[query], gid, similarity, rank, distance)


def found_by(truth: TruePairs, nprobe: int, radius: int | None) -> np.ndarray:
    """Which of the true pairs the join finds with these settings: bool [P]."""
    near = truth.distance <= (SKETCH_BITS if radius is None else radius)
    found = (truth.rank < nprobe) & near
    return found[:, 0] | found[:, 1]


def measured_recall(found: Pairs, truth: TruePairs) -> tuple[float, float]:
    """Recall of the pairs that a join really found, and its lower bound: what goes into the report.

    found may hold pairs of the whole pool; recall is 1 where the sample has no pairs at all.
    """
    ends = np.minimum(truth.query, truth.gid), np.maximum(truth.query, truth.gid)
    low = np.searchsorted(found.a, ends[0], side="left")
    high = np.searchsorted(found.a, ends[0], side="right")
    hits = np.array(
        [b in found.b[i:j] for i, j, b in zip(low.tolist(), high.tolist(), ends[1].tolist(), strict=True)], bool
    )
    return _bounded(hits, truth.query)


def sketch_radius(similarities: np.ndarray, max_loss: float) -> int:
    """The smallest radius, in bits, that is expected to lose at most the share max_loss of pairs so similar.

    Each of the 512 bits differs with probability angle / pi over the choice of the rotations, whatever the vectors are;
    bits of one rotation are, if anything, less spread than independent ones. A pair is lost where its whole sketches
    or their first halves differ too much. 512 when there are no pairs.

    Source: Charikar 2002 and Ji et al. 2012, as in curation.ops.sketches.
    """
    bit_differs = np.arccos(np.clip(similarities.astype(np.float64), -1, 1)) / np.pi
    for radius in range(SKETCH_BITS):
        whole = binom.sf(radius, SKETCH_BITS, bit_differs)
        loss = whole + binom.sf(half_radius(radius), HALF_BITS, bit_differs)
        if len(loss) and loss.mean() <= max_loss:
            return radius
    return SKETCH_BITS


def effective_size(query: np.ndarray) -> float:
    """Number of independent observations among pairs grouped by query, as if those of one query were all alike.

    Rows are sampled independently, pairs of one row are not. Source: Kish, "Survey Sampling", 1965, section 8.2.
    """
    _, counts = np.unique(query, return_counts=True)
    return float(counts.sum() ** 2 / (counts**2).sum()) if len(counts) else 0.0


def lower_bound(successes: float, trials: float, confidence: float = _CONFIDENCE) -> float:
    """One-sided lower confidence bound of a binomial proportion; numbers of trials need not be whole.

    Source: Clopper and Pearson, Biometrika 26, 1934.
    """
    return float(betaincinv(successes, trials - successes + 1, 1 - confidence)) if successes > 0 else 0.0


def rows_of_gids(cells: Cells, gids: np.ndarray) -> np.ndarray:
    """Row of each gid, which must exist: int64. One pass over the pool's gids."""
    wanted, back = np.unique(gids, return_inverse=True)
    rows = np.full(len(wanted), -1, np.int64)
    for start, block in _gid_blocks(cells):
        at = np.searchsorted(wanted, block)
        hit = (
            np.flatnonzero((at < len(wanted)) & (wanted[np.minimum(at, len(wanted) - 1)] == block))
            if len(wanted)
            else []
        )
        rows[at[hit]] = start + np.asarray(hit, np.int64)
    return rows[back]


def _sample(cells: Cells, threshold: float, max_queries: int, seed: int) -> Iterator[tuple[np.ndarray, int | None]]:
    """Growing batches of rows in the order of their gids' hashes, with the radius that their truth is found by."""
    hashes, rows = np.empty(0, np.uint64), np.empty(0, np.int64)
    for start, gids in _gid_blocks(cells):
        hashes = np.concatenate([hashes, hash_uint64(seed, gids)])
        rows = np.concatenate([rows, np.arange(start, start + len(gids))])
        if len(rows) > max_queries:
            smallest = np.argpartition(hashes, max_queries)[:max_queries]
            hashes, rows = hashes[smallest], rows[smallest]
    rows = rows[np.argsort(hashes)]
    yield rows[:_FIRST_QUERIES], None
    radius = sketch_radius(np.array([threshold]), _TRUTH_LOSS)
    for start in range(_FIRST_QUERIES, len(rows), _QUERIES_AT_ONCE):
        yield rows[start : start + _QUERIES_AT_ONCE], radius


def _descend(truth: TruePairs, num_cells: int, radius: int, target_recall: float) -> tuple[int | None, float, float]:
    """(nprobe, recall, lower bound) of the last value, from all cells down, to meet the target; None if none does."""
    best: tuple[int | None, float, float] = (None, 0.0, 0.0)
    for nprobe in _descending(num_cells):
        recall, bound = _bounded(found_by(truth, nprobe, radius), truth.query)
        bound *= 1 - _TRUTH_LOSS
        if bound < target_recall:
            break
        best = (nprobe, recall, bound)
    return best


def _descending(num_cells: int) -> list[int]:
    """From all cells to one, by about a sixth each time."""
    steps = np.unique(np.rint(num_cells * 0.85 ** np.arange(200)).astype(int))
    return [int(n) for n in steps[::-1] if n >= 1]


def _bounded(hits: np.ndarray, query: np.ndarray) -> tuple[float, float]:
    if not len(hits):
        return 1.0, 0.0
    size = effective_size(query)
    return float(hits.mean()), lower_bound(float(hits.mean()) * size, size)


def _ranks_and_distances(
    cells: Cells,
    query: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    flipped: np.ndarray,
    mirror: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    ranks, distances = [], []
    for (_, asking), (rows, asked) in ((query, other), (other, query)):
        if mirror is not None:
            asking = np.where(flipped[:, None], mirrored(asking, mirror), asking)
        ranks.append(cell_ranks(asking, cells.centroids, cells.cell_of_rows(rows)))
        distances.append(radius_needed(cells.sketch(asking), cells.sketch(asked)))
    return np.stack(ranks, axis=1), np.stack(distances, axis=1)


def _first_few(group: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Indices of the 4 smallest hashes of each group, in the order of the groups."""
    order = np.lexsort((hashes, group))
    starts = np.searchsorted(group[order], group[order])
    return order[np.arange(len(order)) - starts < _PAIRS_PER_QUERY]


def _gid_blocks(cells: Cells) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, cells.num_rows, 1 << 20):
        yield start, cells.read_gids(start, min(start + (1 << 20), cells.num_rows))


def _no_true_pairs() -> TruePairs:
    none = np.empty(0, np.int64)
    return TruePairs(none, none, np.empty(0, np.float32), np.empty((0, 2), np.int32), np.empty((0, 2), np.int64))
