"""One phase of a run: its networks, optimizer and step; started afresh, from the phase before, or from a checkpoint."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.checkpoint import Checkpoints
from pretrain.config import TrainConfig, micro_batch_size
from pretrain.data.collate import Batch
from pretrain.data.crops import NUM_GLOBAL_CROPS, CropSizes
from pretrain.data.loader import Loader, build_loader
from pretrain.data.shards import ImageTable
from pretrain.distributed import collectives
from pretrain.distributed.fsdp import Wrapped, initialise, local_tensor, plain_module, wrap
from pretrain.losses.prototypes import Targets
from pretrain.models.layers.fp8 import check_device
from pretrain.network_weights import check_distillation, fill_teacher, load_network, offset_of, teacher_weights
from pretrain.optim.clip import FiniteWatch, clip_by_module
from pretrain.optim.ema import copy_parameters, paired_parameters, update_ema
from pretrain.optim.param_groups import adamw, apply_schedule, param_groups, step_unless
from pretrain.optim.schedules import StepValues, values_at
from pretrain.resume import Standing, check_distilled, weights_hash
from pretrain.student_teacher import (
    Centering,
    Crops,
    Network,
    TeacherAnswers,
    TeacherTargets,
    build_network,
    freeze_unused,
    gram_targets,
    student_losses,
    teacher_outputs,
)
from pretrain.watch.diagnostics import feature_std, target_diagnostics
from pretrain.watch.flops import StepCost, backbone_cost, matrix_weights, step_flops
from pretrain.weights import find_weights

# Streams of randomness, so that no two uses of (seed, phase, step) draw the same numbers.
_WEIGHTS, _STEP = 1, 2


class Phase:
    """The networks and optimizer of one phase on one rank.

    Args:
        config: of this phase (`TrainConfig.phase`).
        index: of the phase in the run.
        student, teacher: on the training device, float32, equal on all ranks; or on `meta`, for a device: whoever makes
            the phase then fills them.
        frozen: a teacher to distil from; None: the EMA teacher gives the targets.
        device: of networks on `meta`.
    """

    def __init__(
        self,
        config: TrainConfig,
        index: int,
        student: Network,
        teacher: Network,
        frozen: Network | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.config, self.index = config, index
        execution = config.execution
        self.device = device or next(student.parameters()).device
        depth = len(student.backbone.blocks)
        if config.model.fp8:
            check_device(self.device)
        freeze_unused(student, config)
        self.wrapped: Wrapped = wrap(
            student,
            teacher,
            execution.parallel,
            config.precision,
            checkpoint_blocks=execution.activation_checkpointing,
            compile_blocks=execution.compile,
            device=self.device,
            shard_ranks=execution.shard_ranks,
        )
        self.student, self.teacher = self.wrapped.student, self.wrapped.teacher
        self.frozen = None if frozen is None else self.wrapped.frozen(frozen)
        self.pairs = paired_parameters(self.teacher, self.student)
        groups = param_groups(
            self.student.named_parameters(),
            depth,
            config.optim.layerwise_decay,
            config.optim.patch_embed_lr_multiplier,
        )
        self.optimizer = adamw(groups, config.optim)
        plain = plain_module(self.student)
        self.modules = {
            name: parameters
            for name, child in plain.named_children()
            if (parameters := [p for p in child.parameters() if p.requires_grad])
        }
        self.cost = step_cost(config, student, teacher if frozen is None else frozen)
        self.centering = Centering(config, collectives.sum_over_ranks).to(self.device)
        # Ranks whose images repel each other talk among themselves.
        self.koleo_ranks = config.loss.koleo_group_size // micro_batch_size(config, collectives.world_size())
        self.koleo_group = collectives.consecutive_ranks(self.koleo_ranks) if self.koleo_ranks > 1 else None
        self.gram: nn.Module | None = None
        self.distilled: str | None = None  # the hash of `frozen`
        self.finite = FiniteWatch(config.optim.max_skipped_steps)
        self.student.train()

    def flops(self, sizes: CropSizes) -> float:
        """Operations that one image of a step of these crop sizes needs."""
        return step_flops(self.cost, sizes.global_px, sizes.local_px, sizes.gram_px)

    def values(self, step: int) -> StepValues:
        return values_at(self.config.optim, step, self.config.steps, self.config.global_batch_size)

    def step(self, batch: Batch, step: int, *, diagnose: bool) -> dict[str, Tensor]:
        """One optimizer step on this rank's images; returns what there is to watch, unread.

        Args:
            step: steps of this phase done before.
            diagnose: also measure teacher entropy, prototype use and feature spread.

        A step with a loss or gradient that is not finite leaves everything as it was: weights, moments, EMA, centre.

        Raises:
            FloatingPointError: too many such steps in a row, this one or (on a GPU) the one before being the last.
        """
        config, values = self.config, self.values(step)
        apply_schedule(self.optimizer, values)
        parts = batch.micro_batches(config.execution.accumulation_steps)
        self._refresh_gram(step)
        # Crops wait as bytes on the host. Of several micro-batches one at a time is made floats, for the teacher and
        # again for the student.
        crops = self.crops(batch) if len(parts) == 1 else None
        centre = [buffer.clone() for buffer in self.centering.buffers()]
        targets, features = self._targets(batch, parts, crops, values.teacher_temperature)
        watched: dict[str, Tensor] = {}
        for i, (part, target) in enumerate(zip(parts, targets, strict=True)):
            with self.wrapped.synchronize(last=i == len(parts) - 1):
                terms, details = self._student_losses(crops or self.crops(part), target, step, i)
                loss = torch.stack(list(terms.values())).sum()
                (loss / len(parts)).backward()
            for name, value in {"loss": loss, **{f"loss/{k}": v for k, v in (terms | details).items()}}.items():
                watched[name] = watched.get(name, 0) + value.detach() / len(parts)
        norms = clip_by_module(self.modules, config.optim.clip_norm)
        watched |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
        skip = self.finite.watch(step, watched)
        step_unless(self.optimizer, skip)
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.pairs, values.teacher_momentum, skip)
        for buffer, before in zip(self.centering.buffers(), centre, strict=True):
            buffer.copy_(torch.where(skip > 0, before, buffer))
        if diagnose:
            watched |= self._diagnostics(features, targets[0], watched)
        self.finite.check()
        return watched

    def has_finite_weights(self) -> bool:
        """Whether student and teacher are finite on all ranks; waits for the device."""
        parameters = [local_tensor(p.detach()) for net in (self.student, self.teacher) for p in net.parameters()]
        finite = torch.stack([parameter.isfinite().all() for parameter in parameters]).all()
        return not collectives.any_over_ranks(not finite.item())

    @torch.no_grad()
    def _targets(
        self, batch: Batch, parts: Sequence[Batch], crops: Crops | None, temperature: float
    ) -> tuple[list[TeacherTargets], Tensor]:
        """What the student is asked in each micro-batch, and the teacher's CLS tokens in the first.

        Args:
            crops: of the batch, where it is one micro-batch.
        """
        network = self.teacher if self.frozen is None else self.frozen
        asked = partial(teacher_outputs, dino=self.config.uses_dino, ibot=self.config.uses_ibot)
        answers, features = TeacherAnswers(batch, len(parts), self.config.loss.ibot_patches), []
        with self.wrapped.autocast():
            for part in parts:
                seen = crops or self.crops(part, teacher_only=True)
                outputs = network(partial(asked, crops=seen))
                answers.add(outputs)
                features = features or [outputs.features]
                del seen, outputs  # before the next are made
            return self.centering(answers, temperature), features[0]

    def crops(self, batch: Batch, teacher_only: bool = False) -> Crops:
        """Of a micro-batch, on the device."""
        return Crops.from_batch(batch, self.device, teacher_only, self.config.loss.ibot_patches)

    def _student_losses(
        self, crops: Crops, targets: TeacherTargets, step: int, part: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # Each micro-batch has noise of its own, by its place in the global batch: the same draws on any number of ranks
        # that make micro-batches of this size.
        micro_batch = collectives.rank() * self.config.execution.accumulation_steps + part
        generator = seeded(self.config.seed, _STEP, self.index, step, micro_batch)
        with self.wrapped.autocast():
            gram_patches = None
            if self.gram is not None:
                with torch.no_grad():
                    gram_patches = self.gram(partial(gram_targets, crops=crops))
            compute = partial(
                student_losses,
                crops=crops,
                targets=targets,
                config=self.config.at_step(step),
                generator=generator,
                gram_patches=gram_patches,
                gather=partial(collectives.gather_with_grad, group=self.koleo_group) if self.koleo_ranks > 1 else None,
                rank=collectives.rank() % max(self.koleo_ranks, 1),
                num_ranks=collectives.world_size(),
                sum_with_grad=collectives.sum_with_grad,
            )
            return self.student(compute)

    def _diagnostics(
        self, features: Tensor, targets: TeacherTargets, watched: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Of the first micro-batch."""
        figures = {"feature_std": feature_std(features)}
        if isinstance(targets.dino, Targets):
            figures |= target_diagnostics("dino", targets.dino.rows, len(targets.dino), watched["loss/dino_global"])
        if isinstance(targets.ibot, Targets):
            figures |= target_diagnostics("ibot", targets.ibot.rows, len(targets.ibot))
        return figures

    def start_gram(self, network: Network) -> None:
        """Make `network` the Gram teacher."""
        self.gram = self.wrapped.frozen(network)

    def _refresh_gram(self, step: int) -> None:
        """The EMA teacher becomes the Gram teacher, every so many steps, a few times."""
        every = self.config.gram.refresh_every_steps
        if (
            self.gram is not None
            and every
            and step
            and step % every == 0
            and step // every <= self.config.gram.max_refreshes
        ):
            copy_parameters(paired_parameters(self.gram, self.teacher))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        state: dict[str, Any] = {
            "student": self.student,
            "teacher": self.teacher,
            "optimizer": self.optimizer,
            "centering": self.centering,
        }
        if self.gram is not None:
            state["gram"] = self.gram
        return state


