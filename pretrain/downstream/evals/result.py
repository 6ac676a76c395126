"""What an evaluation found, and how a set is shown to a backbone: shared by all protocols."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.distributed import collectives
from pretrain.downstream.evals.frozen import Frozen, Pooled
from pretrain.downstream.evals.labelled import LeftOut
from pretrain.downstream.evals.sets import LabelledSet
from pretrain.downstream.pixels import short_side

UNKNOWN = "val, of classes that train has not"
"""among the images of a result"""


@dataclass(frozen=True)
class Result:
    """A headline figure with its standard error over the images that were judged, and what else was found."""

    value: float
    standard_error: float
    """NaN where one image alone was judged"""
    figures: dict[str, float]
    """other figures, by name"""
    images: dict[str, int]
    """how many of each part of the set were used"""
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    """what was chosen without looking at the images that are judged, as the learning rate of a probe"""

    def as_json(self) -> dict[str, Any]:
        out = {split: {"images": len(those), "first": those.names} for split, those in self.left_out.items()}
        error = None if math.isnan(self.standard_error) else self.standard_error
        found = {"value": self.value, "standard_error": error, "figures": self.figures}
        return found | {"images": self.images, "chosen": self.chosen, "left_out": out}


def both_halves(frozen: Frozen, data: LabelledSet, share: bool = False) -> dict[str, Pooled]:
    """Features of `train` and `val`; with `share`, of this rank's part of each."""
    px = data.px or frozen.image.px
    take = frozen.share if share else frozen.all_of
    asked: Mapping[str, tuple[str, str, int]] = {
        "train": (data.train, data.train_labels, data.max_train_images),
        "val": (data.val, data.val_labels, data.max_val_images),
    }
    size = px, data.resize_px or short_side(px)
    return {split: take(pattern, labels, *size, most) for split, (pattern, labels, most) in asked.items()}


def counted(halves: Mapping[str, Pooled], share: bool = False) -> dict[str, Any]:
    """`images` and `left_out` of a result.

    Images of `val` of a class that `train` has not are wrong whatever the answer; they are counted.

    Args:
        share: the halves are this rank's part of each.
    """
    left_out = {split: pooled.left_out for split, pooled in halves.items()}
    images = {split: out.images - len(out) for split, out in left_out.items()}
    if "train" in halves:
        own = set(halves["train"].labels)
        known = set[str]().union(*collectives.from_every_rank(own)) if share else own
        unknown = sum(label not in known for label in halves["val"].labels)
        unknown = sum(collectives.from_every_rank(unknown)) if share else unknown
        images |= {UNKNOWN: unknown} if unknown else {}
    return {"images": images, "left_out": left_out}
