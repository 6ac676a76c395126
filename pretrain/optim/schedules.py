"""Learning rate, weight decay, teacher momentum and temperature as pure functions of the step.

Steps count from 0 within a phase; after its last step every function stays at its final value. End points are those of
DINOv2's released schedules: a linear ramp reaches its end at its last step, a cosine comes within one step of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from configs.ranges import check_choice, check_ranges

LR_RULES: dict[str, Callable[[int], float]] = {
    "sqrt_1024": lambda batch: math.sqrt(batch / 1024),
    "sqrt_1024_x4": lambda batch: 4 * math.sqrt(batch / 1024),
    "linear_256": lambda batch: batch / 256,
    "none": lambda batch: 1.0,
}
"""Factor on the base learning rate for a global batch size. Source: the released DINOv2 and DINOv3 configurations."""


STEP_COUNTS = (
    "warmup_steps",
    "freeze_last_layer_steps",
    "freeze_backbone_steps",
    "teacher_temperature_warmup_steps",
)
"""Settings that say how long the start of a phase is."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    base_lr: float = 4e-3
    """Peak learning rate before `lr_rule` scales it; above 0."""
    lr_rule: str = "sqrt_1024"
    """How `base_lr` follows the global batch size B: sqrt_1024 (DINOv2: sqrt(B/1024)), sqrt_1024_x4 (DINOv3: four times
    that), linear_256 (B/256) or none."""
    min_lr: float = 1e-6
    """Learning rate at the end of a cosine schedule, not scaled; 0 or more."""
    warmup_steps: int = 12_500
    """Steps over which the learning rate rises from 0 to its peak."""
    warmup: str = "linear"
    """Shape of the rise: linear, or cosine (DINOv3's high-resolution stage and distillation)."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine (down to `min_lr` at the last step) or constant."""
    weight_decay: float = 0.04
    """Weight decay at the first step; 0 or more."""
    weight_decay_end: float = 0.4
    """Weight decay at the last step, reached along a cosine; equal to `weight_decay` for a constant one."""
    beta1: float = 0.9
    """Decay of AdamW's first moment; in [0, 1)."""
    beta2: float = 0.999
    """Decay of AdamW's second moment; in [0, 1). DINOv3's 7B: 0.99."""
    clip_norm: float = 3.0
    """Largest gradient norm of each of backbone, DINO head and iBOT head; 0 turns clipping off."""
    layerwise_decay: float = 0.9
    """Learning rate of a block relative to the block above it; in (0, 1]."""
    patch_embed_lr_multiplier: float = 0.2
    """Learning rate of the patch embedding relative to what its depth gives; above 0."""
    freeze_last_layer_steps: int = 1_250
    """Steps in which the prototypes of both heads keep still (their learning rate is 0)."""
    freeze_backbone_steps: int = 0
    """Steps in which the backbone keeps still while the heads learn: for new heads on trained weights (`init_from`)."""
    max_skipped_steps: int = 3
    """Steps in a row that are skipped, since a loss or gradient is not finite; one more ends the run."""
    teacher_momentum: float = 0.992
    """Share of the teacher that an EMA update keeps, at the first step; in [0, 1]."""
    teacher_momentum_end: float = 1.0
    """The same at the last step, reached along a cosine."""
    teacher_temperature: float = 0.04
    """Temperature of the teacher's softmax at the first step; above 0."""
    teacher_temperature_end: float = 0.07
    """The same after its warm-up."""
    teacher_temperature_warmup_steps: int = 37_500
    """Steps over which the teacher's temperature changes linearly."""

    def __post_init__(self) -> None:
        check_choice("optim.lr_rule", self.lr_rule, tuple(LR_RULES))
        check_choice("optim.warmup", self.warmup, ("linear", "cosine"))
        check_choice("optim.schedule", self.schedule, ("cosine", "constant"))
        positive = ("base_lr", "patch_embed_lr_multiplier", "teacher_temperature", "teacher_temperature_end")
        not_negative = ("min_lr", "weight_decay", "weight_decay_end", "clip_norm", "max_skipped_steps", *STEP_COUNTS)
        ranges = dict.fromkeys(positive, "(0, inf)") | dict.fromkeys(not_negative, "[0, inf)")
        ranges |= dict.fromkeys(("beta1", "beta2"), "[0, 1)")
        ranges |= dict.fromkeys(("teacher_momentum", "teacher_momentum_end"), "[0, 1]")
        check_ranges("optim", self, **ranges | {"layerwise_decay": "(0, 1]"})

    def check_steps(self, num_steps: int, prefix: str = "") -> None:
        """Raises ValueError: warm-ups or freezes that are longer than a phase of `num_steps` steps, all of them."""
        longer = [name for name in STEP_COUNTS if getattr(self, name) > num_steps]
        if longer:
            found = ", ".join(f"optim.{name}={getattr(self, name)}" for name in longer)
            wanted = " ".join(f"optim.{name}={num_steps // 10}" for name in longer)
            raise ValueError(
                f"{prefix}{found}: longer than the phase, steps={num_steps}, so that what follows would never come; "
                f"set them to that or less (0: none), for example {wanted}."
            )


@dataclass(frozen=True)
class StepValues:
    """What the schedules give at one step."""

    lr: float
    last_layer_lr: float
    backbone_lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float


def linear(step: int, start: float, end: float, num_steps: int) -> float:
    """From `start` at step 0 to `end` at step num_steps - 1, `end` afterwards."""
    if step >= num_steps:
        return end
    return start + (end - start) * step / max(num_steps - 1, 1)


def cosine(step: int, start: float, end: float, num_steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step num_steps, `end` afterwards."""
    if step >= num_steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / num_steps))


def scaled_lr(base_lr: float, global_batch_size: int, rule: str) -> float:
    """The peak learning rate at this global batch size (images per optimizer step over all ranks)."""
    return base_lr * LR_RULES[rule](global_batch_size)


def learning_rate(config: OptimConfig, step: int, num_steps: int, peak: float) -> float:
    """Warm-up from 0 to `peak`, then constant or a cosine that ends at `min_lr` at `num_steps`."""
    if step < config.warmup_steps:
        rise = linear if config.warmup == "linear" else cosine
        return rise(step, 0.0, peak, config.warmup_steps)
    if config.schedule == "constant":
        return peak
    return cosine(step - config.warmup_steps, peak, config.min_lr, num_steps - config.warmup_steps)


def values_at(config: OptimConfig, step: int, num_steps: int, global_batch_size: int) -> StepValues:
    """Every scheduled value at `step` of a phase of `num_steps` steps."""
    lr = learning_rate(config, step, num_steps, scaled_lr(config.base_lr, global_batch_size, config.lr_rule))
    return StepValues(
        lr=lr,
        last_layer_lr=0.0 if step < config.freeze_last_layer_steps else lr,
        backbone_lr=0.0 if step < config.freeze_backbone_steps else lr,
        weight_decay=cosine(step, config.weight_decay, config.weight_decay_end, num_steps),
        teacher_momentum=cosine(step, config.teacher_momentum, config.teacher_momentum_end, num_steps),
        teacher_temperature=linear(
            step,
            config.teacher_temperature,
            config.teacher_temperature_end,
            config.teacher_temperature_warmup_steps,
        ),
    )
