"""TrainConfig: the components' configs put together. A phase is the whole config with that phase's differences."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.loader import load_config, merge_config, override_config
from configs.ranges import check_choice, check_ranges
from pretrain.checkpoint import PREFIX, CheckpointConfig
from pretrain.data.crops import CropsConfig
from pretrain.data.loader import DataConfig, LoaderConfig
from pretrain.data.masks import MaskConfig
from pretrain.distributed.collectives import DEVICES
from pretrain.distributed.fsdp import MODES, PRECISIONS
from pretrain.losses.gram import NEGATIVES
from pretrain.models.architectures import ARCHITECTURES
from pretrain.models.layers.attention import BACKENDS
from pretrain.models.layers.ffn import FFNS
from pretrain.models.layers.patch_embed import STEMS
from pretrain.optim.schedules import OptimConfig, cosine
from pretrain.watch.evaluation import EvaluationConfig
from pretrain.watch.metrics import WatchConfig

GROUP = "pretrain"
log = logging.getLogger(__name__)
OBJECTIVES = ("prototypes", "coding_rate")
CENTERINGS = ("sinkhorn", "softmax")
IBOT_PATCHES = ("masked", "all")
NETWORKS = ("student", "teacher")
KOLEO_CROPS = ("all", "first")
# Of a phase: which one before it this one differs from.
LIKE = "like"
# Of the model, how it is run and not what it is: weights fit whatever these say.
RUN_SETTINGS = ("position_offset", "rope_shift", "rope_jitter", "rope_rescale", "drop_path", "attention", "fp8")
# Keys that a phase may not have, and why.
_OF_THE_RUN = ("phases", "seed", "execution", "checkpoint", "watch")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The student's backbone. None keeps what the architecture has."""

    architecture: str = "dinov2_vits14"
    """a name of pretrain.models.architectures"""
    patch_size: int | None = None
    """pixels, 1 or more"""
    stem: str | None = None
    """patches (one linear map of each, as published) or convolutions (3 x 3 px, two for each halving of the sides;
    patch_size is a power of two), which learn faster from few and small images; no class of transformers or timm has
    them"""
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
    norm_eps: float | None = None
    """of the layer norms; above 0"""
    mask_key_bias: bool | None = None
    """keys have no bias, as in DINOv3 but for its ImageNet recipe"""
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
    """sdpa (one call per crop size), auto (the same, kernel by length), varlen (packed), xformers"""
    fp8: bool = False
    """8-bit products in the linear layers of blocks that are 1024 wide or more, on GPUs; with precision bfloat16"""

    def __post_init__(self) -> None:
        check_choice("model.architecture", self.architecture, sorted(ARCHITECTURES))
        check_choice("model.attention", self.attention, BACKENDS)
        if self.ffn is not None:
            check_choice("model.ffn", self.ffn, FFNS)
        if self.stem is not None:
            check_choice("model.stem", self.stem, STEMS)
        ranges = dict.fromkeys(("patch_size", "position_px", "depth"), "[1, inf)")
        ranges |= dict.fromkeys(("num_registers", "layerscale", "rope_shift"), "[0, inf)")
        ranges |= dict.fromkeys(("rope_jitter", "rope_rescale"), "[1, inf)") | {"norm_eps": "(0, inf)"}
        check_ranges("model", self, **ranges | {"drop_path": "[0, 1)", "position_offset": "[0, 1)"})

    def changes(self) -> dict[str, Any]:
        """What differs from the architecture, as keyword arguments of VisionTransformer."""
        changed: dict[str, Any] = {"drop_path": self.drop_path, "attention": self.attention, "fp8": self.fp8}
        optional = ("patch_size", "stem", "num_registers", "ffn", "depth", "norm_eps", "mask_key_bias", "layerscale")
        optional += ("untied_local_norm", "position_offset", "rope_shift", "rope_jitter", "rope_rescale")
        for name in optional:
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
            check_ranges(f"heads.{name}", getattr(self, name), **{"num_prototypes": "[2, inf)"} | sizes)
        if self.tied and self.ibot != self.dino:
            raise ValueError(
                "heads.tied=true uses one head for both: set heads.ibot to the same numbers as heads.dino."
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights (0 or more; 0 leaves a term out) and temperatures (above 0) of the sum that is minimised."""

    objective: str = "prototypes"
    """prototypes: cross-entropy to the teacher's assignments, DINO and iBOT; coding_rate: cosine to the teacher's rows,
    and the batch's coding rate against collapse (SimDINO, arXiv:2502.10385): heads then have no prototypes, and
    temperatures, centring and the freezing of the last layer nothing to act on"""
    coding_rate_weight: float = 1.0
    coding_rate_eps: float = 0.05
    """squared distortion up to which the rate counts, above 0; 0.5 in SimDINO, 0.05 in SimDINOv2"""
    dino_weight: float = 1.0
    dino_local_weight: float = 1.0
    """further factor of the local crops' share (DINOv3 lowers it to 0.5 with Gram anchoring)"""
    dino_local_ramp_steps: int = 0
    """steps of the phase over which that factor goes from 1 to its value, along a cosine; 0: none, it holds at once"""
    same_crop_pairs: bool = False
    """also pair a global crop with itself, as when a student without masks is distilled"""
    ibot_weight: float = 1.0
    ibot_patches: str = "masked"
    """masked, or all patches of the crops that have a mask, also those that the student sees (iBOT++,
    arXiv:2604.12012)"""
    koleo_weight: float = 0.1
    koleo_crops: str = "all"
    """all global crops (both codes) or the first only (DINOv3's paper)"""
    koleo_group_size: int = 0
    """images whose CLS tokens repel each other: a part of a micro-batch, or so many over ranks; 0: the micro-batch"""
    student_temperature: float = 0.1
    centering: str = "sinkhorn"
    """sinkhorn (Sinkhorn-Knopp) or softmax (moving centre)"""
    sinkhorn_iterations: int = 3
    """1 or more"""
    center_momentum: float = 0.9
    """in [0, 1)"""

    def __post_init__(self) -> None:
        check_choice("loss.objective", self.objective, OBJECTIVES)
        check_choice("loss.ibot_patches", self.ibot_patches, IBOT_PATCHES)
        check_choice("loss.centering", self.centering, CENTERINGS)
        check_choice("loss.koleo_crops", self.koleo_crops, KOLEO_CROPS)
        weights = ("dino_weight", "dino_local_weight", "ibot_weight", "koleo_weight", "koleo_group_size")
        weights += ("coding_rate_weight",)
        ranges = dict.fromkeys((*weights, "dino_local_ramp_steps"), "[0, inf)")
        ranges |= {"student_temperature": "(0, inf)", "coding_rate_eps": "(0, inf)"}
        ranges |= {"sinkhorn_iterations": "[1, inf)", "center_momentum": "[0, 1)"}
        check_ranges("loss", self, **ranges)
        if self.objective == "coding_rate" and not self.dino_weight:
            raise ValueError(
                "loss.objective=coding_rate with loss.dino_weight=0 lets all images have one answer, for the rate is "
                "that of CLS tokens: set loss.dino_weight above 0."
            )


@dataclass(frozen=True, kw_only=True)
class GramConfig:
    """Gram anchoring (DINOv3, Sec. 4): patch similarities are held to those of an earlier teacher."""

    weight: float = 0.0
    """2.0 in DINOv3, 1.5 while adapting to high resolution; 0: off"""
    ramp_steps: int = 0
    """steps of the phase over which the weight rises from 0, along a cosine; 0: none, it holds at once"""
    teacher: str = "ema"
    """`ema`: the teacher as it is when the phase starts; `step-N`: as it was after N steps of this run, whose
    checkpoint `checkpoint.keep_every_steps` must have kept; or the folder of a teacher or checkpoint"""
    refresh_every_steps: int = 0
    """the EMA teacher becomes the Gram teacher after so many steps; 0: never"""
    max_refreshes: int = 3
    negatives: str = "keep"
    """keep, remove or remove_teacher: what happens to negative similarities (pretrain.losses.gram)"""

    def __post_init__(self) -> None:
        check_choice("gram.negatives", self.negatives, NEGATIVES)
        not_negative = ("weight", "ramp_steps", "refresh_every_steps", "max_refreshes")
        check_ranges("gram", self, **dict.fromkeys(not_negative, "[0, inf)"))

    def source(self, checkpoints: Path) -> str:
        """Where a teacher other than `ema` lies; `checkpoints` is the folder of the run's own."""
        own_step = re.fullmatch(rf"{PREFIX}(\d+)", self.teacher)
        return str(checkpoints / f"{PREFIX}{int(own_step[1]):08d}") if own_step else self.teacher


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How the run is computed. Changing it on resume is allowed."""

    device: str = "auto"
    """auto, cpu, cuda"""
    parallel: str = "auto"
    """auto (single for one process, DDP below a billion parameters, FSDP2 above), single, ddp (a copy on every rank),
    fsdp (one copy, over all ranks), hybrid (one copy over each `shard_ranks` ranks)"""
    shard_ranks: int = 0
    """ranks that share a copy of all weights under hybrid, next to each other; 0: those of a node"""
    accumulation_steps: int = 1
    """micro-batches of a step; losses equal those of one batch but for KoLeo without a group, stochastic depth and RoPE
    noise, which are a micro-batch's own"""
    activation_checkpointing: bool = False
    compile: bool = False
    """torch.compile of every block and head, and on GPUs of the losses over fewer than 2^18 prototypes"""
    deterministic: bool = False
    """equal runs on equal GPUs give equal bits, somewhat slower; on a processor they always do"""
    threads: int = 0
    """of one process on a CPU; 0: torch's own choice"""
    loader: LoaderConfig = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        check_choice("execution.device", self.device, DEVICES)
        check_choice("execution.parallel", self.parallel, MODES)
        check_ranges("execution", self, accumulation_steps="[1, inf)", threads="[0, 1024]", shard_ranks="[0, inf)")


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
    start_from: str = "student"
    """whose weights the student of a phase after the first starts from: student, or teacher (DINOv3's high-resolution
    stage); its teacher goes on as it was"""
    distill_from: str = ""
    """folder of a frozen teacher with heads; the student's EMA is then the product. Empty: self-distillation"""
    phases: dict[str, Any] = field(default_factory=dict)
    """name -> what differs from the settings of this file, in the order they run; empty: one, named pretrain.

    With `like: NAME`, what differs from that phase, which comes before it, rather than from the settings of the file.
    `data.datasets` of a phase are all that it draws from; those of the run lend what an entry leaves out. On the
    command line `phases={...}` replaces them all, `phases.NAME={...}` one, `phases.NAME=null` drops one.
    """
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
        if self.model.fp8 and self.precision != "bfloat16":
            raise ValueError(f"model.fp8=true goes with precision=bfloat16, not {self.precision}.")
        check_choice("start_from", self.start_from, NETWORKS)
        check_ranges("", self, seed="[0, inf)", steps="[1, inf)", global_batch_size="[1, inf)")

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
    def predicted_share(self) -> float:
        """Of all patches of the global crops, the share that iBOT predicts."""
        if not self.uses_ibot:
            return 0.0
        share = 1.0 if self.loss.ibot_patches == "all" else sum(self.masks.ratio) / 2
        return self.masks.probability * share

    @property
    def has_prototypes(self) -> bool:
        """Whether heads end in prototypes."""
        return self.loss.objective == "prototypes"

    @property
    def patch_size(self) -> int:
        return self.model.patch_size or ARCHITECTURES[self.model.architecture]["patch_size"]

    @cached_property
    def _merged_phases(self) -> "dict[str, TrainConfig]":
        """Those that `phase` has been asked for: merging takes tens of milliseconds, and every step asks."""
        return {}

    def phase(self, name: str) -> "TrainConfig":
        """This config with the differences of one phase."""
        if name not in self._merged_phases:
            self._merged_phases[name] = self._merge_phase(name)
        return self._merged_phases[name]

    def at_step(self, step: int) -> "TrainConfig":
        """This phase's config with the weights of the loss as they are at one of its steps."""
        loss, gram = self.loss, self.gram
        if step >= max(loss.dino_local_ramp_steps, gram.ramp_steps):
            return self
        local = cosine(step, 1.0, loss.dino_local_weight, loss.dino_local_ramp_steps)
        weight = cosine(step, 0.0, gram.weight, gram.ramp_steps)
        return replace(self, loss=replace(loss, dino_local_weight=local), gram=replace(gram, weight=weight))

    def _merge_phase(self, name: str) -> "TrainConfig":
        differences = self.phases.get(name) or {}
        if not isinstance(differences, dict):
            raise ValueError(f"phases.{name} is a mapping of settings, found {differences!r}.")
        like = _like(self, name, differences)
        differences = {key: value for key, value in differences.items() if key != LIKE}
        _check_differences(name, differences, is_first=name == self.phase_names[0])
        base, differences = _with_datasets(self if like is None else self.phase(like), name, differences)
        try:
            # `phases` stays: a phase knows the run it belongs to.
            phase = merge_config(base, differences, f"phases.{name}")
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith("phases.") else f"phases.{name}: {text}") from None
        _check_one_size(phase.crops, differences.get("crops") or {}, f"phases.{name}.crops")
        return phase


