"""Load a trained backbone from whatever holds one: the only way to its tokens.

backbone = load_backbone("RUN")                    # a run folder: its newest teacher
backbone = load_backbone("RUN/checkpoints/step-00010000")
backbone = load_backbone("RUN/teacher")            # teacher.safetensors + config.json
backbone = load_backbone("EXPORT")                 # a Hugging Face folder that pretrain.downstream.export wrote
backbone = load_backbone("dinov2_vits14_reg4_pretrain.pth", architecture="dinov2_vits14_reg")
features = backbone.features(images)               # Features(cls, registers, patches, grid)
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.models.architectures import ARCHITECTURES
from pretrain.models.released import load_released
from pretrain.models.vision_transformer import Features, VisionTransformer
from pretrain.weight_files import BACKBONE, HEADS
from pretrain.weights import complete_settings, find_weights

__all__ = ["Backbone", "Features", "ImageSettings", "complete_settings", "load_backbone", "load_heads"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
log = logging.getLogger(__name__)
# How a trained model is run, not what it is: the only settings that loading may change.
CHANGEABLE = ("attention", "fp8", "position_antialias", "position_offset")
# The kernels of training may not exist where the model is used.
_ANYWHERE = {"attention": "sdpa", "fp8": False}


@dataclass(frozen=True)
class ImageSettings:
    """What a backbone expects of its images, and the crop it was trained at."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    """per channel, of values from 0 to 1"""
    std: tuple[float, ...] = IMAGENET_STD
    px: int = 224
    """side of the centre crop at evaluation: the global crop of training"""

    @property
    def resize_px(self) -> int:
        """Shorter side before the centre crop, in the proportion 256 : 224 of the published evaluations."""
        return round(self.px * 256 / 224)

    def normalise(self, images: Tensor) -> Tensor:
        """Uint8 [B, 3, H, W] -> float32, as in training."""
        mean, std = (torch.tensor(value, device=images.device).view(1, -1, 1, 1) for value in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True, eq=False)
class Backbone:
    """A trained model in eval mode, float32, with what is known about it."""

    model: VisionTransformer
    image: ImageSettings
    architecture: str
    """name in pretrain.models.architectures"""
    settings: dict[str, Any]
    """keyword arguments of VisionTransformer, complete"""
    source: str
    """the folder or file that was read"""
    description: dict[str, Any]
    """config.json of the teacher: step, phase, heads, the training config; empty for released weights"""

    def features(self, images: Tensor) -> Features:
        """Tokens of normalised images [B, 3, H, W] of any size that the patch divides; without gradient."""
        with torch.inference_mode():
            return self.model([images])[0]


def load_backbone(path: str | Path, architecture: str = "", **changes: Any) -> Backbone:
    """Load a backbone strictly: every parameter, and none that the model lacks.

    Args:
        path: a run folder, step-* checkpoint, teacher folder, export of ours, or a released .pth or .safetensors.
        architecture: of a released file, which does not say; must be empty or agree for everything else.
        changes: `attention`, `position_antialias` or `position_offset`: how a trained model is run.

    Raises:
        ValueError: nothing that holds a backbone there, an unknown architecture, or tensors of another model.
    """
    unknown = set(changes) - set(CHANGEABLE)
    if unknown:
        raise ValueError(
            f"{sorted(unknown)[0]} belongs to the weights; loading can change {', '.join(CHANGEABLE)} only."
        )
    if not isinstance(offset := changes.get("position_offset", 0), int | float) or not 0 <= offset < 1:
        raise ValueError(f"position_offset={offset} must be in [0, 1).")
    weights = find_weights(path)
    known = weights.description.get("architecture", "")
    if not architecture and not known:
        raise ValueError(
            f"{weights.source} does not say which model it is; give its architecture, one of "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    if architecture and known not in ("", architecture):
        raise ValueError(f"{weights.source} holds a {known}, not the {architecture} that was asked for.")
    settings = weights.settings(architecture) | _ANYWHERE | changes
    if weights.released and settings["position_offset"] and "position_offset" not in changes:
        log.info(
            "%s: position_offset=%g, as the code of its release resizes positions; position_offset=0 is how "
            "transformers does it",
            weights.source,
            settings["position_offset"],
        )
    state = {name.removeprefix(BACKBONE): value for name, value in weights.read((BACKBONE,)).items()}
    return Backbone(
        model=build_model(settings, state, weights.source),
        image=image_settings(weights.description) if weights.description else ImageSettings(),
        architecture=architecture or known,
        settings=settings,
        source=weights.source,
        description=weights.description if not weights.released else {},
    )


def load_heads(path: str | Path) -> dict[str, Tensor]:
    """Tensors of the projection heads beside a backbone, dino_head.* and ibot_head.*; none where there are none."""
    return find_weights(path).read(HEADS)


def build_model(settings: dict[str, Any], state: dict[str, Tensor], source: str) -> VisionTransformer:
    """The model with these weights, in eval mode; ValueError names what is missing, left over or of another shape."""
    with torch.device("meta"):
        model = VisionTransformer(**settings)
    model.to_empty(device="cpu")
    try:
        load_released(model, {name: value.float() for name, value in state.items()})
    except ValueError as error:
        raise ValueError(f"{source} is not of this model: {error}") from None
    return model.requires_grad_(False).eval()


def image_settings(description: Mapping[str, Any]) -> ImageSettings:
    image = description["image"]
    return ImageSettings(mean=tuple(image["mean"]), std=tuple(image["std"]), px=int(image["px"]))
