"""A map of the pool: embeddings -> points in the plane, near ones together."""

import numpy as np

from curation.ops.randomness import hash_uint64

_NEIGHBORS = 12
_EPOCHS = 200
_NEGATIVES = 12  # repelling points drawn for each point in each epoch
_REPULSION = 25  # of all points together, in units of the attraction's weights; UMAP's 5 leaves concepts less apart
_A, _B = 1.577, 0.895  # UMAP's low-dimensional similarity 1 / (1 + a d^2b) for min_dist 0.1


def neighbour_map(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lay out unit rows [N, D] so that neighbours attract and others repel: float64 [N, 2].

    The fuzzy neighbour graph and its forces are those of UMAP (McInnes, Healy, Melville, arXiv:1802.03426), moved
    together epoch by epoch instead of edge by edge, which makes the result independent of any order. Memory is O(N^2).

    Raises:
        ValueError: fewer than 3 rows.
    """
    if len(rows) < 3:
        raise ValueError(f"a map needs at least 3 images, got {len(rows)}.")
    heads, tails, weights = _neighbour_graph(rows)
    points = principal_axes(rows)
    points *= 10 / max(np.abs(points).max(), 1e-12)
    ids = np.arange(len(rows) * _NEGATIVES)
    who = ids // _NEGATIVES
    repulsion = _REPULSION * weights.sum() / len(ids)
    for epoch in range(_EPOCHS):
        step = 0.2 * (1 - epoch / _EPOCHS)
        push = _attraction(points, heads, tails, weights)
        others = (hash_uint64(seed, ids + epoch * len(ids)) % np.uint64(len(rows))).astype(np.int64)
        push += _repulsion(points, who, others, repulsion)
        points += step * np.clip(push, -8, 8)
    return points - points.mean(axis=0)


def principal_axes(rows: np.ndarray) -> np.ndarray:
    """Rows [N, D] on their two principal axes, float64 [N, 2]; the largest entry of each axis is positive."""
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    result = np.zeros((len(rows), 2))
    result[:, : axes.shape[1]] = (centred @ axes).round(6)
    return result


def _neighbour_graph(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directed edges (head, tail) to the nearest neighbours and their weights in (0, 1]."""
    similarity = np.round(rows.astype(np.float32) @ rows.astype(np.float32).T, 5)
    np.fill_diagonal(similarity, -np.inf)
    k = min(_NEIGHBORS, len(rows) - 1)
    tails = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    distance = np.sqrt(np.maximum(2 - 2 * np.take_along_axis(similarity, tails, axis=1).astype(np.float64), 0))
    beyond = distance - distance[:, :1]  # the nearest neighbour always counts in full
    weights = np.exp(-beyond / np.maximum(beyond.mean(axis=1, keepdims=True), 1e-6))
    return np.repeat(np.arange(len(rows)), k), tails.ravel(), weights.ravel()


def _attraction(points: np.ndarray, heads: np.ndarray, tails: np.ndarray, weights: np.ndarray) -> np.ndarray:
    gap = points[heads] - points[tails]
    square = np.einsum("nd,nd->n", gap, gap)
    power = np.maximum(square, 1e-12) ** (_B - 1)
    pull = -2 * _A * _B * power / (1 + _A * power * square) * weights
    force = np.clip(pull[:, None] * gap, -4, 4)
    return _sums(heads, force, len(points)) - _sums(tails, force, len(points))


def _repulsion(points: np.ndarray, who: np.ndarray, others: np.ndarray, weight: float) -> np.ndarray:
    gap = points[who] - points[others]
    square = np.einsum("nd,nd->n", gap, gap)
    away = 2 * _B / ((0.001 + square) * (1 + _A * np.maximum(square, 1e-12) ** _B)) * weight
    return _sums(who, np.clip(away[:, None] * gap, -4, 4), len(points))


def _sums(index: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    return np.stack([np.bincount(index, values[:, axis], minlength=size) for axis in (0, 1)], axis=1)
