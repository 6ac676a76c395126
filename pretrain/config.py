"""TrainConfig: the components' configs put together. A phase is the whole config with that phase's differences."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.loader import load_config, merge_config, override_config
from configs.ranges import check_choice, check_ranges
from pretrain.checkpoint import CheckpointConfig
from pretrain.data.crops import CropsConfig
from pretrain.data.loader import DataConfig, LoaderConfig
from pretrain.data.masks import MaskConfig
from pretrain.distributed.collectives import DEVICES
from pretrain.distributed.fsdp import MODES, PRECISIONS
from pretrain.losses.gram import NEGATIVES
from pretrain.models.architectures import ARCHITECTURES
from pretrain.models.layers.attention import BACKENDS
from pretrain.models.layers.ffn import FFNS
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
    """pixels, 1 or more"""
    num_registers: int | None = None
    """0 or more"""
    ffn: str | None = None
    """mlp or swiglu"""
    position_px: int | None = None
    """side of the images that the learned position table is for; a phase that changes it resizes the table"""
    position_offset: float | None = None
    """what the learned table's size is enlarged by as it is resized, in [0, 1): 0.1 in the code that DINOv2 without
    registers was released with, and therefore where such released weights are loaded; else 0"""
    depth: int | None = None
    """blocks, 1 or more"""
    layerscale: float | None = None
    """initial factor of the residual branches; 1e-5 as published makes short runs slow, 0: none"""
    untied_local_norm: bool | None = None
    """a final norm of their own for CLS and registers of local crops, in training"""
    rope_shift: float | None = None
    """noise of rotary positions in training: shift in (-s, s), 0 or more"""
    rope_jitter: float | None = None
    """factor in (1/j, j) for each axis, 1 or more"""
    rope_rescale: float | None = None
    """factor in (1/r, r) for both, 1 or more; 2 in DINOv3"""
    drop_path: float = 0.0
    """stochastic depth: share of the images that a block leaves out, in [0, 1)"""
    attention: str = "sdpa"
    """sdpa (one call per crop size), varlen (packed), xformers"""

    def __post_init__(self) -> None:
        check_choice("model.architecture", self.architecture, sorted(ARCHITECTURES))
        check_choice("model.attention", self.attention, BACKENDS)
        if self.ffn is not None:
            check_choice("model.ffn", self.ffn, FFNS)
        ranges = dict.fromkeys(("patch_size", "position_px", "depth"), "[1, inf)")
        ranges |= dict.fromkeys(("num_registers", "layerscale", "rope_shift"), "[0, inf)")
        ranges |= dict.fromkeys(("rope_jitter", "rope_rescale"), "[1, inf)")
        check_ranges(self, "model", ranges | {"drop_path": "[0, 1)", "position_offset": "[0, 1)"})

    def changes(self) -> dict[str, Any]:
        """What differs from the architecture, as keyword arguments of VisionTransformer."""
        changed: dict[str, Any] = {"drop_path": self.drop_path, "attention": self.attention}
        optional = ("patch_size", "num_registers", "ffn", "depth", "layerscale", "untied_local_norm", "position_offset")
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
    """2 or more; the other sizes 1 or more"""
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
        sizes = dict.fromkeys(("hidden_dim", "bottleneck_dim", "num_layers"), "[1, inf)")
        for name in ("dino", "ibot"):
            check_ranges(getattr(self, name), f"heads.{name}", {"num_prototypes": "[2, inf)"} | sizes)
        if self.tied and self.ibot != self.dino:
            raise ValueError(
                "heads.tied=true uses one head for both: set heads.ibot to the same numbers as heads.dino."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights (0 or more; 0 leaves a term out) and temperatures (above 0) of the sum that is minimised."""

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
    """1 or more"""
    center_momentum: float = 0.9
    """in [0, 1)"""

    def __post_init__(self) -> None:
        check_choice("loss.centering", self.centering, CENTERINGS)
        check_choice("loss.koleo_crops", self.koleo_crops, KOLEO_CROPS)
        weights = ("dino_weight", "dino_local_weight", "ibot_weight", "koleo_weight", "koleo_group_size")
        ranges = dict.fromkeys(weights, "[0, inf)")
        ranges |= {"student_temperature": "(0, inf)", "sinkhorn_iterations": "[1, inf)", "center_momentum": "[0, 1)"}
        check_ranges(self, "loss", ranges)


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

    def __post_init__(self) -> None:
        check_choice("gram.negatives", self.negatives, NEGATIVES)
        check_ranges(self, "gram", dict.fromkeys(("weight", "refresh_every_steps", "max_refreshes"), "[0, inf)"))


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
        check_choice("execution.device", self.device, DEVICES)
        check_choice("execution.parallel", self.parallel, MODES)
        check_ranges(self, "execution", {"accumulation_steps": "[1, inf)", "threads": "[0, inf)"})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run; or, after `phase`, one phase of it."""

    seed: int = 0
    """0 or more"""
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
        check_choice("precision", self.precision, PRECISIONS)
        check_ranges(self, "", {"seed": "[0, inf)", "steps": "[1, inf)", "global_batch_size": "[1, inf)"})

    @property
    def phase_names(self) -> list[str]:
        return list(self.phases) or ["pretrain"]

    @property
    def uses_dino(self) -> bool:
        """Whether the loss has the term on CLS tokens."""
        return self.loss.dino_weight > 0

    @property
    def uses_ibot(self) -> bool:
        """Whether the loss has the term on masked patches."""
        return self.loss.ibot_weight > 0 and self.masks.probability > 0 and self.masks.ratio[1] > 0

    @property
    def patch_size(self) -> int:
        return self.model.patch_size or ARCHITECTURES[self.model.architecture]["patch_size"]

    def phase(self, name: str) -> "TrainConfig":
        """This config with the differences of one phase."""
        differences = self.phases.get(name) or {}
        if not isinstance(differences, dict):
            raise ValueError(f"phases.{name} is a section, {{key: value}}; found {differences!r}.")
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
    config.optim.check_steps(config.steps, f"phase {name}: ")
    if not (config.uses_dino or config.uses_ibot or loss.koleo_weight or config.gram.weight):
        raise ValueError(
            f"phase {name}: nothing is learned, for every term of the loss is off; set loss.dino_weight, or "
            "loss.ibot_weight with masks.probability and masks.ratio above 0."
        )
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
