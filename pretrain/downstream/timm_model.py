"""Models of timm behind the same tokens as ours: any ViT that gives them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.vision_transformer import Features

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class TimmModel(nn.Module):
    """A ViT of timm in eval mode, which answers as `VisionTransformer` does.

    Args:
        model: of timm, created without a classifier.

    Raises:
        ValueError: it gives no tokens on a grid of patches, or has no CLS token.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        embed: Any = getattr(model, "patch_embed", None)
        if not hasattr(model, "forward_intermediates") or embed is None or not hasattr(model, "blocks"):
            raise ValueError(f"timm's {name} is no ViT: it gives no tokens on a grid of patches.")
        if getattr(model, "cls_token", None) is None:
            raise ValueError(f"timm's {name} has no CLS token; name a ViT that has one.")
        height, width = embed.patch_size
        if height != width:
            raise ValueError(f"timm's {name} has patches of {height} x {width} px; only square ones are supported.")
        self.model: Any = model
        self.patch_size: int = height
        self.embed_dim: int = self.model.embed_dim
        self.depth = len(self.model.blocks)
        self.num_prefix_tokens: int = self.model.num_prefix_tokens
        self.num_registers = self.num_prefix_tokens - 1

    def forward(self, crops: Sequence[Tensor]) -> list[Features]:
        """Features after the last block and the final norm, for each group of equal crops [B, 3, H, W]."""
        return [self._split(self.model.forward_features(images), images) for images in crops]

    def layers(self, images: Tensor, indices: Sequence[int], norm: bool = True) -> list[Features]:
        """Features of images after the blocks `indices`, from 0."""
        found = self.model.forward_intermediates(
            images,
            indices=list(indices),
            return_prefix_tokens=True,
            norm=norm,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
        )
        in_order = zip(sorted(set(indices)), found, strict=True)  # of the blocks, as timm gives them
        tokens = {i: torch.cat([prefix, patches], dim=1) for i, (patches, prefix) in in_order}
        return [self._split(tokens[i], images) for i in indices]

    def _split(self, tokens: Tensor, images: Tensor) -> Features:
        prefix, patches = tokens.split([self.num_prefix_tokens, tokens.shape[1] - self.num_prefix_tokens], dim=1)
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        return Features(prefix[:, 0], prefix[:, 1:], patches, grid)


def is_timm_folder(folder: Path) -> bool:
    """Whether timm reads this folder: an export of ours, or what it pushes to the hub."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    is_theirs = isinstance(config, dict) and "architecture" in config and "model_type" not in config
    return is_theirs and any((folder / name).is_file() for name in _WEIGHTS)


def load_timm(name: str) -> tuple[TimmModel, dict[str, Any]]:
    """A model with its published weights, and what timm knows of its images: mean, std, input_size.

    Args:
        name: of timm, or a folder that timm reads.

    Raises:
        ValueError: an unknown name, weights that cannot be had, or a model without tokens.
    """
    import timm

    if Path(name).is_dir():  # as an export of ours is, or whatever timm pushed to a hub
        name = f"local-dir:{name}"
    elif not timm.is_model(name):
        family = name.partition(".")[0].partition("_")[0]
        near = timm.list_models(f"*{family}*", pretrained=True)[:4]
        raise ValueError(f"timm has no model {name!r}" + (f"; it has {', '.join(near)} ..." if near else "") + ".")
    try:
        try:
            model = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
        except TypeError:  # a model that is no ViT does not know that argument
            model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm, the hub's client and their transports each have their own
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"timm cannot load the weights of {name!r}: {told}") from None
    known: Any = model.pretrained_cfg
    return TimmModel(model.eval().requires_grad_(False), name), dict(known)
