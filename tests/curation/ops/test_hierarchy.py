"""curation.ops.hierarchy: levels, resampling, the split of level 1, and what it does to balance."""

import numpy as np
import pytest

from curation.ops.hierarchy import (
    clamp_levels,
    hierarchical_kmeans,
    leaf_to_level,
    nearest_members,
    rank_in_segment,
    resampled_kmeans,
)
from curation.ops.kmeans import balance, kmeans
from curation.ops.nearest import assign
from curation.ops.sampling import hierarchical_sample


def rings(sizes: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points of five equal rings that do not touch, and the ring of each."""
    rng = np.random.default_rng(seed)
    centres = np.array([[-2.2, 1], [0, 1], [2.2, 1], [-1.1, -1], [1.1, -1]])
    ring = np.repeat(np.arange(len(sizes)), sizes)
    angle, radius = rng.uniform(0, 2 * np.pi, len(ring)), rng.uniform(0.7, 1.0, len(ring))
    points = centres[ring] + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points.astype(np.float32), ring


def unit_rows(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_rank_in_segment():
    assert rank_in_segment(np.array([5, 5, 7, 7, 7, 5])).tolist() == [0, 1, 0, 1, 2, 0]
    assert rank_in_segment(np.zeros(0)).tolist() == []


def test_nearest_members_equal_the_obvious_ones():
    rng = np.random.default_rng(0)
    cell, score, ids = rng.integers(0, 9, 300), rng.integers(0, 20, 300).astype(np.float32), rng.permutation(300)
    for metric, sign in (("cosine", -1), ("l2", 1)):
        expected = []
        for c in range(9):
            members = sorted(np.flatnonzero(cell == c), key=lambda i: (sign * score[i], ids[i]))
            expected += members[:4]
        assert nearest_members(cell, score, 4, metric, ids).tolist() == sorted(expected)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_levels_fit_together(metric):
    x = unit_rows(2000, 16)
    levels = hierarchical_kmeans(x, [200, 40, 6], num_resamplings=2, num_iterations=5, metric=metric)
    assert [len(level.centroids) for level in levels] == [200, 40, 6]
    items = x
    for level in levels:
        cell, score = assign(items, level.centroids, metric)
        np.testing.assert_array_equal(level.assignment, cell)
        np.testing.assert_array_equal(level.scores, score)
        np.testing.assert_array_equal(level.sizes, np.bincount(cell, minlength=len(level.centroids)))
        items = level.centroids
    clusters = list(leaf_to_level(levels))
    for row in range(0, 2000, 97):
        cluster = row
        for level, found in zip(levels, clusters, strict=True):
            cluster = level.assignment[cluster]
            assert found[row] == cluster


def test_no_resampling_is_plain_kmeans():
    x = unit_rows(800, 12)
    plain = kmeans(x, 30, 10, 4, "cosine", "kmeans++").centroids
    np.testing.assert_array_equal(resampled_kmeans(x, 30, 0, 3, 10, 4, "cosine"), plain)


def test_hierarchy_does_not_depend_on_threads_or_row_order():
    x, _ = rings([1500, 20, 80, 40, 600])
    x = np.concatenate([x, x[:, :1] * x[:, 1:], x + 1, x**2], axis=1)
    ids = np.random.default_rng(0).choice(10**12, len(x), replace=False)
    order = np.random.default_rng(1).permutation(len(x))
    one = hierarchical_kmeans(x, [100, 20], 2, num_iterations=5, metric="l2", ids=ids, num_threads=1)
    two = hierarchical_kmeans(x[order], [100, 20], 2, num_iterations=5, metric="l2", ids=ids[order], num_threads=2)
    for left, right in zip(one, two, strict=True):
        assert left.centroids.tobytes() == right.centroids.tobytes()
    np.testing.assert_array_equal(one[0].assignment[order], two[0].assignment)
    np.testing.assert_array_equal(one[1].assignment, two[1].assignment)


def test_resampling_evens_out_what_density_does_not():
    """Rings of very different sizes: each round moves centroids from the dense rings to the thin ones."""
    sizes = [6000, 60, 300, 150, 2400]
    x, ring = rings(sizes)
    entropies = []
    for num_resamplings in (0, 6):
        levels = hierarchical_kmeans(x, [300, 60], num_resamplings, num_iterations=20, metric="l2")
        drawn = hierarchical_sample(levels, 250, seed=0)
        entropies.append(balance(np.bincount(ring[drawn], minlength=5)).entropy)
    uniform_draw = balance(np.array(sizes)).entropy
    assert uniform_draw < 0.6
    assert uniform_draw < entropies[0] < entropies[1]
    assert entropies[1] > 0.96


def test_splitting_level_1_gives_up_to_split_cells_of_each():
    x = unit_rows(3000, 16)
    levels = hierarchical_kmeans(x, [200, 20], [0, 2], num_iterations=8, split=10)
    assert 190 <= len(levels[0].centroids) <= 200
    whole = hierarchical_kmeans(x, [200, 20], [0, 2], num_iterations=8)
    assert levels[0].scores.mean() > 0.95 * whole[0].scores.mean()  # 0.970; isotropic rows are the worst case
    assert len(levels[1].centroids) == 20


def test_splitting_drops_cells_that_have_no_rows():
    """30 distinct rows, many times each, in 4 cells to be split into 20: 30 centroids are left."""
    x = np.repeat(unit_rows(30, 8), 40, axis=0)
    levels = hierarchical_kmeans(x, [80, 5], [0, 1], num_iterations=8, split=20)
    assert len(levels[0].centroids) == 30
    assert (levels[0].sizes == 40).all()


def test_a_round_without_enough_rows_ends_the_resampling():
    x = np.repeat(unit_rows(4, 8), 50, axis=0)  # four distinct rows: six of ten cells stay empty
    centroids = resampled_kmeans(x, 10, 5, 1, 5, 0, "cosine")
    assert centroids.shape == (10, 8)
    assert np.isfinite(centroids).all()


def test_too_many_clusters_are_refused_or_clamped():
    x = unit_rows(100, 8)
    with pytest.raises(ValueError, match=r"level 1 asks for 1000 clusters of 100 rows.*\[50, 25\]"):
        hierarchical_kmeans(x, [1000, 300])
    with pytest.raises(ValueError, match="level 2 asks for 60 clusters of 50 clusters of level 1"):
        hierarchical_kmeans(x, [50, 60])
    with pytest.raises(ValueError, match="levels is empty"):
        hierarchical_kmeans(x, [])
    levels = hierarchical_kmeans(x, [1000, 300], 1, num_iterations=3, clamp=True)
    assert [len(level.centroids) for level in levels] == [50, 25]
    assert clamp_levels(100, [1000, 300, 3, 3, 2]) == [50, 25, 3, 1]
    assert clamp_levels(1, [10, 5]) == [1]


def test_wrong_splits_and_rounds_are_named():
    x = unit_rows(100, 8)
    with pytest.raises(ValueError, match="split=7 must divide"):
        hierarchical_kmeans(x, [20], 0, split=7)
    with pytest.raises(ValueError, match="split="):
        hierarchical_kmeans(x, [20, 4], 0, split=[5])
    with pytest.raises(ValueError, match="num_resamplings="):
        hierarchical_kmeans(x, [20, 5], [3])
    with pytest.raises(ValueError, match="samples_per_cluster="):
        hierarchical_kmeans(x, [20, 5], 1, samples_per_cluster=[3])
