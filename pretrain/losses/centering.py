"""What keeps teacher assignments from collapsing onto few prototypes: Sinkhorn-Knopp, or softmax with a moving centre.

Sources: Sinkhorn-Knopp as in SwAV, arXiv:2006.09882, 3 iterations in DINOv2, arXiv:2304.07193; the centre of
DINO, arXiv:2104.14294.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.losses.prototypes import LOG2_E, Targets, block_bytes, blocks, is_streamed, whole_pass

# Natural logarithms that float64 can exponentiate, with room for a sum over ranks.
LARGEST_LOG = 690.0


def nothing_to_reduce(tensor: Tensor) -> Tensor:
    """The reduction over ranks where there is one rank."""
    return tensor


@torch.no_grad()
def sinkhorn_knopp(
    logits: Sequence[Tensor],
    temperature: float,
    num_iterations: int = 3,
    sum_over_ranks: Callable[[Tensor], Tensor] = nothing_to_reduce,
    compiled: bool = False,
) -> list[Targets]:
    """Assignments in which, over all samples of all ranks, every prototype gets an (almost) equal share.

    Alternates between scaling prototypes and samples of exp(logits / temperature) to equal sums, samples last. Only
    the two scale vectors are kept, as logarithms: the counts of samples and prototypes and the overall sum of the usual
    formulation cancel. Finite for any finite logits (exact while |logits / temperature| is below 690 for the largest
    logit of every prototype).

    Args:
        logits: one [T_i, K_i] per head, this rank's samples (T_i may be 0 here, and differ between ranks).
        temperature: of the teacher, > 0.
        num_iterations: >= 1.
        sum_over_ranks: returns the sum over ranks of a float64 [sum of K_i]; called once an iteration by every rank.
        compiled: code may be compiled; with the device and K it decides whether logits are streamed (`is_streamed`).

    Memory beyond the logits and vectors: a few BLOCK_BYTES. Passes over the logits: num_iterations + 2; whole, 2
    more of them in each iteration.
    """
    if num_iterations < 1:
        raise ValueError(f"Sinkhorn-Knopp needs num_iterations of at least 1, got {num_iterations}.")
    with torch.autocast(logits[0].device.type, enabled=False):
        sizes = [head.shape[1] for head in logits]
        # The first scaling of prototypes, from the logits alone.
        passes = [_passes(head, compiled) for head in logits]
        log_sums = [one.log_sums(head, temperature) for one, head in zip(passes, logits, strict=True)]
        sums = [log_sum.double().clamp(max=LARGEST_LOG).exp() for log_sum in log_sums]
        log_prototype = [-_log(total) for total in sum_over_ranks(torch.cat(sums)).split(sizes)]
        for _ in range(num_iterations - 1):
            # Scaling the samples and summing the result over prototypes is one pass. No share is lost to underflow:
            # with prototypes scaled a sample sums to at most K, so scaling samples leaves a prototype at least 1 / K.
            every = zip(passes, logits, log_prototype, strict=True)
            shares = [one.shares(head, temperature, log) for one, head, log in every]
            shares = sum_over_ranks(torch.cat(shares)).split(sizes)
            log_prototype = [log - _log(share) for log, share in zip(log_prototype, shares, strict=True)]
        return [_normalized(head, temperature, log, compiled) for head, log in zip(logits, log_prototype, strict=True)]


class SoftmaxCentering(nn.Module):
    """Assignments softmax((logits - center) / temperature); the centre is a moving average of teacher logits.

    The centre that `forward` uses holds the batches before this one: call `update` after it. The batch mean is over all
    samples of all ranks (DINOv2 averages the ranks' means, which weighs a masked patch by its rank's number of them and
    has no answer for a rank without; the two agree for equal counts).
    """

    center: Tensor
    # [K] float32

    def __init__(self, num_prototypes: int, momentum: float = 0.9, compiled: bool = False) -> None:
        super().__init__()
        self.momentum, self.compiled = momentum, compiled
        self.register_buffer("center", torch.zeros(num_prototypes))

    def forward(self, logits: Tensor, temperature: float) -> Targets:
        """logits [T, K] -> Targets of T rows. Temperature of the teacher, > 0."""
        with torch.no_grad():
            return _normalized(logits, temperature, -self.center / temperature, self.compiled)

    @torch.no_grad()
    def update(self, logits: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] = nothing_to_reduce) -> None:
        """Move the centre towards the mean of logits [T, K] over all ranks; called once by every rank (T may be 0)."""
        count = logits.new_full((1,), len(logits), dtype=torch.float64)
        total = sum_over_ranks(torch.cat([logits.sum(dim=0, dtype=_accumulator(logits)).double(), count]))
        mean = (total[:-1] / total[-1].clamp(min=1)).to(self.center.dtype)
        weight = torch.where(total[-1] > 0, 1 - self.momentum, 0.0).to(self.center.dtype)
        self.center.lerp_(mean, weight)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _log(positive: Tensor) -> Tensor:
    """Logarithm of float64 sums; those that underflowed count as the smallest, not as nothing."""
    return positive.clamp(min=torch.finfo(torch.float64).tiny).log()


class _Passes(NamedTuple):
    """Passes over the logits [T, K] of a head at a temperature, in one of two forms."""

    log_sums: Callable[[Tensor, float], Tensor]
    """[K]: logsumexp over rows of logits / temperature; -inf where there are none"""
    shares: Callable[[Tensor, float, Tensor], Tensor]
    """[K] float64: what each prototype gets when every sample, scaled by prototype, is made to sum to one"""
    log_samples: Callable[[Tensor, float, Tensor], Tensor]
    """[T]: what makes every sample, scaled by prototype, sum to one"""


def _passes(logits: Tensor, compiled: bool) -> _Passes:
    is_whole = len(logits) and not is_streamed(logits.device, logits.shape[1], compiled)
    return _WHOLE if is_whole else _STREAMED


def _normalized(logits: Tensor, temperature: float, log_prototype: Tensor, compiled: bool) -> Targets:
    """Targets whose rows sum to one, given what is added to each prototype."""
    log_prototype = log_prototype.to(_accumulator(logits))
    log_sample = _passes(logits, compiled).log_samples(logits, temperature, log_prototype)
    return Targets(logits=logits, temperature=temperature, log_prototype=log_prototype, log_sample=log_sample)


def _log_sum_over_samples(logits: Tensor, temperature: float) -> Tensor:
    if len(logits) == 0:
        return logits.new_full((logits.shape[1],), -torch.inf, dtype=_accumulator(logits))
    largest = logits.amax(dim=0).to(_accumulator(logits)) * (LOG2_E / temperature)
    total = torch.zeros_like(largest)
    for _, exponents in _exponents(logits, temperature, -largest):
        total += exponents.exp2_().sum(dim=0)
    return (largest + total.log2()) / LOG2_E


def _shares(logits: Tensor, temperature: float, log_prototype: Tensor) -> Tensor:
    log2_prototype = (log_prototype * LOG2_E).to(_accumulator(logits))
    shares = torch.zeros_like(log2_prototype)
    for _, exponents in _exponents(logits, temperature, log2_prototype):
        scaled = exponents.sub_(exponents.amax(dim=1, keepdim=True)).exp2_()
        shares += scaled.sum(dim=1).reciprocal_() @ scaled
    return shares.double()


def _log_samples(logits: Tensor, temperature: float, log_prototype: Tensor) -> Tensor:
    log_sample = logits.new_empty(len(logits), dtype=log_prototype.dtype)
    for rows, exponents in _exponents(logits, temperature, log_prototype * LOG2_E):
        largest = exponents.amax(dim=1)
        log2_sum = exponents.sub_(largest[:, None]).exp2_().sum(dim=1).log2_().add_(largest)
        log_sample[rows] = log2_sum.div_(-LOG2_E)
    return log_sample


def _exponents(logits: Tensor, temperature: float, log2_prototype: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, each with its scaled logits plus a term per prototype, as powers of two [n, K].

    The tensor is the same one each time: on a processor fresh memory costs as much as the arithmetic in it.
    """
    num_prototypes, dtype = logits.shape[1], log2_prototype.dtype
    rows_at_once = max(block_bytes(logits.device) // (max(num_prototypes, 1) * dtype.itemsize), 1)
    memory = logits.new_empty(min(rows_at_once, len(logits)), num_prototypes, dtype=dtype)
    for rows in blocks(len(logits), rows_at_once):
        block = memory[: rows.stop - rows.start].copy_(logits[rows]).mul_(LOG2_E / temperature)
        yield rows, block.add_(log2_prototype)


_STREAMED = _Passes(_log_sum_over_samples, _shares, _log_samples)


def _whole_log_sums(logits: Tensor, temperature: float) -> Tensor:
    return torch.logsumexp(logits.to(_accumulator(logits)) / temperature, dim=-2).squeeze(0)


def _whole_log_samples(logits: Tensor, temperature: float, log_prototype: Tensor) -> Tensor:
    return -torch.logsumexp(logits.to(log_prototype.dtype) / temperature + log_prototype, dim=-1)


def _whole_shares(logits: Tensor, temperature: float, log_prototype: Tensor, log_sample: Tensor) -> Tensor:
    exponents = logits.to(log_prototype.dtype) / temperature + log_prototype + log_sample[..., None]
    return exponents.exp().sum(dim=-2)


def whole_passes(compiled: bool) -> _Passes:
    """The passes over whole logits, each one or two kernels where they are compiled."""

    def log_sums(logits: Tensor, temperature: float) -> Tensor:
        return whole_pass(_whole_log_sums, compiled, logits[None], temperature)

    def log_samples(logits: Tensor, temperature: float, log_prototype: Tensor) -> Tensor:
        log_prototype = log_prototype.to(_accumulator(logits))
        return whole_pass(_whole_log_samples, compiled, logits[None], temperature, log_prototype)[0]

    def shares(logits: Tensor, temperature: float, log_prototype: Tensor) -> Tensor:
        log_sample = log_samples(logits, temperature, log_prototype)[None]
        log_prototype = log_prototype.to(_accumulator(logits))
        return whole_pass(_whole_shares, compiled, logits[None], temperature, log_prototype, log_sample)[0].double()

    return _Passes(log_sums, shares, log_samples)


_WHOLE = whole_passes(compiled=True)
