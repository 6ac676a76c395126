"""curation.ops.kmeans and curation.ops.nearest: closed forms, slow references, invariances, hard inputs."""

import logging
import math

import numpy as np
import pytest

from curation.ops.kmeans import (
    balance,
    initial_centroids,
    kmeans,
    mean_error,
    merge,
    partial_sums,
    sum_quantum,
    update_centroids,
)
from curation.ops.nearest import assign, nearest_centroids


def unit_rows(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def mixture(num_rows: int, width: int, num_modes: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around random modes, and the mode of each."""
    rng = np.random.default_rng(seed)
    modes = rng.standard_normal((num_modes, width))
    mode = rng.integers(0, num_modes, num_rows)
    x = (modes[mode] + noise * rng.standard_normal((num_rows, width))).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True), mode


def exact_scores(x: np.ndarray, centroids: np.ndarray, metric: str) -> np.ndarray:
    """float64 [N, K], the obvious way."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    if metric == "cosine":
        return x @ centroids.T
    return ((x[:, None] - centroids[None]) ** 2).sum(axis=2)


# nearest centroids


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize(("num_rows", "width", "num_clusters"), [(700, 2, 40), (1500, 24, 33), (2100, 130, 70)])
def test_nearest_centroids_equal_the_exact_order(metric, num_rows, width, num_clusters):
    x = unit_rows(num_rows, width) if metric == "cosine" else 3 * unit_rows(num_rows, width) + 5
    centroids = x[:num_clusters]
    scores = exact_scores(x, centroids, metric)
    order = np.argsort(-scores if metric == "cosine" else scores, axis=1, kind="stable")
    cells, found = nearest_centroids(x, centroids, 5, metric)
    np.testing.assert_array_equal(cells, order[:, :5])
    expected = np.take_along_axis(scores, order[:, :5], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-13)  # float64 inside, rounded once to float32
    cell, score = assign(x, centroids, metric)
    np.testing.assert_array_equal(cell, order[:, 0])
    np.testing.assert_array_equal(score, found[:, 0])


def test_equally_near_centroids_go_to_the_smallest_index():
    x = unit_rows(300, 48)
    centroids = np.concatenate([x[:7], x[:7], x[:7]])
    assert assign(x, centroids)[0].max() < 7
    cells, _ = nearest_centroids(x[:7], centroids, 3)
    np.testing.assert_array_equal(cells, np.arange(7)[:, None] + [0, 7, 14])


def test_ties_within_rounding_are_decided_exactly():
    """Centroids that differ in the last float32 bit: float32 products cannot order them, float64 can."""
    rng = np.random.default_rng(0)
    x = unit_rows(4000, 192)
    base = unit_rows(1, 192, seed=1)
    centroids = np.concatenate([base] + [np.nextafter(base, rng.choice([-1, 1], base.shape)) for _ in range(5)])
    centroids = centroids.astype(np.float32)
    exact = np.argmax(exact_scores(x, centroids, "cosine"), axis=1)
    np.testing.assert_array_equal(assign(x, centroids)[0], exact)
    cells, _ = nearest_centroids(x, centroids, 2)
    np.testing.assert_array_equal(cells[:, 0], exact)


def test_squared_distances_survive_a_far_origin():
    """|x|^2 - 2xc + |c|^2 in float32 would be off by whole units here."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, 40)) + 10_000).astype(np.float32)
    scores = exact_scores(x, x[:20], "l2")
    cell, score = assign(x, x[:20], "l2")
    np.testing.assert_array_equal(cell, scores.argmin(axis=1))
    np.testing.assert_allclose(score, scores.min(axis=1), rtol=1e-7)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_assign_does_not_depend_on_threads_order_or_batch(metric):
    x = unit_rows(3001, 96)
    centroids = unit_rows(129, 96, seed=1)
    cell, score = assign(x, centroids, metric, num_threads=1)
    order = np.random.default_rng(2).permutation(len(x))
    for rows, num_threads in ((order, 2), (order[:777], 1), (order[:3], 2)):
        other_cell, other_score = assign(x[rows], centroids, metric, num_threads=num_threads)
        np.testing.assert_array_equal(other_cell, cell[rows])
        np.testing.assert_array_equal(other_score, score[rows])


def test_float16_rows_are_the_same_as_their_float32_values():
    x = unit_rows(1500, 64).astype(np.float16)
    for stored, computed in zip(
        assign(x, unit_rows(9, 64)), assign(x.astype(np.float32), unit_rows(9, 64)), strict=True
    ):
        np.testing.assert_array_equal(stored, computed)


def test_no_rows():
    cell, score = assign(np.zeros((0, 8), np.float32), unit_rows(3, 8))
    assert cell.shape == score.shape == (0,)
    assert partial_sums(np.zeros((0, 8), np.float32), cell, score, 3).counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(lambda row: row * 2, "row 1100 has norm 2"), (lambda row: row * np.nan, "row 1100 is not finite")],
)
def test_bad_rows_are_named(spoil, message):
    x = unit_rows(1200, 16)
    x[1100] = spoil(x[1100])
    for init in ("random", "kmeans++"):
        with pytest.raises(ValueError, match=message):
            kmeans(x, 4, 10, init=init)  # its first iterations look at a quarter of the rows
    with pytest.raises(ValueError, match=message):
        assign(x, x[:4])


def test_wrong_arguments_are_named():
    x = unit_rows(10, 8)
    with pytest.raises(ValueError, match="num_clusters=11 needs 1 to 10"):
        kmeans(x, 11)
    with pytest.raises(ValueError, match="num_iterations=0"):
        kmeans(x, 2, 0)
    with pytest.raises(ValueError, match="init='best' is unknown"):
        kmeans(x, 2, init="best")
    with pytest.raises(ValueError, match="metric='dot' is unknown"):
        assign(x, x, "dot")
    with pytest.raises(ValueError, match="do not have one width"):
        assign(x, x[:, :4])
    with pytest.raises(ValueError, match="k=11"):
        nearest_centroids(x, x, 11)
    with pytest.raises(ValueError, match="centroids are not all finite"):
        assign(x, x * np.nan)


# sums


def test_sums_are_exact_beyond_2_to_the_24():
    """float32 stops at 2^24, where adding one changes nothing; 130 parts of 131,072 ones go past it."""
    ones = np.ones((131_072, 1), np.float32)
    part = partial_sums(ones, np.zeros(len(ones), np.int64), ones[:, 0], 1)
    total = merge(part for _ in range(130))
    assert total.sums[0, 0] == total.counts[0] == total.scores[0] == 130 * 131_072 > 2**24
    odd = partial_sums(ones[:3], np.zeros(3, np.int64), ones[:3, 0], 1)
    assert merge([total, odd]).sums[0, 0] == 130 * 131_072 + 3
    assert mean_error(total, "cosine") == 0.0


def test_sums_equal_the_obvious_ones_within_half_a_quantum_per_row():
    x = unit_rows(2000, 30)
    cell, score = assign(x, x[:17])
    total = partial_sums(x, cell, score, 20)
    for c in range(20):
        members = x[cell == c].astype(np.float64)
        np.testing.assert_allclose(total.sums[c], members.sum(axis=0), atol=len(members) * 2.0**-27, rtol=0)
        assert total.counts[c] == len(members)
        assert abs(total.scores[c] - score[cell == c].sum(dtype=np.float64)) <= len(members) * 2.0**-27


def test_sums_do_not_depend_on_threads_order_or_parts():
    x = unit_rows(3000, 20)
    cell, score = assign(x, x[:11])
    whole = partial_sums(x, cell, score, 11, num_threads=1)
    order = np.random.default_rng(0).permutation(len(x))
    cuts = [order[:1], order[1:700], order[700:]]
    for parts in (cuts, cuts[::-1]):
        total = merge(partial_sums(x[rows], cell[rows], score[rows], 11, num_threads=2) for rows in parts)
        for left, right in zip(whole, total, strict=True):
            np.testing.assert_array_equal(left, right)


def test_merge_leaves_its_parts_alone_and_needs_one():
    ones = np.ones((4, 1), np.float32)
    part = partial_sums(ones, np.zeros(4, np.int64), ones[:, 0], 1)
    merge([part, part])
    assert part.counts[0] == 4
    with pytest.raises(ValueError, match="at least one part"):
        merge([])


def test_sum_quantum_follows_the_scale_by_powers_of_two():
    assert sum_quantum(1.0) == 2.0**-26
    assert sum_quantum(1000.0) == 2.0**-16
    assert sum_quantum(0.0) == 2.0**-26
    with pytest.raises(ValueError, match="not finite"):
        sum_quantum(math.inf)


# Lloyd


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_one_iteration_equals_the_obvious_one(metric):
    x = unit_rows(900, 12)
    start = initial_centroids(x, 15, 3, "random")
    cell = exact_scores(x, start, metric)
    cell = cell.argmax(axis=1) if metric == "cosine" else cell.argmin(axis=1)
    means = np.stack([x[cell == c].astype(np.float64).mean(axis=0) for c in range(15)])
    if metric == "cosine":
        means /= np.linalg.norm(means, axis=1, keepdims=True)
    result = kmeans(x, 15, 1, seed=3, metric=metric)
    np.testing.assert_allclose(result.centroids, means, atol=1e-6)  # float32, and half a quantum per row
    np.testing.assert_array_equal(result.sizes, np.bincount(cell, minlength=15))


def test_separate_modes_are_found():
    x, mode = mixture(3000, 16, 6, 0.05)
    result = kmeans(x, 6, 20, init="kmeans++")
    cell, _ = assign(x, result.centroids)
    assert len(set(zip(cell.tolist(), mode.tolist(), strict=True))) == 6
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_kmeans_does_not_depend_on_threads_or_row_order(metric, init):
    x, _ = mixture(4000, 40, 50, 0.6)
    ids = np.random.default_rng(0).choice(10**12, len(x), replace=False)
    order = np.random.default_rng(1).permutation(len(x))
    one = kmeans(x, 60, 10, 5, metric, init, ids, num_threads=1)
    two = kmeans(x[order], 60, 10, 5, metric, init, ids[order], num_threads=2)
    assert one.centroids.tobytes() == two.centroids.tobytes()
    assert one.objective.tobytes() == two.objective.tobytes()
    np.testing.assert_array_equal(one.sizes, two.sizes)
    assert kmeans(x, 60, 10, 6, metric, init, ids).centroids.tobytes() != one.centroids.tobytes()


def test_the_objective_falls_and_ends_at_a_fixed_point():
    x, _ = mixture(600, 8, 20, 0.5)
    result = kmeans(x, 100, 200)  # too few rows per cluster for first iterations on a quarter
    assert len(result.objective) < 200
    assert (np.diff(result.objective) <= 1e-8).all()
    again, score = assign(x, result.centroids)
    np.testing.assert_array_equal(np.bincount(again, minlength=100), result.sizes)
    assert abs(1 - score.mean(dtype=np.float64) - result.objective[-1]) < 1e-7


def test_looking_at_a_quarter_first_costs_less_than_1_percent():
    x, _ = mixture(8000, 32, 200, 1.0)
    full = initial_centroids(x, 100, 0, "random")
    for iteration in range(10):
        cell, score = assign(x, full)
        full, _ = update_centroids(partial_sums(x, cell, score, 100), full, "cosine", iteration)
    quick = kmeans(x, 100, 10).centroids
    errors = [1 - assign(x, centroids)[1].mean(dtype=np.float64) for centroids in (quick, full)]
    assert errors[0] < 1.01 * errors[1]


def test_a_distributed_lloyd_gives_the_bytes_of_a_local_one():
    x, _ = mixture(3000, 24, 30, 0.7)
    parts = np.split(np.random.default_rng(0).permutation(len(x)), [5, 900, 2200])
    local = spread = initial_centroids(x, 200, 0, "random")
    for iteration in range(4):
        local, _ = update_centroids(partial_sums(x, *assign(x, local), 200), local, "cosine", iteration)
        sums = merge(partial_sums(x[rows], *assign(x[rows], spread), 200) for rows in parts)
        spread, _ = update_centroids(sums, spread, "cosine", iteration)
    assert local.tobytes() == spread.tobytes()
    assert local.tobytes() == kmeans(x, 200, 4).centroids.tobytes()


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**20])
def test_the_scale_of_points_changes_nothing_else(scale):
    x, _ = mixture(2000, 12, 30, 0.6)
    x = np.concatenate([x, np.repeat(x[:1], 500, axis=0)])
    one = kmeans(x, 50, 8, metric="l2")
    other = kmeans(x * np.float32(scale), 50, 8, metric="l2")
    np.testing.assert_array_equal(other.centroids, one.centroids * np.float32(scale))
    np.testing.assert_array_equal(other.sizes, one.sizes)
    np.testing.assert_array_equal(other.objective, one.objective * scale**2)


# empty and hot cells


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_empty_cells_take_half_of_the_cell_with_the_largest_error(metric):
    x, mode = mixture(4000, 16, 2, 0.3)
    x = x[np.argsort(mode, kind="stable")]
    previous = np.concatenate([x[:1], x[-1:], np.repeat(x[:1], 2, axis=0)])  # two that repeat the first: empty
    cell, score = assign(x, previous, metric)
    total = partial_sums(x, cell, score, 4)
    assert (total.counts > 0).tolist() == [True, True, False, False]
    centroids, num_reseeded = update_centroids(total, previous, metric, seed=0)
    assert num_reseeded == 2
    counts = np.bincount(assign(x, centroids, metric)[0], minlength=4)
    assert counts.min() > 300  # the two halves of 2,000 rows or so, twice, or one of them halved again


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_fewer_distinct_rows_than_clusters(metric, init, caplog):
    distinct = unit_rows(5, 32)
    x = np.repeat(distinct, [1000, 1, 1, 300, 2], axis=0)
    with caplog.at_level(logging.WARNING):
        result = kmeans(x, 12, 30, metric=metric, init=init)
    assert np.isfinite(result.centroids).all()
    assert sorted(result.sizes[result.sizes > 0].tolist()) == [1, 1, 2, 300, 1000]
    assert result.objective[-1] < 1e-6
    assert "leaves 7 of 12 cells empty" in caplog.text


def test_a_hot_cell_of_equal_rows_takes_one_centroid():
    """A placeholder image, 5,000 times among 1,000 others: it is one point, the other cells serve the others."""
    x = np.concatenate([np.repeat(unit_rows(1, 24, seed=9), 5000, axis=0), unit_rows(1000, 24)])
    for init in ("random", "kmeans++"):
        result = kmeans(x, 100, 15, init=init)
        assert result.sizes.min() > 0
        cell, _ = assign(x, result.centroids)
        assert len(np.unique(cell[:5000])) == 1
        assert len(np.unique(cell[5000:])) >= 99


def test_one_cluster_and_one_row():
    x = unit_rows(50, 8)
    mean = x.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(kmeans(x, 1).centroids[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(kmeans(x[:1], 1).centroids, x[:1], atol=1e-7)


def test_rows_that_cancel_keep_their_centroid():
    x = np.array([[1, 0], [-1, 0]], np.float32)
    total = partial_sums(x, np.zeros(2, np.int64), np.array([0, 0], np.float32), 1)
    centroids, _ = update_centroids(total, np.array([[0, 1]], np.float32), "cosine", 0)
    np.testing.assert_array_equal(centroids, [[0, 1]])


# the start


def test_random_start_takes_distinct_rows_by_hash():
    x = np.repeat(unit_rows(40, 8), 50, axis=0)
    start = initial_centroids(x, 40, 1, "random")
    assert len(np.unique(start, axis=0)) == 40


def test_spread_start_reaches_rare_regions():
    """Ten rows far from ten thousand: a uniform draw of 20 misses most of them, distances do not."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((10_000, 8)) * 0.01
    rare = 10 * np.eye(10, 8, k=0) + 20 * np.eye(10, 8, k=-2)
    x = np.concatenate([common, rare]).astype(np.float32)
    start = initial_centroids(x[-600:], 20, 0, "kmeans++")
    assert sum(np.linalg.norm(start, axis=1) > 1) >= 10
    assert sum(np.linalg.norm(initial_centroids(x[-600:], 20, 0, "random"), axis=1) > 1) < 5


# balance


def test_balance_closed_forms():
    even = balance(np.full(8, 5))
    assert even == pytest.approx((1.0, 0.0, 1.0, 0, 5))
    one = balance(np.array([0, 0, 0, 12]))
    assert one == pytest.approx((0.0, 0.75, 4.0, 3, 12))
    assert balance(np.array([7])) == pytest.approx((1.0, 0.0, 1.0, 0, 7))
    two = balance(np.array([1, 3]))
    assert two.entropy == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))
    assert two.imbalance_factor == pytest.approx(2 * (1 + 9) / 16)


def test_balance_equals_the_obvious_gini():
    sizes = np.random.default_rng(0).integers(0, 50, 30)
    pairs = np.abs(sizes[:, None] - sizes[None]).sum()
    assert balance(sizes).gini == pytest.approx(pairs / (2 * len(sizes) * sizes.sum()))
    with pytest.raises(ValueError, match="at least one row"):
        balance(np.zeros(4))
