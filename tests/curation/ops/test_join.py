"""The join against a slow obvious reference, and its invariance to everything that must not matter."""

from itertools import pairwise

import numpy as np
import pytest

from curation.ops.cells import cell_ranks, cells_from_arrays, nearest_cells
from curation.ops.join import merge_pairs, nearest, pairs_above
from curation.ops.neighbours import self_pairs
from curation.ops.sketches import exact_dot, half_radius, radius_needed, widened

DIM = 48


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def pool():
    """900 vectors in 30 modes of uneven size with near and exact copies; gids with gaps; a mirror."""
    rng = np.random.default_rng(3)
    modes = unit(rng.standard_normal((30, DIM)))
    of_mode = np.minimum(rng.zipf(1.4, 900), 30) - 1
    vectors = unit(modes[of_mode] * 0.8 + rng.standard_normal((900, DIM)) / np.sqrt(DIM))
    vectors[600:700] = unit(vectors[:100] + 0.4 * rng.standard_normal((100, DIM)) / np.sqrt(DIM))
    vectors[700:720] = vectors[:20]
    mirror = np.where(rng.random(DIM) < 0.5, -1, 1)
    vectors[720:780] = unit(vectors[100:160] * mirror + 0.3 * rng.standard_normal((60, DIM)) / np.sqrt(DIM))
    gids = np.sort(rng.choice(10_000, 900, replace=False))
    centroids = unit(rng.standard_normal((25, DIM))).astype(np.float32)
    return vectors.astype(np.float16), gids, centroids, mirror


@pytest.fixture(scope="module")
def cells(pool):
    vectors, gids, centroids, _ = pool
    return cells_from_arrays(vectors, gids, nearest_cells(vectors.astype(np.float32), centroids, 1)[:, 0], centroids)


def similarities(a, b):
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)


def reference_pairs(vectors, gids, centroids, threshold, nprobe, mirror=None):
    """Every pair where either end probes the other's cell, from the definition."""
    best = {}
    own = nearest_cells(vectors.astype(np.float32), centroids, 1)[:, 0]
    for flipped, asked in enumerate([vectors] if mirror is None else [vectors, vectors * mirror.astype(np.float16)]):
        probes = nearest_cells(asked.astype(np.float32), centroids, nprobe)
        s = similarities(asked, vectors)
        for i, j in zip(*np.nonzero(s >= np.float32(threshold)), strict=True):
            if i != j and own[j] in probes[i]:
                pair = (min(gids[i], gids[j]), max(gids[i], gids[j]))
                if pair not in best or s[i, j] > best[pair][0]:
                    best[pair] = (s[i, j], bool(flipped))
    return [(*pair, *value) for pair, value in sorted(best.items())]


def as_list(pairs):
    return list(zip(*(column.tolist() for column in pairs), strict=True))


def test_exact_dot_needs_no_order():
    rng = np.random.default_rng(0)
    a, b = unit(rng.standard_normal((2, 1024))).astype(np.float16).astype(np.float32)
    order = rng.permutation(1024)
    assert exact_dot(a, b) == exact_dot(a[order], b[order]) == np.float32(np.dot(a.astype(float), b.astype(float)))


def test_widen_is_exact_for_every_finite_half():
    half = np.arange(2**16, dtype=np.uint16)
    half = half.view(np.float16)[:, None]
    finite = np.isfinite(half[:, 0])
    np.testing.assert_array_equal(widened(half)[finite], half[finite].astype(np.float32))
    assert (np.abs(widened(half)[~finite]) >= 65536).all()  # and so no unit row


@pytest.mark.parametrize("dim", [32, 48, 256, 300])
def test_sketch_distance_follows_the_angle(dim):
    """Bits differ with probability angle / pi: 200 pairs at 60 degrees differ in a third of 512, within 4 sigma."""
    rng = np.random.default_rng(1)
    a, b = (unit(rng.standard_normal((200, dim))) for _ in range(2))
    b = unit(b - (a * b).sum(1, keepdims=True) * a)
    c = (0.5 * a + np.sqrt(0.75) * b).astype(np.float32)
    centroids = a[:1].astype(np.float32)
    cells = cells_from_arrays(a, np.arange(200), np.zeros(200, int), centroids)
    distances = np.bitwise_count(cells.sketch(a.astype(np.float32)) ^ cells.sketch(c)).sum(axis=1)
    deviation = np.sqrt(512 * 2 / 9) * max(1, np.sqrt(128 / dim))  # few dimensions: rotations repeat each other
    assert abs(distances.mean() - 512 / 3) < 4 * deviation / np.sqrt(200)


def test_radius_needed_is_the_least_that_passes_both_looks():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2**63, (2, 500, 8), dtype=np.uint64)
    a[:100], b[100:120, :4] = b[:100], a[100:120, :4]
    b[120:140, 4:] = a[120:140, 4:]
    bits = np.bitwise_count(a ^ b)
    passes = lambda radius: (bits.sum(1) <= radius) & (bits[:, :4].sum(1) <= half_radius(radius))  # noqa: E731
    expected = np.argmax([passes(radius) for radius in range(513)], axis=0)
    np.testing.assert_array_equal(radius_needed(a, b), expected)


def test_nearest_cells_is_the_definition():
    rng = np.random.default_rng(2)
    x, centroids = unit(rng.standard_normal((300, DIM))), unit(rng.standard_normal((70, DIM)))
    centroids[40:50] = centroids[10:20]  # equal scores: the smaller id goes first
    scores = np.rint(x * 2**11) @ np.rint(centroids * 2**12).T
    ranked = np.lexsort((np.broadcast_to(np.arange(70), scores.shape), -scores), axis=1)
    for nprobe in (1, 2, 9, 33, 70):
        expected = np.sort(ranked[:, :nprobe], axis=1)
        np.testing.assert_array_equal(
            nearest_cells(x.astype(np.float32), centroids.astype(np.float32), nprobe), expected
        )
    column = rng.integers(0, 70, 300)
    ranks = cell_ranks(x.astype(np.float32), centroids.astype(np.float32), column)
    np.testing.assert_array_equal(ranks, np.argmax(ranked == column[:, None], axis=1))


