"""Which patches of which global crops the student does not see: block masks for iBOT, as DINOv2 draws them.

A share of the global crops is masked, with ratios spread evenly over a range, in groups of four images that follow each
other in the global batch. A group has as many masked patches as any other; so have ranks and micro-batches of a
multiple of four images, and no rank waits for another. A crop's ratio depends on (seed, phase, step) and its place in
the global batch, not on how ranks split it. arXiv:2304.07193; blocks: BEiT, arXiv:2106.08254.
"""

from dataclasses import dataclass, field

import numpy as np

from configs.ranges import check_ranges
from pretrain.data.randomness import Stream, generator

_BLOCK_ATTEMPTS = 10
GROUP_IMAGES = 4
"""images whose crops share out the range of ratios"""


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Mask sampling, with DINOv2's values."""

    probability: float = 0.5
    """share of the global crops that are masked, exactly; 0 for no masks at all. With a multiple of 1/4, and of four
    images on each rank, all ranks have as many masked patches"""
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
    config: MaskConfig,
    grid: tuple[int, int],
    positions: np.ndarray,
    batch_size: int,
    num_views: int,
    seed: int,
    phase: int,
    step: int,
) -> np.ndarray:
    """Masks of the global crops of some of a step's images: bool [V, B, h * w], true where the mask token stands.

    Args:
        grid: h, w in patches.
        positions: places of the images in the global batch, int [B].
        batch_size: images of the global batch.
        num_views: V, global crops of an image.
    """
    groups, members = np.unique(positions // GROUP_IMAGES, return_inverse=True)
    drawn = []
    for group in groups.tolist():
        images = range(group * GROUP_IMAGES, min((group + 1) * GROUP_IMAGES, batch_size))
        rng = generator(seed, phase, Stream.MASK_RATIOS, step, group)
        counts = np.zeros((num_views, GROUP_IMAGES), np.int64)
        counts[:, : len(images)] = mask_counts(config, grid[0] * grid[1], images, num_views, rng)
        drawn.append(counts)
    counts = np.stack(drawn)[members, :, positions % GROUP_IMAGES].T.ravel()
    crops = (np.arange(num_views)[:, None] * batch_size + positions).ravel()
    masked = np.flatnonzero(counts)
    rngs = [generator(seed, phase, Stream.MASK_BLOCKS, step, int(crop)) for crop in crops[masked]]
    masks = np.zeros((len(crops), *grid), bool)
    masks[masked] = block_masks(config, grid, counts[masked], rngs)
    return masks.reshape(num_views, len(positions), grid[0] * grid[1])


def mask_counts(
    config: MaskConfig, num_patches: int, images: range, num_views: int, rng: np.random.Generator
) -> np.ndarray:
    """Patches to mask in each global crop of images that follow each other in the global batch: int64 [V, images].

    Of all crops of the batch up to any group's end the share `probability` is masked, rounded down. The j-th of the K
    masked crops of these images has a ratio uniform in the j-th of K equal bins of the range, and the j-th from the end
    what it lacks to the sum of both ends of the range: two such crops have the same number of patches in any step.
    """
    first, last = (int(image * num_views * config.probability + 1e-9) for image in (images.start, images.stop))
    num_masked, (low, high) = last - first, config.ratio
    num_pairs, is_odd = divmod(num_masked, 2)
    bins = (np.arange(num_pairs + is_odd) + rng.random(num_pairs + is_odd)) / max(num_masked, 1)
    drawn = np.ceil(num_patches * (low + (high - low) * bins) - 1e-9)
    of_two = int(num_patches * (low + high) + 1e-9)
    counts = np.zeros(num_views * len(images), np.int64)
    counts[: len(drawn)] = drawn
    counts[len(drawn) : num_masked] = of_two - drawn[:num_pairs]
    rng.shuffle(counts)
    return counts.reshape(num_views, len(images))


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
