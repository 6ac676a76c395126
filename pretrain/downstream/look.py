"""What a backbone sees in pictures, as arrays: PCA colours, foreground, attention of CLS, similarity to a patch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.downstream.backbone import Backbone
from pretrain.downstream.components import as_colours, principal_scores
from pretrain.downstream.timm_model import TimmModel
from pretrain.models.layers.block import Block
from pretrain.models.layers.rope import rotate
from pretrain.models.vision_transformer import VisionTransformer

Grid = np.ndarray
"""of one picture's patches: [h, w] or [h, w, 3]"""


def patch_grids(backbone: Backbone, images: Sequence[Tensor]) -> list[Tensor]:
    """Patch features [h, w, D] of each normalised image [3, H, W], one at a time: pictures may be large."""
    found = []
    for image in images:
        features = backbone.features(image[None])
        found.append(features.patches[0].float().unflatten(0, features.grid))
    return found


def first_component(grids: Sequence[Tensor]) -> list[Grid]:
    """The first principal component of all patches together, [h, w] each, as a share of its range from 0 to 1.

    It tells foreground from background (DINOv2, arXiv:2304.07193, fig. 1). Its sign means nothing by itself: it is such
    that the middle of the pictures has more of it than their borders.
    """
    scores = [score[..., 0] for score in _scores(grids, 1)]
    inside = [_middle(*score.shape) for score in scores]
    middle = np.concatenate([score[where] for score, where in zip(scores, inside, strict=True)])
    border = np.concatenate([score[~where] for score, where in zip(scores, inside, strict=True)])
    if border.size and middle.mean() < border.mean():
        scores = [-score for score in scores]
    low, high = min(s.min() for s in scores), max(s.max() for s in scores)
    return [(score - low) / max(high - low, 1e-12) for score in scores]


def _middle(h: int, w: int) -> np.ndarray:
    inside = np.zeros((h, w), bool)
    inside[h // 4 : h - h // 4, w // 4 : w - w // 4] = True
    return inside


def pca_colours(grids: Sequence[Tensor], masks: Sequence[np.ndarray] | None = None) -> list[Grid]:
    """Three principal components of the patches of all pictures together as uint8 [h, w, 3]; one basis for all.

    Args:
        masks: bool [h, w] each: the patches that count; others are black.

    Raises:
        ValueError: fewer than 4 patches that count, or fewer than 3 dimensions.
    """
    scores = _scores(grids, 3, masks)
    colours = [as_colours(score) for score in scores]
    for colour, mask in zip(colours, masks or (), strict=False):
        colour[~mask] = 0
    return colours


def _scores(grids: Sequence[Tensor], count: int, masks: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
    """Principal components [h, w, count] of the patches of all pictures, of those in the masks."""
    rows = torch.cat([grid.flatten(0, 1) for grid in grids])
    chosen = None
    if masks is not None:
        chosen = torch.from_numpy(np.concatenate([mask.ravel() for mask in masks])).to(rows.device)
    scores, _ = principal_scores(rows, count, chosen)
    cuts = np.cumsum([grid.shape[0] * grid.shape[1] for grid in grids])[:-1]
    return [part.reshape(*grid.shape[:2], count) for part, grid in zip(np.split(scores, cuts), grids, strict=True)]


def similarity(grids: Sequence[Tensor], picture: int, row: int, column: int) -> list[Grid]:
    """Cosine of every patch of every picture with one of them, [h, w] each, from -1 to 1.

    Raises:
        ValueError: no such patch.
    """
    h, w = grids[picture].shape[:2]
    if not (0 <= row < h and 0 <= column < w):
        raise ValueError(f"patch {row},{column} of a picture with {h} rows and {w} columns of patches.")
    chosen = F.normalize(grids[picture][row, column], dim=0)
    return [(F.normalize(grid, dim=2) @ chosen).cpu().numpy() for grid in grids]


@torch.inference_mode()
def attention_maps(backbone: Backbone, image: Tensor) -> np.ndarray:
    """Attention of CLS to the patches in the last block, [heads, h, w]; a head's patches sum to at most 1.

    Args:
        image: normalised, [3, H, W].

    Raises:
        ValueError: a program, or a model of timm whose last block does not show its attention.
    """
    model = backbone.model
    if isinstance(model, TimmModel):
        return _attention_of_timm(model, image)
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"{backbone.source} is a program, which does not show its attention; take the run, or an export of "
            "--format huggingface, timm or safetensors."
        )
    block = model.blocks[-1]
    assert isinstance(block, Block)
    if len(model.blocks) > 1:
        before = model.layers(image[None], [len(model.blocks) - 2], norm=False)[0]
        tokens, grid = torch.cat([before.cls[:, None], before.registers, before.patches], dim=1)[0], before.grid
    else:
        tokens, grids = model.embed([image[None]], None)
        grid = grids[0]
    qkv = block.attn.project(block.norm1(tokens)).unflatten(1, (3, block.attn.num_heads, -1))
    q, k, _ = qkv.permute(1, 2, 0, 3).unbind(0)
    table = model.rope_tables([grid], tokens.device, None)[-1][0]
    if table is not None:
        q, k = rotate(q, table), rotate(k, table)
    weights = torch.softmax(q[:, :1] @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)
    return weights[:, 0, model.num_prefix_tokens :].unflatten(1, grid).float().cpu().numpy()


def _attention_of_timm(model: TimmModel, image: Tensor) -> np.ndarray:
    """Of timm's own attention, which shows its weights to its dropout where it is not fused."""
    attention: Any = getattr(model.model.blocks[-1], "attn", None)
    if not hasattr(attention, "attn_drop") or not hasattr(attention, "fused_attn"):
        raise ValueError("the last block of this model of timm does not show its attention.")
    seen: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda _module, _given, weights: seen.append(weights))
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        (features,) = model([image[None]])
    finally:
        attention.fused_attn = fused
        hook.remove()
    (weights,) = seen
    return weights[0, :, 0, model.num_prefix_tokens :].unflatten(1, features.grid).float().cpu().numpy()
