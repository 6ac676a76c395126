"""Trained weights, wherever they lie: the one way to them, for training and for use.

    find_weights("RUN")                          a run folder: its newest teacher
    find_weights("RUN/checkpoints/step-00010000")
    find_weights("RUN/teacher")                  teacher.safetensors and config.json
    find_weights("EXPORT")                       what pretrain.downstream.export wrote, in either format
    find_weights("dinov3-vits16")                a Hugging Face folder of a released model, or its file
    find_weights("dinov2_vits14_pretrain.pth")   a released file, which does not say what it is

Nothing that is read is executed; whatever cannot be read is a ValueError of one sentence. This knows nothing of
training, so that who uses a backbone needs none of it; networks of training are filled by `network_weights`.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint import MANIFEST, PREFIX, read_manifest, stored_state
from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.distributed.tensor_files import Stored
from pretrain.models.architectures import ARCHITECTURES, nearest
from pretrain.models.huggingface import MODEL_TYPES, backbone_state, settings_of
from pretrain.models.released import released_names
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.program_files import PROGRAM_FILES
from pretrain.weight_files import (
    BACKBONE,
    HEADS,
    HUGGINGFACE_FILES,
    network_state,
    renamed_blockwise,
    stored_tensors,
)

TEACHER_WEIGHTS, TEACHER_CONFIG = "teacher.safetensors", "config.json"
EXPORT_CONFIG, EXPORT_HEADS = "seedbed.json", "heads.safetensors"
"""beside an export for transformers, whose own config.json is that of its class"""
RELEASED_OFFSET = 0.1
"""position_offset of the code that DINOv2 without registers was released with"""
Finder = Callable[[tuple[str, ...]], dict[str, Stored]]
ANYWHERE = {"attention": "sdpa", "fp8": False}
"""of a trained model, wherever it is used: the kernels of its training may be missing there"""


@dataclass(frozen=True)
class Weights:
    """Weights that were found but not read yet."""

    source: str
    description: dict[str, Any]
    """architecture, model (keyword arguments of VisionTransformer), image, and of ours also heads, step, phase and
    config; empty for a released file, which does not say what it is"""
    stored: Finder
    """tensors whose names start with one of these: backbone.*, dino_head.*, ibot_head.*; where they lie"""
    released: bool = False
    """from the released code, not from ours"""

    def read(self, starts: tuple[str, ...]) -> dict[str, Tensor]:
        """The same tensors, whole."""
        return {name: tensor.read() for name, tensor in self.stored(starts).items()}

    def settings(self, name: str = "") -> dict[str, Any]:
        """Every keyword argument of VisionTransformer: as described, or as the architecture `name` has them.

        Released DINOv2 without registers get the `position_offset` of their code.
        """
        name = name or self.description["architecture"]
        settings = complete_settings(name, self.description.get("model", {}))
        return settings | ({"position_offset": RELEASED_OFFSET} if self.released and _has_offset(settings) else {})


def find_weights(path: str | Path, part: str = "teacher") -> Weights:
    """The weights in a folder or file, and their description; of a folder, no tensor is read yet.

    Args:
        part: `teacher` or `student`, where the source has both.

    Raises:
        ValueError: nothing there, or nothing known.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _file(path, part)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist; give a run, checkpoint, teacher or export folder, or released file.")
    if (path / TEACHER_WEIGHTS).is_file():
        description = _description(path / TEACHER_CONFIG)
        return Weights(str(path), description, lambda starts: stored_tensors(path / TEACHER_WEIGHTS, starts))
    if (path / EXPORT_CONFIG).is_file() and not _is_of_timm(path):
        return _exported(path)
    if made_for := next((name for name in PROGRAM_FILES.values() if (path / name).is_file()), ""):
        raise ValueError(
            f"{path} is an export that runs by itself ({made_for}), not weights; give the run, or an export of "
            "--format huggingface or safetensors."
        )
    if (path / TEACHER_CONFIG).is_file():
        if _is_of_timm(path):
            raise ValueError(f"{path} is a folder of timm, for use; training takes the run itself, or another format.")
        return _huggingface(path, part)
    found = _checkpoint(path, part) or _newest_of_run(path, part)
    if found is None:
        raise ValueError(
            f"{path} holds no weights: no {TEACHER_WEIGHTS}, no {EXPORT_CONFIG}, no config.json of a Hugging Face "
            "model, no finished checkpoint, no run with one."
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


def _has_offset(settings: Mapping[str, Any]) -> bool:
    return (
        settings["family"] == "dinov2"
        and settings["position"] == "learned"
        and not settings["num_registers"]
        and not settings["position_antialias"]
    )


def _file(path: Path, part: str) -> Weights:
    """A file alone; or the folder that it lies in, where that says what it is."""
    if path.name == TEACHER_WEIGHTS and (path.parent / TEACHER_CONFIG).is_file():
        return find_weights(path.parent, part)
    if path.name in HUGGINGFACE_FILES and any((path.parent / c).is_file() for c in (EXPORT_CONFIG, TEACHER_CONFIG)):
        return find_weights(path.parent, part)
    tensors = stored_tensors(path)
    state, prefix = network_state(tensors, part, str(path))
    # A teacher.safetensors of ours without its description has this prefix; released safetensors have none.
    released = not (prefix == BACKBONE and any(name.startswith(HEADS) for name in tensors))
    return Weights(str(path), {}, lambda starts: _starting(_canonical(state), starts), released)


def _canonical(state: Mapping[str, Stored]) -> dict[str, Stored]:
    """Released names of the backbone as the hub files have them, heads as they are."""
    backbone = released_names({k.removeprefix(BACKBONE): t for k, t in state.items() if k.startswith(BACKBONE)})
    return {f"{BACKBONE}{k}": t for k, t in backbone.items()} | _starting(state, HEADS)


def _starting(state: Mapping[str, Stored], starts: tuple[str, ...]) -> dict[str, Stored]:
    return {name: tensor for name, tensor in state.items() if name.startswith(starts)}


def _exported(folder: Path) -> Weights:
    """An export of ours: its tensors renamed back, heads from the file beside them."""
    description = _description(folder / EXPORT_CONFIG)
    model_type = _json(folder / TEACHER_CONFIG).get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"{folder / TEACHER_CONFIG}: model_type={model_type!r} is none of {', '.join(MODEL_TYPES)}.")
    settings = complete_settings(description["architecture"], description["model"])

    rename = partial(
        backbone_state, model_type=model_type, family=settings["family"], gated=settings["ffn"] == "swiglu"
    )

    def find(starts: tuple[str, ...]) -> dict[str, Stored]:
        tensors: dict[str, Stored] = {}
        if BACKBONE in starts:
            state = renamed_blockwise(stored_tensors(folder / HUGGINGFACE_FILES[0]), rename)
            scaled = settings["layerscale"]  # the classes have layer scales always, of ones if need be
            tensors = {f"{BACKBONE}{name}": value for name, value in state.items() if scaled or ".gamma" not in name}
        heads = tuple(start for start in starts if start != BACKBONE)
        has_heads = bool(heads) and (folder / EXPORT_HEADS).is_file()
        return tensors | (stored_tensors(folder / EXPORT_HEADS, heads) if has_heads else {})

    return Weights(str(folder), description, find)


