"""Linear layers whose products are made of 8-bit floats, scaled row by row as they come.

Forward and the gradient of the input: both operands in float8_e4m3fn, a scale for each row of one and each column of
the other, so that an outlier costs its own row only; results in bfloat16. The gradient of the weight, a sum over all
tokens of rows of unlike scale, stays a bfloat16 product: a third of a layer's work. Source of the format and of dynamic
scaling: FP8 formats for deep learning, arXiv:2209.05433.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_WIDTH, MULTIPLE = 1024, 16
"""of both sides of a matrix: below, scaling costs what the product saves; the units take multiples only"""
CAPABILITY = (8, 9)
"""of a GPU whose units multiply 8-bit floats"""
FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max


class Fp8Linear(nn.Linear):
    """`nn.Linear` in 8-bit products; made of one by `use_fp8`, parameters and names stay."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(self, input, self.weight, self.bias)


def use_fp8(module: nn.Module) -> int:
    """Turn every large enough linear layer inside into an `Fp8Linear`; how many there are."""
    found = [child for child in module.modules() if type(child) is nn.Linear and is_large(child)]
    for child in found:
        child.__class__ = Fp8Linear
    return len(found)


def is_large(layer: nn.Linear) -> bool:
    sides = (layer.in_features, layer.out_features)
    return min(sides) >= LEAST_WIDTH and not any(side % MULTIPLE for side in sides)


def check_device(device: torch.device) -> None:
    """Raises ValueError: a GPU without 8-bit units. A processor computes the same with floats, slowly."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise ValueError(
            f"model.fp8=true needs a GPU of compute capability 8.9 or above; this one has {found[0]}.{found[1]}: "
            "set model.fp8=false."
        )


def linear(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias as the layer multiplies, with another weight or bias than its own."""
    if not isinstance(layer, Fp8Linear):
        return F.linear(x, weight, bias)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.autocast(kind, enabled=False):
        y = _Fp8Product.apply(x.to(dtype), weight.to(dtype))
        assert isinstance(y, Tensor)
        return y if bias is None else y + bias.to(dtype)


class _Fp8Product(torch.autograd.Function):
    """[T, I] and [O, I] to [T, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return scaled_product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        return scaled_product(gradient, weight.T), gradient.T @ x


def scaled_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [N, K].T, both rounded to 8 bits in rows of their own scale; in the dtype of a."""
    a8, a_scale = rounded_rows(a)
    b8, b_scale = rounded_rows(b)
    if a.device.type == "cuda":
        out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            a8, b8.T, a_scale, b_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out.to(a.dtype)
    return ((a8.float() * a_scale) @ (b8.float() * b_scale).T).to(a.dtype)


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] as 8-bit floats, contiguous, and what each is to be multiplied with, float32 [N, 1]."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FLOAT8).contiguous(), scale
