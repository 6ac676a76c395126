"""Linear depth: how far each pixel is, from one linear layer on frozen patches; RMSE in metres.

As DINOv2 measures it (arXiv:2304.07193, section 7.4, and its released code): patches of the last layer with CLS beside
each, a linear layer to 256 bins of equal width between the nearest and the farthest distance; scores, clipped at 0 and
raised by 0.1, are shares of a sum, and the depth is the mean of the bins by these shares; the loss is scale-invariant
in logarithms (arXiv:1406.2283 with a weight of 0.15 for the mean, as AdaBins, arXiv:2011.14141, takes it). Where that
is simpler here: pictures are seen whole, each with its mirror image, the features pass a batch normalisation first, and
there is no loss of gradients. So compare these figures with each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.downstream.evals.dense.head import (
    UPSAMPLE,
    HeadConfig,
    LinearHead,
    Seen,
    ViewConfig,
    judged,
    resized,
    train_head,
    views,
)
from pretrain.downstream.evals.errors import of_mean
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.result import Result
from pretrain.downstream.evals.sets import DepthSet

BINS = 256
_RAISED = 0.1
_MEAN_WEIGHT = 0.15
_THRESHOLD = 1.25


@dataclass(frozen=True, kw_only=True)
class DepthConfig(HeadConfig):
    """How the layer is trained; DINOv3 has a rate of 3e-4, for more steps."""

    epochs: int = 25
    """38,400 steps of 16 are 25 of NYU's 24,000"""
    weight_decay: float = 1e-2


def depth_of(scores: Tensor, min_m: float, max_m: float) -> Tensor:
    """Scores of the bins [..., K, H, W] -> metres [..., H, W]."""
    bins = torch.linspace(min_m, max_m, scores.shape[-3], device=scores.device)
    shares = (F.relu(scores) + _RAISED).flatten(-2)
    return (bins @ shares / shares.sum(dim=-2)).unflatten(-1, scores.shape[-2:])  # four times faster than an einsum


def scale_invariant_loss(answer: Tensor, truth: Tensor) -> Tensor:
    """Metres [N] each, all above 0: the root of variance + 0.15 mean^2 of the difference of logarithms."""
    apart = torch.log(answer) - torch.log(truth)
    return (apart.var(correction=0) + _MEAN_WEIGHT * apart.mean().square()).clamp(min=1e-12).sqrt()


def errors(answer: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of the known pixels of one picture, metres [N] each: RMSE, mean relative error, shares within 1.25^n."""
    ratio = np.maximum(answer / truth, truth / answer)
    found = {"RMSE": float(np.sqrt(np.mean((answer - truth) ** 2)))}
    found["relative error"] = float(np.mean(np.abs(answer - truth) / truth))
    return found | {f"delta {n}": float(np.mean(ratio < _THRESHOLD**n)) for n in (1, 2, 3)}


def run(frozen: Frozen, data: DepthSet, config: DepthConfig) -> Result:
    """RMSE in metres, of each picture, and the mean over pictures.

    Raises:
        ValueError: no picture with a known distance in range.
    """
    seen = ViewConfig(
        member="depth",
        short_px=frozen.picture_px(data.px),
        memory_gb=config.memory_gb,
        with_cls=True,
        prepared=lambda _, map_: metres(map_, data),
    )
    train, left_train = views(frozen, data.train, data.train_maps, seen, for_training=True)
    train = _with_something_known(train, data, data.train)
    head = LinearHead(train[0].width, BINS, config.seed)

    def loss(scores: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
        answer = torch.cat([depth_of(one, data.min_m, data.max_m).flatten() for one in scores])
        truth = torch.cat([one.flatten() for one in maps])
        known = truth > 0
        return scale_invariant_loss(answer[known], truth[known])

    steps = train_head(frozen, head, train, loss, config, "depth")
    val, left_val = views(frozen, data.val, data.val_maps, seen, for_training=False)
    found = []
    for one in _with_something_known(val, data, data.val):
        answer = _answer(head, one, data, frozen.device)
        known = one.truth > 0
        found.append(errors(answer[known], one.truth[known]))
    each = {name: np.array([one[name] for one in found]) for name in found[0]}
    return Result(
        value=float(each["RMSE"].mean()),
        standard_error=of_mean(each["RMSE"]),
        figures={name: float(values.mean()) for name, values in each.items() if name != "RMSE"},
        images={"train": len(train) // 2, "val": len(found)},
        left_out={"train": left_train, "val": left_val},
        chosen={"steps": steps},
    )


@torch.no_grad()
def _answer(head: LinearHead, one: Seen, data: DepthSet, device: torch.device) -> np.ndarray:
    """Metres [H, W] at the size of the map: of UPSAMPLE times the grid, resized."""
    h, w = one.patches.shape[:2]
    answer = depth_of(judged(head, one, device, (UPSAMPLE * h, UPSAMPLE * w)), data.min_m, data.max_m)
    return resized(answer[None, None], (one.truth.shape[0], one.truth.shape[1]))[0, 0].cpu().numpy()


def metres(map_: np.ndarray, data: DepthSet) -> np.ndarray:
    """float32; 0 where unknown or out of range."""
    found = map_.astype(np.float32) * np.float32(data.unit_m)
    return np.where((found >= data.min_m) & (found <= data.max_m), found, np.float32(0))


def _with_something_known(seen: Sequence[Seen], data: DepthSet, pattern: str) -> list[Seen]:
    found = [one for one in seen if one.truth.any()]
    if not found:
        raise ValueError(
            f"{pattern!r} has no distance between min_m={data.min_m:g} and max_m={data.max_m:g} at "
            f"unit_m={data.unit_m:g}: is the unit right?"
        )
    return found
