"""KoLeo: spread the embeddings of a batch over the sphere, by the Kozachenko-Leonenko estimate of entropy."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo_loss(
    x: Tensor,
    group_size: int | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    """Minus the mean log distance of a row to its nearest other row, in nats, over this rank's rows.

    Rows are the CLS tokens of one crop per image: never put two crops of an image in one call, they would be each
    other's neighbours. Averaged over ranks, as gradients are, it is the loss over all rows.

    Args:
        x: [B, D]; any float dtype, computed in float32.
        group_size: neighbours are sought among so many consecutive rows: a divisor of B, or all that `gather` returns.
            None: among all rows there are.
        gather: returns the rows of the ranks that share a group, in their order, [ranks * B, D], with gradient: that of
            a rank's rows is the sum over ranks. None: neighbours are sought among this rank's rows.
        rank: of this process among those; used with `gather`.

    Raises ValueError for groups of fewer than two rows, or that do not divide the batch. Source: arXiv:1806.03198;
    weight 0.1 in DINOv2, arXiv:2304.07193; groups over ranks in DINOv3, arXiv:2508.10104.
    """
    num_rows = len(x)
    with torch.autocast(x.device.type, enabled=False):  # distances need float32
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        first = 0
        if group_size is not None and group_size <= num_rows:
            if group_size < 1 or num_rows % group_size:
                raise ValueError(
                    f"KoLeo: groups of {group_size} rows do not divide the {num_rows} images of a rank's micro-batch; "
                    "change loss.koleo_group_size or the batch size."
                )
            x = groups = x.unflatten(0, (-1, group_size))  # [groups, group_size, D]
        else:
            rows = x if gather is None else gather(x)
            if group_size not in (None, len(rows)):
                raise ValueError(f"KoLeo: a group of {group_size} rows, and {len(rows)} are there.")
            first = 0 if gather is None else rank * num_rows
            x, groups = x[None], rows[None]
        if groups.shape[1] < 2:
            raise ValueError(f"koleo_loss needs at least 2 rows to have a neighbour, got {groups.shape[1]}.")
        with torch.no_grad():
            similarity = x @ groups.mT  # [groups, rows of this rank, rows of the group]
            similarity.diagonal(first, 1, 2).fill_(-2)  # not itself
            nearest = similarity.argmax(dim=2)
        # As a product: where a row is the nearest of several, a GPU adds up the gradient of a gather in any order.
        is_nearest = nearest[..., None] == torch.arange(groups.shape[1], device=x.device)
        neighbours = is_nearest.to(x.dtype) @ groups
        return -torch.log((x - neighbours).norm(dim=-1) + eps).mean()
