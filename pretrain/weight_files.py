"""A file of tensors from anywhere -> names as the backbone and its heads have them. Nothing in it is ever executed.

The kind of a file is told by its content, not its name. Wrappers (`teacher`, `model`, `state_dict`, ...) and prefixes
(`backbone.`, `module.`, `student.`, `encoder.`, ...) are whatever stands before the CLS token's name.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.distributed.tensor_files import DTYPES, Stored
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
_HUGGINGFACE_BLOCK = re.compile(r"(?:.*\.)?layer\.\d+\.")


def stored_tensors(file: Path, starts: tuple[str, ...] = ("",)) -> dict[str, Stored]:
    """Every tensor of a safetensors file, a torch file, or the index of several such, by its dotted name.

    Names and shapes are read now, of torch files from before 2020 (no zip) also the values.

    Args:
        starts: of a safetensors file, only tensors whose names start with one of these are looked for.

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
            tensors |= stored_tensors(shard)
    elif first[8:9] == b"{":
        tensors = _safetensors(file, starts)
    elif first.startswith((_ZIP, _PICKLE)):
        content = _torch_file(file, is_zip=first.startswith(_ZIP))
        tensors = {name: Stored.of(tensor) for name, tensor in _flat(content)}
    else:
        raise ValueError(f"{file} is no file of weights: neither safetensors nor what torch.save writes.")
    if not tensors and starts == ("",):
        raise ValueError(f"{file} holds no tensors.")
    return tensors


def network_state(tensors: Mapping[str, Stored], part: str, source: str) -> tuple[dict[str, Stored], str]:
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


def renamed_blockwise(
    tensors: Mapping[str, Stored], rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Stored]:
    """Tensors of a Hugging Face class under our names, where some are put together from several: read block by block.

    Args:
        rename: of a state dict to ours; it needs no more than one block's tensors at once, and only their shapes to
            know names and shapes.
    """
    groups: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        block = _HUGGINGFACE_BLOCK.match(name)
        groups.setdefault(block[0] if block else "", {})[name] = tensor

    @lru_cache(maxsize=1)
    def read(block: str) -> dict[str, Tensor]:
        return rename({name: tensor.read() for name, tensor in groups[block].items()})

    def stored(block: str, name: str, like: Tensor) -> Stored:
        return Stored(tuple(like.shape), like.dtype, lambda start, stop: read(block)[name][start:stop])

    found = {}
    for block, members in groups.items():
        empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in members.items()}
        found |= {name: stored(block, name, like) for name, like in rename(empty).items()}
    return found


def _from_huggingface(state: Mapping[str, Stored], source: str) -> dict[str, Stored]:
    """Our names for theirs; the class is told by its names."""
    is_dinov2 = any(name.startswith("encoder.layer.") for name in state)
    gated = any("mlp.weights_in" in name or "mlp.gate_proj" in name for name in state)
    try:
        return renamed_blockwise(
            state,
            partial(
                backbone_state,
                model_type="dinov2" if is_dinov2 else "dinov3_vit",
                family="dinov2" if is_dinov2 else "dinov3",
                gated=gated,
            ),
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def _safetensors(file: Path, starts: tuple[str, ...]) -> dict[str, Stored]:
    with _reading(file), safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(starts)]  # noqa: SIM118
        return {name: _in_safetensors(file, name, opened.get_slice(name)) for name in names}


def _in_safetensors(file: Path, name: str, found: Any) -> Stored:
    shape, kind = tuple(found.get_shape()), found.get_dtype()
    if kind not in DTYPES:
        raise ValueError(f"{file}: {name} is of type {kind}, and none of {', '.join(DTYPES)}.")

    def rows(start: int, stop: int) -> Tensor:
        with _reading(file), safe_open(file, "pt") as opened:
            return opened.get_slice(name)[start:stop] if shape else opened.get_tensor(name)

    return Stored(shape, DTYPES[kind], rows)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
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
