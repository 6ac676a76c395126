"""Connected components of near-duplicate pairs, their representatives, and the splitting of those that chained."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]
"""One batch of pairs: a, b int [E] row numbers, and similarity float32 [E]."""

Similar = Callable[[int, np.ndarray], np.ndarray]
"""(a row, others) -> float32 similarity of each of the others to it; -inf where they are no pair."""


class UnionFind:
    """Disjoint sets over rows 0 to N - 1, each named by its smallest row: the result is the same in any order of edges.

    Args:
        parent: an integer array [N] to work in, for instance a np.memmap of uint32 (4 bytes a row); it is overwritten.

    Source: Tarjan and van Leeuwen, "Worst-case analysis of set union algorithms", JACM 1984 (path halving).
    """

    def __init__(self, parent: np.ndarray) -> None:
        if len(parent) > np.iinfo(parent.dtype).max:
            raise ValueError(f"parent of type {parent.dtype} cannot number {len(parent)} rows: use int64.")
        self.parent = parent
        for start in range(0, len(parent), 1 << 20):
            stop = min(start + (1 << 20), len(parent))
            parent[start:stop] = np.arange(start, stop)

    def union(self, a: np.ndarray, b: np.ndarray) -> None:
        """Join the sets of a[i] and b[i], for every i. Raises ValueError for a row that does not exist."""
        if len(a) and not 0 <= min(a.min(), b.min()) <= max(a.max(), b.max()) < len(self.parent):
            raise ValueError(f"edges must name rows 0 to {len(self.parent) - 1}, got {min(a.min(), b.min())} to "
                             f"{max(a.max(), b.max())}.")  # fmt: skip
        _union(self.parent, a, b)

    def labels(self) -> np.ndarray:
        """The smallest row of each row's set: the parent array itself, flattened in place."""
        _flatten(self.parent)
        return self.parent


@dataclass(frozen=True)
class Groups:
    """Near-duplicate groups over all rows.

    Attributes:
        labels: [N], the smallest row of each row's group.
        representatives: int64 [N], the row kept for each row's group; a row that is alone represents itself.
        similarity: float32 [N], of each row to its representative, where they are a pair; 1 for the representative
            itself, NaN for a member that is linked through others only.
        table: one entry per group of at least two rows, ordered by label.
        split: one entry per connected component that was split, ordered by label.
    """

    labels: np.ndarray
    representatives: np.ndarray
    similarity: np.ndarray
    table: "GroupTable"
    split: "SplitTable"


@dataclass(frozen=True)
class GroupTable:
    """Columns [G]: least_similarity is over the members that are a pair with the representative (num_linked of them),
    NaN where there are none; the other size - 1 - num_linked are linked through others only."""

    label: np.ndarray
    size: np.ndarray
    representative: np.ndarray
    least_similarity: np.ndarray
    num_linked: np.ndarray


@dataclass(frozen=True)
class SplitTable:
    """Columns [S]: the component's smallest row, its size, and how many groups it became (rows left alone included)."""

    label: np.ndarray
    size: np.ndarray
    num_groups: np.ndarray


def component_labels(num_rows: int, edges: Iterable[Edges], parent: np.ndarray | None = None) -> np.ndarray:
    """Label each row with the smallest row of its connected component; one pass over batches of edges."""
    sets = UnionFind(np.empty(num_rows, np.int64) if parent is None else parent)
    for a, b, _ in edges:
        sets.union(a, b)
    return sets.labels()


