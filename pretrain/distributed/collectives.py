"""One process or many: starting them, and what they say to each other. Without a process group each is a no-op."""

import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
DEVICES = ("auto", "cpu", "cuda")
START_TIMEOUT = timedelta(minutes=30)  # the first step compiles, and a rank may wait for another's slow disk
STEP_TIMEOUT = timedelta(minutes=10)  # after it a rank that is waited for longer is lost
# PyTorch 2.14 gave it another name, and warns of the one that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def choose_device(name: str, key: str) -> torch.device:
    """The device that a setting or flag names: auto (a GPU if there is one), cpu, cuda, or cuda:N.

    Args:
        key: how the user names it, for the message.

    Raises:
        ValueError: another kind of device, a GPU where torch sees none, or one of a higher number than there are.
    """
    kind, colon, number = name.partition(":")
    if kind not in DEVICES or (colon and (kind != "cuda" or not number.isdecimal())):
        raise ValueError(f"{key}={name!r} is unknown; choose one of {', '.join(DEVICES)}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{key}={name}, but torch sees no GPU here; use {key}=cpu or check the driver.")
    if colon and int(number) >= torch.cuda.device_count():
        raise ValueError(f"{key}={name}, but this machine has {torch.cuda.device_count()} GPU(s), from cuda:0 on.")
    return torch.device(name if kind != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def start(device: str = "auto", timeout: timedelta = START_TIMEOUT) -> torch.device:
    """Join the process group that torchrun (or pretrain.launch) describes in the environment, if it does.

    Args:
        device: auto (a GPU if there is one), cpu or cuda.

    Returns:
        This rank's device, made the current one.

    Raises:
        ValueError: cuda asked for and not there, more local ranks than GPUs, or Slurm tasks unknown to each other.
    """
    on_gpu = choose_device(device, "execution.device").type == "cuda"
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ValueError(
            "Slurm started several tasks that do not know each other: each would train alone, into the same folder. "
            "Use python -m pretrain.launch, or srun one torchrun on each node."
        )
    here = torch.device("cpu")
    if on_gpu:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= (num_gpus := torch.cuda.device_count()):
            raise ValueError(f"local rank {local_rank} has no GPU: this machine has {num_gpus}. Start fewer processes.")
        here = torch.device("cuda", local_rank)
        torch.cuda.set_device(here)
    if launched:
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, timeout=timeout, device_id=here if on_gpu else None)
    return here


def set_timeout(timeout: timedelta) -> None:
    """How long a rank from now on waits for the others, in every group that there is."""
    if not is_distributed():
        return
    # torch lists its groups, those of meshes too, nowhere else; the public name came with torch 2.13 or so.
    set_one = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        set_one(timeout, group)


def stop() -> None:
    """Leave the process group, if there is one."""
    if is_distributed():
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """Leave the process with a status; a rank does so without taking the interpreter apart.

    A thread of gloo may still give back tensors that Python owns. When the interpreter is gone by then, that thread is
    ended inside C++, which aborts a rank whose work is done (8 of 100 trainings of two ranks with FSDP).
    """
    if "RANK" not in os.environ:
        sys.exit(status)
    for child in multiprocessing.active_children():
        child.terminate()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def lost_rank(error: RuntimeError) -> str:
    """One sentence for what this rank meets because another one ended; empty for any other error."""
    text = str(error)
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError) or "gloo" in text or "NCCL" in text:
        return f"rank {os.environ.get('RANK', '0')} lost the others: one of them ended, and its message says why."
    return ""


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum in place over all ranks; returns x."""
    if is_distributed():
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean in place over all ranks, each counting the same; returns x."""
    return sum_over_ranks(x).div_(world_size())


def any_over_ranks(flag: bool) -> bool:
    """Whether the flag is up on any rank (a signal to stop). Hosts wait for each other, not for their devices."""
    return bool(max_over_ranks(int(flag)))


def max_over_ranks(number: int) -> int:
    """The largest number of all ranks'; hosts wait for each other, not for their devices."""
    if not is_distributed():
        return number
    largest = torch.tensor(number)  # on the processor: gloo, also beside NCCL
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def from_every_rank(one: T) -> list[T]:
    """What each rank has, small, by rank."""
    if not is_distributed():
        return [one]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, one)
    return every


