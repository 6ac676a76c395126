"""The method: crops -> student and teacher -> weighted losses. One rank's arithmetic; the loop is in `train.py`.

DINOv2 (arXiv:2304.07193, Sec. 4) and DINOv3 (arXiv:2508.10104, Sec. 3 to 5) differ in numbers and switches only: the
teacher sees the global crops whole, the student sees them with patches masked, and the local crops beside them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from pretrain.config import TrainConfig
from pretrain.data.collate import Batch, prepare
from pretrain.losses.centering import SoftmaxCentering, nothing_to_reduce, sinkhorn_knopp
from pretrain.losses.coding_rate import alignment_loss, coding_rate_loss, patch_alignment_loss
from pretrain.losses.dino import dino_loss
from pretrain.losses.gram import gram_loss, resize_grid
from pretrain.losses.ibot import ibot_loss
from pretrain.losses.koleo import koleo_loss
from pretrain.losses.prototypes import Targets
from pretrain.models import architectures
from pretrain.models.initial import Initial, prefixed
from pretrain.models.projection_head import ProjectionHead
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.settings import HeadConfig

T = TypeVar("T")


class Network(nn.Module):
    """A backbone and its heads: the student, its teacher, or a frozen teacher to distil from.

    Without an `ibot_head` the DINO head serves for both.

    DDP and FSDP attach to `forward` only, so whatever is computed with the parameters goes through it:
    `network(lambda network: student_losses(network, ...))`.
    """

    def __init__(
        self, backbone: VisionTransformer, dino_head: ProjectionHead, ibot_head: ProjectionHead | None
    ) -> None:
        super().__init__()
        self.backbone, self.dino_head, self.ibot_head = backbone, dino_head, ibot_head

    def forward(self, compute: Callable[["Network"], T]) -> T:
        return compute(self)

    def initials(self) -> dict[str, Initial]:
        """What each parameter starts from, by its name."""
        heads = {"dino_head": self.dino_head, "ibot_head": self.ibot_head}
        found = prefixed("backbone", self.backbone.initials())
        for name, head in heads.items():
            found |= prefixed(name, head.initials()) if head is not None else {}
        return found


def build_network(config: TrainConfig) -> Network:
    """The network of one phase, on whatever device is the default: `with torch.device("meta")` costs nothing."""
    backbone = VisionTransformer(**architectures.architecture(config.model.architecture, **config.model.changes()))
    dino_head = build_head(backbone.embed_dim, config.heads.dino, config.has_prototypes)
    ibot_head = None
    if not config.heads.tied:
        ibot_head = build_head(backbone.embed_dim, config.heads.ibot, config.has_prototypes)
    return Network(backbone, dino_head, ibot_head)


def freeze_unused(student: Network, config: TrainConfig) -> None:
    """No gradient for a head that no term of the loss asks: DDP would wait for it, and weight decay wear it down.

    It stays in the network, so that a later phase may use it as it is.
    """
    dino, ibot = config.uses_dino, config.uses_ibot
    if not (dino or (ibot and student.ibot_head is None)):
        student.dino_head.requires_grad_(False)
    if student.ibot_head is not None and not ibot:
        student.ibot_head.requires_grad_(False)


def build_head(in_dim: int, config: HeadConfig, has_prototypes: bool = True) -> ProjectionHead:
    return ProjectionHead(
        in_dim,
        hidden_dim=config.hidden_dim,
        bottleneck_dim=config.bottleneck_dim,
        num_prototypes=config.num_prototypes if has_prototypes else 0,
        num_layers=config.num_layers,
        weight_norm=config.weight_norm,
        train_lengths=config.train_lengths,
    )


@dataclass(frozen=True)
class Crops:
    """One micro-batch of one rank on its device. Rows are crop-major: row v * B + b is crop v of image b."""

    global_crops: Tensor  # [V*B, 3, H, W]
    local_crops: Tensor | None  # [L*B, 3, h, w]
    gram_crops: Tensor | None  # [V*B, 3, H', W']
    masks: Tensor | None  # bool [V*B, N]
    predicted: Tensor  # int64 [M]: flat positions in [V*B*N] of the patches that iBOT predicts
    patch_weights: Tensor  # float32 [M]: 1 / predicted patches of that crop
    num_global: int
    num_images: int

    @staticmethod
    def from_batch(
        batch: Batch, device: torch.device, teacher_only: bool = False, ibot_patches: str = "masked"
    ) -> "Crops":
        """Uint8 crops to normalised floats; positions of the masks are found on the processor, where nothing waits.

        Args:
            teacher_only: leave out what the teacher does not see, the local and Gram crops.
            ibot_patches: which are predicted (`LossConfig.ibot_patches`).
        """
        if teacher_only:
            batch = batch.only_global()
        num_global, num_images = batch.global_crops.shape[:2]
        masks, predicted, weights = None, torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        if batch.masks is not None:
            masks = batch.masks.flatten(0, 1)
            predicted, weights = predicted_patches(masks, ibot_patches)
            masks = masks.to(device, non_blocking=True)
        global_crops, local_crops, gram_crops = prepare(batch, device)
        return Crops(
            global_crops=global_crops,
            local_crops=local_crops if len(local_crops) else None,
            gram_crops=gram_crops,
            masks=masks,
            predicted=predicted.to(device, non_blocking=True),
            patch_weights=weights.to(device, non_blocking=True),
            num_global=num_global,
            num_images=num_images,
        )


def predicted_patches(masks: Tensor, which: str) -> tuple[Tensor, Tensor]:
    """Flat positions int64 [M] in masks [V*B, N], on the processor, of the patches that iBOT predicts; and the weight
    of each, 1 over those of its crop, float32 [M].

    Args:
        which: "masked"; or "all" patches of the crops in which any is masked (iBOT++).
    """
    chosen = masks.any(dim=1, keepdim=True).expand_as(masks) if which == "all" else masks
    predicted = chosen.flatten().nonzero().squeeze(1)
    weights = 1 / chosen.sum(dim=1).clamp(min=1)
    return predicted, weights[:, None].expand_as(masks).flatten()[predicted]


@dataclass(frozen=True)
class TeacherTargets:
    """What the student of one micro-batch is asked to predict; None where the loss does not ask."""

    dino: Targets | Tensor | None  # V*B rows: assignments, or unit rows [V*B, d] without prototypes
    ibot: Targets | Tensor | None  # M rows


@dataclass(frozen=True)
class TeacherOutputs:
    """The teacher's answers for one micro-batch, before they are centred; None where the loss does not ask.

    They are logits, or without prototypes the heads' unit rows.
    """

    features: Tensor  # [V*B, D], CLS tokens
    dino: Tensor | None  # [V*B, K], or [V*B, d]
    ibot: Tensor | None  # [M, K'], or [M, d]


def teacher_outputs(network: Network, crops: Crops, dino: bool = True, ibot: bool = True) -> TeacherOutputs:
    """CLS tokens of the whole global crops, and the patches that the student is to predict, through the heads.

    Args:
        dino, ibot: which of the two the loss asks for.
    """
    (features,) = network.backbone([crops.global_crops])
    patches = features.patches.flatten(0, 1)[crops.predicted]
    cls_projected, patches_projected = _projected(network, features.cls if dino else None, patches if ibot else None)
    return TeacherOutputs(features.cls.float(), _answers(cls_projected), _answers(patches_projected))


# What a head makes of its rows [T, d], and its prototypes [K, d] if it has any.
Projected = tuple[Tensor, Tensor | None]


def _answers(projected: Projected | None) -> Tensor | None:
    """Logits [T, K], or without prototypes the rows [T, d]."""
    if projected is None:
        return None
    rows, prototypes = projected
    return rows if prototypes is None else rows @ prototypes.T


def _projected(
    network: Network, cls: Tensor | None, patches: Tensor | None
) -> tuple[Projected | None, Projected | None]:
    """Both heads' answers, where asked: one pass if one head serves for both."""
    if network.ibot_head is not None or cls is None or patches is None:
        ibot_head = network.ibot_head or network.dino_head
        return None if cls is None else network.dino_head(cls), None if patches is None else ibot_head(patches)
    projected, prototypes = network.dino_head(torch.cat([cls, patches]))
    of_cls, of_patches = projected.split([len(cls), len(patches)])
    return (of_cls, prototypes), (of_patches, prototypes)