def start_phase(
    config: TrainConfig, standing: Standing, checkpoints: Checkpoints, device: torch.device, allowed: Sequence[str] = ()
) -> Phase:
    """The phase that the run stands in, ready for its next step.

    Its networks start at random (or from `init_from`), from the last checkpoint of the phase before it, whose position
    table is resized where the new phase asks for another, or from a checkpoint of its own.

    Args:
        allowed: what may have changed since that checkpoint (`pretrain.resume`).
    """
    position, latest = standing.position, standing.latest
    name = config.phase_names[position.phase]
    phase_config = config.phase(name)
    with torch.device("meta"):
        student, teacher, gram = (build_network(phase_config) for _ in range(3))
    frozen, weights = None, None
    if phase_config.distill_from:
        weights, frozen = teacher_weights(phase_config.distill_from)
        check_distillation(frozen, phase_config)
        if phase_config.precision == "bfloat16" and device.type == "cuda":
            frozen = frozen.to(torch.bfloat16)
    phase = Phase(phase_config, position.phase, student, teacher, frozen, device)
    if frozen is not None and weights is not None:
        phase.distilled = collectives.from_rank_zero(lambda: weights_hash(weights, frozen))
        check_distilled(config, phase.distilled, standing, allowed)
        collectives.together(lambda: fill_teacher(frozen, weights))
    if phase_config.gram.weight:
        phase.start_gram(gram)
    if position.step > 0:
        assert latest is not None
        checkpoints.load(latest, phase.state())
        if phase_config.model.position_offset is None:
            for network in (student, teacher, gram):
                network.backbone.position_offset = offset_of(find_weights(latest), network.backbone)
        return phase
    collectives.together(lambda: _first_values(phase, student, teacher, latest))
    if phase_config.gram.weight:
        own = checkpoints.folder if latest is None else latest.parent  # a replay has a folder of its own
        collectives.together(lambda: _first_gram(phase, gram, teacher, own))
    if latest is not None:
        before = config.phase(config.phase_names[position.phase - 1])
        if phase_config.loss.centering == before.loss.centering:
            checkpoints.load(latest, {"centering": phase.centering})
        if not phase_config.reset_optimizer:
            checkpoints.load(latest, {"optimizer": phase.optimizer})
    return phase


