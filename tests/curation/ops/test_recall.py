"""Certified recall: bounds from tables, truth from definition, and the promise kept on pools with known pairs."""

import numpy as np
import pytest
from scipy.stats import binom

from curation.ops import recall
from curation.ops import true_pairs as true_pairs_module
from curation.ops.cells import cells_from_arrays, nearest_cells
from curation.ops.join import merge_pairs
from curation.ops.neighbours import near_rows, self_pairs
from curation.ops.recall import (
    are_among,
    certify,
    effective_size,
    found_by,
    lower_bound,
    measured_recall,
    question_about,
    sketch_radius,
    true_pairs,
)
from curation.ops.sketches import half_radius
from curation.ops.true_pairs import fewest, hashes, hits_in_range

DIM = 32


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def planted(num_rows, num_pairs, *, hot=0, mirror=None, seed=0):
    rng = np.random.default_rng(seed)
    vectors = unit(rng.standard_normal((num_rows, DIM)))
    cosine = rng.uniform(0.75, 0.99, (num_pairs, 1))
    noise = unit(rng.standard_normal((num_pairs, DIM)))
    vectors[num_pairs : 2 * num_pairs] = unit(cosine * vectors[:num_pairs] + np.sqrt(1 - cosine**2) * noise)
    if mirror is not None:
        vectors[num_pairs : 2 * num_pairs : 2] *= mirror
    if hot:
        vectors[-hot:] = unit(vectors[-1] + 0.02 * rng.standard_normal((hot, DIM)))
    centroids = unit(rng.standard_normal((64, DIM))).astype(np.float32)
    half = vectors.astype(np.float16)
    own = nearest_cells(half.astype(np.float32), centroids, 1)[:, 0]
    return cells_from_arrays(half, np.arange(num_rows) * 3, own, centroids)


def truth_about(cells, rows, mirror=None):
    return true_pairs(cells, question_about(cells, rows, cells.gids_of_rows(rows), 0.75, len(rows), mirror=mirror))


@pytest.mark.parametrize(
    ("found", "of", "bound"), [(298, 298, 0.99), (299, 299, 0.99003), (10, 10, 0.7411), (0, 5, 0.0)]
)
def test_lower_bound_when_all_or_none_are_found_is_a_root(found, of, bound):
    assert lower_bound(found, of) == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize(("found", "of"), [(470, 473), (7, 10), (1, 30)])
def test_lower_bound_is_the_proportion_that_would_rarely_do_as_well(found, of):
    assert binom.sf(found - 1, of, lower_bound(found, of)) == pytest.approx(0.05, abs=1e-9)


def test_effective_size_counts_equal_groups_and_discounts_a_hot_one():
    assert effective_size(np.repeat(np.arange(50), 4)) == 50
    assert effective_size(np.array([1] * 100 + [2])) == pytest.approx(101**2 / (100**2 + 1))
    assert effective_size(np.array([], int)) == 0


def test_sketch_radius_is_the_quantile_of_the_law():
    def loss(radius):
        differs = np.arccos(0.6) / np.pi
        return binom.sf(radius, 512, differs) + binom.sf(half_radius(radius), 256, differs)

    radius = sketch_radius(np.array([0.6]), 1e-3)
    assert loss(radius) <= 1e-3 < loss(radius - 1)
    assert sketch_radius(np.linspace(0.6, 1, 50), 1e-3) < radius
    assert sketch_radius(np.empty(0), 1e-3) == 512


def test_true_pairs_tell_what_every_setting_finds():
    """The join finds exactly those true pairs that found_by predicts, for any nprobe and radius."""
    mirror = np.where(np.random.default_rng(1).random(DIM) < 0.5, -1, 1)
    cells = planted(3000, 300, mirror=mirror)
    truth = truth_about(cells, np.arange(3000), mirror)
    assert len(truth.gid) > 500
    for nprobe, radius in [(1, None), (1, 120), (6, 100), (20, 140), (64, 90), (64, None)]:
        found = self_pairs(cells, 0, 3000, 0.75, nprobe, radius, mirror=mirror)
        known = set(zip(found.a.tolist(), found.b.tolist(), strict=True))
        hits = [(min(p), max(p)) in known for p in zip(truth.query.tolist(), truth.gid.tolist(), strict=True)]
        np.testing.assert_array_equal(found_by(truth, nprobe, radius), hits)
        assert measured_recall(are_among(found, truth), truth)[0] == np.mean(hits)
    assert 0.2 < found_by(truth, 1, None).mean() < 0.9
    assert found_by(truth, 64, None).all()


