"""Student and teacher made ready to train: in one process, replicated (DDP) or sharded (FSDP2), always both alike.

Blocks are compiled and recomputed in place (their `forward` is replaced) and FSDP2 shards in place, so parameter names
stay those of the plain model. Only DDP puts a module around the student.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from pretrain.distributed.collectives import is_distributed
from pretrain.distributed.names import plain_name

MODES = ("auto", "single", "ddp", "fsdp")
PRECISIONS = ("float32", "bfloat16")
HEADS = ("dino_head", "ibot_head")
DDP_LIMIT = 1_000_000_000
"""Parameters of the student up to which replicas are the default: below, sharding costs time and saves little."""


@dataclass(frozen=True)
class Wrapped:
    """What `wrap` returns. Call `student` itself (not a method of it), so that DDP's and FSDP's hooks run."""

    student: nn.Module
    teacher: nn.Module
    mode: str
    precision: str
    compile_blocks: bool
    device: torch.device

    def frozen(self, network: nn.Module) -> nn.Module:
        """Another network that only answers (Gram teacher, teacher to distil from), in place, wrapped as ours are."""
        return _freeze(network, self.mode, self.precision, self.compile_blocks)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for both forwards; under FSDP weights are bfloat16 already, and it settles mixed operations."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def synchronize(self, last: bool) -> AbstractContextManager[Any]:
        """The context for forward and backward of one micro-batch; `last`: of the step.

        DDP reduces gradients with the last one only. FSDP reduces each time and adds up shards, for whole float32
        gradients would take the memory that sharding saved.
        """
        if self.mode == "ddp" and not last:
            assert isinstance(self.student, DistributedDataParallel)
            return self.student.no_sync()
        return nullcontext()


def choose_mode(mode: str, num_parameters: int) -> str:
    """Resolve auto: single without a process group, ddp up to 1e9 parameters of the student, else fsdp.

    Raises:
        ValueError: an unknown mode, fsdp or ddp without a process group, or single with several ranks.
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
) -> Wrapped:
    """Wrap both modules alike, in place where possible.

    Args:
        student, teacher: on the training device, float32, equal on all ranks, with `backbone.blocks` and heads as their
            other children. The student's forward must compute everything that needs a gradient, losses too, and return
            a scalar tensor among its outputs (a tensor, tuple, list or dict). The teacher's must use what its heads
            return before it ends, for they are sharded again then.
        mode: auto, single, ddp or fsdp (see `choose_mode`).
        precision: float32, or bfloat16 for compute; parameters, reductions and optimizer stay float32.
        checkpoint_blocks: keep only the inputs of the student's blocks and recompute the rest in the backward. Exact:
            a block draws nothing at random by itself, its stochastic depth is drawn before the first block.
        compile_blocks: torch.compile the forward of each block and head; equal blocks share the compiled code.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}.")
    mode = choose_mode(mode, sum(p.numel() for p in student.parameters()))
    _replace_forwards(student, checkpoint_blocks, compile_blocks)
    student.register_forward_hook(_touch_embeddings)
    _freeze(teacher, mode, precision, compile_blocks)
    device = next(student.parameters()).device
    if mode == "fsdp":
        _shard(student, precision)
    elif mode == "ddp":
        # Every parameter gets a gradient in every step (see _touch_embeddings), so DDP need not search the graph for
        # unused ones. Buffers are the same constants on all ranks: they need not be broadcast in every forward.
        buffers = [name for name, _ in student.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, buffers)
        device_ids = [device] if device.type == "cuda" else None
        student = DistributedDataParallel(student, device_ids=device_ids, gradient_as_bucket_view=True)
    return Wrapped(student, teacher, mode, precision, compile_blocks, device)


def _freeze(network: nn.Module, mode: str, precision: str, compile_blocks: bool) -> nn.Module:
    network.requires_grad_(False).eval()
    _replace_forwards(network, False, compile_blocks)
    if mode == "fsdp":
        _shard(network, precision)
    return network


def _replace_forwards(network: nn.Module, checkpoint_blocks: bool, compile_blocks: bool) -> None:
    """In place of wrapping: names stay, and the hooks that FSDP puts around a block stay out of the compiled code."""
    for block in _blocks(network):
        if compile_blocks:
            block.forward = torch.compile(block.forward)
        if checkpoint_blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    for name, head in network.named_children():
        if compile_blocks and name in HEADS:
            head.forward = partial(_for_any_rows, torch.compile(head.forward))


def _for_any_rows(compiled: Callable[[Tensor], Any], rows: Tensor) -> Any:
    """Masked patches are not as many in every step: one compiled form serves all numbers."""
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return compiled(rows)


def _blocks(module: nn.Module) -> list[nn.Module]:
    return list(module.get_submodule("backbone.blocks").children())


def _shard(module: nn.Module, precision: str) -> None:
    """fully_shard each block, each head, the backbone's rest, then the root.

    Heads, rest and root stay whole after their forward: the loss uses a head's prototypes after the head has run, and
    their gradient flows back into it. Inputs are not cast: rotary tables stay float32.
    """
    # True of a head's prototypes and harmless: nobody writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(module.parameters()).device.type, (dist.get_world_size(),))
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
def full_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by plain name, whole, one at a time; every rank must go through all of them."""
    for name, tensor in module.state_dict().items():
        yield plain_name(name), tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
