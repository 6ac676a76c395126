"""What an evaluation found, and how a set is shown to a backbone: shared by all protocols."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pretrain.downstream.evals.frozen import Frozen, Pooled
from pretrain.downstream.evals.labelled import LeftOut
from pretrain.downstream.evals.sets import LabelledSet
from pretrain.downstream.pixels import short_side


@dataclass(frozen=True)
class Result:
    """A headline figure with its standard error over the images that were judged, and what else was found."""

    value: float
    standard_error: float
    figures: dict[str, float]
    """other figures, by name"""
    images: dict[str, int]
    """how many of each part of the set were used"""
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    chosen: dict[str, Any] = field(default_factory=dict)
    """what was chosen without looking at the images that are judged, as the learning rate of a probe"""

    def as_json(self) -> dict[str, Any]:
        out = {split: {"images": len(those), "first": those.names} for split, those in self.left_out.items()}
        found = {"value": self.value, "standard_error": self.standard_error, "figures": self.figures}
        return found | {"images": self.images, "chosen": self.chosen, "left_out": out}


def both_halves(frozen: Frozen, data: LabelledSet, share: bool = False) -> dict[str, Pooled]:
    """Features of `train` and `val`; with `share`, of this rank's part of each."""
    px = data.px or frozen.px
    take = frozen.share if share else frozen.all_of
    asked: Mapping[str, tuple[str, str, int]] = {
        "train": (data.train, data.train_labels, data.max_train_images),
        "val": (data.val, data.val_labels, data.max_val_images),
    }
    size = px, data.resize_px or short_side(px)
    return {split: take(pattern, labels, *size, most) for split, (pattern, labels, most) in asked.items()}


def counted(halves: Mapping[str, Pooled]) -> dict[str, Any]:
    """`images` and `left_out` of a result."""
    left_out = {split: pooled.left_out for split, pooled in halves.items()}
    return {"images": {split: out.images - len(out) for split, out in left_out.items()}, "left_out": left_out}
