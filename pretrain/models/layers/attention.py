"""Multi-head self-attention over a concatenation of crops of several sizes, with exchangeable kernels.

The linear layers see one matrix of all tokens. Only the attention itself must keep images apart: one call for each crop
size ("sdpa", "auto"), or one for all in packed form ("varlen", "xformers").
"""

import importlib
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import fp8
from pretrain.models.layers.rope import rotate, rotate_

BACKENDS = ("sdpa", "auto", "varlen", "xformers")
SHORT = 64
"""Tokens up to which "auto" takes PyTorch's memory-efficient kernel on a GPU. Its tiles are 64 queries by 64 keys at
head widths up to 64, where those of flash attention are 128 by 128: 41 tokens (96 px) fill 41% of the one and 10% of
the other, 201 tokens (224 px) 62% of either. Reasoned, not measured: section D of `benchmarks.gpu` can tell."""


QUERIES_AT_ONCE = 256
"""whose weights for all keys stay in a processor's cache"""


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
    if backend in ("sdpa", "auto"):
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

    `mask_key_bias` keeps the key third of the bias out of the sum (LinearKMaskedBias of DINOv3): where no rotary
    position turns it, it cannot change a softmax over keys, and would only drift.
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
        """Token matrix [T, D] to [T, D]; `tables` holds the RoPE table [2, N_g, d/2] of each group, or None."""
        return self.proj(self.mix(x, layout, tables))

    def mix(self, x: Tensor, layout: Layout, tables: Sequence[Tensor | None]) -> Tensor:
        """All of `forward` but the projection at its end."""
        qkv = self.project(x)
        if self.backend in ("sdpa", "auto"):
            return attend_groups(split_heads(qkv, layout, self.num_heads, tables), choose=self.backend == "auto")
        return attend_packed(views_of_heads(qkv, layout, self.num_heads, tables), layout, self.backend)

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values [T, 3 D]."""
        if not self.mask_key_bias:
            return self.qkv(x)
        q, k, v = self.qkv.bias.chunk(3)
        return fp8.linear(self.qkv, x, self.qkv.weight, torch.cat([q, torch.zeros_like(k), v]))


Heads = tuple[Tensor, Tensor, Tensor]
"""q, k, v of one group of equal crops, each [B, H, N, d]; q and k rotated"""


def split_heads(qkv: Tensor, layout: Layout, num_heads: int, tables: Sequence[Tensor | None]) -> list[Heads]:
    """Rows [T, 3 D] to the heads of every group; contiguous, but where views are as good."""
    # The compiler fuses the plain form itself; the fused kernel takes views that nothing has rotated as they are.
    is_rotated = any(table is not None for table in tables)
    if torch.compiler.is_compiling() or (is_in_use() and qkv.dtype == torch.float32 and not is_rotated):
        return views_of_heads(qkv, layout, num_heads, tables)
    flat = _SplitHeads.apply(qkv, layout, num_heads, *tables)
    return [flat[i : i + 3] for i in range(0, len(flat), 3)]


def views_of_heads(qkv: Tensor, layout: Layout, num_heads: int, tables: Sequence[Tensor | None]) -> list[Heads]:
    """The same by plain operations, as views where nothing is rotated."""
    heads = []
    for rows, (images, tokens), table in zip(qkv.split(layout.rows), layout.groups, tables, strict=True):
        q, k, v = rows.view(images, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        heads.append((q, k, v) if table is None else (rotate(q, table), rotate(k, table), v))
    return heads


class _SplitHeads(torch.autograd.Function):
    """`views_of_heads` with one copy in each direction.

    Left to autograd, the gradients of splitting, permuting and rotating each copy all queries, keys and values: a
    tenth of a bfloat16 step on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: Layout, num_heads: int, *tables: Tensor | None) -> tuple[Tensor, ...]:
        ctx.layout, ctx.num_heads, ctx.shape, ctx.tables = layout, num_heads, qkv.shape, tables
        outputs: list[Tensor] = []
        for rows, (images, tokens), table in zip(qkv.split(layout.rows), layout.groups, tables, strict=True):
            heads = rows.view(images, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            q, k, v = (part.clone(memory_format=torch.contiguous_format) for part in heads)
            if table is not None:
                rotate_(q, table)
                rotate_(k, table)
            outputs += [q, k, v]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        result = grads[0].new_empty(ctx.shape)
        parts = result.split(ctx.layout.rows)
        for i, (rows, (images, tokens), table) in enumerate(zip(parts, ctx.layout.groups, ctx.tables, strict=True)):
            heads = rows.view(images, tokens, 3, ctx.num_heads, -1).permute(2, 0, 3, 1, 4)
            for j in range(3):
                heads[j].copy_(grads[3 * i + j])
            if table is not None:
                rotate_(heads[:2], table, inverse=True)
        return result, None, None, *[None] * len(ctx.tables)


def is_in_use() -> bool:
    """Whether there will be no backward: in inference mode, which a compiled graph cannot ask for."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def attend(q: Tensor, k: Tensor, v: Tensor, choose: bool = False) -> Tensor:
    """Attention within each image, [B, H, N, d]; `choose`: by length on GPUs too, in place of PyTorch's own choice.

    PyTorch's fused kernel for CPUs does not use the bfloat16 units: for crops of 224 and 96 px the plain products are
    3.5 and 10 times as fast, at the price of holding the N x N weights, so long images keep the fused kernel. Where
    nothing is kept for a backward, the products of some queries at a time are faster than either at any length.
    """
    if choose and takes_short_kernel(q):
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, needs_gradient)[0]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    scaled = q * q.shape[-1] ** -0.5
    if is_in_use():
        return torch.cat([_plain(some, k, v) for some in scaled.split(QUERIES_AT_ONCE, dim=-2)], dim=-2)
    if q.shape[-2] > 1024:
        return F.scaled_dot_product_attention(q, k, v)
    return _plain(scaled, k, v)


def _plain(scaled: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scaled @ k.transpose(-1, -2), dim=-1).to(v.dtype) @ v


def takes_short_kernel(q: Tensor) -> bool:
    """Whether "auto" takes the memory-efficient kernel for queries [B, H, N, d]; float32 has it from PyTorch anyway."""
    is_short = q.shape[-2] <= SHORT and q.shape[-1] <= 64 and q.shape[-1] % 8 == 0
    return is_short and q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)


def attend_groups(heads: Sequence[Heads], choose: bool = False) -> Tensor:
    """One call for each group of equal crops; the token matrix [T, H d]."""
    outputs = [attend(*group, choose=choose).transpose(1, 2).flatten(2).flatten(0, 1) for group in heads]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def attend_packed(heads: Sequence[Heads], layout: Layout, backend: str) -> Tensor:
    """One call for all images as one sequence; each sees its own tokens only. Result [T, H d]."""
    q, k, v = (
        torch.cat([x.transpose(1, 2).flatten(0, 1) for x in part]) for part in zip(*heads, strict=True)
    )  # [T, H, d]
    if backend == "xformers":
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
        return attention(q[None], k[None], v[None], attn_bias=layout.bias)[0].flatten(1)
    if layout.boundaries is not None:
        if q.dtype == torch.float32:
            raise ValueError("attention=varlen has no float32 kernel on CUDA; train in bfloat16 or use attention=sdpa.")
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, layout.boundaries, layout.boundaries, layout.longest, layout.longest)
        assert isinstance(out, Tensor)
        return out.flatten(1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.bias)[0].transpose(0, 1).flatten(1)
