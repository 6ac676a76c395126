"""Linear segmentation: what class each pixel is of, from one linear layer on frozen patches; mean IoU.

As DINOv2 and DINOv3 measure it (arXiv:2304.07193, section 7.4; arXiv:2508.10104, appendix): patches of the last layer,
batch normalisation and a linear layer, cross-entropy, AdamW. Where that is simpler here: pictures are seen whole at one
size, each with its mirror image, not in random crops of 512 px, and judged whole, not by sliding windows; the loss is
taken at four times the grid of patches. So compare these figures with each other, not with published tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.downstream.evals.dense.head import (
    HeadConfig,
    LinearHead,
    Seen,
    ViewConfig,
    judged,
    train_head,
    views,
)
from pretrain.downstream.evals.errors import bootstrap
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.result import Result
from pretrain.downstream.evals.sets import SegmentationSet

_IGNORED = -1


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(HeadConfig):
    """How the layer is trained; DINOv3 has a grid of rates from 1e-4 to 1e-3 and decays from 1e-4 to 1e-3."""

    epochs: int = 32
    """40,000 steps of 16 are 32 of ADE20K"""
    weight_decay: float = 1e-3


def confusion(answer: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by true class and answer, int64 [C, C]; pixels whose truth is negative are ignored."""
    known = truth >= 0
    codes = truth[known].astype(np.int64) * classes + answer[known]
    return np.bincount(codes, minlength=classes**2).reshape(classes, classes)


def intersection_over_union(confusions: np.ndarray) -> np.ndarray:
    """[C, C] -> [C]; NaN of a class that is neither there nor answered."""
    both = np.diag(confusions)
    either = confusions.sum(axis=0) + confusions.sum(axis=1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def mean_iou(confusions: np.ndarray) -> float:
    """Mean over the classes that are there or answered."""
    return float(np.nanmean(intersection_over_union(confusions)))


def run(frozen: Frozen, data: SegmentationSet, config: SegmentationConfig) -> Result:
    """Mean IoU over all pixels of the validation pictures.

    Raises:
        ValueError: maps with numbers that are no classes.
    """
    seen = ViewConfig(
        member="seg",
        short_px=frozen.picture_px(data.px),
        memory_gb=config.memory_gb,
        with_cls=False,
        prepared=lambda key, map_: numbered(key, map_, data),
    )
    train, left_train = views(frozen, data.train, data.train_maps, seen, for_training=True)
    head = LinearHead(train[0].width, data.classes, config.seed)
    steps = train_head(frozen, head, train, _cross_entropy, config, "segmentation")
    val, left_val = views(frozen, data.val, data.val_maps, seen, for_training=False)
    counts = np.stack([_confusion(head, one, data.classes, frozen.device) for one in val])
    whole = counts.sum(axis=0)
    if not whole.any():
        raise ValueError(f"{data.val!r} has nothing but pixels that ignore={data.ignore} names: nothing is judged.")
    found = enumerate(intersection_over_union(whole))
    each = {f"IoU of class {n + data.first}": float(share) for n, share in found if not np.isnan(share)}
    return Result(
        value=mean_iou(whole),
        standard_error=bootstrap(len(counts), lambda drawn: mean_iou(counts[drawn].sum(axis=0))),
        figures={"accuracy of pixels": float(np.trace(whole) / whole.sum()), **each},
        images={"train": len(train) // 2, "val": len(val)},
        left_out={"train": left_train, "val": left_val},
        chosen={"steps": steps},
    )


def _confusion(head: LinearHead, one: Seen, classes: int, device: torch.device) -> np.ndarray:
    """Of one picture, at the size of its map."""
    scores = judged(head, one, device, (one.truth.shape[0], one.truth.shape[1]))
    return confusion(scores.argmax(dim=0).cpu().numpy(), one.truth, classes)


def numbered(key: str, map_: np.ndarray, data: SegmentationSet) -> np.ndarray:
    """The map with classes from 0, and _IGNORED.

    Raises:
        ValueError: a number that is neither a class nor ignored.
    """
    ignored = np.isin(map_, data.ignore)
    classes = np.where(ignored, _IGNORED, map_ - data.first)
    if wrong := sorted(set(np.unique(classes[~ignored]).tolist()) - set(range(data.classes))):
        raise ValueError(
            f"the map of {key} has the number {wrong[0] + data.first}: classes={data.classes} are numbered "
            f"{data.first} to {data.first + data.classes - 1}, and ignore={data.ignore}."
        )
    return classes


def _cross_entropy(scores: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    pairs = list(zip(scores, maps, strict=True))
    losses = [F.cross_entropy(one, map_.long(), ignore_index=_IGNORED, reduction="sum") for one, map_ in pairs]
    known = torch.stack([(map_ != _IGNORED).sum() for map_ in maps]).sum()
    return torch.stack(losses).sum() / known.clamp(min=1)  # a batch may hold nothing but ignored pixels
