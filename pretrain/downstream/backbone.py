"""Load a trained backbone from whatever holds one: the only way to its tokens.

backbone = load_backbone("RUN")                    # a run folder: its newest teacher
backbone = load_backbone("RUN/checkpoints/step-00010000")
backbone = load_backbone("RUN/teacher")            # teacher.safetensors + config.json
backbone = load_backbone("EXPORT")                 # whatever pretrain.downstream.export wrote, programs too
backbone = load_backbone("dinov2_vits14_reg4_pretrain.pth", architecture="dinov2_vits14_reg")
backbone = load_backbone("hf:facebook/dinov2-small")                       # of the Hugging Face hub, or its cache
backbone = load_backbone("timm:vit_small_patch16_dinov3.lvd1689m")         # any ViT of timm, or a folder of one
features = backbone.features(images)               # Features(cls, registers, patches, grid)
features = backbone.layers(images, "four")         # of the four blocks that dense heads want
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.downstream.pixels import short_side
from pretrain.downstream.program_model import ProgramModel, load_program, program_file
from pretrain.downstream.timm_model import TimmModel, is_timm_folder, load_timm
from pretrain.models.architectures import ARCHITECTURES
from pretrain.models.released import load_released
from pretrain.models.vision_transformer import Features, VisionTransformer
from pretrain.weight_files import BACKBONE, HEADS
from pretrain.weights import ANYWHERE, EXPORT_CONFIG, complete_settings, find_weights

__all__ = ["Backbone", "Features", "ImageSettings", "complete_settings", "load_backbone", "load_heads"]

log = logging.getLogger(__name__)
# How a trained model is run, not what it is: the only settings that loading may change.
CHANGEABLE = ("attention", "fp8", "position_antialias", "position_offset")
FITS = ("exact", "pad", "resize")
HUB, TIMM = "hf:", "timm:"
_HUB_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


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
        return short_side(self.px)

    def normalise(self, images: Tensor) -> Tensor:
        """Uint8 [B, 3, H, W] -> float32, as in training.

        Raises:
            ValueError: images of another kind or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != len(self.mean):
            raise ValueError(
                f"normalise takes uint8 images [B, {len(self.mean)}, H, W], from 0 to 255, got {images.dtype} "
                f"{list(images.shape)}."
            )
        mean, std = (torch.tensor(value, device=images.device).view(1, -1, 1, 1) for value in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


@dataclass(frozen=True, eq=False)
class Backbone:
    """A trained model in eval mode, float32, with what is known about it."""

    model: VisionTransformer | TimmModel | ProgramModel
    image: ImageSettings
    architecture: str
    """name in pretrain.models.architectures, or timm's"""
    settings: dict[str, Any]
    """keyword arguments of VisionTransformer, complete; empty for a model of timm and for a program"""
    source: str
    """the folder or file that was read"""
    description: dict[str, Any]
    """config.json of the teacher: step, phase, heads, the training config; empty for released weights"""
    released: bool = False
    """its weights were read from files as the published ones are"""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.model.depth

    def features(self, images: Tensor, fit: str = "exact") -> Features:
        """Tokens after the last block and the final norm; without gradient.

        Args:
            images: normalised, [B, 3, H, W].
            fit: what to do where the patch does not divide a side: `exact` is an error, see `fitted`.
        """
        _check_normalised(images)
        with torch.inference_mode():
            return self.model([fitted(images, self.model.patch_size, fit)])[0]

    def layers(
        self, images: Tensor, which: int | str | Sequence[int], norm: bool = True, fit: str = "exact"
    ) -> list[Features]:
        """Tokens after several blocks; without gradient.

        Args:
            images: normalised, [B, 3, H, W].
            which: see `chosen_layers`.
            norm: apply the final norm to each.
            fit: as for `features`.

        Raises:
            ValueError: blocks that the model does not have, or, of a program, any but the last.
        """
        _check_normalised(images)
        indices = chosen_layers(which, self.depth)
        with torch.inference_mode():
            return self.model.layers(fitted(images, self.model.patch_size, fit), indices, norm=norm)

    def features_of_each(self, images: Sequence[Tensor], fit: str = "exact") -> list[Features]:
        """Tokens of images of different sizes, each [3, H, W]: in their order, one image in each result.

        Images of equal size go through the model together.
        """
        for image in images:
            _check_normalised(image[None] if isinstance(image, Tensor) else image)
        ready = [fitted(image[None], self.model.patch_size, fit) for image in images]
        sizes: dict[torch.Size, list[int]] = {}
        for number, image in enumerate(ready):
            sizes.setdefault(image.shape, []).append(number)
        found: dict[int, Features] = {}
        with torch.inference_mode():
            groups = self.model([torch.cat([ready[n] for n in numbers]) for numbers in sizes.values()])
        for group, numbers in zip(groups, sizes.values(), strict=True):
            found |= dict(zip(numbers, one_by_one(group), strict=True))
        return [found[number] for number in range(len(images))]


def _check_normalised(images: Any) -> None:
    """Raises ValueError: bytes, a picture that is no tensor, or no image at all, which is told in many ways below."""
    found = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4 or not len(images):
        raise ValueError(
            f"a backbone takes normalised float images [B, 3, H, W], B of 1 or more, got {found}; bytes go through "
            "backbone.image.normalise first."
        )


def one_by_one(features: Features) -> Iterator[Features]:
    """The same of each image alone."""
    parts = (features.cls.split(1), features.registers.split(1), features.patches.split(1))
    for cls, registers, patches in zip(*parts, strict=True):
        yield Features(cls, registers, patches, features.grid)


def fitted(images: Tensor, patch_size: int, fit: str) -> Tensor:
    """Normalised images [B, 3, H, W] whose sides the patch divides.

    Args:
        fit: `exact`: they must be; `pad`: the mean colour is added at the right and below; `resize`: to the nearest
            sides that are, antialiased bicubic.

    Raises:
        ValueError: sides that the patch does not divide, with `exact`; an unknown `fit`.
    """
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} is unknown; choose one of {', '.join(FITS)}.")
    height, width = images.shape[-2:]
    if not (height % patch_size or width % patch_size):
        return images
    if fit == "exact":
        raise ValueError(
            f"images of {height} x {width} px do not split into patches of {patch_size} px; use fit='pad' or "
            "fit='resize'."
        )
    if fit == "pad":  # normalised: the mean colour is 0
        return F.pad(images, (0, -width % patch_size, 0, -height % patch_size))
    size = [max(round(side / patch_size), 1) * patch_size for side in (height, width)]
    return F.interpolate(images, size=size, mode="bicubic", antialias=True)


