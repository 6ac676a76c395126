"""curation.ops.sampling: water filling, balanced sampling over a hierarchy, draws from hot clusters."""

import numpy as np
import pytest

from curation.ops.hierarchy import Level
from curation.ops.sampling import (
    draw_from_leaves,
    hierarchical_sample,
    leaf_quotas,
    sample_per_cluster,
    waterfill,
)


def toy_levels(num_rows: int = 3000, widths: tuple[int, ...] = (60, 12, 3), seed: int = 0) -> list[Level]:
    """A hierarchy with very uneven clusters; some finest ones are empty."""
    rng = np.random.default_rng(seed)
    levels, num_items = [], num_rows
    for width in widths:
        assignment = np.minimum(rng.geometric(min(4 / width, 0.7), num_items) - 1, width - 1)
        scores = rng.random(num_items).astype(np.float32)
        levels.append(
            Level(np.zeros((width, 2), np.float32), assignment, scores, np.bincount(assignment, minlength=width))
        )
        num_items = width
    return levels


def slow_waterfill(capacities: np.ndarray, target: int, priority: np.ndarray) -> np.ndarray:
    """One image at a time, to whoever has least among those with room; the last round by priority."""
    given = np.zeros(len(capacities), dtype=np.int64)
    for _ in range(min(target, int(capacities.sum()))):
        room = np.flatnonzero(given < capacities)
        given[min(room, key=lambda child: (given[child], priority[child]))] += 1
    return given


# water filling


@pytest.mark.parametrize(
    ("capacities", "target", "expected"),
    [
        ([10, 10, 10], 9, [3, 3, 3]),
        ([1, 10, 10], 9, [1, 4, 4]),
        ([1, 10, 10], 10, [1, 5, 4]),  # the odd one goes to the first by priority with room
        ([2, 3, 4], 100, [2, 3, 4]),
        ([0, 5, 0], 3, [0, 3, 0]),
        ([5, 5], 0, [0, 0]),
        ([0, 0], 7, [0, 0]),
        ([], 5, []),
        ([2**62, 3], 2**61, [2**61 - 3, 3]),
    ],
)
def test_waterfill_closed_forms(capacities, target, expected):
    capacities = np.array(capacities, dtype=np.int64)
    assert waterfill(capacities, target, np.arange(len(capacities))).tolist() == expected


def test_waterfill_equals_one_image_at_a_time():
    rng = np.random.default_rng(0)
    for _ in range(60):
        capacities = rng.integers(0, 12, rng.integers(1, 9))
        target, priority = int(rng.integers(0, 50)), rng.permutation(len(capacities))
        expected = slow_waterfill(capacities, target, priority)
        assert waterfill(capacities, target, priority).tolist() == expected.tolist()


# hierarchical sampling


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("target", [0, 1, 17, 500, 2999, 3000, 3001, 8000, 10_000])
def test_the_target_is_met_exactly_within_capacity(target, multiplier):
    ids = hierarchical_sample(toy_levels(), target, seed=0, multiplier=multiplier)
    assert len(ids) == min(target, 3000 * multiplier)
    assert np.bincount(ids, minlength=1).max(initial=0) <= multiplier
    assert (np.diff(ids) >= 0).all()


def test_quotas_are_even_among_the_children_of_each_parent():
    """Top-down: a child below its capacity has at most one less than any sister."""
    levels = toy_levels()
    sizes = levels[0].sizes
    parents = [level.assignment for level in levels[1:]]
    quotas = leaf_quotas(sizes, parents, 700, seed=3)
    assert quotas.sum() == 700
    given, capacity = quotas, sizes
    for above in [*parents, np.zeros(3, dtype=np.int64)]:
        for parent in range(above.max() + 1):
            children = above == parent
            short = given[children & (given < capacity)]
            assert short.min(initial=10**9) >= given[children].max(initial=0) - 1
        given = np.bincount(above, weights=given, minlength=above.max() + 1).astype(np.int64)
        capacity = np.bincount(above, weights=capacity, minlength=above.max() + 1).astype(np.int64)


def test_a_balanced_sample_of_unbalanced_concepts():
    """Four concepts of 10,000, 1,000, 300 and 50 images in clusters of 50: 800 images are 250, 250, 250 and 50."""
    concept = np.repeat([0, 1, 2, 3], [200, 20, 6, 1])
    leaf = np.repeat(np.arange(227), 50)
    zeros = np.zeros((1, 1), np.float32)
    levels = [
        Level(zeros, leaf, np.zeros(len(leaf), np.float32), np.full(227, 50)),
        Level(zeros, concept, np.zeros(227, np.float32), np.bincount(concept)),
    ]
    ids = hierarchical_sample(levels, 800, seed=0)
    assert np.bincount(concept[leaf[ids]]).tolist() == [250, 250, 250, 50]


