"""The settings of one phase of a training, component by component; `config.py` puts them together.

Data, crops, masks, optimizer, checkpoints, evaluation and watching have their settings where they are done.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.ranges import check_choice, check_ranges
from pretrain.checkpoint import PREFIX
from pretrain.data.loader import LoaderConfig
from pretrain.distributed.collectives import DEVICES
from pretrain.distributed.fsdp import MODES
from pretrain.losses.gram import NEGATIVES
from pretrain.models.architectures import ARCHITECTURES
from pretrain.models.layers.attention import BACKENDS
from pretrain.models.layers.ffn import FFNS
from pretrain.models.layers.patch_embed import STEMS

OBJECTIVES = ("prototypes", "coding_rate")
CENTERINGS = ("sinkhorn", "softmax")
IBOT_PATCHES = ("masked", "all")
KOLEO_CROPS = ("all", "first")
# Of the model, how it is run and not what it is: weights fit whatever these say.
RUN_SETTINGS = ("position_offset", "rope_shift", "rope_jitter", "rope_rescale", "drop_path", "attention", "fp8")


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
