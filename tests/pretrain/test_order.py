"""The order of samples: a pure function, exact quotas, no repeats within an epoch."""

import numpy as np
import pytest

from pretrain.data.order import Mixture, SampleOrder


def starts(*sizes: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def order(batch_size: int = 8, seed: int = 0, phase: int = 0, **changes) -> SampleOrder:
    mixture = {"starts": [starts(5, 7, 3, 9)], "weights": [1.0]} | changes
    return SampleOrder(Mixture(**mixture), batch_size, seed, phase)


def draw(sampler: SampleOrder, steps: range) -> tuple[np.ndarray, np.ndarray]:
    batches = [sampler.batch(step) for step in steps]
    return np.concatenate([d for d, _ in batches]), np.concatenate([r for _, r in batches])


@pytest.mark.parametrize("shuffle_shards", [0, 1, 2, 3, 100])
def test_each_epoch_is_a_permutation(shuffle_shards: int) -> None:
    """24 images in batches of 8: every three steps see each image once, in another order every time."""
    sampler = order(shuffle_shards=shuffle_shards)
    epochs = [draw(sampler, range(start, start + 3))[1] for start in (0, 3, 6)]
    for rows in epochs:
        assert sorted(rows.tolist()) == list(range(24))
    assert len({tuple(rows.tolist()) for rows in epochs}) == 3


def test_a_batch_across_two_epochs_keeps_both_whole() -> None:
    rows = draw(order(batch_size=7), range(24))[1]
    for epoch in range(7):
        assert sorted(rows[epoch * 24 : (epoch + 1) * 24].tolist()) == list(range(24))


def test_a_step_does_not_depend_on_those_before() -> None:
    """Forwards, backwards, and from a fresh object: the same batch."""
    mixture = {
        "starts": [starts(5, 7, 3, 9), starts(11, 2), starts(40)],
        "weights": [0.5, 0.2, 0.3],
        "homogeneous": 1,
        "homogeneous_share": 0.25,
    }
    sampler = order(**mixture)
    forwards = [sampler.batch(step) for step in range(150)]
    for step in [*range(149, -1, -7), 149, 0, 3]:
        for expected in (sampler.batch(step), order(**mixture).batch(step)):
            np.testing.assert_array_equal(forwards[step], expected)


def test_seed_and_phase_change_the_order() -> None:
    rows = {tuple(draw(order(seed=s, phase=p), range(3))[1].tolist()) for s in (0, 1) for p in (0, 1)}
    assert len(rows) == 4


def test_windows_keep_reading_local() -> None:
    """With windows of two shards, each stretch of a window touches two shards only; which ones, changes by epoch."""
    sampler = order(starts=[starts(*[10] * 20)], shuffle_shards=2, batch_size=20)
    pairs = []
    for step in range(20):
        _, rows = sampler.batch(step)
        pairs.append(tuple(sorted(set((rows // 10).tolist()))))
        assert len(pairs[-1]) == 2
        assert (np.diff(rows // 10) != 0).sum() > 2  # mixed, not one shard after the other
    assert sorted(sum(pairs[:10], ())) == list(range(20))
    assert set(pairs[:10]) != set(pairs[10:])


@pytest.mark.parametrize(
    ("weights", "batch_size"), [([3, 1], 8), ([0.7, 0.2, 0.1], 40), ([1, 1e-4, 0.3], 4), ([1] * 9, 1)]
)
def test_mixture_quotas_are_exact(weights: list[float], batch_size: int) -> None:
    """After any block, each dataset has had its share within the number of datasets; batches are mixed inside."""
    sampler = order(starts=[starts(50, 60)] * len(weights), weights=weights, batch_size=batch_size)
    share = np.array(weights) / sum(weights)
    block = -(-(len(weights) ** 2) // batch_size)
    counts = np.zeros(len(weights))
    for step in range(60 * block):
        counts += np.bincount(sampler.batch(step)[0], minlength=len(weights))
        if (step + 1) % block == 0:
            assert np.abs(counts - share * (step + 1) * batch_size).max() <= len(weights)


def test_positions_of_a_dataset_are_spread_over_the_batch() -> None:
    """Else one rank would see one dataset only."""
    datasets = np.stack([order(starts=[starts(99)] * 2, weights=[1, 1], batch_size=16).batch(s)[0] for s in range(200)])
    assert np.abs(datasets.mean(axis=0) - 0.5).max() < 0.15


@pytest.mark.parametrize("share", [0.1, 0.29, 1 / 3, 1.0])
def test_homogeneous_share_is_exact_in_every_hundred_steps(share: float) -> None:
    sampler = order(
        starts=[starts(30, 70), starts(64)], weights=[1.0, 0.0], homogeneous=1, homogeneous_share=share, batch_size=4
    )
    kinds = []
    for step in range(1000):
        datasets, _ = sampler.batch(step)
        assert len(set(datasets.tolist())) == 1  # weight 0: never in the mixture
        kinds.append(int(datasets[0]))
        assert sampler.is_homogeneous(step) == (kinds[-1] == 1)
    in_blocks = np.array(kinds).reshape(10, 100).sum(axis=1)
    assert abs(in_blocks.sum() - 1000 * share) < 1
    assert np.ptp(in_blocks) <= 1
    if share == 0.1:  # not at every tenth step, or whatever is done every tenth step would see nothing else
        assert len(set(np.flatnonzero(kinds) % 10)) > 3


def test_a_dataset_in_both_kinds_of_batches_is_still_gone_through_once() -> None:
    sampler = order(
        starts=[starts(30, 70), starts(24, 17)],
        weights=[1.0, 1.0],
        homogeneous=1,
        homogeneous_share=0.2,
        batch_size=6,
        shuffle_shards=1,
    )
    datasets, rows = draw(sampler, range(300))
    for dataset, count in ((0, 100), (1, 41)):
        mine = rows[datasets == dataset]
        for epoch in range(len(mine) // count):
            assert sorted(mine[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
        assert sampler.epoch(300)[dataset] == pytest.approx(len(mine) / count, abs=2 / count)


def test_redraws_are_a_function_of_their_place() -> None:
    sampler = order()
    drawn = {(s, i, a): sampler.redraw(s, i, 0, a) for s in range(5) for i in range(5) for a in range(1, 5)}
    assert all(0 <= row < 24 for row in drawn.values())
    assert len(set(drawn.values())) > 12
    assert all(order().redraw(s, i, 0, a) == row for (s, i, a), row in drawn.items())


def test_a_hundred_million_images_need_arrays_only() -> None:
    """10,000 shards of 10,000: a batch of 4096 is drawn without holding more than a few windows."""
    sampler = order(starts=[starts(*[10_000] * 10_000)], batch_size=4096, shuffle_shards=64)
    _, rows = sampler.batch(20_000)
    assert len(np.unique(rows)) == 4096
    assert rows.max() < 100_000_000
    assert sum(window.nbytes for window in sampler._windows.values()) <= 4 * 64 * 10_000 * 8
