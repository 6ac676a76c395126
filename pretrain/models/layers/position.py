"""Learned position tables at sizes that they were not trained for."""

import math
from functools import lru_cache

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
    rows, columns = (
        resize_weights(side, n, (n + offset) / side if offset else None, antialias, patches.device) for n in grid
    )
    return cls, resized(patches.to(torch.promote_types(patches.dtype, torch.float32)), rows, columns)


def resized(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Grids [B, h * w, D] as [B, h' * w', D] by the weights [h', h] of rows and [w', w] of columns, in x's precision.

    As products: on a GPU the gradient of PyTorch's own interpolation is added up in any order, and two runs differ.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = rows.to(x.dtype) @ x.unflatten(1, (rows.shape[1], -1)).flatten(2)  # [B, h', w * D]
        x = columns.to(x.dtype) @ x.unflatten(2, (columns.shape[1], -1))  # [B, h', w', D]
    return x.flatten(1, 2)


def resize_weights(
    length: int, target: int, scale: float | None, antialias: bool, device: torch.device | str = "cpu"
) -> Tensor:
    """What each of `length` points gives to each of `target`, by bicubic interpolation: float32 [target, length].

    Args:
        scale: target over length, where it is not that of the two.
    """
    # Under a tracer or in fake mode the result is no tensor to keep, nor is a kept one of use.
    traced = torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor
    make = _resize_weights.__wrapped__ if traced else _resize_weights
    return make(length, target, scale, antialias, torch.device(device))


@lru_cache(maxsize=64)
def _resize_weights(length: int, target: int, scale: float | None, antialias: bool, device: torch.device) -> Tensor:
    # A table first made inside inference mode must serve a later backward pass too.
    with torch.inference_mode(False), torch.no_grad():
        # Image c has ones in row c. Images of one column would do, but PyTorch's antialiasing is wrong of those.
        points = torch.eye(length, device=device)[:, None, :, None].repeat(1, 1, 1, length)
        size = None if scale else (target, length)
        factors = (scale, 1.0) if scale else None
        images = F.interpolate(points, size=size, scale_factor=factors, mode="bicubic", antialias=antialias)
        weights = images[:, 0, :, 0]
        assert weights.shape[1] == target, f"a scale of {scale} gives {weights.shape[1]} of {length} for {target}"
        return weights.T.contiguous()


def resize_pos_embed(pos_embed: Tensor, side: int, *, antialias: bool, offset: float = 0.0) -> Tensor:
    """A table [1, 1 + n * n, D] for another training size, [1, 1 + side * side, D], in the table's precision.

    For the switch to a high-resolution phase: a model with `position_grid=side` then computes at that size what the old
    one interpolated.
    """
    # In float64: rounded to the table's precision it is the same on any number of threads, and so of ranks.
    cls, patches = patch_positions(pos_embed.double(), (side, side), antialias=antialias, offset=offset)
    return torch.cat([cls, patches], dim=1).to(pos_embed.dtype)
