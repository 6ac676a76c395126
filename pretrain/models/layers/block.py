"""One transformer block over a concatenated token matrix, with stochastic depth over the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.models.layers.attention import Attention, Layout
from pretrain.models.layers.ffn import Ffn
from pretrain.models.layers.norm import LayerNorm, LayerScale
from pretrain.models.layers.rows import Kept, add_rows, take_rows


class Block(nn.Module):
    """x + scale * attention(norm(x)), then x + scale * ffn(norm(x)); layer scale 0 means none."""

    def __init__(self, dim: int, attention: Attention, ffn: Ffn, *, norm_eps: float, layerscale: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.attn = attention
        self.ls1 = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=norm_eps)
        self.mlp = ffn
        self.ls2 = LayerScale(dim, layerscale) if layerscale else nn.Identity()

    def forward(
        self, x: Tensor, layout: Layout, tables: Sequence[Tensor | None], kept: tuple[Kept, Kept] | None = None
    ) -> Tensor:
        """Token matrix [T, D] to [T, D]; `kept` are the images for the attention and for the feed-forward branch."""
        if kept is None:
            x = x + self.attention_branch(x, layout, tables)
            return x + self.ffn_branch(x)
        first, second = kept
        rows, x = take_rows(x, first)
        x = add_rows(x, self.attention_branch(rows, first.layout, tables), first)
        rows, x = take_rows(x, second)
        return add_rows(x, self.ffn_branch(rows), second)

    def attention_branch(self, x: Tensor, layout: Layout, tables: Sequence[Tensor | None]) -> Tensor:
        if isinstance(self.ls1, LayerScale):
            return self.ls1.after(self.attn.proj, self.attn.mix(self.norm1(x), layout, tables))
        return self.attn(self.norm1(x), layout, tables)

    def ffn_branch(self, x: Tensor) -> Tensor:
        if isinstance(self.ls2, LayerScale):
            return self.ls2.after(self.mlp.last, self.mlp.hidden(self.norm2(x)))
        return self.mlp(self.norm2(x))


def num_kept(images: int, drop_path: float) -> int:
    """Images of a group that a branch runs on: at least one."""
    return max(int(images * (1 - drop_path)), 1)


def draw_kept(images: int, drop_path: float, draws: int, generator: torch.Generator) -> Tensor:
    """Independent subsets of a group without repetition, in order, int64 [draws, kept] on the CPU.

    Source: DINOv2, arXiv:2304.07193, Sec. 4: dropped images are skipped, which saves their share of the work.
    """
    order = torch.rand(draws, images, generator=generator).argsort(dim=1)
    return order[:, : num_kept(images, drop_path)].sort(dim=1).values
