"""The teacher as the exponential moving average of the student, on each rank's float32 shards."""

import torch
from torch import Tensor, nn

from pretrain.distributed.fsdp import local_tensor
from pretrain.distributed.names import plain_name

Pairs = tuple[list[Tensor], list[Tensor]]


def paired_parameters(teacher: nn.Module, student: nn.Module) -> Pairs:
    """This rank's parts of both modules' parameters, in the same order; what `update_ema` takes, made once.

    Raises:
        ValueError: the two differ in a name or in the shape of a shard: they must be built and wrapped alike.
    """
    ours = {plain_name(name): local_tensor(p.detach()) for name, p in teacher.named_parameters()}
    theirs = {plain_name(name): local_tensor(p.detach()) for name, p in student.named_parameters()}
    if differing := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"teacher and student have different parameters, {differing[0]} for one; build them alike.")
    for name, tensor in ours.items():
        if tensor.shape != theirs[name].shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} in the teacher and {list(theirs[name].shape)} in the student "
                "on this rank; build and wrap them alike."
            )
    return list(ours.values()), [theirs[name] for name in ours]


@torch.no_grad()
def copy_parameters(pairs: Pairs) -> None:
    """The first of each pair <- the second, exactly."""
    torch._foreach_copy_(*pairs)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def update_ema(pairs: Pairs, momentum: float, skip: Tensor | None = None) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student; buffers are not averaged.

    In float32: at momentum 0.9999 a bfloat16 teacher (spacing 2^-8 near 1) would stand still.

    Args:
        skip: float32 scalar on the device; where it is 1 the teacher stays as it is, and the host need not know.
    """
    weight: float | list[Tensor] = 1 - momentum
    if skip is not None:
        weight = [(1 - momentum) * (1 - skip)] * len(pairs[0])
    torch._foreach_lerp_(*pairs, weight)  # pyright: ignore[reportPrivateImportUsage]
