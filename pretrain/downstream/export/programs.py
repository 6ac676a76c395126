"""A backbone as one file that runs without this project: ONNX, torch.export, TorchScript."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pretrain.downstream.backbone import Backbone
from pretrain.downstream.export.graph import INPUT, OUTPUTS, Graph, exported
from pretrain.models.vision_transformer import VisionTransformer

FILES = {"onnx": "model.onnx", "torch_export": "model.pt2", "torchscript": "model.ts"}
Run = Callable[[Tensor], tuple[Tensor, ...]]
"""normalised images [B, 3, H, W] -> CLS, registers, patches"""


def write_program(backbone: Backbone, folder: Path, format_: str) -> Run:
    """Write the file of a format (FILES) into an existing folder; what runs it, loaded by its own library."""
    model, file = backbone.model, folder / FILES[format_]
    assert isinstance(model, VisionTransformer)
    return {"onnx": _onnx, "torch_export": _torch_export, "torchscript": _torchscript}[format_](model, file)


def _onnx(model: VisionTransformer, file: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter writes with it
    except ImportError as error:
        raise ValueError(f"--format onnx needs onnxruntime, onnxscript ({error}); install seedbed[export].") from None
    with _quiet():
        program = torch.onnx.export(exported(model), input_names=[INPUT], output_names=list(OUTPUTS), verbose=False)
        assert program is not None
        program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()}))

    return run


def _torch_export(model: VisionTransformer, file: Path) -> Run:
    with _quiet():
        torch.export.save(exported(model), file)
        return torch.export.load(file).module()


def _torchscript(model: VisionTransformer, file: Path) -> Run:
    p = model.patch_size
    example = torch.zeros(2, model.patch_embed.in_channels, 3 * p, 5 * p)
    with _quiet():
        torch.jit.trace(Graph(model).eval(), example, check_trace=False).save(file)
        return torch.jit.load(file)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell their own steps, and their own future, at length."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
