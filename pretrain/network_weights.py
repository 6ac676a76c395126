"""The networks of training, filled from trained weights (`pretrain.weights`), and what a teacher says of itself."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.config import TrainConfig
from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.distributed.tensor_files import Stored, local_rows
from pretrain.models.architectures import architecture
from pretrain.models.released import fitting_state, is_looked_at
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.settings import HeadConfig
from pretrain.student_teacher import Network, build_head
from pretrain.weight_files import BACKBONE, HEADS
from pretrain.weights import ANYWHERE, RELEASED_OFFSET, Weights, complete_settings, find_weights

log = logging.getLogger(__name__)


@torch.no_grad()
def load_network(network: Network, source: str | Path, part: str = "teacher", keep_offset: bool = False) -> list[str]:
    """Fill a network, whole or sharded, from what `source` names: a rank reads the rows that it holds.

    Of a network on `meta`, all is read and looked at, one tensor at a time, and nothing is kept. A learned position
    table of another size is resized. Heads that the source lacks, as released files do, stay as they are, and the log
    says so; heads of another shape are an error.

    Args:
        source: as for `find_weights`.
        part: `teacher` or `student`, where the source has both.
        keep_offset: the network's own position_offset holds, for it was asked for; else that of the source.

    Returns:
        Names of the heads that the source lacks.

    Raises:
        ValueError: nothing there that can be read, or another model.
    """
    weights = find_weights(source, part)
    state = weights.stored((BACKBONE, *HEADS))
    model = network.backbone
    if not keep_offset and model.rope is None:
        model.position_offset = offset_of(weights, model)
    if weights.released and model.position_offset:
        log.info(
            "%s: positions are resized with position_offset=%g, as the code of its release does; "
            "model.position_offset=0 is how transformers does it",
            weights.source,
            model.position_offset,
        )
    backbone = {name.removeprefix(BACKBONE): t for name, t in state.items() if name.startswith(BACKBONE)}
    if model.local_cls_norm is not None and "local_cls_norm.weight" not in backbone:
        log.info("%s has no local_cls_norm, which is of training alone: it starts as its norm", weights.source)
        backbone |= {f"local_cls_{name}": backbone[name] for name in ("norm.weight", "norm.bias") if name in backbone}
    known = {name: t.read() if is_looked_at(name) else _shape_of(t) for name, t in backbone.items()}
    try:
        fitting = fitting_state(model, known, resize_position=True)
    except ValueError as error:
        raise ValueError(f"{weights.source} does not fit model.architecture: {error}") from None
    chosen = {f"{BACKBONE}{n}": backbone[n] if t.is_meta else Stored.of(t) for n, t in fitting.items()}
    lacking = []
    for name, head in network.named_children():
        if name == "backbone":
            continue
        tensors = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
        if not tensors:
            log.info("%s has no %s: it starts at random", weights.source, name)
            lacking.append(name)
            continue
        own = head.state_dict()
        differing = [key for key in own if key not in tensors or own[key].shape != tensors[key].shape]
        if differing:
            found = "nothing" if differing[0] not in tensors else f"{list(tensors[differing[0]].shape)}"
            raise ValueError(
                f"{weights.source} has another {name}: {differing[0]} is {found} there and "
                f"{list(own[differing[0]].shape)} here; set heads.{name.removesuffix('_head')} to the checkpoint's "
                "numbers."
            )
        chosen |= {f"{name}.{key}": tensors[key] for key in own}
    _fill(network, chosen, weights.source)
    return lacking


def _fill(network: Network, state: Mapping[str, Stored], source: str) -> None:
    """Copy what this rank holds of each tensor that is given, one at a time."""
    for name, tensor in network.state_dict().items():
        if name not in state:
            continue
        start, local = local_rows(tensor)
        rows = state[name].rows(start, start + len(local)) if local.ndim else state[name].read()
        if not rows.isfinite().all():
            raise ValueError(f"{source} holds values that are not finite, in {name}: give other weights.")
        local.copy_(rows)


def _shape_of(tensor: Stored) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def offset_of(weights: Weights, model: VisionTransformer) -> float:
    """The position_offset that weights were trained or released with, for a model with a learned table."""
    if weights.description and not weights.released:
        return weights.description["model"].get("position_offset", 0.0)
    return RELEASED_OFFSET if weights.released and not model.num_registers and not model.position_antialias else 0.0


def load_teacher(source: str | Path) -> Network:
    """A trained network with its heads, whole, built from its own description; raises as `teacher_weights` does."""
    weights, network = teacher_weights(source)
    network.to_empty(device="cpu")
    fill_teacher(network, weights)
    return network


def teacher_weights(source: str | Path) -> tuple[Weights, Network]:
    """Where a trained network with its heads lies, and the network on `meta`, built from its own description.

    Raises:
        ValueError: nothing there that can be read, or no heads with it, as in released files.
    """
    weights = find_weights(source)
    if not weights.description.get("heads"):
        raise ValueError(
            f"{weights.source} has no heads, and distillation needs those of its teacher: give a run, "
            "checkpoint or teacher of pretrain, or an export with --heads."
        )
    with torch.device("meta"):
        network = described_network(weights.description)
    state, expected = weights.stored((BACKBONE, *HEADS)), network.state_dict()
    wrong = [k for k in expected.keys() | state.keys() if k not in state or k not in expected]
    wrong = wrong or [k for k in expected if expected[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{weights.source} is not what its description says: {sorted(wrong)[0]} differs.")
    return weights, network


def check_distillation(frozen: Network, config: TrainConfig) -> None:
    """Raises ValueError: the teacher's answers are not of the kind or width of the student's."""
    for name in [name for name, used in (("dino", config.uses_dino), ("ibot", config.uses_ibot)) if used]:
        theirs, ours = getattr(frozen, f"{name}_head") or frozen.dino_head, getattr(config.heads, name)
        if (theirs.last_layer is not None) != config.has_prototypes:
            objective = "coding_rate" if theirs.last_layer is None else "prototypes"
            raise ValueError(
                f"loss.objective={config.loss.objective}, and the heads of the teacher of "
                f"distill_from={config.distill_from} were trained with {objective}: set it to {objective}."
            )
        kind = "num_prototypes" if config.has_prototypes else "bottleneck_dim"
        found = theirs.last_layer.num_prototypes if theirs.last_layer is not None else theirs.bottleneck_dim
        asked = getattr(ours, kind)
        if found != asked:
            raise ValueError(
                f"heads.{name}.{kind}={asked}, and the teacher of distill_from={config.distill_from} "
                f"has {found}: set it to {found}."
            )


@torch.no_grad()
def fill_teacher(network: Network, weights: Weights) -> None:
    """Fill the network of `teacher_weights`, whole or sharded: a rank reads the rows that it holds.

    Raises:
        ValueError: a file that is damaged, or values that are not finite.
    """
    _fill(network, weights.stored((BACKBONE, *HEADS)), weights.source)


def described_network(description: Mapping[str, Any]) -> Network:
    """The network that a description of ours is about, not filled; on whatever device is the default."""
    heads = description["heads"]
    backbone = VisionTransformer(**complete_settings(description["architecture"], description["model"]) | ANYWHERE)
    has_prototypes = heads.get("has_prototypes", True)  # before there was a choice all had them
    dino_head = build_head(backbone.embed_dim, HeadConfig(**heads["dino"]), has_prototypes)
    ibot_head = None
    if not heads["tied"]:
        ibot_head = build_head(backbone.embed_dim, HeadConfig(**heads["ibot"]), has_prototypes)
    return Network(backbone, dino_head, ibot_head)


def describe_teacher(config: TrainConfig, meta: Mapping[str, Any], position_offset: float) -> dict[str, Any]:
    """What a teacher's weights are, as its config.json and every checkpoint say it.

    Args:
        position_offset: of its backbone, which the weights that it started from may have brought.
    """
    sizes = config.crops.all_sizes()
    model = architecture(config.model.architecture, **config.model.changes())
    return {
        "architecture": config.model.architecture,
        "model": model | ({"position_offset": position_offset} if position_offset else {}),
        "heads": asdict(config.heads) | {"has_prototypes": config.has_prototypes},
        "image": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "px": max(s.global_px for s in sizes)},
        "config": asdict(config),
        **meta,
    }
