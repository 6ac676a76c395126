"""Feed-forward layers, with the parameter names of each family."""

import torch.nn.functional as F
from torch import Tensor, nn

FFNS = ("mlp", "swiglu")


class Ffn(nn.Module):
    """A feed-forward layer in two parts, so that a factor on its output can go into the matrix of the last."""

    def hidden(self, x: Tensor) -> Tensor:
        """Tokens [T, D] to what the last matrix multiplies, [T, hidden]."""
        raise NotImplementedError

    @property
    def last(self) -> nn.Module:
        """The linear layer at the end, [T, hidden] to [T, D]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(x))


class Mlp(Ffn):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def hidden(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc1(x))

    @property
    def last(self) -> nn.Module:
        return self.fc2


class SwiGLU(Ffn):
    """silu(x W1) * (x W2), then W3; three matrices as DINOv3 stores them. Source: arXiv:2002.05202."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(self.w1(x)) * self.w2(x)

    @property
    def last(self) -> nn.Module:
        return self.w3


class FusedSwiGLU(Ffn):
    """The same function with W1 and W2 in one matrix, as DINOv2 stores them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def hidden(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return F.silu(gate) * value

    @property
    def last(self) -> nn.Module:
        return self.w3


def swiglu_hidden(dim: int, ratio: float, align: int) -> int:
    """Hidden width: two thirds of `ratio * dim`, rounded up to a multiple of `align`."""
    return -(-int(ratio * dim * 2 / 3) // align) * align


def build_ffn(kind: str, family: str, dim: int, ratio: float, align: int) -> Ffn:
    """Raises ValueError: an unknown kind."""
    if kind == "mlp":
        return Mlp(dim, int(dim * ratio))
    if kind == "swiglu":
        return (FusedSwiGLU if family == "dinov2" else SwiGLU)(dim, swiglu_hidden(dim, ratio, align))
    raise ValueError(f"ffn={kind!r}; known: {', '.join(FFNS)}.")