def chosen_layers(which: int | str | Sequence[int], depth: int) -> list[int]:
    """Numbers of blocks, from 0.

    Args:
        which: the last so many; or numbers, negative ones from the end; or `four`, those of the published dense heads:
            4, 11, 17, 23 of 24, the last of each quarter elsewhere (DINOv2, arXiv:2304.07193, and its released code).

    Raises:
        ValueError: blocks that the model does not have.
    """
    if which == "four":
        if depth < 4:
            raise ValueError(f"layers='four' needs a model of 4 blocks or more, this one has {depth}.")
        return [4, 11, 17, 23] if depth == 24 else [(quarter * depth) // 4 - 1 for quarter in (1, 2, 3, 4)]
    if isinstance(which, str):
        raise ValueError(
            f"layers={which!r} is unknown: give a number (the last so many), numbers of blocks, or 'four'."
        )
    if isinstance(which, int):
        if not 1 <= which <= depth:
            raise ValueError(f"layers={which}: the last {which} blocks of a model that has {depth}.")
        return list(range(depth - which, depth))
    wrong = [number for number in which if not -depth <= number < depth]
    if wrong or not len(which):
        raise ValueError(f"layers={list(which)} of a model of {depth} blocks: numbers from {-depth} to {depth - 1}.")
    return [number % depth for number in which]


def load_backbone(path: str | Path, architecture: str = "", **changes: Any) -> Backbone:
    """Load a backbone strictly: every parameter, and none that the model lacks.

    Args:
        path: a run folder, step-* checkpoint, teacher folder, export of ours in any format, a released .pth or
            .safetensors, a folder of Hugging Face or timm; `hf:OWNER/NAME` of the hub; `timm:NAME`.
        architecture: of a released file, which does not say; must be empty or agree for everything else.
        changes: how a trained model is run, see CHANGEABLE.

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
    place = Path(path) if str(path).startswith(TIMM) else _place(path)
    backbone = _as_it_is(str(path), place)
    if backbone is None:
        return _of_weights(place, architecture, changes)
    if changes:
        raise ValueError(f"{path} is a model as it is, of timm or a program: changes do not apply.")
    if architecture and architecture != backbone.architecture:
        raise ValueError(f"{path} holds a {backbone.architecture}, not the {architecture} that was asked for.")
    return backbone


def _as_it_is(path: str, place: Path) -> Backbone | None:
    """What is not weights of ours to load, but a model of another library; None for weights."""
    if path.startswith(TIMM) or is_timm_folder(place):
        name = path.removeprefix(TIMM) if path.startswith(TIMM) else str(place)
        model, known = load_timm(name)
        image = ImageSettings(tuple(known["mean"]), tuple(known["std"]), int(known["input_size"][-1]))
        told = _json(Path(name) / EXPORT_CONFIG)  # of ours; timm's own folders have none
        return Backbone(model, image, told.get("architecture", name), {}, path, told)
    if file := program_file(place):
        program, told = load_program(file)
        return Backbone(program, image_settings(told), told["architecture"], {}, path, told)
    return None


def _of_weights(place: Path, architecture: str, changes: dict[str, Any]) -> Backbone:
    weights = find_weights(place)
    known = weights.description.get("architecture", "")
    if not architecture and not known:
        raise ValueError(
            f"{weights.source} does not say which model it is; give its architecture, one of "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    if architecture and known not in ("", architecture):
        raise ValueError(f"{weights.source} holds a {known}, not the {architecture} that was asked for.")
    settings = weights.settings(architecture) | ANYWHERE | changes
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
        released=weights.released,
    )


def _place(path: str | Path) -> Path:
    """Of `hf:OWNER/NAME` the folder, fetched where it is not in the cache yet; `hf:FOLDER` is that folder."""
    if not str(path).startswith(HUB):
        return Path(path)
    name = str(path).removeprefix(HUB)
    if Path(name).expanduser().exists():
        return Path(name).expanduser()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # the hub's client and its transports each have their own
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is neither a folder nor can it be had from the hub: {told}") from None


def load_heads(path: str | Path) -> dict[str, Tensor]:
    """Tensors of the projection heads beside a backbone, dino_head.* and ibot_head.*; none where there are none."""
    return find_weights(_place(path)).read(HEADS)


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


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def image_settings(description: Mapping[str, Any]) -> ImageSettings:
    image = description["image"]
    return ImageSettings(mean=tuple(image["mean"]), std=tuple(image["std"]), px=int(image["px"]))
