"""Exports that run by themselves (ONNX, torch.export, TorchScript) behind the same tokens as ours."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.vision_transformer import Features
from pretrain.program_files import INPUT, PROGRAM_CONFIG, PROGRAM_FILES

Run = Callable[[Tensor], Sequence[Tensor]]
"""normalised images [B, 3, H, W] -> CLS, registers, patches, on the processor"""


class ProgramModel(nn.Module):
    """A program in eval mode, which answers as `VisionTransformer` does, after its last block alone.

    It runs on the processor; images of another device go there and their tokens back.

    Args:
        run: the program.
        description: of the model, as its export wrote it.
        source: its file, for messages.
    """

    def __init__(self, run: Run, description: dict[str, Any], source: Path) -> None:
        super().__init__()
        settings = description["model"]
        self.run, self.source = run, source
        self.patch_size: int = settings["patch_size"]
        self.embed_dim: int = settings["embed_dim"]
        self.depth: int = settings["depth"]
        self.num_registers: int = settings["num_registers"]
        self.num_prefix_tokens = 1 + self.num_registers
        # Who asks a model's parameters for its device, and moves it, finds one.
        self.device_of_images = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, crops: Sequence[Tensor]) -> list[Features]:
        """Features after the last block and the final norm, for each group of equal crops [B, 3, H, W]."""
        return [self._features(images) for images in crops]

    def layers(self, images: Tensor, indices: Sequence[int], norm: bool = True) -> list[Features]:
        """The last block's features, as often as `indices` name it. Raises ValueError: another block, or no norm."""
        if set(indices) != {self.depth - 1} or not norm:
            raise ValueError(
                f"{self.source} is a program, which gives the normed tokens of its last block ({self.depth - 1}) only, "
                f"and blocks {sorted(set(indices))}{'' if norm else ' without norm'} were asked for; take the run, or "
                "an export of --format huggingface or safetensors."
            )
        return [self._features(images)] * len(indices)

    def _features(self, images: Tensor) -> Features:
        cls, registers, patches = (tokens.to(images.device) for tokens in self.run(images.cpu().float()))
        return Features(
            cls, registers, patches, (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        )


def program_file(path: Path) -> Path | None:
    """The program in an export's folder, or the path itself where it is that file; None where there is none."""
    found = [path] if path.is_file() else [path / name for name in PROGRAM_FILES.values()]
    return next((file for file in found if file.name in PROGRAM_FILES.values() and file.is_file()), None)


def load_program(file: Path) -> tuple[ProgramModel, dict[str, Any]]:
    """An export that runs by itself, and its description. A program is code: take one from whom you trust.

    Raises:
        ValueError: no description beside it, a library that is not installed, or a file that it cannot read.
    """
    try:
        description = json.loads((file.parent / PROGRAM_CONFIG).read_text(encoding="utf-8"))
        wanted = ("patch_size", "embed_dim", "depth", "num_registers")
        is_whole = {"architecture", "image"} <= description.keys() and all(k in description["model"] for k in wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{file} has no {PROGRAM_CONFIG} of ours beside it, which says what it is: export it again.")
    try:
        run = loaded(file)
    except Exception as error:  # three libraries, each with its own
        raise ValueError(f"{file} cannot be run: {' '.join(str(error).split())[:200]}") from None
    return ProgramModel(run, description, file), description


def loaded(file: Path) -> Run:
    """What runs the program of a file, by its own library; that one's errors, and ValueError: it is not installed."""
    if file.name == PROGRAM_FILES["onnx"]:
        return _onnx(file)
    with quiet():
        program = (
            torch.jit.load(file) if file.name == PROGRAM_FILES["torchscript"] else torch.export.load(file).module()
        )

    def run(images: Tensor) -> Sequence[Tensor]:
        with torch.inference_mode():
            return program(images)

    return run


def _onnx(file: Path) -> Run:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"{file} needs onnxruntime ({error}); install seedbed[onnx].") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; in float16 it warns of each operation that it computes in float32
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters tell their own steps, and their own future, at length."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
