"""Whatever holds a backbone -> what embeds images with it; no torch is imported for an ONNX export."""

from pathlib import Path

from pretrain.downstream.embedders.embedder import Embedder
from pretrain.downstream.pixels import check_px
from pretrain.program_files import PROGRAM_FILES


def load_embedder(
    path: str | Path, architecture: str = "", device: str = "auto", bfloat16: bool = False, gpu: int | None = None
) -> Embedder:
    """The backbone of an ONNX export (its folder or file), run by onnxruntime, or of anything that `load_backbone`
    takes, run by torch.

    Args:
        architecture: of a released file, which does not say.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        bfloat16: run torch's in bfloat16.
        gpu: the one to use where `device` does not say which.

    Raises:
        ValueError: nothing there that holds a backbone, no such device, or what an ONNX file cannot do.
    """
    file = onnx_file(path)
    if file is None:
        from pretrain.downstream.embedders.of_torch import TorchEmbedder

        return TorchEmbedder(path, architecture, device, bfloat16, gpu)
    if architecture or bfloat16:
        raise ValueError(f"{file} runs as it was exported: --architecture and --bfloat16 are for other backbones.")
    from pretrain.downstream.embedders.of_onnx import OnnxEmbedder

    return OnnxEmbedder(file, device, gpu)


def onnx_file(path: str | Path) -> Path | None:
    """The ONNX file that a path means: itself, or that of an export's folder; None for another backbone."""
    file = Path(path).expanduser()
    if file.suffix == ".onnx":
        return file
    return file / PROGRAM_FILES["onnx"] if (file / PROGRAM_FILES["onnx"]).is_file() else None


def crop_side(px: int | None, embedder: Embedder) -> int:
    """Side of a centre crop in whole patches: `px`, or by default that of the training.

    Raises:
        ValueError: the patch does not divide `px`, or there would be too many.
    """
    patch = embedder.patch_size
    if px is None:
        return max(embedder.px // patch, 1) * patch
    if px < 1 or px % patch:
        least = max(px // patch, 1) * patch
        raise ValueError(f"--px {px} does not split into patches of {patch} px; use {least} or {least + patch}.")
    check_px(f"--px {px}", px, patch)
    return px
