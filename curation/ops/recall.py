"""Certified recall: how far the join must probe to find the pairs that brute force finds, with a lower bound.

A pair is found when one end probes the other's cell and their sketches are near enough, so one brute-force answer for a
sample of rows tells the recall of *every* setting: for each true pair, the rank of the other end's cell and the
distance of the sketches, in both directions.

Where only new rows ask, since the others have asked before, new rows are sampled, and a pair counts as found from those
of its ends that ask.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import betaincinv
from scipy.stats import binom

from curation.ops.cells import Cells
from curation.ops.join import Pairs
from curation.ops.randomness import hash_uint64
from curation.ops.sketches import HALF_BITS, SKETCH_BITS, half_radius
from curation.ops.true_pairs import Hits, Question, TruePairs, fewest, hits_in_range, needs, no_hits

_CONFIDENCE = 0.95
_FIRST_QUERIES = 1024  # compared by their vectors, the others by sketches
_QUERIES_AT_ONCE = 8192
_TRUTH_LOSS = 1e-4  # of the sketches that find the truth for all but the first queries
_TRUTH_LOSS_OF_FEW = 1e-3  # where only some rows ask: of a narrower radius, at a third of the time
_EXACT_ROWS = 2**14  # up to the pairs of so many, every pair is looked at in less time than a sample takes
_ROWS_AT_ONCE = 2**20

Compare = Callable[[Question], Iterable[Hits]]
"""The pool against a sample: hits_in_range for ranges that make up all rows of the cells."""


class AskingRows(Protocol):
    """The rows that ask, in ascending order."""

    def __len__(self) -> int: ...

    def between(self, start: int, stop: int) -> np.ndarray:
        """int64: those of the rows start to stop."""
        ...


@dataclass(frozen=True)
class AllRows:
    """Every row asks."""

    num_rows: int

    def __len__(self) -> int:
        return self.num_rows

    def between(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def numbered(self, start: int, stop: int) -> np.ndarray:
        """int64: start to stop of those that ask."""
        return np.arange(start, stop)


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
    floor: float,
    target_recall: float = 0.99,
    *,
    seed: int = 0,
    max_queries: int = 65_536,
    mirror: np.ndarray | None = None,
    compare: Compare | None = None,
    asking: AskingRows | None = None,
) -> tuple[Certificate, TruePairs]:
    """The smallest nprobe whose recall of pairs at or above the floor is at least target_recall with 95% confidence.

    The sketch radius is the one expected to lose a tenth of what may be lost, given the similarities of the sampled
    pairs (sketch_radius); then nprobe descends from all cells, and stops before the first value whose lower bound
    misses the target. A fixed descending sequence needs no correction for testing many values (Maurer, Hothorn and
    Lehmacher 1995). The sample grows until it would certify with a few pairs missed: each round asks for as many rows
    as the rounds before say that it takes, and reads the pool once, so two rounds are the rule. When max_queries (or
    the whole pool) hold too few pairs, all cells are probed, and the law of sketches alone, which holds for any
    vectors, bounds the recall.

    The first 1,024 sampled rows are compared with the whole pool by matrix product; further ones, too, but with
    sketches of a radius that loses one pair in 10,000 at worst, which the bound accounts for. Where only some rows ask,
    all are compared by sketches, of a radius that may lose one in 1,000: the sample would cost more than their join.

    Args:
        compare: the pool against a sample, in as many tasks as it likes; here, one range after the other, where absent.
        asking: the rows that ask; all where absent. Pairs of which neither end asks are none of the certificate's.
            Where they are fewer than a first sample, none is drawn, and the law of sketches bounds the recall.

    Returns:
        the certificate, and the true pairs to check the finished join with.
    """
    if not 0 < target_recall < 1:
        raise ValueError(f"target_recall must lie between 0 and 1, got {target_recall}.")
    asking = AllRows(cells.num_rows) if asking is None else asking
    if len(asking) * cells.num_rows <= _EXACT_ROWS**2:
        certificate = Certificate(
            nprobe=cells.num_cells, sketch_radius=None, num_queries=0, num_pairs=0, recall=1.0, lower_bound=1.0,
            basis="exact",
        )  # fmt: skip
        return certificate, no_true_pairs()
    all_ask = len(asking) == cells.num_rows
    truth_loss = _TRUTH_LOSS if all_ask else _TRUTH_LOSS_OF_FEW
    # Thrice what certifies when every pair is found; twice where few ask, whose probes cost less than a sample.
    enough = (3 if all_ask else 2) * np.log(1 - _CONFIDENCE) / np.log(target_recall)
    nprobe, recall, bound, radius = None, 1.0, 0.0, SKETCH_BITS
    truth, num_queries = no_true_pairs(), 0
    # A first sample would be all of them: to look at every pair by sketches costs no more than to look for settings.
    is_few = not all_ask and len(asking) <= _FIRST_QUERIES + _QUERIES_AT_ONCE
    rows, gids = _sample(cells, asking, 0 if is_few else max_queries, seed)
    while num_queries < len(rows):
        stop = min(num_queries + _more_queries(truth, num_queries, enough), len(rows))
        chosen = slice(num_queries, stop)
        num_exact = max(_FIRST_QUERIES - num_queries, 0) if all_ask else 0
        question = question_about(
            cells, rows[chosen], gids[chosen], floor, num_exact, sketch_radius(np.array([floor]), truth_loss),
            mirror=mirror, seed=seed,
        )  # fmt: skip
        truth = TruePairs(*map(np.concatenate, zip(truth, true_pairs(cells, question, compare, asking), strict=True)))
        num_queries = stop
        if effective_size(truth.query) >= enough:
            radius = sketch_radius(truth.similarity, (1 - target_recall) / 10)
            nprobe, recall, bound = _descend(truth, cells.num_cells, radius, target_recall, truth_loss)
            if nprobe is not None:
                break
    basis = "sample"
    if nprobe is None:
        nprobe, basis, law_loss = cells.num_cells, "law", (1 - target_recall) / 10
        radius = sketch_radius(np.array([floor]), law_loss)
        recall = float(found_by(truth, nprobe, radius).mean()) if len(truth.gid) else 1.0
        bound = 1 - law_loss
    certificate = Certificate(
        nprobe=nprobe, sketch_radius=radius, num_queries=num_queries, num_pairs=len(truth.gid), recall=recall,
        lower_bound=bound, basis=basis,
    )  # fmt: skip
    return certificate, truth


def question_about(
    cells: Cells,
    rows: np.ndarray,
    gids: np.ndarray,
    floor: float,
    num_exact: int,
    radius: int = SKETCH_BITS,
    *,
    mirror: np.ndarray | None = None,
    seed: int = 0,
) -> Question:
    """Read the vectors of the rows to ask about, one read for each."""
    return Question(rows, gids, cells.read_rows(rows), floor, num_exact, radius, mirror, seed)


def true_pairs(
    cells: Cells, question: Question, compare: Compare | None = None, asking: AskingRows | None = None
) -> TruePairs:
    """Compare the rows asked about with the whole pool, and say what the join would need to find each pair.

    From an end that does not ask a pair is not found: all cells come before the other's.
    """
    found = [hits_in_range(cells, 0, cells.num_rows, question)] if compare is None else compare(question)
    hits = fewest(question, [no_hits(), *found])
    truth = needs(cells, question, hits)
    if asking is not None:
        truth.rank[~_are_asking(asking, hits.row), 1] = cells.num_cells
    return truth


def _are_asking(asking: AskingRows, rows: np.ndarray) -> np.ndarray:
    """bool: which of some rows ask, a block of them in memory at a time."""
    found = np.zeros(len(rows), bool)
    for block in np.unique(rows // _ROWS_AT_ONCE).tolist():
        own = np.flatnonzero(rows // _ROWS_AT_ONCE == block)
        found[own] = np.isin(rows[own], asking.between(block * _ROWS_AT_ONCE, (block + 1) * _ROWS_AT_ONCE))
    return found


def found_by(truth: TruePairs, nprobe: int, radius: int | None) -> np.ndarray:
    """Which of the true pairs the join finds with these settings: bool [P]."""
    near = truth.distance <= (SKETCH_BITS if radius is None else radius)
    found = (truth.rank < nprobe) & near
    return found[:, 0] | found[:, 1]


def are_among(edges: Pairs, truth: TruePairs) -> np.ndarray:
    """Which of the true pairs are among some edges: bool [P]."""
    known = np.unique(np.concatenate([truth.query, truth.gid]))
    if not len(known):
        return np.zeros(0, bool)

    def keys(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.searchsorted(known, np.minimum(a, b)) * len(known) + np.searchsorted(known, np.maximum(a, b))

    both = np.flatnonzero(np.isin(edges.a, known) & np.isin(edges.b, known))
    return np.isin(keys(truth.query, truth.gid), keys(edges.a[both], edges.b[both]))


def measured_recall(hits: np.ndarray, truth: TruePairs) -> tuple[float, float]:
    """Share of the true pairs that are hits, bool [P], and its lower bound; 1 and 0 where there are no pairs."""
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


def _sample(cells: Cells, asking: AskingRows, max_queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that ask in the order of their gids' hashes, and the gids: one pass over these, of which few are held."""
    share = min(4 * max_queries / len(asking), 1.0)
    hashes, rows, gids = np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)
    for start in range(0, cells.num_rows, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, cells.num_rows)
        own_rows = asking.between(start, stop)
        own = cells.read_gids(start, stop)[own_rows - start]
        own_hashes = hash_uint64(seed, own)
        few = np.flatnonzero(own_hashes <= np.uint64(min(share * 2.0**64, 2.0**64 - 2048)))
        hashes = np.concatenate([hashes, own_hashes[few]])
        rows, gids = np.concatenate([rows, own_rows[few]]), np.concatenate([gids, own[few]])
    order = np.argsort(hashes)[:max_queries]
    return rows[order], gids[order]


def _more_queries(truth: TruePairs, num_queries: int, enough: float) -> int:
    """How many further rows to ask about, given what those before gave."""
    if not num_queries:
        return _FIRST_QUERIES + _QUERIES_AT_ONCE
    independent = max(effective_size(truth.query), 1.0)
    missing = max(1.25 * enough - independent, independent / 2)
    return max(int(missing * num_queries / independent), _FIRST_QUERIES)


def _descend(
    truth: TruePairs, num_cells: int, radius: int, target_recall: float, truth_loss: float
) -> tuple[int | None, float, float]:
    """(nprobe, recall, lower bound) of the last value, from all cells down, to meet the target; None if none does."""
    best: tuple[int | None, float, float] = (None, 0.0, 0.0)
    for nprobe in _descending(num_cells):
        recall, bound = _bounded(found_by(truth, nprobe, radius), truth.query)
        bound *= 1 - truth_loss
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


def no_true_pairs() -> TruePairs:
    none = np.empty(0, np.int64)
    return TruePairs(none, none, np.empty(0, np.float32), np.empty((0, 2), np.int32), np.empty((0, 2), np.int64))
