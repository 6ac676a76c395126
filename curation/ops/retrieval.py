"""Which clusters a seed image looks into, and what of its top-k counts where several seed images want one image."""

import numpy as np

_EXACT_ROWS = 2**17  # up to this many survivors are all compared with each seed image
_PROBED_ROWS = 2**16  # beyond, those of its nearest clusters, as many clusters as hold about this many images
_LEAST_PROBES = 64


def resolve_collisions(
    gids: np.ndarray, similarity: np.ndarray, k: int, collisions: str
) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of the neighbour lists count as draws.

    Args:
        gids: int64 [Q, depth], each query's neighbours nearest first; -1 where there is none.
        similarity: float32 [Q, depth].
        k: draws per query, at most.
        collisions: "keep": the first k of every list, whoever else wants them. "drop": of the first k, an image goes
            to the query it is most similar to. "next_neighbor": as drop, but a query that loses an image goes deeper
            in its list.

    Returns:
        (query, rank) int64 [draws]: positions in gids, by query then rank.

    Source: the three readings that the DINOv2 paper leaves open; its counts are exact multiples of k ("keep").
    """
    limit = gids if collisions == "next_neighbor" else gids[:, :k]
    query, rank = np.nonzero(limit >= 0)
    if collisions == "keep":
        return query, rank
    wanted = limit[query, rank]
    # The most similar claim on an image comes first; ties go to the lower query, so the order is total.
    order = np.lexsort((query, wanted, -similarity[query, rank].astype(np.float64)))
    if collisions == "drop":
        _, first = np.unique(wanted[order], return_index=True)
        kept = np.sort(order[first])
        return query[kept], rank[kept]
    taken: set[int] = set()
    drawn = np.zeros(len(gids), np.int64)
    kept_list = []
    for position in order.tolist():
        image, by = int(wanted[position]), query[position]
        if drawn[by] < k and image not in taken:
            taken.add(image)
            drawn[by] += 1
            kept_list.append(position)
    kept = np.sort(np.array(kept_list, np.int64))
    return query[kept], rank[kept]


def num_probes(num_rows: int, num_clusters: int) -> int:
    """How many clusters a seed image looks into: all of a small pool, else enough for the nearest to be among them."""
    if num_rows <= _EXACT_ROWS:
        return num_clusters
    return min(num_clusters, max(_LEAST_PROBES, -(-_PROBED_ROWS * num_clusters // num_rows)))
