"""An export is a folder that appears whole: written beside its place, checked, then renamed."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pretrain.distributed.tensor_files import save_tensors
from pretrain.downstream.backbone import Backbone, load_backbone, load_heads
from pretrain.downstream.export import huggingface, safetensors
from pretrain.downstream.export.card import model_card
from pretrain.downstream.export.graph import Graph
from pretrain.downstream.export.parity import Difference, check, check_folder, measure_float16, of_model
from pretrain.downstream.export.programs import write_program
from pretrain.downstream.export.provenance import licence_of, provenance
from pretrain.downstream.export.timm import read_timm, write_timm
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.program_files import PROGRAM_FILES
from pretrain.weight_files import BACKBONE
from pretrain.weights import EXPORT_HEADS, TEACHER_WEIGHTS

FORMATS = ("huggingface", "safetensors", "timm", *PROGRAM_FILES)
WITH_HEADS = ("huggingface", "safetensors")
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def export(
    checkpoint: str | Path,
    out: str | Path,
    format_: str,
    architecture: str = "",
    *,
    heads: bool = False,
    dtype: str = "float32",
    licence: str = "",
    **changes: Any,
) -> list[str]:
    """Write the backbone of a checkpoint as a folder for others.

    Args:
        checkpoint, architecture, changes: as for `load_backbone`.
        out: a folder that does not exist yet.
        format_: huggingface (loads with transformers, and as `hf:OUT` in curation), safetensors (our own names), timm
            (`timm.create_model(NAME, checkpoint_path="OUT/model.safetensors")`, the line is in the card), or one file
            that runs by itself: onnx, torch_export, torchscript.
        heads: the projection heads too, for distillation or training that goes on with them.
        dtype: of the backbone's weights, `float32` or `float16`; programs compute in it.
        licence: of the weights, one word; empty: as the release or the export that they come from has it, if any.

    Returns:
        One line for each thing that was compared, with its figure.

    Raises:
        ValueError: the folder exists, the checkpoint does not load or has no heads, or the export differs; then there
            is no OUT.
    """
    if format_ not in FORMATS:
        raise ValueError(f"format={format_!r} is unknown; choose one of {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    if heads and format_ not in WITH_HEADS:
        raise ValueError(f"--heads: {format_} has no place for them; they go with {' or '.join(WITH_HEADS)}.")
    out = Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{out} exists; choose a folder that does not, or remove it.")
    backbone = load_backbone(checkpoint, architecture, **changes)
    if not isinstance(backbone.model, VisionTransformer):
        kind = "a model of timm" if not backbone.description else "an export without weights of ours"
        raise ValueError(f"{checkpoint} is {kind}, which cannot be exported again; give the run, or a release.")
    tensors = load_heads(checkpoint) if heads else {}
    if heads and not tensors:
        raise ValueError(f"--heads: {backbone.source} has none; leave it out, or give the run.")
    known = backbone.description | provenance(backbone)
    if not heads:
        known.pop("heads", None)  # whoever reads of heads would look for their tensors
    if told := licence_of(backbone, licence):
        known["licence"] = told
    return write_checked(replace(backbone, description=known), tensors, out, format_, dtype)


def write_checked(
    backbone: Backbone, heads: dict[str, torch.Tensor], out: Path, format_: str, dtype: str = "float32"
) -> list[str]:
    """Write, check, rename. `heads`: tensors dino_head.* and ibot_head.*, which may be none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        compared = [str(line) for line in _written(backbone, heads, folder, format_, DTYPES[dtype])]
        licence = backbone.description.get("licence", "")
        card = model_card(backbone, heads, format_, dtype, licence, compared)
        (folder / "README.md").write_text(card, encoding="utf-8")
        folder.chmod(0o755)  # mkdtemp and safetensors let nobody else in
        for file in folder.iterdir():
            file.chmod(0o644)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return compared


def _written(
    backbone: Backbone, heads: dict[str, torch.Tensor], folder: Path, format_: str, dtype: torch.dtype
) -> Sequence[Difference | str]:
    """Write the files of a format, and compare what its library makes of them.

    Those in float16 are first looked at in float32, to the tolerance of any export: rounding hides no mistake.
    """
    model, is_half = backbone.model, dtype == torch.float16
    assert isinstance(model, VisionTransformer)
    if format_ in PROGRAM_FILES:
        if is_half:
            check(Graph(model), backbone)
        run = write_program(backbone, folder, format_, dtype)
        return measure_float16(run, backbone) if is_half else check(run, backbone)
    compared: Sequence[Difference | str]
    if format_ == "safetensors":
        compared = [safetensors.write_teacher_folder(backbone, heads, folder)]
        if is_half:  # heads are for training, and stay as they are
            huggingface.round_file(folder / TEACHER_WEIGHTS, BACKBONE)
            return measure_float16(of_model(load_backbone(folder).model.half()), backbone)
    elif format_ == "timm":
        compared = check(of_model(write_timm(backbone, folder)), backbone)
        if is_half:
            huggingface.round_file(folder / huggingface.WEIGHTS)
            return measure_float16(of_model(read_timm(backbone, folder).half()), backbone)
    else:
        huggingface.write_model(backbone, folder)
        if heads:
            save_tensors(heads, folder / EXPORT_HEADS)
        compared = check_folder(folder, backbone)
        if is_half:
            huggingface.round_model(backbone, folder)
            return measure_float16(huggingface.read_model(folder, backbone, dtype), backbone)
    return compared