def _first_values(phase: Phase, student: Network, teacher: Network, latest: Path | None) -> None:
    """Weights of student and teacher before the first step of a phase: each rank its rows."""
    config = phase.config
    keep_offset = config.model.position_offset is not None
    source = latest or config.init_from
    lacking: Sequence[str] = [name for name, _ in student.named_children()]
    if source:
        lacking = load_network(student, source, config.start_from if latest else "teacher", keep_offset)
    if lacking:
        initialise(student, student.initials(), weights_seed(config), [f"{name}." for name in lacking])
    if latest is not None:
        load_network(teacher, latest, "teacher", keep_offset)
    else:
        copy_parameters(phase.pairs)
        teacher.backbone.position_offset = student.backbone.position_offset


def _first_gram(phase: Phase, gram: Network, teacher: Network, checkpoints: Path) -> None:
    """Weights of the Gram teacher before the first step of a phase; `checkpoints` is the folder of the run's own."""
    config = phase.config
    gram.backbone.position_offset = teacher.backbone.position_offset
    if config.gram.teacher == "ema":
        copy_parameters(paired_parameters(gram, teacher))
        return
    lacking = load_network(gram, config.gram.source(checkpoints), keep_offset=config.model.position_offset is not None)
    if lacking:  # no loss asks a Gram teacher's heads, and a checkpoint holds finite values
        initialise(gram, gram.initials(), weights_seed(config), [f"{name}." for name in lacking])


