"""A file of tensors from anywhere -> names as the backbone and its heads have them. Nothing in it is ever executed.

The kind of a file is told by its content, not its name. Wrappers (`teacher`, `model`, `state_dict`, ...) and prefixes
(`backbone.`, `module.`, `student.`, `encoder.`, ...) are whatever stands before the CLS token's name.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.models.huggingface import backbone_state

BACKBONE, HEADS = "backbone.", ("dino_head.", "ibot_head.")
HUGGINGFACE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""the weights of a Hugging Face folder, the first that is there"""
_CLS, _HUGGINGFACE_CLS = "cls_token", "embeddings.cls_token"
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_MANY = 3


def read_tensors(file: Path, starts: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, a torch file, or the index of several such, by its dotted name.

    Args:
        starts: of a safetensors file, only tensors whose names start with one of these are read.

    Raises:
        ValueError: a file of another kind, a cut or damaged one, or one that holds no tensors.
    """
    try:
        with file.open("rb") as opened:
            first = opened.read(16)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from None
    if not first:
        raise ValueError(f"{file} is empty.")
    if file.name.endswith(".index.json"):
        tensors = {}
        for shard in _shards_of(file):
            tensors |= read_tensors(shard)
    elif first[8:9] == b"{":
        tensors = _safetensors(file, starts)
    elif first.startswith((_ZIP, _PICKLE)):
        tensors = dict(_flat(_torch_file(file, is_zip=first.startswith(_ZIP))))
    else:
        raise ValueError(f"{file} is no file of weights: neither safetensors nor what torch.save writes.")
    if not tensors and starts == ("",):
        raise ValueError(f"{file} holds no tensors.")
    return tensors


def network_state(tensors: Mapping[str, Tensor], part: str, source: str) -> tuple[dict[str, Tensor], str]:
    """One network's tensors, as `backbone.*`, `dino_head.*` and `ibot_head.*`, and the prefix that its backbone had.

    Args:
        part: `teacher` or `student`, where there are both.

    Raises:
        ValueError: no vision transformer of the DINOv2 or DINOv3 family.
    """
    prefix, is_huggingface = _prefix(list(tensors), part, source)
    backbone = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if is_huggingface:
        backbone = _from_huggingface(backbone, source)
    around = prefix.removesuffix(BACKBONE)
    heads = {name.removeprefix(around): t for name, t in tensors.items() if name.startswith(around)}
    state = {f"{BACKBONE}{name}": t for name, t in backbone.items() if not name.startswith(HEADS)}
    return state | {name: t for name, t in heads.items() if name.startswith(HEADS)}, prefix


def listed(names: Sequence[str], most: int = _MANY) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _prefix(names: Sequence[str], part: str, source: str) -> tuple[str, bool]:
    """What stands before the backbone's names, and whether they are those of a Hugging Face class."""
    found = [name for name in names if name.rpartition(".")[2] == _CLS]
    if not found:
        raise ValueError(
            f"{source} is no vision transformer of the DINOv2 or DINOv3 family, for it has no {_CLS}; it has "
            f"{listed(names)}."
        )

    def rank(name: str) -> tuple[bool, bool, int, str]:
        words = name.split(".")
        return part not in words, ("student" if part == "teacher" else "teacher") in words, len(words), name

    chosen = min(found, key=rank)
    is_huggingface = chosen == _HUGGINGFACE_CLS or chosen.endswith(f".{_HUGGINGFACE_CLS}")
    return chosen.removesuffix(_HUGGINGFACE_CLS if is_huggingface else _CLS), is_huggingface


def _from_huggingface(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Our names for theirs; the class is told by its names."""
    is_dinov2 = any(name.startswith("encoder.layer.") for name in state)
    gated = any("mlp.weights_in" in name or "mlp.gate_proj" in name for name in state)
    try:
        return backbone_state(
            state,
            "dinov2" if is_dinov2 else "dinov3_vit",
            family="dinov2" if is_dinov2 else "dinov3",
            gated=gated,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _safetensors(file: Path, starts: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(starts)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{file} cannot be read as safetensors, it is cut or damaged: {text}") from None


def _torch_file(file: Path, is_zip: bool) -> Any:
    try:
        if file.suffix == ".safetensors":  # torch goes by the name then
            with file.open("rb") as opened:
                return torch.load(opened, map_location="cpu", weights_only=True)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # hostile or cut: what torch raises then is of many kinds
        text = str(error)
        if "Weights only load failed" in text or "weights_only" in text:
            raise ValueError(
                f"{file} is a pickle of more than tensors, or damaged; what else is in it is never run: save its "
                "state dict alone, as safetensors."
            ) from None
        raise ValueError(
            f"{file} cannot be read as a torch file, it is cut, damaged or of another kind: "
            f"{' '.join(text.split())[:200] or type(error).__name__}"
        ) from None


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dicts by their dotted names; what else is in them is left out."""
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(name, str):
                yield from _flat(value, f"{prefix}{name}.")


def _shards_of(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [index.parent / Path(name).name for name in names]  # beside it, wherever it says
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index} is no index of a model's files: it has no weight_map.") from None
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index} names {listed(missing)}, which is not beside it.")
    return files