def test_sampling_does_not_depend_on_row_order():
    levels = toy_levels()
    ids = np.random.default_rng(1).choice(10**12, 3000, replace=False)
    order = np.random.default_rng(2).permutation(3000)
    first = levels[0]
    shuffled = [first._replace(assignment=first.assignment[order], scores=first.scores[order]), *levels[1:]]
    for leaf in ("random", "closest"):
        one = hierarchical_sample(levels, 400, 5, ids, leaf=leaf)
        np.testing.assert_array_equal(one, hierarchical_sample(shuffled, 400, 5, ids[order], leaf=leaf))
    assert hierarchical_sample(levels, 400, 6, ids).tolist() != hierarchical_sample(levels, 400, 5, ids).tolist()


@pytest.mark.parametrize(("metric", "best_first"), [("cosine", -1), ("l2", 1)])
def test_closest_takes_the_best_of_each_leaf(metric, best_first):
    levels = toy_levels()
    ids = hierarchical_sample(levels, 300, 0, leaf="closest", metric=metric)
    quotas = leaf_quotas(levels[0].sizes, [level.assignment for level in levels[1:]], 300, 0)
    for cluster in np.flatnonzero(quotas):
        members = np.flatnonzero(levels[0].assignment == cluster)
        best = members[np.argsort(best_first * levels[0].scores[members])][: quotas[cluster]]
        assert set(best) <= set(ids)


def test_full_copies_come_before_a_remainder():
    cluster = np.array([0, 0, 0, 1])
    ids = draw_from_leaves(cluster, np.array([7, 2]), seed=0, ids=np.array([10, 20, 30, 40]))
    counts = {int(i): int(n) for i, n in zip(*np.unique(ids, return_counts=True), strict=True)}
    assert counts[40] == 2
    assert sorted(counts[i] for i in (10, 20, 30)) == [2, 2, 3]


def test_draws_are_uniform():
    """Each of 20 images of a leaf is drawn 5 in 20 times over 2,000 seeds, within five standard deviations."""
    cluster = np.zeros(20, dtype=np.int64)
    counts = np.zeros(20)
    for seed in range(2000):
        counts[draw_from_leaves(cluster, np.array([5]), seed)] += 1
    assert np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="leaf='best' is unknown"):
        hierarchical_sample(toy_levels(), 5, 0, leaf="best")
    with pytest.raises(ValueError, match="target=-1"):
        hierarchical_sample(toy_levels(), -1, 0)


# draws from hot clusters


def test_sample_per_cluster_closed_form():
    cluster = np.repeat([0, 1, 2, 3], [100, 5, 50, 30])
    draw = sample_per_cluster(cluster, np.array([1, 2, 3]), 20, None, seed=0)
    assert np.bincount(cluster[draw.ids], minlength=4).tolist() == [0, 5, 20, 20]
    assert draw.num_drawn == 45
    assert draw.shortfall.tolist() == [15, 0, 0]
    capped = sample_per_cluster(cluster, np.array([1, 2, 3]), 20, 30, seed=0)
    assert len(capped.ids) == 30
    assert capped.num_drawn == 45
    assert set(capped.ids) <= set(draw.ids)


def test_sample_per_cluster_of_nothing():
    cluster = np.zeros(10, dtype=np.int64)
    draw = sample_per_cluster(cluster, np.zeros(0, np.int64), 5, 10, 0)
    assert len(draw.ids) == draw.num_drawn == len(draw.shortfall) == 0
    draw = sample_per_cluster(cluster, np.array([7]), 5, 10, 0)
    assert len(draw.ids) == 0
    assert draw.shortfall.tolist() == [5]


def test_sample_per_cluster_follows_ids_not_rows():
    rng = np.random.default_rng(0)
    cluster, ids = rng.integers(0, 10, 2000), rng.choice(10**12, 2000, replace=False)
    order = rng.permutation(2000)
    one = sample_per_cluster(cluster, np.array([3, 5, 8]), 40, 90, 1, ids)
    two = sample_per_cluster(cluster[order], np.array([8, 3, 5, 5]), 40, 90, 1, ids[order])
    np.testing.assert_array_equal(one.ids, two.ids)
    assert set(one.ids) <= set(ids[np.isin(cluster, [3, 5, 8])])


def test_the_cap_is_fair_to_large_and_small_clusters():
    """Both clusters give 50, one of them the best hashes out of 50,000; a cap by that hash would keep only those."""
    cluster = np.repeat([0, 1], [50_000, 50])
    kept = [sample_per_cluster(cluster, np.array([0, 1]), 50, 50, seed).ids for seed in range(40)]
    share = np.mean([np.mean(ids < 50_000) for ids in kept])
    assert abs(share - 0.5) < 0.05  # five standard deviations of 40 draws of 50 out of 100