def phase_loader(config: TrainConfig, index: int, start_step: int, tables: dict[str, ImageTable]) -> Loader:
    """The batches of a phase for this rank, from a step of it on."""
    name = config.phase_names[index]
    phase = config.phase(name)
    try:
        return build_loader(
            phase.data,
            phase.crops,
            phase.masks,
            patch_size=phase.patch_size,
            seed=phase.seed,
            phase=index,
            start_step=start_step,
            num_steps=phase.steps - start_step,
            global_batch_size=phase.global_batch_size,
            rank=collectives.rank(),
            world_size=collectives.world_size(),
            execution=phase.execution.loader,
            tables=tables,
        )
    except ValueError as error:
        raise ValueError(f"phase {name}: {error}") from None


def fresh_network(config: TrainConfig) -> Network:
    """The network of a phase with random weights, whole, on the processor: what every mode starts from."""
    with torch.device("meta"):
        network = build_network(config)
    network.to_empty(device="cpu")
    initialise(network, network.initials(), weights_seed(config))
    return network


def weights_seed(config: TrainConfig) -> int:
    """What the first values of a run's weights are drawn from."""
    return _seed(config.seed, _WEIGHTS)


def seeded(*numbers: int) -> torch.Generator:
    """A generator on the processor that depends on these numbers and nothing else."""
    return torch.Generator().manual_seed(_seed(*numbers))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def step_cost(config: TrainConfig, student: Network, teacher: Network) -> StepCost:
    """What the number of operations of a step depends on; networks may lie on `meta`."""

    def head(network: Network, name: str) -> int:
        return matrix_weights(getattr(network, name) or network.dino_head)

    return StepCost(
        student=backbone_cost(student.backbone),
        teacher=backbone_cost(teacher.backbone),
        drop_path=config.model.drop_path,
        num_global_crops=NUM_GLOBAL_CROPS,
        num_local_crops=config.crops.num_local_crops if config.uses_dino else 0,
        student_dino_head=head(student, "dino_head") if config.uses_dino else 0,
        student_ibot_head=head(student, "ibot_head"),
        teacher_dino_head=head(teacher, "dino_head") if config.uses_dino else 0,
        teacher_ibot_head=head(teacher, "ibot_head"),
        predicted_share=config.predicted_share,
        gram=backbone_cost(student.backbone) if config.gram.weight else None,
    )