def spanning_forest(a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Which edges make a spanning forest of the largest similarities, and so span the components at every threshold.

    Equal similarities go by a, then b. Returns indices, int64, ascending: at most one fewer than there are nodes.

    Source: Kruskal, "On the shortest spanning subtree of a graph", 1956.
    """
    _, ends = np.unique(np.concatenate([a, b]), return_inverse=True)
    order = np.lexsort((b, a, -similarity))
    sets = np.arange(int(ends.max(initial=-1)) + 1)
    return np.sort(order[_tree_edges(sets, ends[: len(a)][order], ends[len(a) :][order])])


def component_sizes(labels: np.ndarray) -> np.ndarray:
    """Number of rows of the component that row i names, int64 [N]; 0 for a row that names none."""
    return np.bincount(labels, minlength=len(labels))


def representatives(labels: np.ndarray, keys: Sequence[np.ndarray]) -> np.ndarray:
    """The row to keep for each row's component: int64 [N].

    Args:
        keys: arrays [N], the most important first, larger is better, NaN worst: resolution, bytes, closeness to the
            component's mean. Rows that are equal in all of them: the smallest row.
    """
    kept = np.ones(len(labels), bool)
    for key in keys:
        if len(key) != len(labels):
            raise ValueError(f"each key needs one value for each of {len(labels)} rows, got {len(key)}.")
        _keep_largest(labels, np.asarray(key), kept)
    return _first_kept(labels, kept)


def duplicate_groups(
    num_rows: int,
    edges: Iterable[Edges],
    keys: Sequence[np.ndarray],
    *,
    max_component_size: int,
    min_similarity: float | None = None,
    labels: np.ndarray | None = None,
    capped: np.ndarray | None = None,
    similar: Similar | None = None,
) -> Groups:
    """Connected components with representatives; those that chained too far become stars around representatives.

    A component is split when it has more than max_component_size rows, or, with min_similarity, when a member's
    direct similarity to the representative is lower (or none: the edges hold all pairs above their threshold). Then,
    in the order of keys, each row still unassigned becomes a representative and takes its unassigned neighbours: every
    member of a star is a pair with its representative. A star may be larger than the limit: those are copies of one
    image, not a chain.

    Args:
        edges: batches of pairs, iterated up to three times: a sequence, or an object that reads files anew for each
            iter().
        keys: as in representatives.
        labels: of the components, where they are known (from forests, which are shorter); they are overwritten.
        capped: bool [N], rows whose edges may lack some of their neighbours. A representative among them is compared
            by `similar` with those of its component that are capped and unassigned.

    Memory: about 30 bytes a row, and 28 an edge of the components that are split.
    """
    if iter(edges) is edges:
        raise ValueError("edges are read three times: pass a list, or an object whose iter() starts anew.")
    labels = component_labels(num_rows, edges) if labels is None else labels
    chosen = representatives(labels, keys)
    sizes = component_sizes(labels)
    similarity = _similarity_to(chosen, edges)
    to_split = sizes > max_component_size
    if min_similarity is not None:
        to_split[labels[~(similarity >= np.float32(min_similarity))]] = True
    split = SplitTable(np.flatnonzero(to_split), sizes[to_split], np.zeros(np.count_nonzero(to_split), np.int64))
    if len(split.label):
        rows = np.flatnonzero(to_split[labels])
        component = labels[rows].copy()
        _split(rows, labels, chosen, similarity, edges, to_split, keys, min_similarity, capped, similar)
        stars = np.flatnonzero(chosen[rows] == rows)
        split.num_groups[:] = np.bincount(np.searchsorted(split.label, component[stars]), minlength=len(split.label))
    return Groups(labels, chosen, similarity, _table(labels, chosen, similarity), split)


def _similarity_to(chosen: np.ndarray, edges: Iterable[Edges]) -> np.ndarray:
    similarity = np.full(len(chosen), np.nan, np.float32)
    similarity[chosen == np.arange(len(chosen))] = 1
    for a, b, s in edges:
        _direct(chosen, a, b, s, similarity)
    return similarity


def _split(
    rows: np.ndarray,
    labels: np.ndarray,
    chosen: np.ndarray,
    similarity: np.ndarray,
    edges: Iterable[Edges],
    to_split: np.ndarray,
    keys: Sequence[np.ndarray],
    min_similarity: float | None,
    capped: np.ndarray | None,
    similar: Similar | None,
) -> None:
    """Rewrite labels, chosen and similarity of the given rows, the members of the components to split, in place."""
    place = np.full(len(labels), -1, np.int32 if len(rows) < np.iinfo(np.int32).max else np.int64)
    place[rows] = np.arange(len(rows))
    held = [(place[:0], place[:0], np.empty(0, np.float32))]
    for a, b, s in edges:
        inside = to_split[labels[a]]
        if min_similarity is not None:
            inside &= s >= np.float32(min_similarity)
        held.append((place[a[inside]], place[b[inside]], s[inside]))
    neighbours = _neighbours(len(rows), *(np.concatenate(columns) for columns in zip(*held, strict=True)))
    del held
    priority = np.lexsort((rows, *(-_comparable(key[rows]) for key in reversed(keys))))
    star, own = np.full(len(rows), -1, np.int64), np.ones(len(rows), np.float32)
    if capped is None or similar is None:
        _stars(priority, 0, np.zeros(len(rows), bool), *neighbours, star, own)
    else:
        _stars_of_capped(rows, priority, capped[rows], labels[rows], neighbours, similar, min_similarity, star, own)
    chosen[rows], similarity[rows] = rows[star], own
    smallest = np.full(len(rows), len(rows), np.int64)
    np.minimum.at(smallest, star, np.arange(len(rows)))
    labels[rows] = rows[smallest[star]]


def _stars_of_capped(
    rows: np.ndarray,
    priority: np.ndarray,
    capped: np.ndarray,
    component: np.ndarray,
    neighbours: tuple[np.ndarray, ...],
    similar: Similar,
    min_similarity: float | None,
    star: np.ndarray,
    own: np.ndarray,
) -> None:
    """As _stars, where a representative that is capped also takes those that its edges lack."""
    by_component = np.flatnonzero(capped)
    by_component = by_component[np.argsort(component[by_component], kind="stable")]
    begin = 0
    edge_bounds, edge_to, edge_similarity = neighbours
    while (begin := _stars(priority, begin, capped, edge_bounds, edge_to, edge_similarity, star, own)) < len(rows):
        chosen = priority[begin]
        bounds = np.searchsorted(component[by_component], component[chosen] + np.arange(2))
        others = by_component[slice(*bounds)]
        others = others[star[others] < 0]
        values = similar(int(rows[chosen]), rows[others])
        taken = values >= np.float32(-np.inf if min_similarity is None else min_similarity)
        taken &= values > -np.inf
        star[others[taken]], own[others[taken]] = chosen, values[taken]
        begin += 1


def _comparable(key: np.ndarray) -> np.ndarray:
    key = np.asarray(key, np.float64)
    return np.where(np.isnan(key), -np.inf, key)


def _table(labels: np.ndarray, chosen: np.ndarray, similarity: np.ndarray) -> GroupTable:
    sizes = component_sizes(labels)
    label = np.flatnonzero(sizes >= 2)
    least, linked = _least(labels, chosen, similarity)
    return GroupTable(label, sizes[label], chosen[label], least[label], linked[label])


@njit(cache=True, nogil=True)
def _union(parent, a, b):
    for i in range(a.size):
        x, y = a[i], b[i]
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = np.int64(parent[x])
        while parent[y] != y:
            parent[y] = parent[parent[y]]
            y = np.int64(parent[y])
        if x < y:
            parent[y] = x
        elif y < x:
            parent[x] = y


@njit(cache=True, nogil=True)
def _tree_edges(parent, a, b):
    """bool [E]: edges, in their order, that join two sets."""
    joins = np.zeros(a.size, np.bool_)
    for i in range(a.size):
        x, y = a[i], b[i]
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        while parent[y] != y:
            parent[y] = parent[parent[y]]
            y = parent[y]
        joins[i] = x != y
        parent[max(x, y)] = min(x, y)
    return joins


@njit(cache=True, nogil=True)
def _flatten(parent):
    for i in range(parent.size):  # a parent is never larger than its child, so it is flat already
        parent[i] = parent[parent[i]]


@njit(cache=True, nogil=True)
def _keep_largest(labels, key, kept):
    """Unset kept for rows whose key is below the largest of the kept rows of their component; NaN is lowest."""
    best = np.full(labels.size, -1, np.int64)
    for i in range(labels.size):
        at = best[labels[i]]
        if kept[i] and (at < 0 or key[i] > key[at] or (key[at] != key[at] and key[i] == key[i])):
            best[labels[i]] = i
    for i in range(labels.size):
        at = best[labels[i]]
        kept[i] = kept[i] and (key[i] == key[at] or key[at] != key[at])


@njit(cache=True, nogil=True)
def _first_kept(labels, kept):
    first = np.full(labels.size, -1, np.int64)
    for i in range(labels.size):
        if kept[i] and first[labels[i]] < 0:
            first[labels[i]] = i
    out = np.empty(labels.size, np.int64)
    for i in range(labels.size):
        out[i] = first[labels[i]]
    return out


@njit(cache=True, nogil=True)
def _direct(chosen, a, b, s, similarity):
    for i in range(a.size):
        for end, other in ((a[i], b[i]), (b[i], a[i])):
            if chosen[end] == other and not similarity[end] >= s[i]:
                similarity[end] = s[i]


@njit(cache=True, nogil=True)
def _stars(priority, begin, ask, bounds, neighbours, similarities, star, own):
    """Give stars their centres and members, from place `begin` of the priority on; star is -1 where it is open.

    Returns the place of the first new centre that is in `ask`, or the end.
    """
    for place in range(begin, priority.size):
        row = priority[place]
        if star[row] >= 0:
            continue
        star[row] = row
        for e in range(bounds[row], bounds[row + 1]):
            if star[neighbours[e]] < 0:
                star[neighbours[e]] = row
                own[neighbours[e]] = similarities[e]
            elif star[neighbours[e]] == row and neighbours[e] != row:
                own[neighbours[e]] = max(own[neighbours[e]], similarities[e])
        if ask[row]:
            return place
    return priority.size


@njit(cache=True, nogil=True)
def _neighbours(num_rows, a, b, s):
    """Where each row's neighbours begin, the neighbours, and their similarities."""
    bounds = np.zeros(num_rows + 1, np.int64)
    for i in range(a.size):
        bounds[a[i] + 1] += 1
        bounds[b[i] + 1] += 1
    bounds = np.cumsum(bounds)
    others, similarities, at = np.empty(2 * a.size, a.dtype), np.empty(2 * a.size, s.dtype), bounds[:-1].copy()
    for i in range(a.size):
        others[at[a[i]]], similarities[at[a[i]]] = b[i], s[i]
        at[a[i]] += 1
        others[at[b[i]]], similarities[at[b[i]]] = a[i], s[i]
        at[b[i]] += 1
    return bounds, others, similarities


@njit(cache=True, nogil=True)
def _least(labels, chosen, similarity):
    least = np.full(labels.size, np.nan, np.float32)
    linked = np.zeros(labels.size, np.int64)
    for i in range(labels.size):
        if chosen[i] != i and similarity[i] == similarity[i]:
            linked[labels[i]] += 1
            if not least[labels[i]] <= similarity[i]:
                least[labels[i]] = similarity[i]
    return least, linked