def _is_of_timm(folder: Path) -> bool:
    config = folder / TEACHER_CONFIG
    return (folder / HUGGINGFACE_FILES[0]).is_file() and config.is_file() and "architecture" in _json(config)


def _huggingface(folder: Path, part: str) -> Weights:
    """A released model as a Hugging Face folder."""
    try:
        settings = settings_of(_json(folder / TEACHER_CONFIG))
    except ValueError as error:
        raise ValueError(f"{folder} is no model of the DINOv2 or DINOv3 family: {error}") from None
    file = next((folder / name for name in HUGGINGFACE_FILES if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} has a config.json and no weights: none of {', '.join(HUGGINGFACE_FILES)}.")
    processor = folder / "preprocessor_config.json"
    image = _image(_json(processor) if processor.is_file() else {})
    description = {"architecture": nearest(settings), "model": settings, "image": image}
    return Weights(
        str(folder),
        description,
        lambda starts: _starting(network_state(stored_tensors(file), part, str(file))[0], starts),
        released=True,
    )


def _image(processor: Mapping[str, Any]) -> dict[str, Any]:
    crop = processor.get("crop_size") or processor.get("size") or {}
    px = crop.get("height") if isinstance(crop, Mapping) else crop
    mean, std = processor.get("image_mean") or IMAGENET_MEAN, processor.get("image_std") or IMAGENET_STD
    return {"mean": list(mean), "std": list(std), "px": px if isinstance(px, int) else 224}


def _checkpoint(folder: Path, part: str) -> Weights | None:
    """One network of a step-* folder; None where there is no finished checkpoint."""
    if not (folder / MANIFEST).is_file():
        return None
    description = _described(read_manifest(folder)["meta"].get("teacher"), folder / MANIFEST)

    return Weights(str(folder), description, lambda starts: _starting(stored_state(folder, f"{part}."), starts))


def _newest_of_run(run: Path, part: str) -> Weights | None:
    """The teacher or finished checkpoint of a run folder with the most steps; at the same step the teacher."""
    folders = [*sorted((run / "checkpoints").glob(f"{PREFIX}*"))]
    found = [weights for folder in folders if (weights := _checkpoint(folder, part))]
    if (run / "teacher" / TEACHER_WEIGHTS).is_file() and part == "teacher":
        found.append(find_weights(run / "teacher"))
    return max(reversed(found), key=lambda weights: weights.description.get("step") or 0, default=None)


def _description(file: Path) -> dict[str, Any]:
    """What pretrain wrote of a model."""
    return _described(_json(file), file)


def _described(description: Any, file: Path) -> dict[str, Any]:
    if not isinstance(description, dict) or not all(
        isinstance(description.get(key), kind)
        for key, kind in (("architecture", str), ("model", dict), ("image", dict))
    ):
        raise ValueError(f"{file} is not a description that pretrain wrote: it needs architecture, model and image.")
    return description


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as the description of a model: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} cannot be read as the description of a model: it holds a {type(content).__name__}.")
    return content
