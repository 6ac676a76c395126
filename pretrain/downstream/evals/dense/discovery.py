"""Objects without labels: one box a picture from its patches alone; CorLoc.

TokenCut (arXiv:2202.11539): patches are the nodes of a graph, joined with weight 1 where their cosine is above a
threshold and 1e-5 elsewhere; the second smallest eigenvector of its normalised Laplacian, cut at its mean, parts the
picture in two; the object is the part that holds the largest entry, of it the connected piece around that. CorLoc is
the share of pictures whose box overlaps some true box by half or more. The published method takes keys of the last
attention and a threshold of 0.2; here any backbone's patches after the last norm are taken, less their mean over the
picture, since cosines of such patches have no common level.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.ndimage
import torch.nn.functional as F
from torch import Tensor

from configs.ranges import check_ranges
from pretrain.downstream.evals.dense.pairs import Pair, as_images, over_pictures, pairs
from pretrain.downstream.evals.errors import of_share
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.labelled import LeftOut
from pretrain.downstream.evals.result import Result
from pretrain.downstream.evals.sets import ObjectSet
from pretrain.models.vision_transformer import Features

_WEAK = 1e-5
_OVERLAP = 0.5
Box = tuple[float, float, float, float]
"""left, top, right, bottom, in pixels or patches; right and bottom are the first beyond"""


@dataclass(frozen=True, kw_only=True)
class DiscoveryConfig:
    """When two patches are alike."""

    threshold: float = 0.2
    """cosine of centred patches above which they are joined"""

    def __post_init__(self) -> None:
        check_ranges("discovery", self, threshold="[-1, 1)")


def object_box(patches: np.ndarray, threshold: float) -> Box:
    """The box of the object in one picture, in patches.

    Args:
        patches: [h, w, D], of 2 patches or more.
        threshold: cosine of patches, less their mean, above which two are joined.
    """
    h, w = patches.shape[:2]
    rows = patches.reshape(h * w, -1).astype(np.float64)
    rows = rows - rows.mean(axis=0)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    weights = np.where(rows @ rows.T > threshold, 1.0, _WEAK)
    degrees = weights.sum(axis=1)
    # The second smallest of (D - W) x = l D x, by the symmetric form of it.
    root = 1 / np.sqrt(degrees)
    laplacian = np.eye(h * w) - root[:, None] * weights * root
    _, vectors = scipy.linalg.eigh(laplacian, subset_by_index=[0, 1])
    second = (vectors[:, 1] * root).reshape(h, w)
    largest = np.unravel_index(np.abs(second).argmax(), second.shape)
    above = second > second.mean()
    pieces = np.zeros((h, w), np.int64)
    scipy.ndimage.label(above if above[largest] else ~above, output=pieces)
    found = np.argwhere(pieces == pieces[largest])
    top, left = found.min(axis=0).tolist()
    bottom, right = (found.max(axis=0) + 1).tolist()
    return left, top, right, bottom


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both) if both else 0.0


def boxes_of_segments(segments: np.ndarray, least_share: float) -> list[Box]:
    """Boxes of the segments [H, W] that cover `least_share` of the picture and touch at most one of its sides."""
    height, width = segments.shape
    found = []
    for number in np.unique(segments):
        places = np.argwhere(segments == number)
        (top, left), (bottom, right) = places.min(axis=0), places.max(axis=0) + 1
        sides = sum((top == 0, left == 0, bottom == height, right == width))
        if len(places) >= least_share * segments.size and sides <= 1:
            found.append((float(left), float(top), float(right), float(bottom)))
    return found


def run(frozen: Frozen, data: ObjectSet, config: DiscoveryConfig) -> Result:
    """CorLoc, over the pictures that have an object; beside it that of a box of half the width and height, centred.

    Raises:
        ValueError: no picture has an object, or boxes that are none.
    """
    short_px, patch = frozen.picture_px(data.px), frozen.tokens.patch_size

    def reading(left_out: LeftOut, rank: int, num_ranks: int) -> Iterator[Pair]:
        return pairs(data.val, "", "seg", short_px, patch, left_out, False, rank, num_ranks)

    def work(pair: Pair, features: Callable[[Tensor], Features]) -> tuple[float, float] | None:
        found = features(as_images(pair.picture))
        true = _true_boxes(pair, data)
        if not true:
            return None
        height, width = pair.size
        h, w = found.grid
        if h * w < 2:
            raise ValueError(f"{pair.key} has one patch at px={short_px}, which cannot be parted: give a larger px.")
        patches = F.normalize(found.patches[0].float(), dim=1).unflatten(0, found.grid).cpu().numpy()
        left, top, right, bottom = object_box(patches, config.threshold)
        box = (left * width / w, top * height / h, right * width / w, bottom * height / h)
        middle = (width / 4, height / 4, width * 3 / 4, height * 3 / 4)
        return max(overlap(box, one) for one in true), max(overlap(middle, one) for one in true)

    each, left_out = over_pictures(frozen, "discovery", data.val, reading, work)
    overlaps = np.array([one for one in each if one is not None])
    if not len(overlaps):
        raise ValueError(f"no picture of {data.val!r} has an object, in boxes of its json or in segments beside it.")
    found, middle = (overlaps >= _OVERLAP).mean(axis=0)
    return Result(
        value=float(found),
        standard_error=of_share(float(found), len(overlaps)),
        figures={"CorLoc of a box in the middle": float(middle), "mean overlap": float(overlaps[:, 0].mean())},
        images={"val": len(overlaps), "without an object": len(each) - len(overlaps)},
        left_out={"val": left_out},
    )


def _true_boxes(pair: Pair, data: ObjectSet) -> list[Box]:
    boxes: Any = pair.metadata.get("boxes")
    if boxes is None:
        return [] if pair.truth is None else boxes_of_segments(pair.truth, data.least_share)
    try:
        found = [(float(left), float(top), float(right), float(bottom)) for left, top, right, bottom in boxes]
    except (TypeError, ValueError):
        raise ValueError(f"boxes of {pair.key} must be lists of left, top, right, bottom, found {boxes}.") from None
    if wrong := next((box for box in found if box[0] >= box[2] or box[1] >= box[3]), None):
        raise ValueError(f"a box of {pair.key} has no inside: left, top, right, bottom = {wrong}.")
    return found
