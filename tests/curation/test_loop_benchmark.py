"""The figures of `benchmarks.loop` on vectors whose answers are known."""

import numpy as np

from benchmarks.loop import VOTERS, beside, figures, votes, whitened
from curation.account.truth import TruthRow
from curation.ops.descriptors import unit


def groups(each: int, spread: float) -> tuple[np.ndarray, list[TruthRow]]:
    """Three concepts around three axes, the last of them not in the seed set, and junk around a fourth."""
    rng = np.random.default_rng(5)
    centres = np.repeat(np.eye(4, 16, dtype=np.float32), each, axis=0)
    rows = unit(centres + spread * rng.standard_normal(centres.shape).astype(np.float32))
    kinds = [("natural", "a", True), ("natural", "b", True), ("natural", "c", False), ("ui", "", None)]
    truth = [
        TruthRow(key=f"{place}", kind=kind, label=label, in_seed=in_seed)
        for place, (kind, label, in_seed) in enumerate(kind for kind in kinds for _ in range(each))
    ]
    return rows, truth


def test_votes_are_of_others_that_have_a_label() -> None:
    rows, truth = groups(20, 0.01)
    assert votes(rows, truth).tolist() == [True] * 60
    # Fewer of a kind than voters: strangers outvote them here and there.
    rows, truth = groups(VOTERS // 2, 0.01)
    assert votes(rows, truth).mean() < 1


def test_shares_are_of_what_seeds_draw() -> None:
    rows, truth = groups(20, 0.01)
    natural, concepts, vote = figures(rows, np.eye(2, 16, dtype=np.float32), truth)
    assert [natural, concepts, vote] == ["100.0 ± 0.0"] * 3
    natural, concepts, _ = figures(rows, np.eye(4, 16, dtype=np.float32), truth)
    assert natural.startswith("75.0")  # four of each, a quarter of them junk
    assert concepts.startswith("66.7")


def test_a_joint_cosine_is_the_weighted_sum() -> None:
    rng = np.random.default_rng(0)
    one, other = (unit(rng.standard_normal((5, width)).astype(np.float32)) for width in (7, 4))
    joined = beside(one, other, 0.3)
    np.testing.assert_allclose(joined @ joined.T, 0.7 * one @ one.T + 0.3 * other @ other.T, atol=1e-6)


def test_whitened_axes_have_one_variance_before_rows_are_scaled() -> None:
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal((4000, 6)) * [9, 5, 3, 1, 0.5, 0.1] + 4).astype(np.float32)
    rows, seeds = whitened(pool, pool[:3])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(np.cov(rows.T) * 6, np.eye(6), atol=0.1)
    np.testing.assert_array_equal(rows[:3], seeds)
