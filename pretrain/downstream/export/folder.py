"""An export is a folder that appears whole: written beside its place, checked, then renamed."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from pretrain.distributed.tensor_files import save_tensors
from pretrain.downstream.backbone import Backbone, load_backbone, load_heads
from pretrain.downstream.export import huggingface, safetensors
from pretrain.downstream.export.card import model_card
from pretrain.downstream.export.parity import check_folder, check_program
from pretrain.downstream.export.programs import FILES, write_program
from pretrain.downstream.export.timm import write_timm
from pretrain.downstream.timm_model import TimmModel
from pretrain.weights import EXPORT_HEADS

FORMATS = ("huggingface", "safetensors", "timm", *FILES)


def export(checkpoint: str | Path, out: str | Path, format_: str, architecture: str = "", **changes: Any) -> list[str]:
    """Write the backbone of a checkpoint, and its heads, as a folder for others.

    Args:
        checkpoint, architecture, changes: as for `load_backbone`.
        out: a folder that does not exist yet.
        format_: huggingface (loads with transformers, and as `hf:OUT` in curation), safetensors (our own names), timm
            (`timm.create_model("local-dir:OUT", pretrained=True)`), or one file that runs by itself: onnx,
            torch_export, torchscript.

    Returns:
        One line for each thing that was compared, with its figure.

    Raises:
        ValueError: the folder exists, the checkpoint does not load, or the export differs; then there is no OUT.
    """
    if format_ not in FORMATS:
        raise ValueError(f"format={format_!r} is unknown; choose one of {', '.join(FORMATS)}.")
    out = Path(out).expanduser()
    if out.exists():
        raise ValueError(f"{out} exists; choose a folder that does not, or remove it.")
    backbone = load_backbone(checkpoint, architecture, **changes)
    if isinstance(backbone.model, TimmModel):
        raise ValueError(
            f"{checkpoint} is a model of timm, which exports its own; give weights of pretrain or a release."
        )
    heads = load_heads(checkpoint)
    return write_checked(backbone, heads, out, format_)


def write_checked(backbone: Backbone, heads: dict[str, Any], out: Path, format_: str) -> list[str]:
    """Write, check, rename. `heads`: tensors dino_head.* and ibot_head.*, which may be none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        if format_ == "safetensors":
            compared = [safetensors.write_teacher_folder(backbone, heads, folder)]
        elif format_ == "timm":
            heads = {}  # timm has no place for them
            compared = [str(difference) for difference in check_program(write_timm(backbone, folder), backbone)]
        elif format_ in FILES:
            heads = {}  # of training alone
            run = write_program(backbone, folder, format_)
            compared = [str(difference) for difference in check_program(run, backbone)]
        else:
            huggingface.write_model(backbone, folder)
            if heads:
                save_tensors(heads, folder / EXPORT_HEADS)
            compared = [str(difference) for difference in check_folder(folder, backbone)]
        (folder / "README.md").write_text(model_card(backbone, heads, format_, compared), encoding="utf-8")
        folder.chmod(0o755)  # mkdtemp and safetensors let nobody else in
        for file in folder.iterdir():
            file.chmod(0o644)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return compared
