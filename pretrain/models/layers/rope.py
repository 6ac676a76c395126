"""Axial rotary position embedding of patches, with the training noise of DINOv3 (arXiv:2508.10104, Sec. 3.2)."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

NORMALISATIONS = ("separate", "min", "max")


@dataclass(frozen=True)
class Rope:
    """How patch coordinates become angles.

    Half of a head's angles follow the row, half the column. Coordinates are patch centres in [-1, 1]; `normalise` says
    what spans that range: each axis its own length ("separate"), or both the shorter ("min") or the longer ("max").
    Periods are `base ** (4 i / head_dim)`, or log-spaced between `min_period` and `max_period` where those are given.
    """

    head_dim: int
    base: float = 100.0
    min_period: float | None = None
    max_period: float | None = None
    normalise: str = "separate"

    def __post_init__(self) -> None:
        if self.head_dim % 4:
            raise ValueError(f"RoPE over two axes needs a head width divisible by 4, got {self.head_dim}.")
        if self.normalise not in NORMALISATIONS:
            raise ValueError(f"rope_normalise={self.normalise!r}; known: {', '.join(NORMALISATIONS)}.")
        if (self.min_period is None) != (self.max_period is None):
            raise ValueError("rope_min_period and rope_max_period go together: give both or neither.")


def periods(rope: Rope, device: torch.device | str = "cpu") -> Tensor:
    """Periods in units of half an image side, float32 [head_dim / 4]."""
    count = rope.head_dim // 4
    exponents = torch.arange(count, device=device, dtype=torch.float32)
    if rope.min_period is not None and rope.max_period is not None:
        span = rope.max_period / rope.min_period
        return rope.max_period * span ** (exponents / max(count - 1, 1) - 1)
    return rope.base ** (exponents / count)


def coordinates(h: int, w: int, normalise: str, device: torch.device) -> Tensor:
    """Centres of the patches (row, column) in row-major order, float32 [h * w, 2]."""
    spans = {"separate": (h, w), "min": (min(h, w),) * 2, "max": (max(h, w),) * 2}[normalise]
    rows, columns = (
        (torch.arange(n, device=device, dtype=torch.float32) + 0.5) / span * 2 - 1
        for n, span in zip((h, w), spans, strict=True)
    )
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def tables_from(coords: Tensor, rope: Rope, num_prefix_tokens: int) -> Tensor:
    """Cosine and sine for coordinates [..., N, 2], float32 [..., 2, num_prefix_tokens + N, head_dim / 2].

    Prefix rows hold angle 0, so that CLS and registers pass through `rotate` unchanged, to the bit.
    """
    angles = 2 * math.pi * coords[..., None] / periods(rope, coords.device)  # [..., N, 2, head_dim / 4]
    angles = torch.nn.functional.pad(angles.flatten(-2), (0, 0, num_prefix_tokens, 0))
    return torch.stack([angles.cos(), angles.sin()], dim=-3)


@lru_cache(maxsize=64)
def _cached_tables(rope: Rope, h: int, w: int, num_prefix_tokens: int, device: torch.device) -> Tensor:
    # A table first made inside inference mode must serve a later backward pass too.
    with torch.inference_mode(False), torch.no_grad():
        return tables_from(coordinates(h, w, rope.normalise, device), rope, num_prefix_tokens)


def tables(rope: Rope, grid: tuple[int, int], num_prefix_tokens: int, device: torch.device) -> Tensor:
    """The noiseless table of a grid, [2, num_prefix_tokens + h * w, head_dim / 2]; made once per grid and device."""
    # Under a tracer or in fake mode the result is no tensor to keep, nor is a kept one of use.
    traced = torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor
    make = _cached_tables.__wrapped__ if traced else _cached_tables
    return make(rope, *grid, num_prefix_tokens, device)


@dataclass(frozen=True)
class RopeNoise:
    """Training noise on the coordinates: shift is added, jitter and rescale multiply. None switches one off."""

    shift: float | None = None
    """half-width of a uniform shift per axis, in half image sides, above 0"""
    jitter: float | None = None
    """bound of a log-uniform factor per axis, at least 1"""
    rescale: float | None = None
    """bound of a log-uniform factor common to both axes, at least 1"""

    def __post_init__(self) -> None:
        if self.shift is not None and self.shift <= 0:
            raise ValueError(f"rope_shift={self.shift}: a half-width above 0, or none.")
        for name in ("jitter", "rescale"):
            bound = getattr(self, name)
            if bound is not None and bound < 1:
                raise ValueError(f"rope_{name}={bound}: factors are drawn from 1/r to r, so r must be at least 1.")

    @property
    def on(self) -> bool:
        return any(value is not None for value in (self.shift, self.jitter, self.rescale))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Factors and offsets [count, 1, 2] on the CPU: noisy coordinates are `coords * factor + offset`."""

        def uniform(bound: float | None, axes: int) -> Tensor:
            return (torch.rand(count, 1, axes, generator=generator) * 2 - 1) * (bound or 0.0)

        shift = uniform(self.shift, 2)
        log_factor = uniform(math.log(self.jitter or 1.0), 2) + uniform(math.log(self.rescale or 1.0), 1)
        factor = log_factor.exp()
        return factor, shift * factor  # the published order: shift first


def noisy_tables(
    rope: Rope,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    device: torch.device,
    noise: RopeNoise,
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """`count` tables with noise of their own, [count, 2, num_prefix_tokens + h * w, head_dim / 2]."""
    factor, offset = (x.to(device, non_blocking=True) for x in noise.draw(count, generator))
    coords = coordinates(*grid, rope.normalise, device) * factor + offset
    return tables_from(coords, rope, num_prefix_tokens)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of the last axis by its token's angles.

    Args:
        x: queries or keys [..., N, d].
        table: [2, N, d/2] from `tables`, float32: products are made in float32 and rounded once to x's precision.
    """
    cos, sin = table.unbind(0)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotate_(x: Tensor, table: Tensor, *, inverse: bool = False) -> None:
    """`rotate` in place and outside autograd, in fewer passes over memory; `inverse` turns by minus the angles."""
    cos, sin = table.unbind(0)
    sign = -1 if inverse else 1
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    turned = [
        torch.addcmul(first * cos, second, sin, value=-sign),
        torch.addcmul(second * cos, first, sin, value=sign),
    ]
    for half, value in zip(x.chunk(2, dim=-1), turned, strict=True):
        half.copy_(value)
