"""Features of an export, loaded by its own library, beside ours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pretrain.downstream.backbone import Backbone

TOLERANCE = 1e-5
"""largest difference of a feature, relative to the root mean square of all of them (about 1 after the final norm);
float32 arithmetic in another order gives up to 3e-6 for ViT-S"""


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


def check_program(run: Callable[[Tensor], Sequence[Tensor]], backbone: Backbone) -> list[Difference]:
    """Differences of CLS, registers and patches on square, smaller, larger and non-square batches.

    Args:
        run: normalised images to CLS, registers and patches.

    Raises:
        ValueError: a difference above TOLERANCE, with every figure.
    """

    def tokens(images: Tensor) -> Tensor:
        cls, registers, patches = run(images)
        return torch.cat([cls[:, None], registers, patches], dim=1)

    return _checked([_difference("random", images, images, backbone, tokens) for images in _batches(backbone)])


def check_folder(folder: Path, backbone: Backbone) -> list[Difference]:
    """The same of a folder that transformers loads, and of an image that its processor prepares.

    Raises:
        ValueError: a missing or unexpected tensor, or a difference above TOLERANCE, with every figure.
    """
    from transformers import AutoImageProcessor, AutoModel

    model, report = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise ValueError(f"transformers loads {folder} with {kind.replace('_', ' ')}: {sorted(report[kind])[:4]}.")
    model = model.eval()

    def tokens(images: Tensor) -> Tensor:
        return model(images).last_hidden_state

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    differences = [_difference("random", images, images, backbone, tokens) for images in _batches(backbone)]
    image = _picture(backbone.image.resize_px)
    theirs = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
    differences.append(_difference("processed", _processed(image, backbone), theirs, backbone, tokens))
    return _checked(differences)


def _checked(differences: list[Difference]) -> list[Difference]:
    if not all(d.prefix <= TOLERANCE and d.patches <= TOLERANCE for d in differences):  # refuses NaN, too
        figures = "; ".join(str(d) for d in differences)
        raise ValueError(f"features of the export differ from ours by more than {TOLERANCE:g}: {figures}.")
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
def _difference(
    what: str, ours_in: Tensor, theirs_in: Tensor, backbone: Backbone, tokens: Callable[[Tensor], Tensor]
) -> Difference:
    ours = backbone.features(ours_in)
    prefix = torch.cat([ours.cls[:, None], ours.registers], dim=1)
    theirs = tokens(theirs_in).split([prefix.shape[1], ours.patches.shape[1]], dim=1)
    scale = ours.patches.square().mean().sqrt()
    apart = [float((a - b).abs().max() / scale) for a, b in zip((prefix, ours.patches), theirs, strict=True)]
    height, width = ours_in.shape[-2:]
    return Difference(what, height, width, len(ours_in), *apart)
