"""Multi-head self-attention over a concatenation of crops of several sizes, with exchangeable kernels.

The linear layers see one matrix of all tokens. Only the attention itself must keep images apart: one call for each crop
size ("sdpa"), or one for all in packed form ("varlen", "xformers").
"""

import importlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers.rope import rotate

BACKENDS = ("sdpa", "varlen", "xformers")


@dataclass(frozen=True)
class Layout:
    """How the rows of a token matrix [T, D] divide into images; made once per forward, shared by all blocks."""

    groups: tuple[tuple[int, int], ...]
    """(images, tokens of each) for every group of equal crops, in row order"""
    boundaries: Tensor | None = None
    """first row of every image, and T; int32 [images + 1]; packed CUDA attention only"""
    bias: Any = None
    """block-diagonal mask: bool [T, T] for packed attention on a CPU, xFormers' own for xFormers"""

    @property
    def rows(self) -> list[int]:
        return [images * tokens for images, tokens in self.groups]

    @property
    def longest(self) -> int:
        return max(tokens for _, tokens in self.groups)


def check_backend(name: str) -> None:
    """Raises ValueError: an unknown backend, or xFormers where it is not installed."""
    if name not in BACKENDS:
        raise ValueError(f"attention={name!r}; known: {', '.join(BACKENDS)}.")
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ValueError("attention=xformers, but xFormers is not installed; use attention=sdpa or varlen.")


def make_layout(groups: Sequence[tuple[int, int]], backend: str, device: torch.device) -> Layout:
    """The layout with what its backend needs. Raises ValueError: xFormers on a device without its kernels."""
    groups = tuple(groups)
    if backend == "sdpa":
        return Layout(groups)
    lengths = [tokens for images, tokens in groups for _ in range(images)]
    if backend == "xformers":
        if device.type != "cuda":
            raise ValueError(
                f"attention=xformers has no kernels for {device.type!r} tensors, only for CUDA; use attention=sdpa."
            )
        fmha = importlib.import_module("xformers.ops.fmha")
        return Layout(groups, bias=fmha.BlockDiagonalMask.from_seqlens(lengths))
    if device.type == "cuda":
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return Layout(groups, boundaries=starts.to(device, non_blocking=True))
    image = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    return Layout(groups, bias=image[:, None] == image[None, :])


class Attention(nn.Module):
    """Self-attention with parameters `qkv` and `proj`.

    `mask_key_bias` keeps the key third of the bias out of the sum: it cannot change a softmax over keys, and so would
    only drift (LinearKMaskedBias of DINOv3).
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, mask_key_bias: bool, backend: str) -> None:
        super().__init__()
        check_backend(backend)
        self.num_heads = num_heads
        self.mask_key_bias = mask_key_bias and qkv_bias
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, tables: Sequence[Tensor | None]) -> Tensor:
        """Token matrix [T, D] to [T, D]; `tables` holds the RoPE table [2, N_g, d] of each group, or None."""
        qkv = self.project(x).split(layout.rows)
        heads = [self.heads(rows, *group, table) for rows, group, table in zip(qkv, layout.groups, tables, strict=True)]
        attended = attend_groups(heads) if self.backend == "sdpa" else attend_packed(heads, layout, self.backend)
        return self.proj(attended)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values [T, 3 D]."""
        if not self.mask_key_bias:
            return self.qkv(x)
        q, k, v = self.qkv.bias.chunk(3)
        return F.linear(x, self.qkv.weight, torch.cat([q, torch.zeros_like(k), v]))

    def heads(self, qkv: Tensor, images: int, tokens: int, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """One group's rows [images * tokens, 3 D] to rotated q, k and v, each [B, H, N, d]."""
        qkv = qkv.view(images, tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return (q, k, v) if table is None else (rotate(q, table), rotate(k, table), v)


def attend_groups(heads: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """One call for each group of equal crops; q, k, v [B, H, N, d] to the token matrix [T, H d]."""
    outputs = [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1) for q, k, v in heads]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend_packed(heads: Sequence[tuple[Tensor, Tensor, Tensor]], layout: Layout, backend: str) -> Tensor:
    """One call for all images as one sequence; each sees its own tokens only. Result [T, H d]."""
    q, k, v = (
        torch.cat([x.transpose(1, 2).flatten(0, 1) for x in part]) for part in zip(*heads, strict=True)
    )  # [T, H, d]
    if backend == "xformers":
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
        return attention(q[None], k[None], v[None], attn_bias=layout.bias)[0].flatten(1)
    if layout.boundaries is not None:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, layout.boundaries, layout.boundaries, layout.longest, layout.longest)
        assert isinstance(out, Tensor)
        return out.flatten(1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.bias)[0].transpose(0, 1).flatten(1)
