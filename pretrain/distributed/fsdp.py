"""Student and teacher made ready to train: in one process, replicated (DDP), sharded over all ranks (FSDP2) or over
groups of them (hybrid: each group holds one copy), always both alike.

Blocks are compiled and recomputed in place (their `forward` is replaced) and FSDP2 shards in place, so parameter names
stay those of the plain model. Only DDP puts a module around the student.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from pretrain import compiling
from pretrain.compiling import compiled
from pretrain.distributed.collectives import is_distributed
from pretrain.distributed.names import plain_name
from pretrain.distributed.tensor_files import local_rows
from pretrain.models.initial import Initial, fill_rows

MODES = ("auto", "single", "ddp", "fsdp", "hybrid")
SHARDED = ("fsdp", "hybrid")
PRECISIONS = ("float32", "bfloat16")
HEADS = ("dino_head", "ibot_head")
DDP_LIMIT = 1_000_000_000
"""Parameters of the student up to which replicas are the default: below, sharding costs time and saves little."""


@dataclass(frozen=True)
class Placement:
    """How the networks of a run lie on its ranks."""

    mode: str
    precision: str
    device: torch.device
    mesh: DeviceMesh | None = None
    """of sharded parameters: [shard] or [replicate, shard]"""
    compile_blocks: bool = False

    def frozen(self, network: nn.Module) -> nn.Module:
        """A network that only answers, in place. One on `meta` gets its place on the device, without values."""
        network.requires_grad_(False).eval()
        _replace_forwards(network, False, self.compile_blocks)
        return self.placed(network)

    def placed(self, network: nn.Module) -> nn.Module:
        """Sharded, where that is the mode, then off `meta`: a rank has room for its own rows, and no more."""
        if self.mesh is not None:
            _shard(network, self.precision, self.mesh)
        if any(p.is_meta for p in network.parameters()):
            network.to_empty(device=self.device)
            with torch.no_grad():
                for parameter in network.parameters():
                    local_tensor(parameter).fill_(torch.nan)  # what nobody fills shows
        return network

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for both forwards; under FSDP weights are bfloat16 already, and it settles mixed operations."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Wrapped(Placement):
    """What `wrap` returns. Call `student` itself (not a method of it), so that DDP's and FSDP's hooks run."""

    student: nn.Module
    teacher: nn.Module

    def synchronize(self, last: bool) -> AbstractContextManager[Any]:
        """The context for forward and backward of one micro-batch; `last`: of the step.

        DDP reduces gradients with the last one only. FSDP reduces each time and adds up shards, for whole float32
        gradients would take the memory that sharding saved; copies of a shard are summed with the last one only.
        """
        if self.mode == "hybrid":
            assert isinstance(self.student, FSDPModule)
            self.student.set_requires_all_reduce(last)
        if self.mode == "ddp" and not last:
            assert isinstance(self.student, DistributedDataParallel)
            return self.student.no_sync()
        return nullcontext()


def choose_mode(mode: str, num_parameters: int) -> str:
    """Resolve auto: single without a process group, ddp up to 1e9 parameters of the student, else fsdp.

    Raises:
        ValueError: an unknown mode, one of many ranks without a process group, or single with several ranks.
    """
    if mode not in MODES:
        raise ValueError(f"execution.parallel={mode!r} must be one of {', '.join(MODES)}.")
    if mode == "auto":
        if not is_distributed():
            return "single"
        return "ddp" if num_parameters <= DDP_LIMIT else "fsdp"
    if mode != "single" and not is_distributed():
        raise ValueError(
            f"execution.parallel={mode} needs processes that know each other: start with torchrun, or use single."
        )
    if mode == "single" and is_distributed() and dist.get_world_size() > 1:
        raise ValueError(
            f"execution.parallel=single with {dist.get_world_size()} ranks would train as many models; use auto."
        )
    return mode


def wrap(
    student: nn.Module,
    teacher: nn.Module,
    mode: str,
    precision: str,
    checkpoint_blocks: bool = False,
    compile_blocks: bool = False,
    device: torch.device | None = None,
    shard_ranks: int = 0,
) -> Wrapped:
    """Wrap both modules alike, in place where possible.

    Args:
        student, teacher: on the training device, float32, equal on all ranks, or on `meta`: they then get room for
            their values on `device`, which the caller fills (`initialise`, `Checkpoints.load`). They have
            `backbone.blocks`, and heads as their other children. The student's forward must compute everything that
            needs a gradient, losses too, and return a scalar tensor among its outputs (a tensor, tuple, list or dict).
            The teacher's must use what its heads return before it ends, for they are sharded again then.
        mode: auto, single, ddp, fsdp or hybrid (see `choose_mode`).
        precision: float32, or bfloat16 for compute; parameters, reductions and optimizer stay float32.
        checkpoint_blocks: keep only the inputs of the student's blocks and recompute the rest in the backward. Exact:
            a block draws nothing at random by itself, its stochastic depth is drawn before the first block.
        compile_blocks: torch.compile the forward of each block and head; equal blocks share the compiled code.
        shard_ranks: of hybrid: neighbouring ranks that hold one copy; 0: those of a node.

    Raises:
        ValueError: a mode that cannot be had here, or groups that do not divide the ranks.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}.")
    mode = choose_mode(mode, sum(p.numel() for p in student.parameters()))
    device = device or next(student.parameters()).device
    placement = Placement(mode, precision, device, _mesh(mode, device, shard_ranks), compile_blocks)
    _replace_forwards(student, checkpoint_blocks, compile_blocks)
    student.register_forward_hook(_touch_embeddings)
    placement.frozen(teacher)
    placement.placed(student)
    if mode == "ddp":
        # Every parameter gets a gradient in every step (see _touch_embeddings), so DDP need not search the graph for
        # unused ones. Buffers are the same constants on all ranks: they need not be broadcast in every forward.
        buffers = [name for name, _ in student.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, buffers)
        device_ids = [device] if device.type == "cuda" else None
        student = DistributedDataParallel(student, device_ids=device_ids, gradient_as_bucket_view=True)
    return Wrapped(mode, precision, device, placement.mesh, compile_blocks, student=student, teacher=teacher)


