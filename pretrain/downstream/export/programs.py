"""A backbone as one file that runs without this project: ONNX, torch.export, TorchScript."""

from pathlib import Path

import torch

from pretrain.downstream.backbone import Backbone
from pretrain.downstream.export.graph import Graph, exported
from pretrain.downstream.export.huggingface import described, write_json
from pretrain.downstream.program_model import Run, loaded, quiet
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.program_files import INPUT, OUTPUTS, PROGRAM_CONFIG, PROGRAM_FILES


def write_program(backbone: Backbone, folder: Path, format_: str, dtype: torch.dtype) -> Run:
    """Write the file of a format and its config.json into an existing folder.

    Args:
        dtype: of the weights and of the arithmetic; images come and tokens go in float32 always.

    Returns:
        What runs the file, loaded by its own library.

    Raises:
        ValueError: a library that is not installed.
    """
    assert isinstance(backbone.model, VisionTransformer)
    graph, file = Graph(backbone.model, dtype).eval(), folder / PROGRAM_FILES[format_]
    write_json(folder / PROGRAM_CONFIG, described(backbone, backbone.settings))
    {"onnx": _onnx, "torch_export": _torch_export, "torchscript": _torchscript}[format_](graph, file)
    return loaded(file)


def _onnx(graph: Graph, file: Path) -> None:
    try:
        import onnxscript  # noqa: F401  torch's exporter writes with it
    except ImportError as error:
        raise ValueError(f"--format onnx needs onnxscript ({error}); install seedbed[export].") from None
    with quiet():
        program = torch.onnx.export(exported(graph), input_names=[INPUT], output_names=list(OUTPUTS), verbose=False)
        assert program is not None
        program.save(file)


def _torch_export(graph: Graph, file: Path) -> None:
    with quiet():
        torch.export.save(exported(graph), file)


def _torchscript(graph: Graph, file: Path) -> None:
    with quiet():
        torch.jit.trace(graph, graph.example(), check_trace=False).save(file)
