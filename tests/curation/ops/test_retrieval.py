import numpy as np
import pytest

from curation.ops.retrieval import num_probes, resolve_collisions

GIDS = np.array([[1, 2, 3], [1, 4, 5], [1, 2, 6]])
SIMILARITY = np.array([[0.9, 0.5, 0.4], [0.8, 0.7, 0.6], [0.95, 0.3, 0.2]], np.float32)


@pytest.mark.parametrize(
    ("rule", "draws"),
    [
        ("keep", [(0, 1), (0, 2), (1, 1), (1, 4), (2, 1), (2, 2)]),
        ("drop", [(0, 2), (1, 4), (2, 1)]),
        ("next_neighbor", [(0, 2), (0, 3), (1, 4), (1, 5), (2, 1), (2, 6)]),
    ],
)
def test_rules_by_hand(rule, draws):
    query, rank = resolve_collisions(GIDS, SIMILARITY, 2, rule)
    assert [(int(q), int(GIDS[q, r])) for q, r in zip(query, rank, strict=True)] == draws


def test_missing_neighbours_are_no_draws():
    query, _ = resolve_collisions(np.array([[3, -1], [-1, -1]]), np.zeros((2, 2), np.float32), 2, "keep")
    assert query.tolist() == [0]


@pytest.mark.parametrize("rule", ["drop", "next_neighbor"])
def test_no_image_is_drawn_twice_and_query_order_does_not_matter(rule):
    generator = np.random.default_rng(0)
    gids = np.stack([generator.permutation(60)[:12] for _ in range(30)])
    similarity = -np.sort(-generator.random((30, 12)).astype(np.float32), axis=1)
    query, rank = resolve_collisions(gids, similarity, 3, rule)
    drawn = gids[query, rank]
    assert len(np.unique(drawn)) == len(drawn)
    assert np.bincount(query).max() <= 3
    order = generator.permutation(30)
    again_query, again_rank = resolve_collisions(gids[order], similarity[order], 3, rule)
    pairs = set(zip(query.tolist(), drawn.tolist(), strict=True))
    again = gids[order][again_query, again_rank]
    assert pairs == set(zip(order[again_query].tolist(), again.tolist(), strict=True))


@pytest.mark.parametrize(
    ("num_rows", "num_clusters", "expected"),
    [(9_400, 1_848, 1_848), (10**6, 250_000, 16_384), (744 * 10**6, 100_000, 64), (200_000, 30, 30)],
)
def test_a_seed_image_looks_into_enough_clusters(num_rows, num_clusters, expected):
    assert num_probes(num_rows, num_clusters) == expected
