"""What a network starts from: a checkpoint, a teacher's folder, a run's newest teacher, or a released file."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain.checkpoint import MANIFEST, PREFIX, teacher_state
from pretrain.config import HeadConfig, TrainConfig
from pretrain.data.photometric import IMAGENET_MEAN, IMAGENET_STD
from pretrain.models.architectures import architecture
from pretrain.models.released import load_released
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.student_teacher import Network, build_head

TEACHER_WEIGHTS, TEACHER_CONFIG = "teacher.safetensors", "config.json"
_RELEASED = (".pth", ".pt", ".safetensors")
log = logging.getLogger(__name__)


def load_network(network: Network, source: str | Path, part: str = "teacher") -> None:
    """Fill a network, whole and not wrapped yet, from what `source` names.

    A learned position table of another size is resized. Heads that the source lacks, as released files do, stay as they
    are, and the log says so; heads of another shape are an error.

    Args:
        source: a step-* checkpoint, a teacher's folder, a run folder, or a released .pth or .safetensors.
        part: `teacher` or `student`, where the source has both.

    Raises:
        ValueError: nothing there that can be read, or another model.
    """
    path = Path(source)
    state = read_state(path, part)
    backbone = {name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")}
    try:
        load_released(network.backbone, backbone, resize_position=True)
    except ValueError as error:
        raise ValueError(f"{path} does not fit model.architecture: {error}") from None
    for name, head in network.named_children():
        if name == "backbone":
            continue
        tensors = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
        if not tensors:
            log.info("%s has no %s: it starts at random", path, name)
            continue
        own = head.state_dict()
        differing = [key for key in own if key not in tensors or own[key].shape != tensors[key].shape]
        if differing:
            found = "nothing" if differing[0] not in tensors else f"{list(tensors[differing[0]].shape)}"
            raise ValueError(
                f"{path} has another {name}: {differing[0]} is {found} there and {list(own[differing[0]].shape)} here; "
                f"set heads.{name.removesuffix('_head')} to the checkpoint's numbers."
            )
        head.load_state_dict(tensors)


def read_state(path: Path, part: str) -> dict[str, Tensor]:
    """Tensors of one network by name: backbone.*, dino_head.*, ibot_head.*.

    Raises:
        ValueError: no such file or folder, or nothing in it that holds a network.
    """
    if path.is_file() and path.suffix in _RELEASED:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        state = state.get("teacher", state.get("model", state))
        return (
            state
            if any(key.startswith("backbone.") for key in state)
            else {f"backbone.{k}": t for k, t in state.items()}
        )
    if (path / MANIFEST).is_file():
        return teacher_state(path, f"{part}.")
    if (path / TEACHER_WEIGHTS).is_file():
        return load_file(path / TEACHER_WEIGHTS)
    if (path / "teacher" / TEACHER_WEIGHTS).is_file():
        return load_file(path / "teacher" / TEACHER_WEIGHTS)
    whole = sorted(path.glob(f"checkpoints/{PREFIX}*/{MANIFEST}"))
    if whole:
        return teacher_state(whole[-1].parent, f"{part}.")
    raise ValueError(
        f"{path} holds no weights: give a step-* checkpoint, a teacher's folder, a run folder, or a file that ends in "
        f"{', '.join(_RELEASED)}."
    )


def describe_teacher(config: TrainConfig, meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a teacher's weights are, as its config.json and every checkpoint say it."""
    sizes = config.crops.all_sizes()
    return {
        "architecture": config.model.architecture,
        "model": architecture(config.model.architecture, **config.model.changes()),
        "heads": asdict(config.heads),
        "image": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "px": max(s.global_px for s in sizes)},
        "config": asdict(config),
        **meta,
    }


def load_teacher(folder: str | Path) -> Network:
    """The network that `checkpoint.write_teacher` wrote, with its heads, built from its own description.

    Raises:
        ValueError: the folder holds no teacher.
    """
    folder = Path(folder)
    folder = folder / "teacher" if (folder / "teacher" / TEACHER_WEIGHTS).is_file() else folder
    if not (folder / TEACHER_WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no teacher: give the `teacher` folder that a finished run wrote.")
    description = json.loads((folder / TEACHER_CONFIG).read_text(encoding="utf-8"))
    heads = description["heads"]
    backbone = VisionTransformer(**description["model"])
    dino_head = build_head(backbone.embed_dim, HeadConfig(**heads["dino"]))
    ibot_head = None if heads["tied"] else build_head(backbone.embed_dim, HeadConfig(**heads["ibot"]))
    network = Network(backbone, dino_head, ibot_head)
    network.load_state_dict(load_file(folder / TEACHER_WEIGHTS))
    return network
