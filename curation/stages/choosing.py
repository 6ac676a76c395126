"""Which image stands for a group: what images are compared by, and what the join may not have kept of their pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from curation.engine.store import ImageSet
from curation.ops.components import Similar
from curation.stages.members import unit_rows


@dataclass(frozen=True)
class GroupRules:
    """How one image of a group is chosen, and when a group is split: see DedupConfig."""

    representative: tuple[str, ...]
    max_component_size: int
    min_similarity: float | None
    perceptual_distance: int
    similarity_threshold: float
    mirror: tuple[int, ...] | None
    """signs that turn a vector into that of the flipped image"""


def priorities(
    pool: ImageSet, encoder: str, rules: GroupRules, nodes: np.ndarray, labels: np.ndarray, gids: np.ndarray
) -> list[np.ndarray]:
    """By what images of a component are compared, the most important first.

    Args:
        nodes: of each image, what `representative` names, and its standing in an earlier release.

    The component's mean is asked for only where all that comes before leaves two images of it equal.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    keys: list[np.ndarray] = [nodes["standing"].astype(np.int64)]
    for name in rules.representative:
        if name == "central":
            keys.append(_centrality(pool, encoder, gids, labels, _undecided(labels, keys)))
        else:
            keys.append(nodes[{"resolution": "pixels", "bytes": "bytes"}[name]].astype(np.int64))
    return keys


def _undecided(labels: np.ndarray, keys: Sequence[np.ndarray]) -> np.ndarray:
    """bool [N]: rows of components in which two rows are equal in all keys."""
    order = np.lexsort((*keys, labels))
    same = np.ones(max(len(labels) - 1, 0), bool)
    for column in (labels, *keys):
        same &= column[order][1:] == column[order][:-1]
    return np.isin(labels, labels[order][1:][same])


def _centrality(pool: ImageSet, encoder: str, gids: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """float32 [N]: cosine to the mean of the image's component; NaN where it is not asked for."""
    result = np.full(len(labels), np.nan, np.float32)
    members = np.flatnonzero(asked)
    if not len(members):
        return result
    rows = unit_rows(pool.take_embeddings(encoder, gids[members]))
    order = np.argsort(labels[members], kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(labels[members][order]) > 0])
    sums = np.add.reduceat(rows[order].astype(np.float64), starts, axis=0)
    mean = np.repeat(sums, np.diff(np.r_[starts, len(order)]), axis=0)
    cosine = np.einsum("nd,nd->n", rows[order], mean) / np.maximum(np.linalg.norm(mean, axis=1), 1e-12)
    result[members[order]] = cosine
    return result


def similar_to(pool: ImageSet, encoder: str, rules: GroupRules, node: np.ndarray, capped: np.ndarray) -> Similar:
    """Cosines as the join computes them, of capped nodes to one; -inf below the threshold."""
    vectors = np.empty((0, 0), np.float16)
    places = np.cumsum(capped) - 1

    def similar(row: int, others: np.ndarray) -> np.ndarray:
        nonlocal vectors
        if not len(vectors):
            vectors = pool.take_embeddings(encoder, node[capped])
        own = vectors[places[row]].astype(np.float64)
        ways = np.stack([own] if rules.mirror is None else [own, own * np.array(rules.mirror)])
        cosine = np.empty(len(others), np.float32)
        for start in range(0, len(others), 1 << 14):  # sums in float64 are exact, whatever the order
            block = slice(start, start + (1 << 14))
            cosine[block] = (vectors[places[others[block]]].astype(np.float64) @ ways.T).max(axis=1)
        return np.where(cosine >= np.float32(rules.similarity_threshold), cosine, np.float32(-np.inf))

    return similar
