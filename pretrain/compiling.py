"""torch.compile as training uses it: a block compiled whole, for each shape that there is."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
BACKEND: str | Callable[..., Any] = "inductor"
# Of one function in one process: student, teacher and Gram teacher, each at every crop size of every phase, and as many
# again for what guards are about besides. The default of 8 is less than DINOv3's high-resolution phase alone has, and
# what comes after the limit runs uncompiled.
MOST_VARIANTS = 128


def compiled(function: Callable[P, T], any_rows: bool = False) -> Callable[P, T]:
    """The function compiled, anew for every set of shapes: phases and crop sizes are few and known.

    Left to itself the compiler takes the second size of crops for one of many and makes code for any, which is slower
    and cannot unroll. Under DDP it would split a block where a bucket of gradients ends, to let their reduction begin
    within the block: three graphs instead of one, for buckets that are as large as half a block.

    Args:
        any_rows: one form for every size that the caller leaves open (`open_rows`), as that of masked patches.
    """
    settings = torch._dynamo.config  # pyright: ignore[reportPrivateImportUsage]
    settings.optimize_ddp = False
    settings.recompile_limit = max(settings.recompile_limit, MOST_VARIANTS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 8 * MOST_VARIANTS)
    return torch.compile(function, dynamic=None if any_rows else False, backend=BACKEND)


def open_rows(x: torch.Tensor, dim: int) -> None:
    """Leave the size of one dimension of an argument open to what is compiled next with it, and no other."""
    torch._dynamo.mark_static(x, [other for other in range(x.ndim) if other != dim])
    torch._dynamo.maybe_mark_dynamic(x, dim)