def test_a_hot_group_has_four_pairs_a_query():
    cells = planted(2000, 100, hot=400)
    truth = truth_about(cells, np.arange(2000))
    _, counts = np.unique(truth.query, return_counts=True)
    assert counts.max() == 4
    again = truth_about(cells, np.arange(2000)[::-1])
    for one, other in zip(truth, again, strict=True):
        assert sorted(map(str, one.tolist())) == sorted(map(str, other.tolist()))


def test_certificate_holds_on_the_whole_pool(monkeypatch):
    monkeypatch.setattr(recall, "_EXACT_ROWS", 1000)
    monkeypatch.setattr(recall, "_FIRST_QUERIES", 256)
    cells = planted(16_000, 4000)
    certificate, truth = certify(cells, 0.75, 0.95, seed=1)
    assert certificate.basis == "sample"
    assert certificate.nprobe < 64
    assert certificate.num_queries < 16_000
    assert 0.95 <= certificate.lower_bound <= certificate.recall
    found = self_pairs(cells, 0, 16_000, 0.75, certificate.nprobe, certificate.sketch_radius)
    assert measured_recall(are_among(found, truth), truth)[0] == pytest.approx(certificate.recall, abs=1e-12)
    everything = self_pairs(cells, 0, 16_000, 0.75, 64, None)
    assert len(found.a) >= 0.95 * len(everything.a)
    compare = lambda question: (hits_in_range(cells, s, s + 4000, question) for s in range(0, 16_000, 4000))  # noqa: E731
    assert certify(cells, 0.75, 0.95, seed=1, compare=compare)[0] == certificate


def test_too_few_pairs_fall_back_to_all_cells(monkeypatch):
    monkeypatch.setattr(recall, "_EXACT_ROWS", 1000)
    cells = planted(2000, 10)
    certificate, truth = certify(cells, 0.75, 0.99)
    assert (certificate.basis, certificate.nprobe, certificate.num_queries) == ("law", 64, 2000)
    assert certificate.lower_bound == pytest.approx(0.999)
    assert certificate.num_pairs == len(truth.gid) >= 10
    found = self_pairs(cells, 0, 2000, 0.75, certificate.nprobe, certificate.sketch_radius)
    assert measured_recall(are_among(found, truth), truth)[0] == 1


def test_a_small_pool_is_answered_exactly():
    certificate, truth = certify(planted(500, 10), 0.75)
    assert (certificate.basis, certificate.nprobe, certificate.sketch_radius) == ("exact", 64, None)
    assert (certificate.recall, certificate.lower_bound, len(truth.gid)) == (1.0, 1.0, 0)