def load_train_config(name_or_path: str, overrides: list[str], shards: list[str]) -> TrainConfig:
    """The config of a command line; `shards` (paths, globs or folders) replace the datasets that the file names.

    One is named `shards`, several `0-NAME`, `1-NAME`, so that `data.datasets.0-NAME.weight=2` weighs them.
    """
    config = load_config(TrainConfig, GROUP, name_or_path)
    if shards:
        names = [_dataset_name(path, i, len(shards)) for i, path in enumerate(shards)]
        datasets = {name: {"shards": path} for name, path in zip(names, shards, strict=True)}
        config = replace(config, data=replace(config.data, datasets={}))
        config = merge_config(config, {"data": {"datasets": datasets}}, "--data")
    config = override_config(config, overrides)
    _check_one_size(config.crops, _not_default(config.crops), "crops")
    for name in config.phase_names:
        config.phase(name)  # a wrong key in a phase is an error now, not after the first phase
        own = config.phase(name).data.datasets
        if shards and own != config.data.datasets:
            log.info("phase %s draws from its own data.datasets (%s), not from --data as such", name, ", ".join(own))
    return config


def _like(config: TrainConfig, name: str, differences: dict[str, Any]) -> str | None:
    """The phase that this one differs from; None: from the settings of the file.

    Raises ValueError: it is no phase before this one.
    """
    like = differences.get(LIKE)
    before = config.phase_names[: config.phase_names.index(name)]
    if like is not None and like not in before:
        raise ValueError(
            f"phases.{name}.like={like} names no phase before this one ({', '.join(before) or 'it is the first'}); "
            f"phases.{name}.like=null starts from the settings of the file."
        )
    return like


