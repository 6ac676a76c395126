"""What the trainer measures of the teacher as it trains; the work itself is called by name in pretrain.downstream."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from configs.ranges import check_ranges
from pretrain.models.vision_transformer import Features

ONLINE = "pretrain.downstream.evals.online"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """k-NN accuracy on a labelled set, other evaluations by name, and PCA pictures; changes nothing in the training."""

    every_steps: int = 0
    """steps between two evaluations, each also at the first and last step; 0: none"""
    names: list[str] = field(default_factory=lambda: ["knn"])
    """what is measured: knn, linear, logistic, fewshot, retrieval, copies, segmentation, depth, discovery
    (pretrain.downstream.evals); on `train` and `val`, and on the `sets` of each one's kind"""
    sets: str = ""
    """a YAML file of further sets (pretrain/downstream/evals/sets.py)"""
    train: str = ""
    """labelled tars that vote or teach: path, glob or folder; empty: nothing is measured on `val`"""
    val: str = ""
    """labelled tars to classify; the pictures are of its first images"""
    train_labels: str = ""
    """csv with columns key and label; empty: the label in each sample's json"""
    val_labels: str = ""
    px: int = 224
    """side of the centre crop, in pixels"""
    resize_px: int = 0
    """shorter side before the crop; 0: px x 256 / 224"""
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])
    """numbers of neighbours; the first gives the headline figure"""
    temperature: float = 0.07
    """of the votes"""
    max_train_images: int = 0
    """first images only, to bound the cost; 0: all"""
    max_val_images: int = 0
    batch_size: int = 128
    """images through the backbone at once"""
    bfloat16: bool = False
    """bfloat16 for the backbone also where training is not"""
    pca_images: int = 8
    """how many images get a PCA picture; 0: none"""
    pca_grid: int = 16
    """least side of the grid of patches in a picture: smaller images are scaled up to it"""

    def __post_init__(self) -> None:
        counts = ("every_steps", "resize_px", "max_train_images", "max_val_images", "pca_images")
        ranges = dict.fromkeys(counts, "[0, inf)")
        ranges |= dict.fromkeys(("px", "k", "batch_size", "pca_grid"), "[1, inf)")
        check_ranges("evaluation", self, **ranges | {"temperature": "(0, inf)"})
        if self.every_steps and not (self.val or self.sets):
            raise ValueError(
                f"evaluation.every_steps={self.every_steps} needs labelled tars: give evaluation.val and, for k-NN, "
                "evaluation.train, or evaluation.sets, or set evaluation.every_steps=0."
            )
        if not self.k:
            raise ValueError("evaluation.k=[] must be one or more numbers of neighbours.")
        if 0 < self.resize_px < self.px:
            raise ValueError(f"evaluation.resize_px={self.resize_px} is smaller than evaluation.px={self.px}.")

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate when `step` steps are done; 0 gives the starting point."""
        return bool(self.every_steps) and (step % self.every_steps == 0 or step == last_step)


def check_sets(config: EvaluationConfig) -> None:
    """Raises ValueError: a labelled set that is not there, or has no image or label to begin with."""
    importlib.import_module(ONLINE).check_sets(asdict(config))


class Backbone(Protocol):
    """What is evaluated: a VisionTransformer in eval mode, or what answers as one does."""

    @property
    def patch_size(self) -> int: ...

    def __call__(self, crops: Sequence[Tensor]) -> list[Features]: ...


def run_evaluation(
    backbone: Backbone,
    untrained: Callable[[], Backbone],
    config: EvaluationConfig,
    folder: Path,
    step: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    left: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Evaluate a backbone; pictures and result.json go to `<folder>/evaluation`.

    Every rank calls it: images are shared out, the backbone is called in step, all get the figures.

    Args:
        untrained: makes a backbone of the same form, for the baseline.
        folder: the run folder.
        mean, std: per channel, of pixel values from 0 to 1, as in training.
        device: of the backbone.
        left: whether this rank is asked to stop; all then raise Stopped.

    Returns:
        figures for Metrics.evaluation: `knn`, `knn/<k>`, `knn_pixels`, `knn_random`, and what else is named.
    """
    online = importlib.import_module(ONLINE)
    settings = {**asdict(config), "mean": list(mean), "std": list(std)}
    return online.run(backbone, untrained, settings, folder, step, device, left)