def place(mode: str, precision: str, device: torch.device, shard_ranks: int, num_parameters: int) -> Placement:
    """How a network that only answers lies on the ranks, beside no student; see `wrap`."""
    mode = choose_mode(mode, num_parameters)
    return Placement(mode, precision, device, _mesh(mode, device, shard_ranks))


def ranks_of_a_copy(mode: str, shard_ranks: int, world_size: int) -> int:
    """The ranks that hold one copy of the weights: under hybrid as asked, or those of a node, which torchrun tells.

    Raises:
        ValueError: groups of so many do not divide the ranks.
    """
    if mode != "hybrid":
        return world_size if mode == "fsdp" else 1
    asked = shard_ranks or min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    if world_size % asked:
        raise ValueError(
            f"execution.shard_ranks={shard_ranks}: groups of {asked} ranks do not divide {world_size} ranks; choose "
            f"one of {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}."
        )
    return asked


def _mesh(mode: str, device: torch.device, shard_ranks: int) -> DeviceMesh | None:
    if mode not in SHARDED:
        return None
    ranks = dist.get_world_size()
    copy = ranks_of_a_copy(mode, shard_ranks, ranks)
    if mode == "fsdp":
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (ranks // copy, copy), mesh_dim_names=("replicate", "shard"))


def _replace_forwards(network: nn.Module, checkpoint_blocks: bool, compile_blocks: bool) -> None:
    """In place of wrapping: names stay, and the hooks that FSDP puts around a block stay out of the compiled code."""
    for block in _blocks(network):
        if compile_blocks:
            block.forward = compiled(block.forward)
        if checkpoint_blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    for name, head in network.named_children():
        if compile_blocks and name in HEADS:
            head.forward = partial(_for_any_rows, compiled(head.forward, any_rows=True))


def _for_any_rows(forward: Callable[[Tensor], Any], rows: Tensor) -> Any:
    """Masked patches are not as many in every step: one compiled form serves all numbers."""
    compiling.open_rows(rows, 0)
    return forward(rows)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return list(module.get_submodule("backbone.blocks").children())


def _shard(module: nn.Module, precision: str, mesh: DeviceMesh) -> None:
    """fully_shard each block, each head, the backbone's rest, then the root.

    Heads, rest and root stay whole after their forward: the loss uses a head's prototypes after the head has run, and
    their gradient flows back into it. Inputs are not cast: rotary tables stay float32.
    """
    # True of a head's prototypes and harmless: nobody writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    blocks = _blocks(module)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for unit in (*module.children(), module):
        if any(True for _ in unit.parameters()):
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for block, following in pairwise(blocks):
        assert isinstance(block, FSDPModule)
        assert isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch([following])
    module.register_forward_hook(_reshard_without_grad)


def _reshard_without_grad(module: nn.Module, _inputs: Any, _output: Any) -> None:
    """After a forward that no backward follows, free the whole weights: they would be used again after an update."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        return
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


class _Touch(torch.autograd.Function):
    """x unchanged, with zero gradients for the parameters given beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, *(torch.zeros_like(p) for p in ctx.saved_tensors)


def _touch_embeddings(student: nn.Module, _inputs: Any, output: Any) -> Any:
    """Give the backbone's parameters outside the blocks a gradient in every step.

    Without masks or local crops the mask token or the local norm is in nobody's graph; with few images that differs
    from rank to rank, and DDP and FSDP would wait for, or reduce, gradients that one rank has and another has not.
    """
    if not torch.is_grad_enabled():
        return output
    backbone = student.get_submodule("backbone")
    parameters = [p for n, p in backbone.named_parameters() if p.requires_grad and not n.startswith("blocks.")]
    leaves, structure = tree_flatten(output)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.ndim == 0:
            leaves[index] = _Touch.apply(leaf, *parameters)
            return tree_unflatten(leaves, structure)
    raise AssertionError("the student's forward returns no scalar tensor that needs a gradient")


def plain_module(module: nn.Module) -> nn.Module:
    """The module inside DDP, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def local_tensor(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (sharing its memory), or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def initialise(module: nn.Module, initials: Mapping[str, Initial], seed: int, only: Sequence[str] = ("",)) -> None:
    """Set the parameters anew, each rank the rows that it holds: the same values for every mode and number of ranks.

    Args:
        initials: by plain name.
        only: starts of the plain names of parameters to set; all by default.
    """
    for wrapped_name, parameter in module.named_parameters():
        name = plain_name(wrapped_name)
        if name.startswith(tuple(only)):
            start, local = local_rows(parameter.detach())
            fill_rows(local, initials[name], tuple(parameter.shape), start, seed, name)


@torch.no_grad()
def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by plain name, whole, one at a time; every rank must go through all of them."""
    for name, tensor in module.state_dict().items():
        yield plain_name(name), tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
