"""Layer norm and LayerScale, with the released parameter names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.initial import Initial
from pretrain.models.layers import fp8
from pretrain.models.layers.fp8 import Fp8Linear


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that takes its precision from the input.

    Under FSDP the parameters arrive in bfloat16 while the residual stream stays float32, a mix that the stock kernel
    refuses.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch, small at first. Source: CaiT, arXiv:2103.17239."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

    def after(self, linear: nn.Module, x: Tensor) -> Tensor:
        """`self(linear(x))`, with the factor folded into the matrix: no pass over the tokens, forward or backward."""
        if type(linear) is not nn.Linear and not isinstance(linear, Fp8Linear):
            return self(linear(x))  # a replacement (LoRA) has a forward of its own
        if linear.bias is None:
            return self(linear(x))
        return fp8.linear(linear, x, self.gamma[:, None] * linear.weight, self.gamma * linear.bias)

    def initials(self) -> dict[str, Initial]:
        return {"gamma": Initial("constant", self.initial)}
