"""What a GPU computes against the processor's kernels, to the last bit; torch's device is the processor here.

Ties and pairs on both sides of the threshold are planted, nearer to it than a float32 product can tell.
"""

import numpy as np
import pytest

from curation.ops.cells import cells_from_arrays, nearest_cells
from curation.ops.hierarchy import hierarchical_kmeans
from curation.ops.join import nearest, pairs_above
from curation.ops.kmeans import kmeans, partial_sums, sum_quantum
from curation.ops.nearest import assign, nearest_centroids
from curation.ops.sketches import exact_dot

torch = pytest.importorskip("torch")

from curation.ops import torch_kmeans, torch_tiles  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_on_one_thread")
DIM = 64
MEMORY = [2**26, 2**16]  # everything in one product; products of 2,048 entries


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def on(vectors, sketches=None):
    return torch_tiles.Rows(vectors, sketches, "cpu")


def pairs_of(queries, members, threshold, radius=None, memory=2**26, sketches=(None, None)):
    asked, met = on(queries, sketches[0]), on(members, sketches[1])
    everyone = np.arange(len(queries))
    return list(torch_tiles.near_pairs(asked, everyone, met, 0, len(met), threshold, radius, max_bytes=memory))


def lists_of(queries, members, gids, k):
    lists = torch_tiles.Nearest(on(queries), k)
    lists.meet(np.arange(len(queries)), on(members), 0, len(members), gids)
    return lists.result()


def sorted_pairs(found):
    query, member, similarity = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((member, query))
    return query[order], member[order], similarity[order]


