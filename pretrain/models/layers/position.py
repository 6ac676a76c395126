"""Learned position tables at sizes that they were not trained for."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_positions(
    pos_embed: Tensor, grid: tuple[int, int], *, antialias: bool, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Bicubic resize of a learned square table.

    The published variants differ away from the trained size, by 0.3 to 0.9 in features: `transformers` Dinov2 has no
    antialiasing, DINOv2 with registers and timm have it, the first release added an offset of 0.1 to the target size.

    Args:
        pos_embed: [1, 1 + n * n, D], the CLS row first.
        grid: patches (h, w).
        antialias: low-pass before shrinking.
        offset: patches added to the target when its scale is computed; 0 resizes to exactly the target.

    Returns:
        CLS position [1, 1, D] and patch positions [1, h * w, D], in float32 when they had to be resized.
    """
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = math.isqrt(patches.shape[1])
    assert side * side == patches.shape[1], "the table is square"
    if grid == (side, side):
        return cls, patches
    square = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if offset:
        scale = [(n + offset) / side for n in grid]
        resized = F.interpolate(square, scale_factor=scale, mode="bicubic", antialias=antialias)
        assert resized.shape[-2:] == grid, f"offset {offset} gives {tuple(resized.shape[-2:])} for {grid}"
    else:
        resized = F.interpolate(square, size=grid, mode="bicubic", antialias=antialias)
    return cls, resized.flatten(2).transpose(1, 2)


def resize_pos_embed(pos_embed: Tensor, side: int, *, antialias: bool, offset: float = 0.0) -> Tensor:
    """A table [1, 1 + n * n, D] for another training size, [1, 1 + side * side, D], in the table's precision.

    For the switch to a high-resolution phase: a model with `position_grid=side` then computes at that size what the old
    one interpolated.
    """
    cls, patches = patch_positions(pos_embed, (side, side), antialias=antialias, offset=offset)
    return torch.cat([cls, patches.to(cls.dtype)], dim=1)