@pytest.mark.parametrize("nprobe", [1, 4, 25])
@pytest.mark.parametrize("with_mirror", [False, True])
def test_self_pairs_are_the_definition(pool, cells, nprobe, with_mirror):
    vectors, gids, centroids, mirror = pool
    mirror = mirror if with_mirror else None
    expected = reference_pairs(vectors, gids, centroids, 0.6, nprobe, mirror)
    for radius in (None, 512):  # every pair lies within 512 bits
        assert as_list(self_pairs(cells, 0, 900, 0.6, nprobe, radius, mirror=mirror)) == expected
    assert len(expected) > 100


def test_radius_removes_exactly_what_lies_beyond(pool, cells):
    vectors, gids, *_ = pool
    bits = dict(zip(gids.tolist(), cells.sketch(vectors.astype(np.float32)), strict=True))
    everything = as_list(self_pairs(cells, 0, 900, 0.6, 25, None))
    expected = [p for p in everything if radius_needed(bits[p[0]][None], bits[p[1]][None])[0] <= 120]
    assert 0 < len(expected) < len(everything)
    assert as_list(self_pairs(cells, 0, 900, 0.6, 25, 120)) == expected


@pytest.mark.parametrize("radius", [None, 160])
def test_tiles_and_ranges_change_no_bit(pool, cells, radius):
    *_, mirror = pool
    whole = self_pairs(cells, 0, 900, 0.55, 5, radius, mirror=mirror)
    for bounds, memory in [((0, 900), 20_000), ((0, 37, 38, 500, 900), 300_000), ((0, 450, 900), 2**24)]:
        ranges = [
            self_pairs(cells, a, b, 0.55, 5, radius, mirror=mirror, max_memory_bytes=memory)
            for a, b in pairwise(bounds)
        ]
        for found, expected in zip(merge_pairs(ranges), whole, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_one_cell_with_everything_and_empty_cells(pool):
    vectors, gids, centroids, _ = pool
    one = cells_from_arrays(vectors, gids, np.full(900, 7), centroids)
    expected = reference_pairs(vectors, gids, np.ones((1, DIM), np.float32) / np.sqrt(DIM), 0.7, 1)
    found = self_pairs(one, 0, 900, 0.7, 25, 512, max_memory_bytes=100_000)
    assert as_list(found) == expected
    assert len(self_pairs(one, 0, 0, 0.7, 25, 512).a) == 0


@pytest.mark.parametrize("radius", [None, 512])
def test_pairs_above_is_brute_force_with_all_cells(pool, cells, radius):
    vectors, gids, _, mirror = pool
    queries = vectors[::17].astype(np.float32)
    found = pairs_above(queries, cells, 0.5, 25, radius, mirror=mirror, max_memory_bytes=200_000)
    plain, flipped = similarities(queries, vectors), similarities(queries * mirror, vectors)
    best = np.maximum(plain, flipped)
    query, row = np.nonzero(best >= np.float32(0.5))
    np.testing.assert_array_equal(found.query, query)
    np.testing.assert_array_equal(found.gid, gids[row])
    np.testing.assert_array_equal(found.similarity, best[query, row])
    np.testing.assert_array_equal(found.mirrored, (flipped > plain)[query, row])


@pytest.mark.parametrize("k", [1, 7, 1000])
def test_nearest_is_the_definition(pool, cells, k):
    vectors, gids, centroids, _ = pool
    queries = vectors[::9].astype(np.float32)  # some have exact copies: equal similarities
    for nprobe in (3, 25):
        own = nearest_cells(vectors.astype(np.float32), centroids, 1)[:, 0]
        probes = nearest_cells(queries, centroids, nprobe)
        s = similarities(queries, vectors)
        s[~np.array([[c in p for c in own] for p in probes])] = -np.inf
        order = np.lexsort((np.broadcast_to(gids, s.shape), -s), axis=1)[:, :k]
        best = np.take_along_axis(s, order, 1)
        expected = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf, np.float32)
        expected[0][:, : order.shape[1]] = np.where(best > -np.inf, gids[order], -1)
        expected[1][:, : order.shape[1]] = best
        for memory, threads in [(2**28, 1), (60_000, 3)]:
            found = nearest(queries, cells, k, nprobe, max_memory_bytes=memory, num_threads=threads)
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])


def test_mistakes_are_named(pool, cells):
    vectors, gids, centroids, mirror = pool
    own = np.zeros(900, int)
    wrong = vectors.copy()
    wrong[3] *= 2
    with pytest.raises(ValueError, match="unit-norm rows: row 3 has norm 2"):
        cells_from_arrays(wrong, gids, own, centroids)
    wrong[3] = np.nan
    with pytest.raises(ValueError, match="unit-norm rows: row 3 has norm"):
        cells_from_arrays(wrong, gids, own, centroids)
    with pytest.raises(ValueError, match="nprobe must be between 1 and the number of cells, 25"):
        self_pairs(cells, 0, 900, 0.6, 26)
    with pytest.raises(ValueError, match="mirror must hold 48 signs"):
        self_pairs(cells, 0, 900, 0.6, 2, mirror=mirror[:5])
    with pytest.raises(ValueError, match="sketch_radius"):
        pairs_above(vectors[:2].astype(np.float32), cells, 0.6, 2, 600)
