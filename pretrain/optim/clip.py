"""Gradient norms and clipping by module, and the watch for values that are not finite; the host waits for neither."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pretrain.distributed.collectives import is_distributed
from pretrain.distributed.fsdp import local_tensor


@torch.no_grad()
def clip_by_module(modules: Mapping[str, Sequence[nn.Parameter]], max_norm: float) -> dict[str, Tensor]:
    """Scale the gradients of each module down to `max_norm` (0: leave them), as DINOv2 does, separately for each.

    Shards are summed over their ranks: one all-reduce for all modules. Parameters without a gradient count as 0.

    Returns:
        The norm of each module before clipping, float32 scalars on the device.
    """
    first = next(p for parameters in modules.values() for p in parameters)
    gradients = {name: [p.grad for p in parameters if p.grad is not None] for name, parameters in modules.items()}
    squares = torch.zeros(2, len(modules), dtype=torch.float64, device=first.device)  # whole tensors, shards
    meshes = {g.device_mesh for group in gradients.values() for g in group if isinstance(g, DTensor)}
    for column, group in enumerate(gradients.values()):
        for row, sharded in enumerate((False, True)):
            if tensors := [local_tensor(g) for g in group if isinstance(g, DTensor) == sharded]:
                norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
                squares[row, column] = torch.stack(norms).double().square().sum()
    for mesh in meshes:
        assert len(meshes) == 1, "parameters are sharded over one mesh"
        dist.all_reduce(squares[1], group=mesh.get_group(mesh.ndim - 1))  # copies of a shard hold the same gradient
    norms = squares.sum(0).sqrt().float()
    if max_norm > 0:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for factor, group in zip(factors, gradients.values(), strict=True):
            if group:
                torch._foreach_mul_([local_tensor(g) for g in group], factor)  # pyright: ignore[reportPrivateImportUsage]
    return dict(zip(modules, norms, strict=True))


@dataclass(frozen=True)
class SkippedStep:
    """A step that changed nothing, and the values that were not finite."""

    step: int
    terms: tuple[str, ...]


class FiniteWatch:
    """Finds the steps with a value that is not finite, without making the host wait for the device.

    `watch` gives a flag with which the step leaves everything as it was, on the device (`param_groups.step_unless`,
    `ema.update_ema`); what it found is read when the copy has arrived, on a GPU usually during the next step.

    Args:
        max_skipped: such steps in a row that are let pass.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        self.max_skipped, self.in_a_row = max_skipped, 0
        self.first = 0
        """what messages call step 0"""
        self._pending: list[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = []
        self._skipped: list[SkippedStep] = []

    @torch.no_grad()
    def watch(self, step: int, values: Mapping[str, Tensor]) -> Tensor:
        """Remember which of the named scalars are not finite on any rank.

        Returns:
            1.0 if there is one, else 0.0: a float32 scalar on the device, equal on all ranks.
        """
        found = torch.stack([(~v.detach().isfinite()).all() for v in values.values()]).float()
        if is_distributed():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        event = None
        on_host = found
        if found.is_cuda:
            on_host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            on_host.copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, list(values), on_host, event))
        return found.max()

    def check(self, wait: bool = False) -> None:
        """Read what has been found so far; with `wait` for every step watched, as before a checkpoint.

        Without `wait` it still waits for the step before the last, so that ranks stop at the same step.

        Raises:
            FloatingPointError: more than `max_skipped` steps in a row; names the last one and its values.
        """
        while self._pending and (wait or len(self._pending) > 1 or self._pending[0][3] is None):
            step, names, found, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            bad = [name for name, flag in zip(names, found.tolist(), strict=True) if flag]
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad:
                self._skipped.append(SkippedStep(step, tuple(bad)))
            if self.in_a_row > self.max_skipped:
                raise FloatingPointError(
                    f"step {self.first + step}: {', '.join(bad)} not finite on at least one rank; the optimizer did "
                    "not step" + (f", as in the {self.in_a_row - 1} step(s) before." if self.in_a_row > 1 else ".")
                )

    def take(self) -> list[SkippedStep]:
        """The skipped steps read since the last call."""
        taken, self._skipped = self._skipped, []
        return taken
