"""Components against scipy, chains and stars with known answers, and indifference to the order of edges."""

import numpy as np
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from curation.ops.components import (
    UnionFind,
    component_labels,
    component_sizes,
    duplicate_groups,
    representatives,
    spanning_forest,
)


def edges_of(pairs, similarity=0.9):
    a, b = np.array(pairs, np.int64).reshape(-1, 2).T
    return a, b, np.broadcast_to(np.float32(similarity), a.shape)


def chain(n):
    return edges_of(np.stack([np.arange(n - 1), np.arange(1, n)], axis=1))


def scipy_labels(num_rows, a, b):
    _, component = connected_components(
        coo_array((np.ones(len(a)), (a, b)), shape=(num_rows, num_rows)), directed=False
    )
    smallest = np.full(component.max() + 1, num_rows)
    np.minimum.at(smallest, component, np.arange(num_rows))
    return smallest[component]


@pytest.mark.parametrize("num_edges", [0, 300, 1500, 10_000])
def test_labels_equal_scipy_in_any_order_and_batching(num_edges, tmp_path):
    rng = np.random.default_rng(num_edges)
    a, b = rng.integers(0, 2000, (2, num_edges))
    expected = scipy_labels(2000, a, b)
    order = rng.permutation(num_edges)
    shuffled = [(b[part], a[part], None) for part in np.array_split(order, 7)]
    np.testing.assert_array_equal(component_labels(2000, [(a, b, None)]), expected)
    np.testing.assert_array_equal(component_labels(2000, shuffled), expected)
    mapped = np.memmap(tmp_path / "parent.u32", np.uint32, "w+", shape=(2000,))
    np.testing.assert_array_equal(component_labels(2000, shuffled, mapped), expected)
    np.testing.assert_array_equal(component_sizes(expected), [np.sum(expected == i) for i in range(2000)])


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_long_chain_and_star_take_no_time(order):
    n = 200_000
    for a, b in ((np.arange(n - 1), np.arange(1, n)), (np.zeros(n - 1, np.int64), np.arange(1, n))):
        which = {"forward": slice(None), "backward": slice(None, None, -1)}.get(order)
        which = np.random.default_rng(0).permutation(n - 1) if which is None else which
        assert not component_labels(n, [(a[which].copy(), b[which].copy(), None)]).any()


def test_representative_follows_the_keys_then_the_smallest_row():
    labels = np.array([0, 0, 0, 3, 3, 5, 6, 6, 6])
    pixels = np.array([1, 9, 9, 4, 4, 0, 2, 2, 2])
    num_bytes = np.array([0, 5, 7, 3, 3, 0, 1, 1, 1])
    closeness = np.array([0, 0, 0, 0, 0, 0, np.nan, 0.3, 0.3])
    expected = [2, 2, 2, 3, 3, 5, 7, 7, 7]
    np.testing.assert_array_equal(representatives(labels, [pixels, num_bytes, closeness]), expected)
    np.testing.assert_array_equal(representatives(labels, []), labels)
    np.testing.assert_array_equal(representatives(labels, [np.full(9, np.nan)]), labels)


def test_chain_splits_into_stars_of_direct_neighbours():
    """0-1-2-3-4-5-6 with 3 the largest image: 3 takes 2 and 4, then 0 takes 1 and 5 takes 6."""
    pixels = np.array([5, 1, 1, 9, 1, 4, 1, 1])
    groups = duplicate_groups(8, [chain(7)], [pixels], max_component_size=6)
    np.testing.assert_array_equal(groups.representatives, [0, 0, 3, 3, 3, 5, 5, 7])
    np.testing.assert_array_equal(groups.labels, [0, 0, 2, 2, 2, 5, 5, 7])
    np.testing.assert_array_equal(groups.similarity, np.array([1, 0.9, 0.9, 1, 0.9, 1, 0.9, 1], np.float32))
    assert (groups.split.label.tolist(), groups.split.size.tolist(), groups.split.num_groups.tolist()) == (
        [0],
        [7],
        [3],
    )
    whole = duplicate_groups(8, [chain(7)], [pixels], max_component_size=7)
    np.testing.assert_array_equal(whole.representatives, [3] * 7 + [7])
    assert np.isnan(whole.similarity[[0, 1, 5, 6]]).all()
    assert (whole.table.size.tolist(), whole.table.num_linked.tolist(), len(whole.split.label)) == ([7], [2], 0)


def test_min_similarity_splits_what_is_not_directly_similar():
    """Triangle 0-1-2 stays; 3-4-5, where 3 and 5 are a weak pair, gives up 5; 6-7 is weak and comes apart."""
    edges = [edges_of([(0, 1), (1, 2), (0, 2), (3, 4), (4, 5)], 0.95), edges_of([(3, 5), (6, 7)], 0.65)]
    groups = duplicate_groups(8, edges, [], max_component_size=10, min_similarity=0.7)
    np.testing.assert_array_equal(groups.representatives, [0, 0, 0, 3, 3, 5, 6, 7])
    assert groups.split.label.tolist() == [3, 6]
    assert groups.split.num_groups.tolist() == [2, 2]
    assert groups.table.label.tolist() == [0, 3]
    np.testing.assert_array_equal(groups.table.least_similarity, np.float32([0.95, 0.95]))


