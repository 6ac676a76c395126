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
from pretrain.checkpoint import CheckpointConfig
from pretrain.data.crops import CropsConfig
from pretrain.data.loader import DataConfig
from pretrain.data.masks import MaskConfig
from pretrain.distributed.fsdp import PRECISIONS
from pretrain.models.architectures import ARCHITECTURES
from pretrain.optim.schedules import OptimConfig, cosine
from pretrain.settings import ExecutionConfig, GramConfig, HeadsConfig, LossConfig, ModelConfig
from pretrain.watch.evaluation import EvaluationConfig
from pretrain.watch.metrics import WatchConfig

GROUP = "pretrain"
log = logging.getLogger(__name__)
NETWORKS = ("student", "teacher")
# Of a phase: which one before it this one differs from.
LIKE = "like"
# Keys that a phase may not have, and why.
_OF_THE_RUN = ("phases", "seed", "execution", "checkpoint", "watch")


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
