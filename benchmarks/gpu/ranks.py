"""Section H, under torchrun: DDP and FSDP2 as the only rank, against one plain process; their checkpoints.

One rank has nobody to wait for, so this shows that the wrappers, NCCL and the checkpoints work, and what they cost.
"""

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch.distributed.tensor import DTensor

from benchmarks.gpu.measure import Setting, check, relative_error
from benchmarks.gpu.steps import SMALL, ready, step_config, timed_steps
from benchmarks.gpu.table import Figures, Part
from benchmarks.train_step import STEP
from pretrain.checkpoint import CheckpointConfig, Checkpoints
from pretrain.config import TrainConfig
from pretrain.data.collate import Batch
from pretrain.distributed import collectives
from pretrain.distributed.fsdp import full_tensors
from pretrain.phase import Phase

FORMS = {
    "single": ("parallel=single",),
    "DDP": ("parallel=ddp",),
    "FSDP2": ("parallel=fsdp",),
    "DDP, checkpointed blocks": ("parallel=ddp", "activation_checkpointing=true"),
    "FSDP2, checkpointed blocks": ("parallel=fsdp", "activation_checkpointing=true"),
    "DDP, compiled": ("parallel=ddp", "compile=true"),
    "FSDP2, compiled, checkpointed": ("parallel=fsdp", "compile=true", "activation_checkpointing=true"),
}


def ranks(at: Setting) -> Iterator[Part]:
    collectives.start(at.device.type)
    first: dict[str, float] = {}
    for name in list(FORMS)[:5]:
        yield name, partial(one_form, at, config_of(at, name), first)
    yield "a checkpoint of DDP", lambda: checkpoints(at)
    for name in list(FORMS)[5:]:
        yield name, partial(one_form, at, config_of(at, name), first)


def config_of(at: Setting, name: str) -> TrainConfig:
    settings = [f"execution.{setting}" for setting in FORMS[name]]
    # With layer scales of 1e-5 KoLeo sees CLS tokens that differ by rounding only.
    return step_config(at, SMALL, at.sizes.rank_images, "model.layerscale=0.5", *settings)


def one_form(at: Setting, config: TrainConfig, first: dict[str, float]) -> Figures:
    """The time of a step; and its first loss against that of one process, which wrapping must not change much."""
    phase, batch = ready(config, at)
    start = time.perf_counter()
    loss = phase.step(batch, STEP, diagnose=False)["loss"].item()
    first_step_s = time.perf_counter() - start
    expected = first.setdefault("loss", loss)
    # FSDP2 runs norms and residuals on bfloat16 weights, compiled blocks keep fewer roundings: 8 bits of mantissa.
    tolerance = 2e-3 if config.execution.parallel == "fsdp" or config.execution.compile else 1e-4
    return {
        **timed_steps(phase, batch, at, share=0.06),
        "first_step_s": first_step_s,
        **check(abs(loss - expected) / expected, tolerance, loss=loss),
    }


def checkpoints(at: Setting) -> list[Figures]:
    """Written by DDP, read by FSDP2 and by one process: every tensor to the bit, and the loss after it."""
    config = config_of(at, "DDP")
    phase, batch = ready(config, at)
    phase.step(batch, STEP, diagnose=False)
    store = Checkpoints(at.work / "checkpoints", CheckpointConfig(asynchronous=False))
    store.save(phase.state(), 1, {})
    path = store.latest()
    assert path is not None, "it has just been written"
    expected = next_step(phase, batch)
    lines: list[Figures] = []
    for name in ("FSDP2", "single"):
        other, _ = ready(config_of(at, name), at)
        store.load(path, other.state())
        found = next_step(other, batch)
        lines.append(check(relative_error(found[0], expected[0]), 0.0, into=name, result="tensors"))
        tolerance = 2e-3 if name == "FSDP2" else 1e-4
        lines.append(check(relative_error(found[1], expected[1]), tolerance, into=name, result="losses after it"))
    return lines


def next_step(phase: Phase, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """All weights of student and teacher, AdamW's second moments, and the losses of one more step."""
    tensors = [tensor for part in (phase.student, phase.teacher) for _, tensor in full_tensors(part)]
    for state in phase.optimizer.state.values():
        moment = state["exp_avg_sq"]
        tensors.append(moment.full_tensor() if isinstance(moment, DTensor) else moment)
    whole = torch.cat([tensor.flatten().cpu() for tensor in tensors])
    losses = phase.step(batch, STEP + 1, diagnose=False)
    names = sorted(name for name in losses if name.startswith("loss"))
    return whole, torch.stack([losses[name] for name in names])