class TeacherAnswers:
    """The teacher's answers in all micro-batches of a step: one matrix a head, in the dtype that they were computed in.

    They are centred together, so accumulation changes nothing; what is centred together lies together, once.

    Args:
        batch: this rank's images of the step, whose masks are on the processor.
        num_parts: micro-batches.
        ibot_patches: which patches iBOT predicts.
    """

    def __init__(self, batch: Batch, num_parts: int, ibot_patches: str) -> None:
        self.rows = {"dino": batch.global_crops.shape[0] * len(batch), "ibot": batch.num_predicted(ibot_patches)}
        self.num_parts = num_parts
        self.matrices: dict[str, Tensor] = {}
        self.lengths: dict[str, list[int]] = {}

    def add(self, outputs: TeacherOutputs) -> None:
        """The next micro-batch."""
        for name, rows in (("dino", outputs.dino), ("ibot", outputs.ibot)):
            if rows is None:
                continue
            lengths = self.lengths.setdefault(name, [])
            if self.num_parts == 1:
                self.matrices[name] = rows
            else:
                if not lengths:
                    self.matrices[name] = rows.new_empty(self.rows[name], rows.shape[1])
                self.matrices[name][sum(lengths) :][: len(rows)] = rows
            lengths.append(len(rows))


class Centering(nn.Module):
    """Teacher logits to targets that cannot collapse: Sinkhorn-Knopp, or softmax with a moving centre.

    Without prototypes the teacher's rows are the targets as they are.
    """

    def __init__(self, config: TrainConfig, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.loss, self.sum_over_ranks, self.compiled = config.loss, sum_over_ranks, config.execution.compile
        self.kind = config.loss.centering if config.has_prototypes else "none"
        if self.kind == "softmax":
            momentum = config.loss.center_momentum
            self.dino = SoftmaxCentering(config.heads.dino.num_prototypes, momentum, self.compiled)
            self.ibot = SoftmaxCentering(config.heads.ibot.num_prototypes, momentum, self.compiled)

    @torch.no_grad()
    def forward(self, answers: TeacherAnswers, temperature: float) -> list[TeacherTargets]:
        """The targets of each micro-batch."""
        matrices, centred = answers.matrices, []
        if self.kind == "none":
            centred = list(matrices.values())
        elif self.kind == "softmax":
            for name, head in matrices.items():
                centring = self.get_submodule(name)
                centred.append(centring(head, temperature))
                centring.update(head, self.sum_over_ranks)  # pyright: ignore[reportCallIssue]
        elif matrices:
            iterations, heads = self.loss.sinkhorn_iterations, list(matrices.values())
            centred = sinkhorn_knopp(heads, temperature, iterations, self.sum_over_ranks, self.compiled)
        split = {name: _split(one, answers.lengths[name]) for name, one in zip(matrices, centred, strict=True)}
        nothing = [None] * answers.num_parts
        of_both = zip(split.get("dino", nothing), split.get("ibot", nothing), strict=True)
        return [TeacherTargets(dino, ibot) for dino, ibot in of_both]


def _split(targets: Targets | Tensor, lengths: Sequence[int]) -> Sequence[Targets | Tensor]:
    if isinstance(targets, Tensor):
        return targets.split(list(lengths))
    rows = zip(targets.logits.split(list(lengths)), targets.log_sample.split(list(lengths)), strict=True)
    return [replace(targets, logits=logits, log_sample=log_sample) for logits, log_sample in rows]


def student_losses(
    network: Network,
    crops: Crops,
    targets: TeacherTargets,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    gram_patches: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    sum_with_grad: Callable[[Tensor], Tensor] = nothing_to_reduce,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weighted terms of the loss of one micro-batch, whose sum is minimised; and parts of them to watch.

    Args:
        generator: draws the images that stochastic depth leaves out and the noise of RoPE.
        gram_patches: [V*B, N, D'] of the Gram teacher, on the student's grid.
        gather, rank: all-gather with gradient over the ranks of a KoLeo group, and this one's place among them; None: a
            group lies on one rank.
        num_ranks, sum_with_grad: the sum over all ranks with gradient, for the coding rate of their rows together.
    """
    loss, num_global, num_images = config.loss, crops.num_global, crops.num_images
    koleo_group = loss.koleo_group_size or None
    # A distilled student sees its crops whole, as released; iBOT's patches are those that masks choose.
    groups, masks, local = [crops.global_crops], [None if config.distill_from else crops.masks], [False]
    if crops.local_crops is not None and targets.dino is not None:
        seen = crops.local_crops
        if config.crops.drop_local_remainder:
            height, width = (side - side % network.backbone.patch_size for side in seen.shape[2:])
            seen = seen[..., :height, :width]
        groups, masks, local = [*groups, seen], [*masks, None], [*local, True]
    features = network.backbone(groups, masks, local, generator)
    cls = torch.cat([f.cls for f in features])
    patches = features[0].patches.flatten(0, 1)[crops.predicted]
    of_cls, of_patches = _projected(
        network, None if targets.dino is None else cls, None if targets.ibot is None else patches
    )
    terms: dict[str, Tensor] = {}
    watched: dict[str, Tensor] = {}
    if of_cls is not None and targets.dino is not None:
        terms, watched = _cls_terms(of_cls, targets.dino, crops, config, num_ranks, sum_with_grad)
    if of_patches is not None and targets.ibot is not None:
        terms["ibot"] = loss.ibot_weight * _patch_loss(of_patches, targets.ibot, crops, config)
    if loss.koleo_weight:
        chosen = range(num_global if loss.koleo_crops == "all" else 1)
        global_cls = features[0].cls.unflatten(0, (num_global, num_images))
        koleo = [koleo_loss(global_cls[v], koleo_group, gather, rank) for v in chosen]
        terms["koleo"] = loss.koleo_weight * torch.stack(koleo).sum()
    if gram_patches is not None:
        gram = gram_loss(
            features[0].patches,
            gram_patches,
            negatives=config.gram.negatives,
        )
        terms["gram"] = config.gram.weight * gram
    return terms, watched


def _cls_terms(
    of_cls: Projected,
    targets: Targets | Tensor,
    crops: Crops,
    config: TrainConfig,
    num_ranks: int,
    sum_with_grad: Callable[[Tensor], Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weighted terms on CLS tokens; and parts of them to watch."""
    loss, (rows, prototypes) = config.loss, of_cls
    views, num_global = rows.unflatten(0, (-1, crops.num_images)), crops.num_global
    seen = views[:num_global], views[num_global:] if crops.local_crops is not None else None
    pairs = {"include_same_crop": loss.same_crop_pairs, "local_weight": loss.dino_local_weight}
    terms: dict[str, Tensor] = {}
    if isinstance(targets, Tensor):
        of_teacher = targets.unflatten(0, (num_global, crops.num_images))
        dino = alignment_loss(*seen, of_teacher, **pairs)
        # Of the mean of student and teacher, as released for SimDINOv2.
        rate = coding_rate_loss((seen[0] + of_teacher) / 2, loss.coding_rate_eps, num_ranks, sum_with_grad)
        terms["coding_rate"] = loss.coding_rate_weight * rate
    else:
        assert prototypes is not None, "heads and targets are of one objective"
        compiled = config.execution.compile
        dino = dino_loss(*seen, prototypes, targets, loss.student_temperature, **pairs, compiled=compiled)
    terms["dino"] = loss.dino_weight * dino.total
    return terms, {"dino_global": dino.global_term, "dino_local": dino.local_term}


def _patch_loss(of_patches: Projected, targets: Targets | Tensor, crops: Crops, config: TrainConfig) -> Tensor:
    (rows, prototypes), weights = of_patches, crops.patch_weights
    num_crops = crops.num_global * crops.num_images
    if isinstance(targets, Tensor):
        return patch_alignment_loss(rows, targets, weights, num_crops)
    assert prototypes is not None, "heads and targets are of one objective"
    temperature, compiled = config.loss.student_temperature, config.execution.compile
    return ibot_loss(rows, prototypes, targets, weights, num_crops, temperature, compiled)


def gram_targets(network: Network, crops: Crops) -> Tensor:
    """[V*B, N, D] patches of the Gram teacher on its larger, undistorted crops, resized to the student's grid."""
    assert crops.gram_crops is not None, "the config check asks for crops.gram_px when gram.weight is set"
    (features,) = network.backbone([crops.gram_crops])
    patch_size = network.backbone.patch_size
    grid = (crops.global_crops.shape[2] // patch_size, crops.global_crops.shape[3] // patch_size)
    return resize_grid(features.patches.float(), features.grid, grid)
