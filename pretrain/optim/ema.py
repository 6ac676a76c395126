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

    In float32: at momentum 0.9999 a bfloat16 teacher (spacing 2^-8 near 1) would stand still. One pass over all pairs
    in few kernels: it is a fused step of SGD from the teacher whose gradient is teacher - student, at the rate
    1 - momentum, for those kernels alone take lists and skip on the device. (Linear interpolation with a weight on the
    device is a kernel for every parameter.)

    Args:
        skip: float32 scalar on the device; where it is 1 the teacher stays as it is, and the host need not know.
    """
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        *pairs,
        [],
        weight_decay=1.0,  # adds the teacher to the gradient
        maximize=True,  # takes the student from it
        lr=1 - momentum,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        is_first_step=False,
        found_inf=skip,
    )
