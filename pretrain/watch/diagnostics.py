"""What says whether a student-teacher run learns or collapses. Functions of tensors that never wait for the device."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 256  # targets looked at in one step: enough for the means, and 64 MiB at 65,536 prototypes


def mean_entropy(targets: Tensor) -> Tensor:
    """Mean entropy of the rows of q [N, K], in nats [] : 0 is certain, ln K is uniform (says nothing)."""
    return torch.special.entr(targets).sum(dim=-1).mean()


def prototype_use(targets: Tensor) -> tuple[Tensor, Tensor]:
    """How many prototypes a batch uses.

    Args:
        targets: q [N, K], rows sum to 1.

    Returns:
        share: different prototypes that are the argmax of some row, over the most that could be, min(N, K);
            1 when no two rows agree, 1/min(N, K) when all do.
        perplexity: exp of the entropy of the mean assignment, from 1 (all rows on one prototype) to K.
    """
    rows, prototypes = targets.shape
    used = torch.zeros(prototypes, device=targets.device).index_fill_(0, targets.argmax(dim=1), 1.0)
    return used.sum() / min(rows, prototypes), mean_entropy(targets.mean(dim=0, keepdim=True)).exp()


def target_diagnostics(
    head: str, rows: Callable[[int, int], Tensor], num_rows: int, cross_entropy: Tensor | None = None
) -> dict[str, Tensor]:
    """Figures of one head's teacher targets, from its first few hundred rows.

    Args:
        head: `dino` or `ibot`, for the names.
        rows: (start, stop) -> q [n, K] float32 (losses.prototypes.Targets.rows).
        num_rows: how many there are on this rank.
        cross_entropy: mean CE(q, student) in nats [], where it is known; gives the divergence, CE - entropy.

    Returns:
        teacher_entropy/, prototype_use/, prototype_perplexity/ and kl/ of the head; zeros when there are no rows.
    """
    with torch.no_grad():
        targets = rows(0, min(num_rows, _ROWS))
        if not num_rows:
            entropy = share = perplexity = targets.new_zeros(())
        else:
            entropy = mean_entropy(targets)
            share, perplexity = prototype_use(targets)
        figures = {
            f"teacher_entropy/{head}": entropy,
            f"prototype_use/{head}": share,
            f"prototype_perplexity/{head}": perplexity,
        }
        if cross_entropy is not None:
            figures[f"kl/{head}"] = cross_entropy.detach() - entropy
    return figures


def feature_std(features: Tensor) -> Tensor:
    """Spread of unit features [B, D] over the batch, as a share of what an even spread has [].

    The standard deviation of each component of the normalised rows, averaged, times sqrt(D): 1 when directions are
    spread evenly over the sphere, 0 when every image gives the same feature. As in SimSiam, arXiv:2011.10566, fig. 2.
    Not defined for one row: 0.
    """
    with torch.no_grad():
        unit = F.normalize(features.detach().float(), dim=-1)
        return unit.std(dim=0, correction=0).mean() * math.sqrt(features.shape[-1])
