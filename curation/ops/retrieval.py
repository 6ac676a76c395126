"""Top-k lists of seed images -> draws, under a rule for the pool images that several seed images want."""

import numpy as np


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
