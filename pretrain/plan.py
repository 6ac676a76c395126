"""--dry-run: what a training would cost, by phase: parameters, memory, operations, time. Nothing is started or written.

Models are built on `meta`, so the plan of a 7B model takes seconds on a laptop. Memory is reckoned, not measured
(`pretrain/memory.py`). Operations are those of `watch.flops`; times are for the rates below.
"""

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pretrain.checks import check_numbers, check_run
from pretrain.config import LIKE, TrainConfig, micro_batch_size
from pretrain.data.crops import NUM_GLOBAL_CROPS, CropSizes
from pretrain.data.loader import DataConfig
from pretrain.distributed.fsdp import DDP_LIMIT
from pretrain.machine import SHARED, waiting_bytes
from pretrain.memory import count, rank_memory, shards, start_memory
from pretrain.network_weights import described_network
from pretrain.optim.schedules import scaled_lr
from pretrain.phase import step_cost
from pretrain.student_teacher import Network, build_network, freeze_unused
from pretrain.watch.flops import StepCost, step_flops
from pretrain.weights import find_weights

_WIDTH = 120
_BYTES = ("B", "kB", "MB", "GB", "TB")
_FLOP = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP")


@dataclass(frozen=True)
class Rate:
    """What one device gets out of its peak, training, all told."""

    device: str
    flops_per_s: float
    source: str


# Of our operations (watch.flops), from published images per second; a plan for other hardware scales with its peak.
RATES = (
    Rate("H100", 183e12, "published for DINOv3's ViT-L/16 on 32: 125,000 steps in 14 h, 18% of the peak"),
    Rate("A100", 107e12, "published for DINOv2's ViT-L/16 on 32: 125,000 steps in a day, 34% of the peak"),
    Rate("two cores", 0.20e12, "measured with DINOv3's public code, ViT-S/16 in float32 on an AMD EPYC"),
)


@dataclass(frozen=True)
class PhasePlan:
    """The numbers of one phase. `memory` is of one rank at the peak of a step, by what it is for, in bytes."""

    name: str
    config: TrainConfig
    network: Network
    """on `meta`"""
    flops_per_image: float
    mode: str
    memory: dict[str, float]
    start_bytes: float
    """of one rank before the first step"""

    @property
    def images(self) -> int:
        return self.config.steps * self.config.global_batch_size

    @property
    def flops(self) -> float:
        return self.images * self.flops_per_image


def describe(config: TrainConfig, world_size: int = 1, out: Path | None = None) -> str:
    """The plan as text, 120 columns wide.

    Args:
        config: of the run; its datasets, where it names some, are listed to count epochs.
        world_size: processes, one a GPU.
        out: the run folder, where it is known.

    Raises:
        ValueError: the settings do not fit each other, or a dataset cannot be read.
    """
    images = [{name: len(table) for name, table in tables.items()} for tables in check_run(config, world_size, out)]
    plans = plan_phases(config, world_size)
    lines = io.StringIO()
    console = Console(file=lines, width=_WIDTH, no_color=True, highlight=False)
    console.print(_parameters(plans[0]), _steps(plans, images), _memory(plans, world_size), _times(plans, world_size))
    for note in _notes(plans, world_size):
        console.print(note, soft_wrap=True)
    return lines.getvalue().rstrip()


def plan_phases(config: TrainConfig, world_size: int) -> list[PhasePlan]:
    """The numbers of every phase; ValueError for settings that do not fit each other."""
    check_numbers(config, world_size)
    plans = []
    for name in config.phase_names:
        phase = config.phase(name)
        with torch.device("meta"):
            network = build_network(phase)
        freeze_unused(network, phase)
        frozen = _frozen_teacher(phase, network)
        mode = parallel_mode(phase, network, world_size)
        plans.append(
            PhasePlan(
                name=name,
                config=phase,
                network=network,
                flops_per_image=flops_per_image(step_cost(phase, network, frozen), phase.crops.all_sizes()),
                mode=mode,
                memory=rank_memory(phase, network, frozen, world_size, mode),
                start_bytes=start_memory(phase, network, frozen, shards(phase, world_size, mode)),
            )
        )
    return plans


def flops_per_image(cost: StepCost, sizes: Sequence[CropSizes]) -> float:
    """Averaged over the crop sizes that steps draw."""
    total = sum(size.probability for size in sizes)
    return sum(s.probability / total * step_flops(cost, s.global_px, s.local_px, s.gram_px) for s in sizes)


def parallel_mode(config: TrainConfig, network: Network, world_size: int) -> str:
    """What `execution.parallel` comes to."""
    if config.execution.parallel != "auto":
        return config.execution.parallel
    if world_size == 1:
        return "single"
    return "ddp" if count(network) <= DDP_LIMIT else "fsdp"


def epochs(data: DataConfig, images_drawn: int, images_of: Mapping[str, int]) -> dict[str, float]:
    """How often each dataset is seen, by name, when so many images are drawn."""
    weights = {name: dataset.weight for name, dataset in data.datasets.items()}
    total = sum(weights.values())
    shares = {name: (1 - data.homogeneous_share) * (w / total if total else 0) for name, w in weights.items()}
    if data.homogeneous:
        shares[data.homogeneous] += data.homogeneous_share
    return {name: share * images_drawn / images_of[name] for name, share in shares.items()}


def _frozen_teacher(config: TrainConfig, network: Network) -> Network:
    """On `meta`: the teacher of a distillation, from its description; the student's like where it is not there yet."""
    if not config.distill_from or not Path(config.distill_from).exists():
        return network
    description = find_weights(config.distill_from).description
    if not description.get("heads"):
        return network  # refused where it is loaded
    with torch.device("meta"):
        return described_network(description)