def _check_differences(name: str, differences: dict[str, Any], is_first: bool) -> None:
    """Raise ValueError for a key that would do nothing in this phase."""
    for key in _OF_THE_RUN:
        if key in differences:
            raise ValueError(f"phases.{name}.{key} cannot differ by phase; set {key} for the run.")
    if not is_first and "init_from" in differences:
        raise ValueError(
            f"phases.{name}.init_from: a phase after the first starts from the one before it; set init_from for the "
            "first phase, or drop the phases before this one."
        )
    if is_first and "reset_optimizer" in differences:
        raise ValueError(f"phases.{name}.reset_optimizer: the first phase has no optimizer to keep; leave it out.")
    if is_first and "start_from" in differences:
        raise ValueError(f"phases.{name}.start_from: the first phase has none before it; leave it out.")


def _not_default(crops: CropsConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(crops).items() if value != getattr(CropsConfig(), key)}


def _check_one_size(crops: CropsConfig, given: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a side that `sizes` would leave unused."""
    unused = [key for key in ("global_px", "local_px", "gram_px") if key in given]
    if crops.sizes and unused:
        raise ValueError(
            f"{where}.{unused[0]}={getattr(crops, unused[0])} does nothing where crops.sizes is given: change sizes, "
            f"or set {where}.sizes=[]."
        )


def _with_datasets(config: TrainConfig, name: str, differences: dict[str, Any]) -> tuple[TrainConfig, dict[str, Any]]:
    """A config and a phase's differences from it, such that merging them leaves the phase's own datasets, if any."""
    data = differences.get("data")
    own = data.get("datasets") if isinstance(data, dict) else None
    if own is None:
        return config, differences
    of_run = config.data.datasets
    if not isinstance(own, dict) or not own:
        raise ValueError(f"phases.{name}.data.datasets must name its datasets, NAME: {{shards: ...}}; found {own!r}.")
    complete = {}
    for dataset, entry in own.items():
        if not isinstance(entry, dict | None):
            raise ValueError(f"phases.{name}.data.datasets.{dataset} is a mapping, found {entry!r}.")
        complete[dataset] = (asdict(of_run[dataset]) if dataset in of_run else {}) | (entry or {})
        if "shards" not in complete[dataset]:
            raise ValueError(
                f"phases.{name}.data.datasets.{dataset}.shards is missing, and no dataset of the run has that name "
                f"(it has {', '.join(of_run) or 'none'})."
            )
    base = replace(config, data=replace(config.data, datasets={}))
    return base, {**differences, "data": {**differences["data"], "datasets": complete}}


def _dataset_name(path: str, index: int, count: int) -> str:
    readable = re.sub(r"[^A-Za-z0-9]+", "-", Path(path).stem).strip("-") or "shards"
    return "shards" if count == 1 else f"{index}-{readable}"


def micro_batch_size(config: TrainConfig, world_size: int) -> int:
    """Images of one micro-batch on one rank."""
    return config.global_batch_size // (world_size * config.execution.accumulation_steps)


def total_steps(config: TrainConfig) -> int:
    return sum(config.phase(name).steps for name in config.phase_names)
