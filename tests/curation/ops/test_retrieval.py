import numpy as np
import pytest

from curation.ops.retrieval import certify_probes, first_neighbours, resolve_collisions

GIDS = np.array([[1, 2, 3], [1, 4, 5], [1, 2, 6]])
SIMILARITY = np.array([[0.9, 0.5, 0.4], [0.8, 0.7, 0.6], [0.95, 0.3, 0.2]], np.float32)


def drawn_of(gids, similarity, k, collisions):
    """(query, rank) of what counts, of lists of neighbours [Q, depth], -1 where there is none."""
    query, rank = np.nonzero(gids >= 0)
    counts = resolve_collisions(query, rank, gids[query, rank], similarity[query, rank], k, collisions)
    return query[counts], rank[counts]


@pytest.mark.parametrize(
    ("rule", "draws"),
    [
        ("keep", [(0, 1), (0, 2), (1, 1), (1, 4), (2, 1), (2, 2)]),
        ("drop", [(0, 2), (1, 4), (2, 1)]),
        ("next_neighbor", [(0, 2), (0, 3), (1, 4), (1, 5), (2, 1), (2, 6)]),
    ],
)
def test_rules_by_hand(rule, draws):
    query, rank = drawn_of(GIDS, SIMILARITY, 2, rule)
    assert [(int(q), int(GIDS[q, r])) for q, r in zip(query, rank, strict=True)] == draws


def test_missing_neighbours_are_no_draws():
    query, _ = drawn_of(np.array([[3, -1], [-1, -1]]), np.zeros((2, 2), np.float32), 2, "keep")
    assert query.tolist() == [0]


@pytest.mark.parametrize("rule", ["drop", "next_neighbor"])
def test_no_image_is_drawn_twice_and_query_order_does_not_matter(rule):
    generator = np.random.default_rng(0)
    gids = np.stack([generator.permutation(60)[:12] for _ in range(30)])
    similarity = -np.sort(-generator.random((30, 12)).astype(np.float32), axis=1)
    query, rank = drawn_of(gids, similarity, 3, rule)
    drawn = gids[query, rank]
    assert len(np.unique(drawn)) == len(drawn)
    assert np.bincount(query).max() <= 3
    order = generator.permutation(30)
    again_query, again_rank = drawn_of(gids[order], similarity[order], 3, rule)
    pairs = set(zip(query.tolist(), drawn.tolist(), strict=True))
    again = gids[order][again_query, again_rank]
    assert pairs == set(zip(order[again_query].tolist(), again.tolist(), strict=True))


def test_probes_are_the_fewest_whose_lower_bound_meets_the_target():
    query = np.arange(1000)
    rank = np.concatenate([np.zeros(900, int), np.full(97, 20), np.full(3, 90)])
    found = certify_probes(query, rank, 100, 0.99, 1000)
    assert 20 < found.nprobe <= 25  # by sixths; the next fewer would lose a tenth of the neighbours
    assert (found.recall, found.basis) == (0.997, "sample")
    assert 0.99 <= found.lower_bound < 0.997
    assert certify_probes(query, rank, 100, 0.999, 1000).basis == "exact"  # three of a thousand are too many for that
    assert certify_probes(query, np.zeros(1000, int), 100, 0.99, 1000).nprobe == 1


def test_too_few_neighbours_certify_nothing():
    """299 pairs that are all found certify 0.99; and pairs of one query count as one."""
    assert certify_probes(np.arange(299), np.zeros(299, int), 50, 0.99, 299).nprobe == 1
    assert certify_probes(np.arange(298), np.zeros(298, int), 50, 0.99, 298).nprobe == 50
    assert certify_probes(np.repeat(np.arange(298), 4), np.zeros(4 * 298, int), 50, 0.99, 298).nprobe == 50
    assert certify_probes(np.zeros(0, int), np.zeros(0, int), 50, 0.99, 10).nprobe == 50


def test_lists_of_neighbours_are_cut():
    query, gid, similarity = np.array([2, 0, 2, 2]), np.array([7, 1, 9, 8]), np.array([0.5, 0.1, 0.5, 0.6], np.float32)
    found = first_neighbours(query, gid, similarity, 2)
    assert [column.tolist() for column in found[:2]] == [[0, 2, 2], [1, 8, 7]]
