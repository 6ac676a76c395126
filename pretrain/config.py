"""TrainConfig: the components' configs put together. A phase is the whole config with that phase's differences."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.loader import load_config, merge_config, override_config
from pretrain.checkpoint import CheckpointConfig
from pretrain.data.crops import CropsConfig
from pretrain.data.loader import DataConfig, LoaderConfig
from pretrain.data.masks import MaskConfig
from pretrain.distributed.fsdp import MODES, PRECISIONS
from pretrain.models.architectures import ARCHITECTURES
from pretrain.optim.schedules import OptimConfig
from pretrain.watch.evaluation import EvaluationConfig
from pretrain.watch.metrics import WatchConfig

GROUP = "pretrain"
CENTERINGS = ("sinkhorn", "softmax")
KOLEO_CROPS = ("all", "first")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student's backbone. None keeps what the architecture has."""

    architecture: str = "dinov2_vits14"
    """a name of pretrain.models.architectures"""
    patch_size: int | None = None
    num_registers: int | None = None
    ffn: str | None = None
    """mlp or swiglu"""
    position_px: int | None = None
    """side of the images that the learned position table is for; a phase that changes it resizes the table"""
    depth: int | None = None
    """blocks"""
    layerscale: float | None = None
    """initial factor of the residual branches; 1e-5 as published makes short runs slow"""
    untied_local_norm: bool | None = None
    """a final norm of their own for CLS and registers of local crops, in training"""
    rope_shift: float | None = None
    """noise of rotary positions in training: shift in (-s, s)"""
    rope_jitter: float | None = None
    """factor in (1/j, j) for each axis"""
    rope_rescale: float | None = None
    """factor in (1/r, r) for both; 2 in DINOv3"""
    drop_path: float = 0.0
    """stochastic depth: share of the images that a block leaves out, in [0, 1)"""
    attention: str = "sdpa"
    """sdpa (one call per crop size), varlen (packed), xformers"""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"model.architecture={self.architecture!r} is unknown; choose one of "
                f"{', '.join(sorted(ARCHITECTURES))}."
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path={self.drop_path} must lie in [0, 1).")

    def changes(self) -> dict[str, Any]:
        """What differs from the architecture, as keyword arguments of VisionTransformer."""
        changed: dict[str, Any] = {"drop_path": self.drop_path, "attention": self.attention}
        optional = ("patch_size", "num_registers", "ffn", "depth", "layerscale", "untied_local_norm")
        for name in (*optional, "rope_shift", "rope_jitter", "rope_rescale"):
            if getattr(self, name) is not None:
                changed[name] = getattr(self, name)
        if self.position_px is not None:
            patch = self.patch_size or ARCHITECTURES[self.architecture]["patch_size"]
            if self.position_px % patch:
                raise ValueError(f"model.position_px={self.position_px} is not a multiple of the patch size {patch}.")
            changed["position_grid"] = self.position_px // patch
        return changed


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A projection head: an MLP to a unit-norm bottleneck, then prototypes."""

    num_prototypes: int = 65_536
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    weight_norm: bool = True
    """prototypes as a length and a direction, as in DINOv2; false: a plain linear layer, as in DINOv3"""
    train_lengths: bool = True
    """false: lengths of weight-normed prototypes stay 1, as in DINO; steadier at small batches"""


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """The head on CLS tokens and the one on masked patches."""

    dino: HeadConfig = field(default_factory=HeadConfig)
    ibot: HeadConfig = field(default_factory=HeadConfig)
    tied: bool = False
    """one head for both, as in iBOT; then heads.ibot must equal heads.dino"""

    def __post_init__(self) -> None:
        if self.tied and self.ibot != self.dino:
            raise ValueError(
                "heads.tied=true uses one head for both: set heads.ibot to the same numbers as heads.dino."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and temperatures of the sum that is minimised."""

    dino_weight: float = 1.0
    dino_local_weight: float = 1.0
    """further factor of the local crops' share (DINOv3 lowers it to 0.5 with Gram anchoring)"""
    same_crop_pairs: bool = False
    """also pair a global crop with itself, as when a student without masks is distilled"""
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_crops: str = "all"
    """all global crops (both codes) or the first only (DINOv3's paper)"""
    koleo_group_size: int = 0
    """images whose CLS tokens repel each other, over ranks; 0: those of one micro-batch"""
    student_temperature: float = 0.1
    centering: str = "sinkhorn"
    """sinkhorn (Sinkhorn-Knopp) or softmax (moving centre)"""
    sinkhorn_iterations: int = 3
    center_momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.centering not in CENTERINGS:
            raise ValueError(f"loss.centering={self.centering!r} is unknown; choose one of {', '.join(CENTERINGS)}.")
        if self.koleo_crops not in KOLEO_CROPS:
            raise ValueError(
                f"loss.koleo_crops={self.koleo_crops!r} is unknown; choose one of {', '.join(KOLEO_CROPS)}."
            )


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """Gram anchoring (DINOv3, Sec. 4): patch similarities are held to those of an earlier teacher."""

    weight: float = 0.0
    """2.0 in DINOv3, 1.5 while adapting to high resolution; 0: off"""
    teacher: str = "ema"
    """folder of a teacher or checkpoint, or `ema`: the teacher as it is when the phase starts"""
    refresh_every_steps: int = 0
    """the EMA teacher becomes the Gram teacher after so many steps; 0: never"""
    max_refreshes: int = 3
    negatives: str = "keep"
    """keep, remove or remove_teacher: what happens to negative similarities (pretrain.losses.gram)"""


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How the run is computed. Changing it on resume is allowed."""

    device: str = "auto"
    """auto, cpu, cuda"""
    parallel: str = "auto"
    """auto (single for one process, DDP below a billion parameters, FSDP2 above), single, ddp, fsdp"""
    accumulation_steps: int = 1
    """micro-batches of a step; losses equal those of one batch but for KoLeo, whose neighbours are the micro-batch's"""
    activation_checkpointing: bool = False
    compile: bool = False
    """torch.compile of every block"""
    threads: int = 0
    """of one process on a CPU; 0: torch's own choice"""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        if self.parallel not in MODES:
            raise ValueError(f"execution.parallel={self.parallel!r} is unknown; choose one of {', '.join(MODES)}.")
        if self.accumulation_steps < 1:
            raise ValueError(f"execution.accumulation_steps={self.accumulation_steps} must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run; or, after `phase`, one phase of it."""

    seed: int = 0
    global_batch_size: int = 2048
    """images of a step, over all ranks and micro-batches"""
    steps: int = 125_000
    """of this phase"""
    precision: str = "bfloat16"
    """of matrix products; parameters, statistics and losses are float32"""
    init_from: str = ""
    """a teacher, checkpoint or released .pth that student and teacher start from; empty: random"""
    reset_optimizer: bool = True
    """a phase after the first starts with fresh AdamW moments"""
    distill_from: str = ""
    """folder of a frozen teacher with heads; the student's EMA is then the product. Empty: self-distillation"""
    phases: dict[str, Any] = field(default_factory=dict)
    """name -> what differs from the settings of this file, in the order they run; empty: one, named pretrain"""
    model: ModelConfig = field(default_factory=ModelConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    gram: GramConfig = field(default_factory=GramConfig)
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}.")
        if self.steps < 1 or self.global_batch_size < 1:
            raise ValueError(f"steps={self.steps} and global_batch_size={self.global_batch_size} must be at least 1.")

    @property
    def phase_names(self) -> list[str]:
        return list(self.phases) or ["pretrain"]

    @property
    def patch_size(self) -> int:
        return self.model.patch_size or ARCHITECTURES[self.model.architecture]["patch_size"]

    def phase(self, name: str) -> "TrainConfig":
        """This config with the differences of one phase."""
        differences = self.phases.get(name) or {}
        forbidden = [key for key in ("phases", "execution", "checkpoint", "seed") if key in differences]
        if forbidden:
            raise ValueError(f"phases.{name}.{forbidden[0]} cannot differ by phase; set {forbidden[0]} for the run.")
        # `phases` stays: a phase knows the run it belongs to.
        return merge_config(self, differences, f"phases.{name}")

    def check(self, world_size: int) -> None:
        """What can be known to be wrong before any time is lost, in one sentence each (ValueError)."""
        for name in self.phase_names:
            _check_phase(name, self.phase(name), world_size)


def load_train_config(name_or_path: str, overrides: list[str], shards: list[str]) -> TrainConfig:
    """The config of a command line; `shards` (paths, globs or folders) replace the datasets that the file names.

    One is named `shards`, several `0-NAME`, `1-NAME`, so that `data.datasets.0-NAME.weight=2` weighs them.
    """
    config = load_config(TrainConfig, GROUP, name_or_path)
    if shards:
        names = [_dataset_name(path, i, len(shards)) for i, path in enumerate(shards)]
        datasets = {name: {"shards": path} for name, path in zip(names, shards, strict=True)}
        config = replace(config, data=replace(config.data, datasets={}))
        config = merge_config(config, {"data": {"datasets": datasets}}, "--shards")
    config = override_config(config, overrides)
    for phase in config.phase_names:
        config.phase(phase)  # a wrong key in a phase is an error now, not after the first phase
    return config


def _dataset_name(path: str, index: int, count: int) -> str:
    readable = re.sub(r"[^A-Za-z0-9]+", "-", Path(path).stem).strip("-") or "shards"
    return "shards" if count == 1 else f"{index}-{readable}"


def _check_phase(name: str, config: TrainConfig, world_size: int) -> None:
    ranks = world_size * config.execution.accumulation_steps
    if config.global_batch_size % ranks:
        below = config.global_batch_size // ranks * ranks
        nearest = f"{below} and {below + ranks}" if below else f"{ranks}"
        raise ValueError(
            f"global_batch_size={config.global_batch_size} does not split over {world_size} ranks of "
            f"{config.execution.accumulation_steps} micro-batches; the nearest that do are {nearest}."
        )
    images = config.global_batch_size // ranks
    loss = config.loss
    if loss.koleo_weight and not loss.koleo_group_size and images < 2:
        raise ValueError(
            f"phase {name}: KoLeo needs two images to have a neighbour, found {images} in a micro-batch; raise "
            "global_batch_size, set loss.koleo_group_size, or loss.koleo_weight=0."
        )
    if loss.koleo_group_size and (loss.koleo_group_size % images or config.global_batch_size % loss.koleo_group_size):
        raise ValueError(
            f"phase {name}: loss.koleo_group_size={loss.koleo_group_size} must be a multiple of the {images} images of "
            f"a micro-batch and divide global_batch_size={config.global_batch_size}."
        )
    config.model.changes()
    if config.gram.weight and not config.crops.all_sizes()[0].gram_px:
        raise ValueError(
            f"phase {name}: gram.weight={config.gram.weight} needs crops.gram_px, the Gram teacher's crop."
        )
    if config.gram.weight and config.distill_from:
        raise ValueError(f"phase {name}: gram.weight and distill_from together are not a published recipe; choose one.")


def micro_batch_size(config: TrainConfig, world_size: int) -> int:
    """Images of one micro-batch on one rank."""
    return config.global_batch_size // (world_size * config.execution.accumulation_steps)


def total_steps(config: TrainConfig) -> int:
    return sum(config.phase(name).steps for name in config.phase_names)