@pytest.mark.usefixtures("torch_on_one_thread")
@pytest.mark.parametrize("num_exact", [0, 300, 700])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_ranges_of_the_pool_and_its_device_change_nothing(num_exact, device):
    mirror = np.where(np.random.default_rng(1).random(DIM) < 0.5, -1, 1)
    cells = planted(3000, 300, hot=200, mirror=mirror)
    rows = np.random.default_rng(0).permutation(3000)[:700]
    question = question_about(cells, rows, cells.gids_of_rows(rows), 0.75, num_exact, 150, mirror=mirror)
    whole = hits_in_range(cells, 0, 3000, question)
    ranges = [
        hits_in_range(cells, a, b, question, max_memory_bytes=memory, device=device)
        for a, b, memory in [(0, 1, 2**20), (1, 1700, 2**20), (1700, 3000, 2**28)]
    ]
    for one, other in zip(whole, fewest(question, ranges), strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.unique(whole.query, return_counts=True)[1].max() == 4


@pytest.mark.usefixtures("torch_on_one_thread")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_a_crowd_is_not_compared_pair_by_pair(device, monkeypatch):
    """Three quarters of the pool are alike: of a row's 60,000 true pairs few are compared exactly."""
    torch_tiles = pytest.importorskip("curation.ops.torch_tiles")
    cells = planted(80_000, 100, hot=60_000)
    rows = np.random.default_rng(0).permutation(80_000)[:40]
    question = question_about(cells, rows, cells.gids_of_rows(rows), 0.75, 20, 250)
    compared = []

    def counted(kernel, count):
        def call(*arguments):
            found = kernel(*arguments)
            compared.append(count(arguments, found))
            return found

        return call

    exact = torch_tiles._exact_similarities
    monkeypatch.setattr(torch_tiles, "_exact_similarities", counted(exact, lambda given, _: len(given[2])))
    for name in ("_meet_by_score", "_meet_by_sketch"):
        monkeypatch.setattr(true_pairs_module, name, counted(getattr(true_pairs_module, name), lambda _, done: done))
    found = hits_in_range(cells, 0, 80_000, question, device=device)
    # On a device, what the first tile has is compared whole: there is no pair yet that others must beat.
    assert 0 < sum(compared) < (40 * 2**14 * 1.01 if device else 40 * 100)
    vectors = cells.read(0, 80_000)
    similarity = (question.vectors @ vectors.T).astype(np.float32)
    for query, row in enumerate(rows):
        true = np.flatnonzero(similarity[query] >= 0.75)
        true = true[true != row]
        pair_hashes = hashes(question, np.full(len(true), query), cells.gids_of_rows(true))
        expected = true[np.argsort(pair_hashes)[:4]]
        assert found.row[found.query == query].tolist() == expected.tolist()


def test_target_must_be_a_proportion():
    with pytest.raises(ValueError, match="target_recall must lie between 0 and 1, got 1"):
        certify(planted(500, 10), 0.75, 1.0)


def test_new_rows_alone_ask(monkeypatch):
    """The certificate is about pairs with a new end, found from those of its ends that ask; it keeps its promise."""
    monkeypatch.setattr(recall, "_EXACT_ROWS", 1000)
    monkeypatch.setattr(recall, "_QUERIES_AT_ONCE", 2000)
    cells = planted(20_000, 6000)
    gids = cells.read_gids(0, cells.num_rows)
    new = np.flatnonzero(gids % 5 == 0)

    class New:
        def __len__(self):
            return len(new)

        def between(self, start, stop):
            return new[(new >= start) & (new < stop)]

    certificate, truth = certify(cells, 0.75, 0.95, seed=1, asking=New())
    assert certificate.basis == "sample"
    assert np.isin(truth.query, gids[new]).all()
    is_new = np.isin(truth.gid, gids[new])
    assert 0 < is_new.sum() < len(is_new)
    assert (truth.rank[~is_new, 1] == cells.num_cells).all()
    assert (truth.rank[is_new, 1] < cells.num_cells).all()
    assert (truth.rank[:, 0] < cells.num_cells).all()
    found = [p for _, p, _ in near_rows(cells, new, 0.75, certificate.nprobe, certificate.sketch_radius).pieces()]
    hits = are_among(merge_pairs(found), truth)
    np.testing.assert_array_equal(hits, found_by(truth, certificate.nprobe, certificate.sketch_radius))
    assert measured_recall(hits, truth)[0] == pytest.approx(certificate.recall)
    assert certificate.nprobe >= certify(cells, 0.75, 0.95, seed=1)[0].nprobe


def test_few_new_rows_meet_all_by_sketches(monkeypatch):
    """No sample, for that would be all of them; the law bounds what the sketches lose."""
    monkeypatch.setattr(recall, "_EXACT_ROWS", 1000)
    cells = planted(16_000, 4000)
    gids = cells.read_gids(0, cells.num_rows)
    new = np.flatnonzero(gids % 20 == 0)

    class New:
        def __len__(self):
            return len(new)

        def between(self, start, stop):
            return new[(new >= start) & (new < stop)]

    certificate, truth = certify(cells, 0.75, 0.99, asking=New())
    assert (certificate.basis, certificate.nprobe, certificate.num_queries, len(truth.gid)) == ("law", 64, 0, 0)
    found = [p for _, p, _ in near_rows(cells, new, 0.75, 64, certificate.sketch_radius).pieces()]
    brute = [p for _, p, _ in near_rows(cells, new, 0.75, 64, None).pieces()]
    assert len(merge_pairs(found).a) >= certificate.lower_bound * len(merge_pairs(brute).a) > 100
