"""Load a trained backbone from whatever holds one: the only way to its tokens.

backbone = load_backbone("RUN")                    # a run folder: its newest teacher
backbone = load_backbone("RUN/checkpoints/step-00010000")
backbone = load_backbone("RUN/teacher")            # teacher.safetensors + config.json
backbone = load_backbone("EXPORT")                 # a Hugging Face folder that pretrain.downstream.export wrote
backbone = load_backbone("dinov2_vits14_reg4_pretrain.pth", architecture="dinov2_vits14_reg")
features = backbone.features(images)               # Features(cls, registers, patches, grid)
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint import MANIFEST, read_manifest, teacher_state
from pretrain.downstream.export.names import backbone_state
from pretrain.models.architectures import ARCHITECTURES
from pretrain.models.released import load_released
from pretrain.models.vision_transformer import Features, VisionTransformer

__all__ = ["Backbone", "Features", "ImageSettings", "find_weights", "load_backbone", "load_heads"]

TEACHER_FILE = "teacher.safetensors"
CONFIG_FILE = "config.json"
SEEDBED_FILE = "seedbed.json"
"""our config.json beside an export, whose own config.json is that of transformers"""
HEADS_FILE = "heads.safetensors"
HEADS = ("dino_head.", "ibot_head.")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# How a trained model is run, not what it is: the only settings that loading may change.
CHANGEABLE = ("attention", "position_antialias", "position_offset")
# The kernels of training may not exist where the model is used.
_ANYWHERE = {"attention": "sdpa"}


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


@dataclass(frozen=True)
class Weights:
    """Weights that were found but not read yet."""

    source: str
    description: dict[str, Any]
    read: Callable[[tuple[str, ...]], dict[str, Tensor]]
    """tensors whose names start with one of these"""


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
    path = Path(path).expanduser()
    if path.is_file():
        return _load_released(path, architecture, changes)
    weights = find_weights(path)
    name = weights.description["architecture"]
    if architecture not in ("", name):
        raise ValueError(f"{weights.source} holds a {name}, not the {architecture} that was asked for.")
    settings = complete_settings(name, weights.description["model"] | _ANYWHERE | changes)
    state = {key.removeprefix("backbone."): value for key, value in weights.read(("backbone.",)).items()}
    return Backbone(
        model=build_model(settings, state, weights.source),
        image=image_settings(weights.description),
        architecture=name,
        settings=settings,
        source=weights.source,
        description=weights.description,
    )


def load_heads(path: str | Path) -> dict[str, Tensor]:
    """Tensors of the projection heads beside a backbone, dino_head.* and ibot_head.*; none where there are none."""
    path = Path(path).expanduser()
    return {} if path.is_file() else find_weights(path).read(HEADS)


def find_weights(path: Path) -> Weights:
    """The weights in a folder, and their description; reads no tensor yet.

    Raises:
        ValueError: the folder does not exist or holds nothing known.
    """
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a run, checkpoint, teacher or export folder, or released file.")
    if (path / TEACHER_FILE).is_file():
        return Weights(
            str(path), _description(path / CONFIG_FILE), lambda starts: _tensors(path / TEACHER_FILE, starts)
        )
    if (path / SEEDBED_FILE).is_file():
        return _exported(path)
    if (path / "config.json").is_file():
        raise ValueError(f"{path} has no {SEEDBED_FILE}: it is a model folder, but not one that pretrain exported.")
    found = _checkpoint(path) or _newest_of_run(path)
    if found is None:
        raise ValueError(
            f"{path} holds no backbone: no {TEACHER_FILE}, no {SEEDBED_FILE}, no finished checkpoint, no run with one."
        )
    return found


def complete_settings(architecture: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Every keyword argument of VisionTransformer: its defaults, the architecture's, then `changes`.

    Raises:
        ValueError: an architecture or argument that does not exist.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r} is unknown; choose one of {', '.join(sorted(ARCHITECTURES))}.")
    parameters = list(inspect.signature(VisionTransformer.__init__).parameters.values())[1:]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    settings = defaults | dict(ARCHITECTURES[architecture]) | dict(changes)
    unknown = settings.keys() - {p.name for p in parameters}
    if unknown:
        raise ValueError(f"model setting {sorted(unknown)[0]!r} is not one of this version's VisionTransformer.")
    return settings


def build_model(settings: dict[str, Any], state: dict[str, Tensor], source: str) -> VisionTransformer:
    """The model with these weights, in eval mode; ValueError names what is missing, left over or of another shape."""
    with torch.device("meta"):
        model = VisionTransformer(**settings)
    expected = {name: value.shape for name, value in model.state_dict().items()}
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    differing = [name for name in state if name in expected and state[name].shape != expected[name]]
    for names, problem in ((missing, "lacks"), (extra, "has left over"), (differing, "has another shape of")):
        if names:
            raise ValueError(f"{source} is not of this model: it {problem} {_listed(names)}.")
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def image_settings(description: Mapping[str, Any]) -> ImageSettings:
    image = description["image"]
    return ImageSettings(mean=tuple(image["mean"]), std=tuple(image["std"]), px=int(image["px"]))


def _load_released(path: Path, architecture: str, changes: dict[str, Any]) -> Backbone:
    if not architecture:
        raise ValueError(
            f"{path} does not say which model it is; give its architecture, one of {', '.join(sorted(ARCHITECTURES))}."
        )
    settings = complete_settings(architecture, changes)
    with torch.device("meta"):
        model = VisionTransformer(**settings)
    model.to_empty(device="cpu")
    load_released(model, path)
    return Backbone(model.requires_grad_(False).eval(), ImageSettings(), architecture, settings, str(path), {})


def _exported(folder: Path) -> Weights:
    """An export of ours: its tensors renamed back, heads from the file beside them."""
    description = _description(folder / SEEDBED_FILE)
    model_type = _description(folder / "config.json")["model_type"]
    family, gated = description["model"]["family"], description["model"]["ffn"] == "swiglu"

    def read(starts: tuple[str, ...]) -> dict[str, Tensor]:
        tensors = {}
        if "backbone." in starts:
            state = backbone_state(
                _tensors(folder / "model.safetensors", ("",)), model_type, family=family, gated=gated
            )
            scaled = description["model"]["layerscale"]  # the classes have layer scales always, of ones if need be
            tensors = {f"backbone.{name}": value for name, value in state.items() if scaled or ".gamma" not in name}
        heads = tuple(start for start in starts if start != "backbone.")
        has_heads = bool(heads) and (folder / HEADS_FILE).is_file()
        return tensors | (_tensors(folder / HEADS_FILE, heads) if has_heads else {})

    return Weights(str(folder), description, read)


def _checkpoint(folder: Path) -> Weights | None:
    """The teacher of a step-* folder; None where there is no finished checkpoint."""
    if not (folder / MANIFEST).is_file():
        return None
    description = read_manifest(folder)["meta"]["teacher"]

    def read(starts: tuple[str, ...]) -> dict[str, Tensor]:
        has = [start for start in starts if start != "ibot_head." or not description["heads"]["tied"]]
        return {start + name: t for start in has for name, t in teacher_state(folder, f"teacher.{start}").items()}

    return Weights(str(folder), description, read)


def _newest_of_run(run: Path) -> Weights | None:
    """The teacher or finished checkpoint of a run folder with the most steps; at the same step the teacher."""
    folders = [*sorted((run / "checkpoints").glob("step-*")), run / "teacher"]
    found = [weights for folder in folders if (weights := _checkpoint(folder) or _teacher(folder))]
    return max(reversed(found), key=lambda weights: weights.description.get("step") or 0, default=None)


def _teacher(folder: Path) -> Weights | None:
    return find_weights(folder) if (folder / TEACHER_FILE).is_file() else None


def _description(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as the description of a model: {error}") from error
    return description


def _tensors(file: Path, starts: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose names start with one of these; the others are not read."""
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(starts)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
