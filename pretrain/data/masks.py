"""Which patches of which global crops the student does not see: block masks for iBOT, as DINOv2 draws them.

A share of the global batch's crops is masked, with ratios spread evenly over a range, so the number of masked patches
of a step hardly varies. Which crop gets which ratio depends on (seed, phase, step) and the crop's place in the global
batch, not on how ranks split it. arXiv:2304.07193; blocks: BEiT, arXiv:2106.08254.
"""

from dataclasses import dataclass, field

import numpy as np

from configs.ranges import check_ranges
from pretrain.data.randomness import Stream, generator

_BLOCK_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Mask sampling, with DINOv2's values."""

    probability: float = 0.5
    """share of the global crops that are masked, exactly; 0 for no masks at all"""
    ratio: list[float] = field(default_factory=lambda: [0.1, 0.5])
    """least and most share of patches masked in such a crop"""
    min_patches: int = 4
    """of a block"""
    max_share: float = 0.5
    """of a block, of all patches"""
    aspect: float = 0.3
    """a block's height / width is log-uniform in this .. 1 / this"""
    exact: bool = True
    """blocks can fall short of the ratio; true fills up with single patches (DINOv3), false leaves it so (DINOv2)"""

    def __post_init__(self) -> None:
        ranges = {"probability": "[0, 1]", "ratio": "[0, 1]", "min_patches": "[1, inf)"}
        check_ranges("masks", self, **ranges | {"max_share": "(0, 1]", "aspect": "(0, 1]"})
        if len(self.ratio) != 2 or self.ratio[0] > self.ratio[1]:
            raise ValueError(f"masks.ratio={self.ratio} must be [least, most], the smaller number first.")


def step_masks(
    config: MaskConfig, grid: tuple[int, int], crops: np.ndarray, num_crops: int, seed: int, phase: int, step: int
) -> np.ndarray:
    """Masks of some of a step's global crops: bool [n, h * w], true where the student sees the mask token.

    Args:
        grid: h, w in patches.
        crops: places of the wanted ones among all global crops of the global batch, int [n].
        num_crops: of the global batch.
    """
    counts = mask_counts(config, grid[0] * grid[1], num_crops, generator(seed, phase, Stream.MASK_RATIOS, step))[crops]
    masked = np.flatnonzero(counts)
    rngs = [generator(seed, phase, Stream.MASK_BLOCKS, step, int(crop)) for crop in crops[masked]]
    masks = np.zeros((len(crops), *grid), bool)
    masks[masked] = block_masks(config, grid, counts[masked], rngs)
    return masks.reshape(len(crops), grid[0] * grid[1])


def mask_counts(config: MaskConfig, num_patches: int, num_crops: int, rng: np.random.Generator) -> np.ndarray:
    """Patches to mask in each global crop, int64 [num_crops]: int(probability * num_crops) of them are not 0.

    The j-th of those has a ratio uniform in the j-th of as many equal bins of the range; then all are shuffled.
    """
    num_masked = int(num_crops * config.probability)
    counts = np.zeros(num_crops, np.int64)
    low, high = config.ratio
    bins = (np.arange(num_masked) + rng.random(num_masked)) / max(num_masked, 1)
    counts[:num_masked] = num_patches * (low + (high - low) * bins)
    rng.shuffle(counts)
    return counts


def block_masks(
    config: MaskConfig, grid: tuple[int, int], counts: np.ndarray, rngs: list[np.random.Generator]
) -> np.ndarray:
    """Masks of random blocks, bool [n, h, w], all images at once: a round adds one block to each that still needs one.

    A block is the first of ten random ones that adds a patch and no more than is missing; an image for which none of
    the ten does is left as it is, then filled up if the config says so. An image's masks depend on its generator only.

    Args:
        counts: patches to mask, int64 [n].
        rngs: a generator for each image.
    """
    height, width = grid
    masks = np.zeros((len(counts), height, width), bool)
    largest = config.max_share * height * width
    active = np.arange(len(counts))
    missing = counts.copy()
    while len(active := active[missing[active] > 0]):
        uniform = np.stack([rngs[i].random((_BLOCK_ATTEMPTS, 4)) for i in active])
        most = np.minimum(missing[active], largest)[:, None]
        area = config.min_patches + uniform[..., 0] * (most - config.min_patches)
        ratio = np.exp(np.log(config.aspect) * (1 - 2 * uniform[..., 1]))
        block_h, block_w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        top = np.floor(uniform[..., 2] * (height - block_h + 1))
        left = np.floor(uniform[..., 3] * (width - block_w + 1))
        corners = np.stack([top, left, top + block_h, left + block_w], axis=-1).astype(np.int64)
        inside = (block_h >= 1) & (block_w >= 1) & (block_h < height) & (block_w < width)
        added = _area(corners) - _masked_inside(masks[active], np.where(inside[..., None], corners, 0))
        good = inside & (added > 0) & (added <= most)
        found = good.any(axis=1)
        active = active[found]
        chosen = corners[found, good[found].argmax(axis=1)]
        missing[active] -= added[found, good[found].argmax(axis=1)]
        masks[active] |= _rectangles(chosen, height, width)
    if config.exact:
        _fill(masks, missing, rngs)
    return masks


def _area(corners: np.ndarray) -> np.ndarray:
    """Patches in boxes [..., 4] of (top, left, bottom, right)."""
    return (corners[..., 2] - corners[..., 0]) * (corners[..., 3] - corners[..., 1])


def _masked_inside(masks: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """How many patches of each box [n, k, 4] are masked already, by sums over the upper left of each patch."""
    n, height, width = masks.shape
    sums = np.zeros((n, height + 1, width + 1), np.int64)
    sums[:, 1:, 1:] = masks.cumsum(axis=1).cumsum(axis=2)
    image = np.arange(n)[:, None]
    top, left, bottom, right = np.moveaxis(corners, -1, 0)
    return sums[image, bottom, right] - sums[image, top, right] - sums[image, bottom, left] + sums[image, top, left]


def _rectangles(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool [n, height, width]: true inside each box [n, 4]."""
    top, left, bottom, right = corners.T[:, :, None]
    rows, columns = np.arange(height), np.arange(width)
    return ((rows >= top) & (rows < bottom))[:, :, None] & ((columns >= left) & (columns < right))[:, None, :]


def _fill(masks: np.ndarray, missing: np.ndarray, rngs: list[np.random.Generator]) -> None:
    """Mask as many more random patches as are missing, in place."""
    for i in np.flatnonzero(missing > 0):
        free = np.flatnonzero(~masks[i].ravel())
        masks[i].ravel()[rngs[i].choice(free, missing[i], replace=False)] = True