def together(make: Callable[[], T]) -> T:
    """What `make` returns on this rank; what it raises on any rank is raised on all, instead of a hang.

    `make` itself must not wait for other ranks.
    """
    result, error = None, None
    try:
        result = make()
    except Exception as found:
        error = found
    if any_over_ranks(error is not None):
        raise next(met for met in from_every_rank(error) if met is not None)
    return result  # pyright: ignore[reportReturnType]  # made, where nothing was raised


def in_step(items: Iterable[T], work: Callable[[T | None], None], left: Callable[[], bool] = lambda: False) -> bool:
    """Do the work on every item, as many turns on every rank: None on a rank that has no more while another has.

    So `work` may hold collectives, such as the forward of a sharded network. What one rank's items or work raise is
    raised on all at the next turn; only an error between two collectives of one turn leaves the others waiting.

    Args:
        left: whether this rank is asked to stop.

    Returns:
        Whether all was done; False: some rank was asked to stop.
    """
    turns, error = iter(items), None
    while True:
        item, has_item = None, False
        if error is None:
            try:
                item, has_item = next(turns), True
            except StopIteration:
                pass
            except Exception as found:
                error = found
        state = max_over_ranks(3 if error is not None else 2 if left() else int(has_item))
        if state == 3:
            raise next(met for met in from_every_rank(error) if met is not None)
        if state != 1:
            return state == 0
        try:
            work(item)
        except Exception as found:
            error = found


def from_rank_zero(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, on every rank; an error there is raised everywhere, instead of a hang."""
    if not is_distributed():
        return make()
    message: list[Any] = [None, None]
    if rank() == 0:
        try:
            message[0] = make()
        except Exception as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0)
    if message[1] is not None:
        raise message[1]
    return message[0]


def from_first_of_machine(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank of this machine; an error on any machine is raised on every rank."""
    if not is_distributed():
        return make()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    message: list[Any] = [None, None]
    if local_rank == 0:
        try:
            message[0] = make()
        except Exception as error:
            message[1] = error
    messages = from_every_rank(message)
    for _, error in messages:
        if error is not None:
            raise error
    return messages[rank() - local_rank][0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(dist.get_world_size(group) * x.shape[0], *x.shape[1:])
        _all_gather(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = dist.get_world_size(ctx.group)
        ours = gradient.new_empty(gradient.shape[0] // size, *gradient.shape[1:])
        dist.reduce_scatter_tensor(ours, gradient.contiguous(), group=ctx.group)
        return ours, None


def gather_with_grad(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows of all ranks of the group (all ranks by default), in rank order: [B, D] -> [ranks * B, D].

    Every rank must give the same number of rows. The gradient of a row is the *sum* over ranks of what their losses ask
    of it. Parameters whose gradients are then *averaged* over ranks (DDP, FSDP) get the gradient of the mean of the
    ranks' losses: no further factor, whether a rank's loss is about its own rows or about all of them.
    """
    return _Gather.apply(x, group) if is_distributed() else x  # pyright: ignore[reportReturnType]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sum_over_ranks(gradient.clone())


def sum_with_grad(x: Tensor) -> Tensor:
    """The sum over all ranks; its gradient is the sum over ranks of what their losses ask (see `gather_with_grad`)."""
    return _Sum.apply(x) if is_distributed() else x  # pyright: ignore[reportReturnType]


def consecutive_ranks(ranks_per_group: int) -> dist.ProcessGroup | None:
    """The group of this many neighbouring ranks that this rank belongs to; None (all ranks) when that is everyone.

    Every rank must call it. Raises ValueError when the ranks do not split evenly.
    """
    if world_size() % ranks_per_group:
        raise ValueError(f"groups of {ranks_per_group} ranks do not divide {world_size()} ranks.")
    if ranks_per_group == world_size():
        return None
    ranks = [range(first, first + ranks_per_group) for first in range(0, world_size(), ranks_per_group)]
    mine, _ = dist.new_subgroups_by_enumeration([list(r) for r in ranks])
    assert isinstance(mine, dist.ProcessGroup)  # every rank is in one of them
    return mine