def test_star_larger_than_the_limit_stays_one_group():
    hub = edges_of([(0, i) for i in range(1, 50)])
    groups = duplicate_groups(50, [hub], [], max_component_size=10)
    assert not groups.representatives.any()
    assert groups.split.num_groups.tolist() == [1]


def test_every_group_is_one_representative_and_its_neighbours_in_any_order():
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 1000, (2, 1500))
    a, b = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]
    _, once = np.unique(a * 1000 + b, return_index=True)
    a, b = a[once], b[once]
    similarity = rng.uniform(0.6, 1, len(a)).astype(np.float32)
    keys = [rng.integers(0, 4, 1000), rng.random(1000)]
    groups = duplicate_groups(1000, [(a, b, similarity)], keys, max_component_size=20, min_similarity=0.7)
    known = {(x, y): s for x, y, s in zip(a.tolist(), b.tolist(), similarity, strict=True)}
    components = scipy_labels(1000, a, b)
    for row, representative in enumerate(groups.representatives.tolist()):
        assert groups.labels[row] == groups.labels[representative]
        assert components[row] == components[representative]
        if row != representative and components[row] in groups.split.label:
            direct = known[min(row, representative), max(row, representative)]
            assert direct >= 0.7
            assert direct == groups.similarity[row]
    order = rng.permutation(len(a))
    again = duplicate_groups(
        1000,
        [(b[p], a[p], similarity[p]) for p in np.array_split(order, 5)],
        keys,
        max_component_size=20,
        min_similarity=0.7,
    )
    for name in ("labels", "representatives", "similarity"):
        np.testing.assert_array_equal(getattr(groups, name), getattr(again, name))
    for table in ("table", "split"):
        for name, column in vars(getattr(groups, table)).items():
            np.testing.assert_array_equal(column, getattr(getattr(again, table), name))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="rows 0 to 9, got 3 to 10"):
        component_labels(10, [(np.array([3]), np.array([10]), None)])
    with pytest.raises(ValueError, match="read three times"):
        duplicate_groups(10, iter([chain(3)]), [], max_component_size=3)
    with pytest.raises(ValueError, match="one value for each of 3 rows, got 2"):
        representatives(np.zeros(3, int), [np.zeros(2)])
    with pytest.raises(ValueError, match="uint8 cannot number"):
        UnionFind(np.empty(300, np.uint8))


def test_a_spanning_forest_spans_the_components_at_every_threshold():
    rng = np.random.default_rng(4)
    a, b = rng.integers(0, 300, (2, 900))
    similarity = np.rint(rng.uniform(0.5, 1, 900) * 40).astype(np.float32) / 40  # many are equal
    chosen = spanning_forest(a, b, similarity)
    assert len(chosen) < 300
    for threshold in (0.5, 0.7, 0.9, 1.0):
        every, kept = np.flatnonzero(similarity >= threshold), chosen[similarity[chosen] >= threshold]
        np.testing.assert_array_equal(
            component_labels(300, [(a[kept], b[kept], None)]), component_labels(300, [(a[every], b[every], None)])
        )
    order = rng.permutation(900)
    np.testing.assert_array_equal(np.sort(order[spanning_forest(a[order], b[order], similarity[order])]), chosen)
    assert len(spanning_forest(a[:0], b[:0], similarity[:0])) == 0


def test_a_representative_whose_edges_are_capped_takes_what_they_lack():
    """200 rows that are all alike, of which each keeps three: one group, as with all edges."""
    rng = np.random.default_rng(0)
    a = np.repeat(np.arange(200), 3)
    b = rng.integers(0, 200, 600)
    a, b = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]
    edges = [(a, b, np.full(len(a), 0.9, np.float32))]
    pixels = rng.permutation(202)
    asked = []

    def similar(row, others):
        asked.append(row)
        return np.where(others < 200, 0.8, -np.inf).astype(np.float32)

    capped = np.arange(202) < 201  # 200 is capped, and in a component of its own; 201 is alone
    groups = duplicate_groups(202, edges, [pixels], max_component_size=16, capped=capped, similar=similar)
    assert asked == [int(np.argmax(pixels[:200]))]
    assert (groups.labels[:200] == 0).all()
    assert set(groups.representatives[:200]) == set(asked)
    assert np.isin(groups.similarity[:200], np.array([0.8, 0.9, 1.0], np.float32)).all()
    lacking = duplicate_groups(202, edges, [pixels], max_component_size=16)
    assert len(lacking.table.label) > 10
