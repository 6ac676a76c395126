"""How far a seed image must look for its nearest pool images, and which of those count where several want one."""

from dataclasses import dataclass

import numpy as np
from numba import njit

from curation.ops.hierarchy import rank_in_segment
from curation.ops.recall import effective_size, lower_bound

SAMPLED_QUERIES = 1024
"""Seed images that are compared with all the pool: a set of no more is answered exactly."""

BLOCK_PIECES = 8
"""into which a block of neighbours is cut for its draws"""
SPARE, SPARE_SHARE = 8, 2
"""Neighbours that are looked for beyond those that can be drawn, which leaks may turn out to be."""


@dataclass(frozen=True, kw_only=True)
class RetrievalCertificate:
    """How many clusters seed images look into, and the evidence for it."""

    nprobe: int
    num_queries: int
    """seed images sampled"""
    num_pairs: int
    """their true neighbours"""
    recall: float
    """share of those in the clusters that are looked into"""
    lower_bound: float
    """of the recall, one-sided, 95%"""
    basis: str
    """sample: measured; exact: every seed image was compared with the whole pool, or none can be drawn"""


def certify_probes(
    query: np.ndarray, rank: np.ndarray, num_clusters: int, target_recall: float, num_queries: int
) -> RetrievalCertificate:
    """The fewest clusters that hold the true neighbours of a sample of queries with the recall that is asked for.

    Descends from all clusters, by a sixth each time, to the last number whose lower bound meets the target; a fixed
    order needs no correction for testing many values. Where none meets it, all clusters are looked into.

    Args:
        query: int64 [P], the query of each true neighbour.
        rank: int [P], how many clusters are nearer to the query than the neighbour's own.

    Source: Maurer, Hothorn and Lehmacher 1995, and the bounds of curation.ops.recall.
    """
    size, best = effective_size(query), (num_clusters, 1.0, 1.0)
    for nprobe in np.unique(np.rint(num_clusters * 0.85 ** np.arange(1, 200)).astype(int))[::-1].tolist():
        recall = float((rank < nprobe).mean()) if len(rank) else 0.0
        bound = lower_bound(recall * size, size)
        if nprobe < 1 or bound < target_recall:
            break
        best = (nprobe, recall, bound)
    nprobe, recall, bound = best
    return RetrievalCertificate(
        nprobe=nprobe, num_queries=num_queries, num_pairs=len(query), recall=recall, lower_bound=bound,
        basis="exact" if nprobe == num_clusters else "sample",
    )  # fmt: skip


def first_neighbours(
    query: np.ndarray, gid: np.ndarray, similarity: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `depth` most similar gids of each query, nearest first, equal ones by smaller gid; sorted by query."""
    order = np.lexsort((gid, -similarity.astype(np.float64), query))
    order = order[rank_in_segment(query[order]) < depth]
    return query[order], gid[order], similarity[order]


def resolve_collisions(
    query: np.ndarray, rank: np.ndarray, gid: np.ndarray, similarity: np.ndarray, k: int, collisions: str
) -> np.ndarray:
    """Which claims of queries on images count as draws: bool [N].

    Args:
        query, rank, gid, similarity: of each claim: who makes it, how many of its own are nearer, what it wants, how
            similar that is. "keep" and "drop" need all claims of an image, "next_neighbor" all claims there are.
        k: draws per query, at most.
        collisions: "keep": the first k of every query, whoever else wants them. "drop": of the first k, an image goes
            to the query it is most similar to. "next_neighbor": as drop, but a query that loses an image goes deeper
            in its list.

    Source: the three readings that the DINOv2 paper leaves open; its counts are exact multiples of k ("keep").
    """
    first = rank < k
    if collisions == "keep":
        return first
    # The most similar claim on an image comes first; ties go to the lower query, so the order is total.
    images, image = np.unique(gid, return_inverse=True)
    queries, by = np.unique(query, return_inverse=True)
    order = np.lexsort((query, gid, -similarity.astype(np.float64)))
    if collisions == "drop":
        order, k = order[first[order]], len(images)
    return _by_order(order, by, image, k, len(queries), len(images))


@njit(cache=True, nogil=True)
def _by_order(order, query, image, k, num_queries, num_images):
    """Claims that find their image untaken and their query with fewer than k, in this order."""
    counts, drawn = np.zeros(query.size, np.bool_), np.zeros(num_queries, np.int64)
    taken = np.zeros(num_images, np.bool_)
    for claim in order:
        if drawn[query[claim]] < k and not taken[image[claim]]:
            counts[claim] = taken[image[claim]] = True
            drawn[query[claim]] += 1
    return counts
