"""The rows that a residual branch runs on: taken out of the token matrix, and added back.

Rows are unique, so each of the two is one read and one write of every row, in both directions, and no order of adding
matters. Left to autograd, adding keeps the scaled branch in float32 for a backward that only needs its rows, and taking
fills a matrix of zeros that is then added to the gradient.

Compiled, every result is written row by row from where its parts lie (`Kept.place`), which fuses with the norm before
and the scale after it; by themselves, operators are fewer passes when rows are added to a copy.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.models.layers.attention import Layout


@dataclass(frozen=True)
class Kept:
    """The images that a residual branch runs on in this step."""

    rows: Tensor
    """their rows in the token matrix, unique, int64 [T']"""
    place: Tensor
    """where each row of the token matrix is among them, or -1, int64 [T]"""
    scale: Tensor
    """images in the group over images kept, for each row, float32 [T', 1]: keeps the expectation of the branch"""
    layout: Layout
    """of the T' rows"""


def take_rows(x: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
    """The kept rows [T', D] of a token matrix [T, D]; and the matrix itself, which is to be used in its place."""
    return _Take.apply(x, kept.rows, kept.place)  # type: ignore[return-value]  # apply is untyped


def add_rows(x: Tensor, branch: Tensor, kept: Kept) -> Tensor:
    """x [T, D] plus the scaled branch [T', D] at its rows."""
    return _Add.apply(x, branch, kept.rows, kept.place, kept.scale)  # type: ignore[return-value]  # as above


def _added(x: Tensor, some: Tensor, rows: Tensor, place: Tensor) -> Tensor:
    """x [T, D] plus some [T', D] at these rows."""
    if not torch.compiler.is_compiling():
        return x.index_add(0, rows, some.to(x.dtype))
    spread = some.index_select(0, place.clamp(min=0))
    return x + torch.where(place[:, None] >= 0, spread, 0).to(x.dtype)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, place)
        return x.index_select(0, rows), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, of_taken: Tensor, of_x: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _added(of_x, of_taken, *ctx.saved_tensors), None, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, rows: Tensor, place: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(rows, scale)
        ctx.dtype = branch.dtype
        return _added(x, branch * scale, rows, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, scale = ctx.saved_tensors
        return gradient, (gradient.index_select(0, rows) * scale).to(ctx.dtype), None, None, None
