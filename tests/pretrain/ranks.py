"""Two processes on a CPU that train together, and a small student-teacher pair for them."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.distributed import collectives
from pretrain.distributed.fsdp import full_tensors, plain_module, wrap
from pretrain.optim.clip import FiniteWatch, clip_by_module
from pretrain.optim.ema import paired_parameters, update_ema
from pretrain.optim.param_groups import adamw, apply_schedule, param_groups, step_unless
from pretrain.optim.schedules import OptimConfig, StepValues

TIMEOUT_S = 240
# Forked from a process that has imported torch once and done nothing with it: importing takes longer than the tests.
PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.pretrain.ranks", "pretrain.phase"])
VALUES = StepValues(
    lr=1e-2,
    last_layer_lr=5e-3,
    backbone_lr=1e-2,
    weight_decay=0.1,
    teacher_momentum=0.9,
    teacher_temperature=0.05,
)


def run_ranks(function: Callable[..., Any], folder: Path, *arguments: Any, num_ranks: int = 2) -> list[Any]:
    """Call `function(*arguments)` in gloo processes of one thread each; what each rank returned, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        PROCESSES.Process(target=_one_rank, args=(rank, num_ranks, folder, function, arguments), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT_S
    for process in processes:
        process.join(max(end - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    assert codes == [0] * num_ranks, f"exit codes {codes} (None: still running after {TIMEOUT_S} s)"
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _one_rank(rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    torch.save(function(*arguments), folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim, bias=False)
        self.norm2, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.scaled_dot_product_attention(*self.attn(self.norm1(x)).chunk(3, dim=-1))
        return x + F.gelu(self.mlp(self.norm2(x)))


class Backbone(nn.Module):
    """Tokens [B, N, 6] to [B, 1 + N, D]; `local_cls_norm` and, without a mask, `mask_token` are used by nobody."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(6, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(torch.randn(1, dim))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.norm, self.local_cls_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.patch_embed(x)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token, x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class LastLayer(nn.Module):
    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_prototypes, dim))

    def forward(self) -> Tensor:
        return self.weight.view_as(self.weight)


class Head(nn.Module):
    def __init__(self, dim: int, num_prototypes: int) -> None:
        super().__init__()
        self.mlp, self.last_layer = nn.Linear(dim, dim), LastLayer(dim, num_prototypes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.mlp(x).float(), dim=-1), self.last_layer()


class Network(nn.Module):
    """As in pretrain.student_teacher: everything that needs the parameters goes through `forward`."""

    def __init__(self, dim: int = 12, depth: int = 3, num_prototypes: int = 10) -> None:
        super().__init__()
        self.backbone = Backbone(dim, depth)
        self.dino_head, self.ibot_head = Head(dim, num_prototypes), Head(dim, num_prototypes)

    def forward(self, compute: Callable[["Network"], Any]) -> Any:
        return compute(self)


def make_networks() -> tuple[Network, Network]:
    """Student and teacher with different weights, the same in every process."""
    torch.manual_seed(3)
    return Network(), Network()


def logits(network: Network, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the CLS token [B, K] and of all patches [B * N, K]."""
    tokens = network.backbone(x, mask)
    features, prototypes = network.dino_head(tokens[:, 0])
    patch_features, patch_prototypes = network.ibot_head(tokens[:, 1:].flatten(0, 1))
    return features @ prototypes.T, patch_features @ patch_prototypes.T


def losses(network: Network, x: Tensor, mask: Tensor | None, targets: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Mean cross-entropies over the images given."""
    cls, patches = logits(network, x, mask)
    return {
        "dino": F.cross_entropy(cls.float() / 0.1, (targets[0] / 0.05).softmax(-1)),
        "ibot": F.cross_entropy(patches.float() / 0.1, (targets[1] / 0.05).softmax(-1)),
    }


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Eight images of five patches and their masks; only the first half has masks at odd steps, nobody at step 2."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 5, 6, generator=generator)
    mask = torch.rand(8, 5, generator=generator) < 0.4
    if step % 2:
        mask[4:] = False
    return x, mask & (step != 2)


class Run:
    """Student, teacher and optimizer, and the steps that a training loop takes with them."""

    def __init__(self, mode: str, precision: str = "float32", micro_batches: int = 1, **options: int) -> None:
        self.micro_batches = micro_batches
        self.wrapped = wrap(*make_networks(), mode, precision, **options)
        self.student = plain_module(self.wrapped.student)
        self.pairs = paired_parameters(self.wrapped.teacher, self.student)
        self.optimizer = adamw(param_groups(self.wrapped.student.named_parameters(), 3, 0.8, 0.2), OptimConfig())
        self.modules = {name: list(child.parameters()) for name, child in self.student.named_children()}
        self.watch = FiniteWatch()
        self.gradients: dict[str, Tensor] = {}

    def step(self, step: int) -> dict[str, float]:
        """Losses (means over all images) and gradient norms; `gradients` are those before clipping."""
        rank, ranks = collectives.rank(), collectives.world_size()
        total: dict[str, Tensor] = {}
        for micro in range(self.micro_batches):
            x, mask = (part.chunk(ranks)[rank].chunk(self.micro_batches)[micro] for part in batch(step))
            masked = mask if mask.any() else None  # as a collate function may do: the mask token is then unused
            with self.wrapped.synchronize(last=micro == self.micro_batches - 1):
                with self.wrapped.autocast():
                    with torch.no_grad():
                        targets = self.wrapped.teacher(lambda network, x=x: logits(network, x, None))
                    terms = self.wrapped.student(lambda network, x=x, m=masked, t=targets: losses(network, x, m, t))
                torch.stack(list(terms.values())).sum().div(self.micro_batches).backward()
            for name, term in terms.items():
                total[name] = total.get(name, 0) + collectives.mean_over_ranks(term.detach()) / self.micro_batches
        self.gradients = {name: whole(p.grad).clone() for name, p in self.student.named_parameters()}
        norms = clip_by_module(self.modules, 0.5)
        apply_schedule(self.optimizer, VALUES)
        step_unless(self.optimizer, self.watch.watch(step, total | norms))
        self.watch.check()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.pairs, VALUES.teacher_momentum)
        return {name: value.item() for name, value in (total | norms).items()}

    def answer(self) -> Tensor:
        """What the student says to the first batch, without gradient."""
        with torch.no_grad(), self.wrapped.autocast():
            return self.wrapped.student(lambda network: logits(network, batch(0)[0], None))[0].float()

    def state(self) -> dict[str, Any]:
        return {"student": self.wrapped.student, "teacher": self.wrapped.teacher, "optimizer": self.optimizer}

    def tensors(self) -> dict[str, Tensor]:
        """Everything in the state, whole."""
        found = {f"{key}.{n}": t for key in ("student", "teacher") for n, t in full_tensors(self.state()[key])}
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                found |= {f"{name}.{k}": whole(v) for k, v in self.optimizer.state[parameter].items()}
        return {name: tensor.clone() for name, tensor in found.items()}


def whole(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.full_tensor() if hasattr(x, "full_tensor") else x
