"""Block masks: counts in closed form, DINOv2's generator as a slow reference, and no dependence on the ranks."""

import math
import random

import numpy as np
import pytest

from pretrain.data.masks import MaskConfig, block_masks, mask_counts, step_masks

CONFIG = MaskConfig()


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [np.random.default_rng([seed, i]) for i in range(count)]


def slow_block_mask(config: MaskConfig, grid: tuple[int, int], count: int, rng: random.Random) -> np.ndarray:
    """One image, one block at a time, as the paper's supplement and BEiT describe it."""
    height, width = grid
    mask = np.zeros(grid, bool)
    while mask.sum() < count:
        most = min(count - mask.sum(), config.max_share * height * width)
        for _ in range(10):
            area = rng.uniform(config.min_patches, most)
            ratio = math.exp(rng.uniform(math.log(config.aspect), -math.log(config.aspect)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (1 <= h < height and 1 <= w < width):
                continue
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            added = h * w - mask[top : top + h, left : left + w].sum()
            if 0 < added <= most:
                mask[top : top + h, left : left + w] = True
                break
        else:
            return mask
    return mask


def figures(masks: np.ndarray) -> np.ndarray:
    """[n, 4]: patches masked, borders between masked and seen, rows touched, columns touched."""
    borders = (masks[:, 1:] != masks[:, :-1]).sum(axis=(1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum(axis=(1, 2))
    return np.stack(
        [masks.sum(axis=(1, 2)), borders, masks.any(axis=2).sum(axis=1), masks.any(axis=1).sum(axis=1)], axis=1
    )


@pytest.mark.parametrize("grid", [(16, 16), (14, 14), (8, 8), (9, 20)])
@pytest.mark.parametrize("ratio", [0.12, 0.3, 0.5])
def test_blocks_have_the_distribution_of_the_slow_reference(grid: tuple[int, int], ratio: float) -> None:
    """Mean and spread of each figure over 1500 masks, within sampling error."""
    count, size = 1500, int(ratio * grid[0] * grid[1])
    config = MaskConfig(exact=False)
    ours = figures(block_masks(config, grid, np.full(count, size), rngs(count))).astype(float)
    chance = random.Random(0)
    theirs = figures(np.stack([slow_block_mask(config, grid, size, chance) for _ in range(count)])).astype(float)
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / count)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4.5 * error + 1e-9).all()
    assert np.abs(ours.std(axis=0) - theirs.std(axis=0)).max() < 0.15 * theirs.std(axis=0).max() + 0.1
    assert (ours[:, 0] <= size).all()


def test_exact_fills_up_to_the_count() -> None:
    counts = np.random.default_rng(0).integers(0, 129, 300)
    filled = block_masks(CONFIG, (16, 16), counts, rngs(300))
    np.testing.assert_array_equal(filled.sum(axis=(1, 2)), counts)
    blocks = block_masks(MaskConfig(exact=False), (16, 16), counts, rngs(300))
    assert (blocks.sum(axis=(1, 2)) <= counts).all()
    assert (blocks.sum(axis=(1, 2)) < counts).any()
    assert (filled | ~blocks).all()  # the blocks are the same; patches are added


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (2, 9), (4, 4)])
def test_tiny_grids_end_and_are_exact(grid: tuple[int, int]) -> None:
    counts = np.arange(grid[0] * grid[1] + 1)
    masks = block_masks(CONFIG, grid, counts, rngs(len(counts)))
    np.testing.assert_array_equal(masks.sum(axis=(1, 2)), counts)


@pytest.mark.parametrize("num_images", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("probability", [0.5, 0.25, 1.0, 0.3])
def test_counts_are_one_in_each_bin(num_images: int, probability: float) -> None:
    config = MaskConfig(probability=probability)
    for seed in range(20):
        counts = mask_counts(config, 256, range(num_images), 2, np.random.default_rng(seed))
        masked = np.sort(counts[counts > 0])
        assert len(masked) == int(2 * num_images * probability)
        edges = 256 * np.linspace(0.1, 0.5, len(masked) + 1)
        assert (masked >= edges[:-1] - 2).all()  # the sum of two is rounded down, and one of them up
        assert (masked <= edges[1:] + 1).all()
        assert len(masked) % 2 or masked.sum() == 153 * len(masked) // 2  # int(256 * 0.6) for two


def test_ratios_are_uniform_and_spread_over_all_crops() -> None:
    """Over many groups, as published: every ratio of the range is as likely, in any crop."""
    drawn = np.stack([mask_counts(CONFIG, 10_000, range(4), 2, np.random.default_rng(seed)) for seed in range(3000)])
    ratios = np.sort(drawn[drawn > 0]) / 10_000
    distance = np.abs(ratios - (0.1 + 0.4 * (np.arange(len(ratios)) + 0.5) / len(ratios))).max() / 0.4
    assert distance < 1.63 / math.sqrt(len(ratios))  # Kolmogorov-Smirnov, 1%
    assert np.abs((drawn > 0).mean(axis=0) - 0.5).max() < 4 * 0.5 / math.sqrt(3000)
    assert np.abs(drawn.mean(axis=0) / 3000 - 0.5).max() < 0.06


@pytest.mark.parametrize(("ranks", "images"), [(32, 64), (256, 16), (8, 12), (16, 4)])
def test_ranks_have_as_many_masked_patches_in_every_step(ranks: int, images: int) -> None:
    """Before, the slowest of 32 ranks had 1.22 times the mean at 64 images a rank, of 256 ranks 1.64 times at 16."""
    found = set()
    for step in range(2):
        for rank in range(0, ranks, max(ranks // 8, 1)):
            positions = np.arange(rank * images, (rank + 1) * images)
            masks = step_masks(CONFIG, (14, 14), positions, ranks * images, 2, 0, 0, step)
            found.add(int(masks.sum()))
    assert found == {images * 117 // 2}  # int(196 * 0.6) for two masked crops, one of which an image has on average


def test_the_share_is_exact_over_groups_that_it_does_not_divide() -> None:
    config = MaskConfig(probability=0.3)
    masks = step_masks(config, (8, 8), np.arange(50), 50, 2, seed=0, phase=0, step=0)
    assert masks.any(axis=2).sum() == 30


def test_ranks_together_have_the_masks_of_one() -> None:
    """Any split of the global batch, in any order: each crop has its own mask."""
    whole = step_masks(CONFIG, (8, 8), np.arange(18), 18, 2, seed=1, phase=2, step=3)
    some = np.array([17, 0, 5, 11])
    np.testing.assert_array_equal(step_masks(CONFIG, (8, 8), some, 18, 2, seed=1, phase=2, step=3), whole[:, some])
    assert whole.shape == (2, 18, 64)
    assert (whole.any(axis=2)).sum() == 18
    for other in (
        {"seed": 2, "phase": 2, "step": 3},
        {"seed": 1, "phase": 1, "step": 3},
        {"seed": 1, "phase": 2, "step": 4},
    ):
        assert not np.array_equal(step_masks(CONFIG, (8, 8), np.arange(18), 18, 2, **other), whole)
    none = step_masks(CONFIG, (8, 8), np.arange(1), 1, 1, seed=0, phase=0, step=0)
    assert not none.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probability": 1.1}, "masks.probability"),
        ({"ratio": [0.5, 0.1]}, "masks.ratio"),
        ({"min_patches": 0}, "min_patches"),
        ({"aspect": 0.0}, "aspect"),
        ({"max_share": 2.0}, "max_share"),
    ],
)
def test_wrong_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskConfig(**changes)