def _parameters(plan: PhasePlan) -> Table:
    table = _table("Parameters", "network", ">M", "what")
    network, config, backbone = plan.network, plan.config, plan.network.backbone
    shape = f"{backbone.embed_dim} wide, {len(backbone.blocks)} blocks, patch {backbone.patch_size} px"
    table.add_row(
        "backbone",
        f"{count(backbone) / 1e6:,.2f}",
        f"{config.model.architecture}: {shape}, {backbone.num_registers} registers",
    )
    heads = {"DINO head": (network.dino_head, config.heads.dino), "iBOT head": (network.ibot_head, config.heads.ibot)}
    for name, (head, settings) in heads.items():
        if head is None:
            table.add_row(name, "", "the DINO head")
        else:
            sizes = (
                f"{settings.num_layers} layers, {settings.hidden_dim:,} hidden, {settings.bottleneck_dim} bottleneck"
            )
            prototypes = f"{settings.num_prototypes:,} prototypes" if config.has_prototypes else "no prototypes"
            table.add_row(name, f"{count(head) / 1e6:,.2f}", f"{prototypes}, {sizes}")
    return table


def _steps(plans: Sequence[PhasePlan], images_of: Sequence[Mapping[str, int]]) -> Table:
    table = _table("Phases", "phase", ">steps", ">batch", ">images", "crops", ">an image", ">in all", "epochs")
    for plan, images in zip(plans, images_of, strict=True):
        config = plan.config
        seen = epochs(config.data, plan.images, images)
        table.add_row(
            plan.name,
            f"{config.steps:,}",
            f"{config.global_batch_size:,}",
            _scaled(plan.images, ("", "k", "M", "G")),
            "; ".join(_crop_sizes(config, size) for size in config.crops.all_sizes()),
            _scaled(plan.flops_per_image, _FLOP),
            _scaled(plan.flops, _FLOP),
            ", ".join(f"{name} {value:,.3g}" for name, value in seen.items()) or "-",
        )
    return table


def _memory(plans: Sequence[PhasePlan], world_size: int) -> Table:
    """One column a phase; one row for what memory is for."""
    title = f"Memory of one rank of {world_size} at the peak of a step, reckoned"
    table = _table(title, "for", *(f">{plan.name}" for plan in plans))
    for name in dict.fromkeys(name for plan in plans for name in plan.memory):
        table.add_row(name, *(_scaled(plan.memory.get(name, 0), _BYTES) for plan in plans))
    table.add_row("in all", *(_scaled(sum(plan.memory.values()), _BYTES) for plan in plans))
    table.add_row("before a step", *(_scaled(plan.start_bytes, _BYTES) for plan in plans))
    images = [micro_batch_size(plan.config, world_size) for plan in plans]
    table.add_row("", *(f"{n} images, {plan.mode}" for n, plan in zip(images, plans, strict=True)))
    return table


def _times(plans: Sequence[PhasePlan], world_size: int) -> Table:
    table = _table(f"Time on {world_size} such device(s)", "device", ">images/s", ">time", "rate")
    total = sum(plan.flops for plan in plans)
    images = sum(plan.images for plan in plans)
    for rate in RATES:
        seconds = total / (rate.flops_per_s * world_size)
        speed = f"{_scaled(rate.flops_per_s, _FLOP)}/s: {rate.source}"
        table.add_row(
            rate.device, f"{images / seconds:,.{0 if images > 99 * seconds else 2}f}", _duration(seconds), speed
        )
    return table


def _notes(plans: Sequence[PhasePlan], world_size: int) -> Iterator[str]:
    steps, flops = sum(plan.config.steps for plan in plans), sum(plan.flops for plan in plans)
    yield f"in all {steps:,} steps and {_scaled(flops, _FLOP)} on {world_size} rank(s)"
    for plan in plans:
        optim, batch = plan.config.optim, plan.config.global_batch_size
        like = (plan.config.phases.get(plan.name) or {}).get(LIKE)
        yield (
            (f"{plan.name}, like {like}: " if like else f"{plan.name}: ")
            + f"learning rate {scaled_lr(optim.base_lr, batch, optim.lr_rule):.3g} "
            f"({optim.base_lr:g} by rule {optim.lr_rule} for batch {batch:,}), "
            f"{optim.schedule} after {optim.warmup_steps:,} steps"
        )
    waiting = max(waiting_bytes(plan.config, world_size) for plan in plans)
    if waiting:
        loader = plans[0].config.execution.loader
        there = f"; this machine has {_scaled(shutil.disk_usage(SHARED).free, _BYTES)}" if SHARED.is_dir() else ""
        yield (
            f"shared memory ({SHARED}) for batches that wait: {_scaled(waiting, _BYTES)} on each rank "
            f"({loader.num_workers} workers x {loader.prefetch} batches){there}"
        )
    if not all(plan.config.data.datasets for plan in plans):
        yield "no dataset is named, so epochs are not known: give --data"


def _crop_sizes(config: TrainConfig, size: CropSizes) -> str:
    gram = f" + {NUM_GLOBAL_CROPS} x {size.gram_px} Gram" if size.gram_px and config.gram.weight else ""
    chance = f" ({size.probability:.0%})" if len(config.crops.all_sizes()) > 1 else ""
    return f"{NUM_GLOBAL_CROPS} x {size.global_px} + {config.crops.num_local_crops} x {size.local_px}{gram}{chance}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, width=_WIDTH)
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name[0] == ">" else "left", overflow="fold")
    return table


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}".rstrip()
        value /= 1000
    return f"{value:,.3g} {units[-1]}"


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.0f} s"
