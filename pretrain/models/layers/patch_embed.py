"""Pixels to patch tokens."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.initial import Initial


class PatchEmbed(nn.Module):
    """The linear map of non-overlapping patches, stored as the convolution of the released checkpoints.

    It runs as one matrix product over the patches of all crops: on a CPU the gradient of a strided convolution is
    slower, and one call for each crop size leaves small products.
    """

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def grid(self, crops: Tensor) -> tuple[int, int]:
        """Rows and columns of patches in crops [B, C, H, W]. Raises ValueError where the patch does not divide them."""
        if crops.ndim != 4 or crops.shape[1] != self.in_channels:
            raise ValueError(f"crops are [B, {self.in_channels}, H, W], got {tuple(crops.shape)}.")
        height, width = crops.shape[-2:]
        p = self.patch_size
        if height % p or width % p or not height or not width:
            raise ValueError(
                f"a crop of {height} x {width} px does not divide into patches of {p} px; "
                f"the nearest that does is {max(round(height / p), 1) * p} x {max(round(width / p), 1) * p}."
            )
        return height // p, width // p

    def forward(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Groups of crops [B_g, C, H_g, W_g] to patch tokens [B_g, N_g, D], row-major."""
        grids = [self.grid(group) for group in crops]
        p = self.patch_size
        pixels = [
            group.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5).reshape(len(group) * h * w, -1)
            for group, (h, w) in zip(crops, grids, strict=True)
        ]
        tokens = F.linear(torch.cat(pixels), self.proj.weight.flatten(1), self.proj.bias)
        split = tokens.split([len(rows) for rows in pixels])
        return [rows.unflatten(0, (len(group), h * w)) for rows, group, (h, w) in zip(split, crops, grids, strict=True)]

    def initials(self) -> dict[str, Initial]:
        """Uniform within 1 / sqrt(fan in), weights and bias, as both families do."""
        bound = Initial("uniform", 1 / math.sqrt(self.in_channels * self.patch_size**2))
        return {"proj.weight": bound, "proj.bias": bound}
