"""A backbone, and its heads where asked for, as a teacher folder of our own names: teacher.safetensors, config.json."""

from pathlib import Path

import torch
from torch import Tensor

from pretrain.distributed.tensor_files import save_tensors
from pretrain.downstream.backbone import Backbone, load_backbone
from pretrain.downstream.export.huggingface import described, write_json
from pretrain.weights import TEACHER_CONFIG, TEACHER_WEIGHTS


def write_teacher_folder(backbone: Backbone, heads: dict[str, Tensor], folder: Path) -> str:
    """Write both files, load them back and compare every tensor.

    Returns:
        A line that says how many tensors are equal.

    Raises:
        ValueError: a tensor that did not come back as it was.
    """
    state = {f"backbone.{name}": value.contiguous() for name, value in backbone.model.state_dict().items()}
    save_tensors(state | heads, folder / TEACHER_WEIGHTS)
    write_json(folder / TEACHER_CONFIG, described(backbone, backbone.settings))
    again = load_backbone(folder).model.state_dict()
    differing = [name for name, value in backbone.model.state_dict().items() if not torch.equal(value, again[name])]
    if differing:
        raise ValueError(f"{len(differing)} tensors of {folder} do not come back as written, {differing[0]} first.")
    return f"all {len(again)} tensors of the backbone equal those of {backbone.source}"
