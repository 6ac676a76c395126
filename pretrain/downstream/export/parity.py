"""Features of an export, loaded by its own library, beside ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pretrain.downstream.backbone import Backbone
from pretrain.downstream.export.huggingface import read_model
from pretrain.downstream.program_model import Run

TOLERANCE = 1e-5
"""largest difference of a feature, relative to the root mean square of all of them (about 1 after the final norm);
float32 arithmetic in another order gives up to 3e-6 for ViT-S"""
TOLERANCE_FLOAT16 = 0.1
"""the same of arithmetic in float16, whose rounding is stated rather than refused: 0.01 is usual"""


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on one batch."""

    what: str
    height: int
    width: int
    images: int
    prefix: float
    """CLS and registers"""
    patches: float

    def __str__(self) -> str:
        size = f"{self.images} x {self.height} x {self.width}"
        return f"{self.what} {size} px: CLS and registers {self.prefix:.1e}, patches {self.patches:.1e}"


def check(run: Run, backbone: Backbone) -> list[Difference]:
    """Differences of CLS, registers and patches on square, smaller, larger and non-square batches.

    Args:
        run: normalised images to CLS, registers and patches.

    Raises:
        ValueError: a difference above TOLERANCE, with every figure.
    """
    return _checked([_difference("random", images, images, backbone, run) for images in _batches(backbone)], TOLERANCE)


def check_folder(folder: Path, backbone: Backbone) -> list[Difference]:
    """The same of a folder that transformers loads, and of an image that its processor prepares.

    Raises:
        ValueError: a missing or unexpected tensor, or a difference above TOLERANCE, with every figure.
    """
    from transformers import AutoImageProcessor

    run = read_model(folder, backbone, torch.float32)
    differences = [_difference("random", images, images, backbone, run) for images in _batches(backbone)]
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    image = _picture(backbone.image.resize_px)
    theirs = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    differences.append(_difference("processed", _processed(image, backbone), theirs, backbone, run))
    return _checked(differences, TOLERANCE)


def measure_float16(run: Run, backbone: Backbone) -> list[Difference]:
    """Differences of a run in float16 from ours in float32, on a square, a smaller and a non-square image.

    Raises:
        ValueError: features that are not finite, or a difference that no rounding explains, above TOLERANCE_FLOAT16.
    """
    some = [images[:1] for images in _batches(backbone)[:3]]
    return _checked([_difference("float16", images, images, backbone, run) for images in some], TOLERANCE_FLOAT16)


def of_model(model: nn.Module) -> Run:
    """How a model that takes groups of crops, ours or one behind the same tokens, runs, in its own precision."""

    @torch.inference_mode()
    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = model([images.to(next(model.parameters()).dtype)])[0]
        return features.cls.float(), features.registers.float(), features.patches.float()

    return run


def _checked(differences: list[Difference], most: float) -> list[Difference]:
    if not all(d.prefix <= most and d.patches <= most for d in differences):  # refuses NaN, too
        figures = "; ".join(str(d) for d in differences)
        raise ValueError(f"features of the export differ from ours by more than {most:g}: {figures}.")
    return differences


def grids(px: int, patch: int) -> Sequence[tuple[int, int, int]]:
    """(images, rows, columns) of patches: the training crop, smaller, larger, and both ways non-square."""
    n = max(px // patch, 2)
    half = max(n // 2, 1)
    return [(2, n, n), (1, half, half), (2, half, n), (1, n, half + 1), (1, n + 1, n + 3)]


def _batches(backbone: Backbone) -> list[Tensor]:
    generator, patch = torch.Generator().manual_seed(0), backbone.settings["patch_size"]
    channels = backbone.settings["in_channels"]
    sizes = grids(backbone.image.px, patch)
    return [torch.randn(b, channels, h * patch, w * patch, generator=generator) for b, h, w in sizes]


def _picture(px: int) -> np.ndarray:
    """Uint8 [px, px + 8, 3]: its shorter side is that of the processor's resize, so only crop and scale remain."""
    return np.random.default_rng(0).integers(0, 256, (px, px + 8, 3), dtype=np.uint8)


def _processed(image: np.ndarray, backbone: Backbone) -> Tensor:
    px, (height, width) = backbone.image.px, image.shape[:2]
    top, left = (height - px) // 2, (width - px) // 2
    crop = torch.from_numpy(image[top : top + px, left : left + px]).permute(2, 0, 1)[None]
    return backbone.image.normalise(crop)


@torch.inference_mode()
def _difference(what: str, ours_in: Tensor, theirs_in: Tensor, backbone: Backbone, run: Run) -> Difference:
    ours, (cls, registers, patches) = backbone.features(ours_in), run(theirs_in)
    scale = ours.patches.square().mean().sqrt()
    prefix = torch.cat([ours.cls[:, None] - cls[:, None], ours.registers - registers], dim=1)
    apart = [float(difference.abs().max() / scale) for difference in (prefix, ours.patches - patches)]
    height, width = ours_in.shape[-2:]
    return Difference(what, height, width, len(ours_in), *apart)
