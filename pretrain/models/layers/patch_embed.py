"""Pixels to patch tokens."""

import itertools
import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.initial import NORM, Initial, prefixed
from pretrain.models.layers.norm import LayerNorm

STEMS = ("patches", "convolutions")


def patch_grid(crops: Tensor, channels: int, p: int) -> tuple[int, int]:
    """Rows and columns of patches of p px in crops [B, C, H, W].

    Raises ValueError: other channels, or sides that the patch does not divide.
    """
    if crops.ndim != 4 or crops.shape[1] != channels:
        raise ValueError(f"crops are [B, {channels}, H, W], got {tuple(crops.shape)}.")
    height, width = crops.shape[-2:]
    if height % p or width % p or not height or not width:
        raise ValueError(
            f"a crop of {height} x {width} px does not divide into patches of {p} px; "
            f"the nearest that does is {max(round(height / p), 1) * p} x {max(round(width / p), 1) * p}."
        )
    return height // p, width // p


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

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """Groups of crops [B_g, C, H_g, W_g] to patch tokens [B_g, N_g, D], row-major.

        `masks` change nothing: a token sees its own patch alone.
        """
        p = self.patch_size
        grids = [patch_grid(group, self.in_channels, p) for group in crops]
        pixels = [
            group.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5).reshape(len(group) * h * w, -1)
            for group, (h, w) in zip(crops, grids, strict=True)
        ]
        tokens = F.linear(torch.cat(pixels), self.proj.weight.flatten(1), self.proj.bias)
        split = tokens.split([len(rows) for rows in pixels])
        return [rows.unflatten(0, (len(group), h * w)) for rows, group, (h, w) in zip(split, crops, grids, strict=True)]

    def products(self) -> int:
        """Multiply-adds for a patch."""
        return self.proj.weight.numel()

    def initials(self) -> dict[str, Initial]:
        """Uniform within 1 / sqrt(fan in), weights and bias, as both families do."""
        bound = Initial("uniform", 1 / math.sqrt(self.in_channels * self.patch_size**2))
        return {"proj.weight": bound, "proj.bias": bound}


class ConvolutionalStem(nn.Module):
    """Convolutions of 3 x 3 px, two for each halving of the sides, then a linear layer.

    Learns faster than one linear map of a patch, from few and small images above all (arXiv:2106.14881, whose batch
    norm is a layer norm here, so that no token depends on another image; arXiv:2104.05704 for small images). A token
    sees up to 9 px around its patch of 4, so what is masked is hidden before.

    Args:
        patch_size: a power of two, 2 or more: the stride of all convolutions together.
        embed_dim: of the tokens, and of the last two convolutions; each pair before has half as many channels.
    """

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        num_halvings = patch_size.bit_length() - 1
        if num_halvings < 1 or patch_size != 1 << num_halvings:
            raise ValueError(f"stem=convolutions halves the sides: patch_size={patch_size} is no power of 2.")
        self.patch_size, self.in_channels = patch_size, in_channels
        widths = [in_channels, *[max(embed_dim >> (num_halvings - 1 - i), 8) for i in range(num_halvings)]]
        layers: list[nn.Conv2d] = []
        for width, following in itertools.pairwise(widths):
            layers.append(nn.Conv2d(width, following, 3, stride=2, padding=1))
            layers.append(nn.Conv2d(following, following, 3, padding=1))
        self.convolutions = nn.ModuleList(layers)
        self.norms = nn.ModuleList(LayerNorm(layer.out_channels, eps=1e-6) for layer in layers)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """Groups of crops [B_g, C, H_g, W_g] to patch tokens [B_g, N_g, D], row-major.

        Args:
            masks: bool [B_g, N_g], or None: patches whose pixels no token sees, but 0, the mean of normalised ones.
        """
        pairs = zip(crops, masks, strict=True)
        return [self.tokens(group if mask is None else self._hidden(group, mask)) for group, mask in pairs]

    def _hidden(self, crops: Tensor, mask: Tensor) -> Tensor:
        p = self.patch_size
        pixels = mask.unflatten(1, patch_grid(crops, self.in_channels, p))
        return crops.masked_fill(pixels.repeat_interleave(p, dim=1).repeat_interleave(p, dim=2)[:, None], 0)

    def tokens(self, crops: Tensor) -> Tensor:
        """Crops [B, C, H, W] of sides that the patch divides to patch tokens [B, N, D], row-major."""
        x = crops.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            # Channels lie last, so that the norm reads rows and the permutation copies nothing.
            x = F.gelu(norm(convolution(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.proj(x.permute(0, 2, 3, 1)).flatten(1, 2)

    def places(self) -> list[int]:
        """Positions in a patch at which each convolution answers."""
        return [(self.patch_size >> (i // 2 + 1)) ** 2 for i in range(len(self.convolutions))]

    def products(self) -> int:
        """Multiply-adds for a patch."""
        weights = [weight.numel() for weight in self.convolutions.parameters() if weight.ndim == 4]
        return sum(map(operator.mul, weights, self.places())) + self.proj.weight.numel()

    def initials(self) -> dict[str, Initial]:
        """Convolutions uniform within 1 / sqrt(fan in), as the patch embedding; linear layer and norms as in blocks."""
        found: dict[str, Initial] = {}
        for i, convolution in enumerate(self.convolutions):
            assert isinstance(convolution, nn.Conv2d)
            bound = Initial("uniform", 1 / math.sqrt(9 * convolution.in_channels))
            found |= {f"convolutions.{i}.weight": bound, f"convolutions.{i}.bias": bound}
            found |= prefixed(f"norms.{i}", NORM)
        return found


def build_stem(stem: str, patch_size: int, in_channels: int, embed_dim: int) -> PatchEmbed | ConvolutionalStem:
    """What makes tokens of pixels; `stem` is one of STEMS."""
    kind = {"patches": PatchEmbed, "convolutions": ConvolutionalStem}[stem]
    return kind(patch_size, in_channels, embed_dim)
