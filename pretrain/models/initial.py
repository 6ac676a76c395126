"""First values of parameters: drawn in blocks of rows from (seed, name, block), so that any rows can be drawn alone.

A rank of a sharded network draws the rows that it holds and gets what one process draws, whatever the number of ranks.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

_BLOCK_ELEMENTS = 1 << 18
"""least elements of a block; changing it changes every first value"""


@dataclass(frozen=True)
class Initial:
    """A distribution: normal with deviation `scale`, uniform in (-scale, scale), or the constant `scale`.

    The released code truncates its normal distributions at -2 and 2, a hundred deviations of 0.02: nothing is cut.
    """

    kind: Literal["normal", "uniform", "constant"]
    scale: float


LINEAR = {"weight": Initial("normal", 0.02), "bias": Initial("constant", 0.0)}
NORM = {"weight": Initial("constant", 1.0), "bias": Initial("constant", 0.0)}


@torch.no_grad()
def fill_rows(rows: Tensor, initial: Initial, shape: tuple[int, ...], start: int, seed: int, name: str) -> None:
    """Set the rows [R, ...] of a parameter, from row `start` on, to their first values.

    Drawn on the processor, so that a GPU starts from the same numbers.

    Args:
        rows: on any device; none of them, or all, too.
        shape: of the whole parameter.
        name: of the parameter in its network; two of one name and shape start equal.
    """
    if not rows.numel():
        return
    if initial.kind == "constant":
        rows.fill_(initial.scale)
        return
    in_block = max(1, _BLOCK_ELEMENTS // math.prod(shape[1:]))
    stop = start + len(rows)
    for block in range(start // in_block, -(-stop // in_block)):
        first = block * in_block
        drawn = torch.empty(min(in_block, shape[0] - first), *shape[1:], device="cpu")
        digest = hashlib.sha256(f"{seed} {name} {block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if initial.kind == "normal":
            drawn.normal_(0.0, initial.scale, generator=generator)
        else:
            drawn.uniform_(-initial.scale, initial.scale, generator=generator)
        begin, end = max(first, start), min(first + in_block, stop)
        rows[begin - start : end - start].copy_(drawn[begin - first : end - first])


def initialise(module: nn.Module, initials: Mapping[str, Initial], generator: torch.Generator | None = None) -> None:
    """Set every parameter of a whole module anew, from a seed that the generator draws. On `meta` nothing happens."""
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            fill_rows(parameter.detach(), initials[name], tuple(parameter.shape), 0, seed, name)


def prefixed(prefix: str, initials: Mapping[str, Initial]) -> dict[str, Initial]:
    """The first values of a submodule's parameters by their names in the module."""
    return {f"{prefix}.{name}" if prefix else name: initial for name, initial in initials.items()}