def similarities(a, b):
    return (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    """700 float16 rows: modes, 90 equal rows, copies of the first hundred, and steps of one bit around the first."""
    rng = np.random.default_rng(5)
    modes = unit(rng.standard_normal((20, DIM)))
    x = unit(modes[rng.integers(0, 20, 700)] + 0.6 * rng.standard_normal((700, DIM)) / np.sqrt(DIM) * 3)
    x[200:290] = x[200]
    x[300:400] = unit(x[:100] + rng.standard_normal((100, DIM)) * np.linspace(1e-4, 0.1, 100)[:, None])
    x = x.astype(np.float16)
    x[400:500] = x[0]
    for i in range(100):
        x[400 + i, i % DIM] = np.nextafter(x[0, i % DIM], np.float16(2 * (i // DIM) - 1))
    return x


@pytest.fixture(scope="module")
def threshold(rows):
    """The similarity of many planted pairs, to the bit: what is equal to it counts, its neighbours below do not."""
    return float(np.median(similarities(rows[400:500], rows[:1])))


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("which", ["planted", "ordinary", "nothing", "everything"])
def test_pairs_above_are_those_of_the_definition(rows, threshold, memory, which):
    at = {"planted": threshold, "ordinary": 0.5, "nothing": 1.5, "everything": -1.0}[which]
    s = similarities(rows[:450], rows)
    expected = np.nonzero(s >= np.float32(at))
    found = pairs_of(rows[:450], rows, at, memory=memory)
    query, member, similarity = sorted_pairs(found)
    np.testing.assert_array_equal(query, expected[0])
    np.testing.assert_array_equal(member, expected[1])
    np.testing.assert_array_equal(similarity, s[expected])
    assert query.dtype == member.dtype == np.int32
    assert max(len(piece[0]) for piece in found) <= memory // torch_tiles.ENTRY_BYTES
    if which == "planted":
        below = s[(s < np.float32(at)) & (s > at - 1e-3)]
        assert min(len(expected[0]), len(below)) > 50, "the threshold must part what lies within the margin"


def test_pairs_above_are_those_of_the_join(rows, threshold):
    centroids = unit(np.random.default_rng(0).standard_normal((9, DIM))).astype(np.float32)
    own = nearest_cells(rows.astype(np.float32), centroids, 1)[:, 0]
    cells = cells_from_arrays(rows, np.arange(700), own, centroids)
    for at in (threshold, 0.55):
        expected = pairs_above(rows.astype(np.float32), cells, at, 9)
        [found] = pairs_of(rows, rows, at)
        for ours, theirs in zip(found, (expected.query, expected.gid, expected.similarity), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("memory", MEMORY)
def test_sketches_leave_the_pairs_that_they_leave_the_join(rows, memory):
    cells = cells_from_arrays(rows, np.arange(700), np.zeros(700, int), unit(np.ones((1, DIM), np.float32)))
    sketches = cells.read_sketches(0, 700)
    for radius in (0, 90, 150, 512):
        expected = pairs_above(rows.astype(np.float32), cells, 0.5, 1, radius)
        found = pairs_of(rows, rows, 0.5, radius, memory, (sketches, sketches))
        for ours, theirs in zip(sorted_pairs(found), (expected.query, expected.gid, expected.similarity), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_query_meets_members_in_ascending_order_from_product_to_product(rows):
    """What stops a row after so many neighbours counts on it."""
    last = np.full(700, -1)
    for query, member, _ in pairs_of(rows, rows, 0.3, memory=2**14):
        for q, m in zip(query, member, strict=True):
            assert m > last[q]
            last[q] = m


def test_some_queries_mirrored_meet_a_part_of_a_tile_up_to_their_limit(rows):
    signs = np.where(np.random.default_rng(9).random(DIM) < 0.5, -1, 1)
    turned = rows * signs.astype(np.float16)
    asking, met = on(rows).mirrored(signs, None), on(np.concatenate([turned, rows]))
    some = np.array([600, 3, 200])
    s = similarities(turned[some], np.concatenate([turned, rows])[150:1200])
    for most in (None, 7):
        [(query, member, similarity)] = torch_tiles.near_pairs(asking, some, met, 150, 1200, 0.5, most=most)
        for i in range(3):
            expected = np.flatnonzero(s[i] >= np.float32(0.5))[:most]
            np.testing.assert_array_equal(member[query == i], 150 + expected)
            np.testing.assert_array_equal(similarity[query == i], s[i, expected])


def test_bits_are_counted():
    words = np.append(
        np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64), np.array([0, 2**64 - 1, 2**63], np.uint64)
    )
    found = torch_tiles._bit_counts(torch.from_numpy(words.view(np.int64)))
    np.testing.assert_array_equal(found.numpy(), np.bitwise_count(words))


def test_the_exact_similarity_is_that_of_the_kernel_with_and_without_a_whole_product(rows, monkeypatch):
    query, member = np.divmod(np.arange(0, 700 * 700, 37), 700)
    wide = rows.astype(np.float32)
    expected = [exact_dot(wide[q], wide[m]) for q, m in zip(query, member, strict=True)]
    x = torch.from_numpy(rows)
    found = torch_tiles._exact_similarities(x, x, torch.from_numpy(query), torch.from_numpy(member), 2**16)
    np.testing.assert_array_equal(found.numpy(), expected)
    monkeypatch.setattr(torch_tiles, "_DENSE", 2**60)
    dense = pairs_of(rows, rows, 0.3)
    monkeypatch.setattr(torch_tiles, "_DENSE", 0)
    sparse = pairs_of(rows, rows, 0.3)
    for a, b in zip(dense[0], sparse[0], strict=True):
        np.testing.assert_array_equal(a, b)


def test_scores_that_err_by_the_margin_change_nothing(rows, threshold, monkeypatch):
    """A GPU adds in another order than a processor: any error up to the margin must leave the same pairs."""
    expected = pairs_of(rows, rows, threshold)
    lists = lists_of(rows, rows, np.arange(700), 5)
    honest, generator = torch_tiles.half_products, torch.Generator().manual_seed(0)

    def noisy(x, y):
        scores = honest(x, y)
        return scores + (2 * torch.rand(scores.shape, generator=generator) - 1) * 0.999e-3

    monkeypatch.setattr(torch_tiles, "half_products", noisy)
    for ours, theirs in zip(pairs_of(rows, rows, threshold), expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(lists_of(rows, rows, np.arange(700), 5), lists, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("memory", [2**26, 2**19])
@pytest.mark.parametrize("k", [1, 7, 95, 800])
def test_nearest_lists_are_those_of_the_join(rows, k, memory):
    """Equal rows and equal similarities: the smaller gid goes first, in whatever order members are met."""
    rng = np.random.default_rng(1)
    gids = np.sort(rng.choice(10**12, 700, replace=False))
    centroids = unit(rng.standard_normal((9, DIM))).astype(np.float32)
    own = nearest_cells(rows.astype(np.float32), centroids, 1)[:, 0]
    cells = cells_from_arrays(rows, gids, own, centroids)
    queries = rows[::7]
    expected = nearest(queries.astype(np.float32), cells, k, 9)
    lists = torch_tiles.Nearest(on(queries), k, memory)
    for members in np.array_split(rng.permutation(700), 3):
        tile = on(rows[np.append(0, members)])
        lists.meet(rng.permutation(len(queries)), tile, 1, len(tile), gids[members])
    found = lists.result()
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_only_those_who_ask_meet(rows):
    lists = torch_tiles.Nearest(on(rows[:4]), 2)
    lists.meet(np.array([2, 0]), on(rows), 10, 13, np.arange(10, 13))
    lists.meet(np.array([1]), on(rows), 10, 10, np.arange(0))
    gids, similarity = lists.result()
    assert (gids[[1, 3]] == -1).all()
    assert np.isneginf(similarity[[1, 3]]).all()
    assert (gids[[0, 2]] >= 10).all()


@pytest.mark.parametrize("nprobe", [1, 5, 33, 60])
def test_probed_cells_are_the_same(rows, nprobe):
    centroids = unit(np.random.default_rng(2).standard_normal((60, DIM))).astype(np.float32)
    centroids[40:50] = centroids[10:20]  # equal scores: the smaller id goes first
    x = rows.astype(np.float32)
    expected = nearest_cells(x, centroids, nprobe)
    for memory in MEMORY:
        np.testing.assert_array_equal(torch_tiles.nearest_cells(x, centroids, nprobe, "cpu", memory), expected)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_nearest_centroids_are_the_same(metric, k):
    """Among them centroids that are equal, and some that differ in the last bit of a coordinate."""
    rng = np.random.default_rng(3)
    x = unit(rng.standard_normal((3000, 48))).astype(np.float32)
    centroids = np.concatenate([x[:30], x[:5], np.nextafter(x[:5], np.float32(1))])
    x[100:130] = x[0]
    if metric == "l2":
        x, centroids = 300 * x + 1000, 300 * centroids + 1000
    for ours, theirs in zip(
        nearest_centroids(x, centroids, k, metric, device="cpu"),
        nearest_centroids(x, centroids, k, metric),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_candidates_are_few_and_do_not_depend_on_the_block():
    rng = np.random.default_rng(4)
    x, centroids = (unit(rng.standard_normal((n, 96))).astype(np.float32) for n in (2000, 300))
    search = torch_kmeans.CentroidSearch(centroids, 1, "cosine", "cpu")
    assert torch_kmeans.CentroidSearch(centroids, 1, "cosine", "cpu", 100).block_rows == 1
    cells, bounds = search(x)
    assert len(cells) < 1.05 * len(x)  # the processor looks at little more than the winners
    pieces = [search(x[i : i + 500])[0] for i in range(0, 2000, 500)]
    np.testing.assert_array_equal(np.concatenate(pieces), cells)
    assert bounds[-1] == len(cells)


@pytest.mark.parametrize("memory", MEMORY)
def test_sums_are_the_same_bits(memory):
    rng = np.random.default_rng(6)
    x = (rng.standard_normal((5000, 24)) * 1e3).astype(np.float32)
    cell, score = rng.integers(0, 7, 5000), rng.random(5000, np.float32) * 1e6
    quantum = sum_quantum(float(np.abs(x).max()))
    expected = partial_sums(x, cell, score, 9, quantum)
    sums, scores = torch_kmeans.cell_sums(x, cell, score, 9, quantum, quantum**2 * 2.0**26, "cpu", memory)
    np.testing.assert_array_equal(sums, expected.sums)
    np.testing.assert_array_equal(scores, expected.scores)
    for ours, theirs in zip(partial_sums(x, cell, score, 9, quantum, device="cpu"), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("init", ["random", "kmeans++"])
def test_kmeans_ends_in_the_same_bits(metric, init):
    x = unit(np.random.default_rng(7).standard_normal((3000, 24)) + 1).astype(np.float32)
    x = 50 * x if metric == "l2" else x
    here, there = (kmeans(x, 40, 8, 1, metric, init, device=device) for device in ("cpu", None))
    for ours, theirs in zip(here, there, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_hierarchy_ends_in_the_same_bits():
    x = unit(np.random.default_rng(8).standard_normal((2000, 16))).astype(np.float32)
    for split, rounds in ((1, 2), (4, 0)):
        both = [
            hierarchical_kmeans(x, [60, 12], rounds, num_iterations=4, split=split, device=device)
            for device in ("cpu", None)
        ]
        for ours, theirs in zip(*both, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b)


def test_arrays_that_may_not_be_written_are_read(rows):
    """Ray hands out read-only arrays, and torch warns of those."""
    frozen = rows.copy()
    frozen.flags.writeable = False
    assert len(pairs_of(frozen, frozen, 0.9)) == 1
    x = frozen.astype(np.float32)
    x.flags.writeable = False
    assign(x, x[:9], device="cpu")


def test_on_cuda_halves_are_added_up_in_float32():
    """Fake tensors, so shapes and types only: no GPU has to be there, and none has computed anything here."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, y = (torch.empty(n, 32, dtype=torch.float16, device="cuda") for n in (5, 7))
        scores = torch_tiles.half_products(x, y)
    assert (scores.dtype, scores.shape, scores.device.type) == (torch.float32, (5, 7), "cuda")


def test_tensorfloat32_is_off_for_exact_products_and_back_afterwards():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen = []
    try:
        matmul.fp32_precision = "tf32"
        with torch_tiles._ieee():
            seen.append(matmul.fp32_precision)
        seen.append(matmul.fp32_precision)
    finally:
        matmul.fp32_precision = before
    assert seen == ["ieee", "tf32"]
