"""Two gloo ranks give the assignments, centres, losses and gradients of one rank with all rows."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.distributed import collectives
from pretrain.losses.centering import SoftmaxCentering, sinkhorn_knopp
from pretrain.losses.dino import dino_loss
from pretrain.losses.ibot import ibot_loss
from pretrain.losses.koleo import koleo_loss
from tests.pretrain.ranks import run_ranks

IMAGES, WIDTH, PROTOTYPES = 8, 6, (50, 30)


def rows(number: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(number, width, generator=generator, dtype=torch.float64), dim=-1)


def head_losses(images: range, masked: range, centering: str) -> dict[str, Tensor]:
    """What one rank computes on its images and masked patches, gradients (not yet averaged) included."""
    student = rows(4 * IMAGES, WIDTH, 0).view(4, IMAGES, WIDTH)[:, list(images)]  # 2 global crops, 2 local ones
    patches = rows(20, WIDTH, 1)[list(masked)]
    prototypes = [rows(number, WIDTH, 2).requires_grad_() for number in PROTOTYPES]
    teacher = rows(2 * IMAGES, PROTOTYPES[0], 3).view(2, IMAGES, -1)[:, list(images)].flatten(0, 1)
    teacher_patches = rows(20, PROTOTYPES[1], 4)[list(masked)]
    result = {}
    if centering == "sinkhorn":
        targets = sinkhorn_knopp([teacher, teacher_patches], 0.05, sum_over_ranks=collectives.sum_over_ranks)
    else:
        centers = [SoftmaxCentering(number).double() for number in PROTOTYPES]
        for center, logits in zip(centers, (teacher, teacher_patches), strict=True):
            center.update(logits, collectives.sum_over_ranks)
        targets = [center(logits, 0.05) for center, logits in zip(centers, (teacher, teacher_patches), strict=True)]
        result = {"dino_center": centers[0].center, "ibot_center": centers[1].center}
    dino = dino_loss(student[:2], student[2:], prototypes[0], targets[0])
    weights = torch.full((len(masked),), 0.25, dtype=torch.float64)
    ibot = ibot_loss(patches, prototypes[1], targets[1], weights, 2 * len(images))
    (dino.total + ibot).backward()
    result |= {"dino": dino.total.detach(), "ibot": ibot.detach()}
    return result | {"dino_gradient": prototypes[0].grad, "ibot_gradient": prototypes[1].grad}


def koleo(images: range, group_size: int | None) -> dict[str, Tensor]:
    """KoLeo of a shared linear map of this rank's rows: its gradient is what ranks average."""
    weight = torch.eye(WIDTH, dtype=torch.float64).requires_grad_()
    x = rows(IMAGES, WIDTH, 5)[list(images)] @ weight
    gather = collectives.gather_with_grad if group_size is None or group_size > len(x) else None
    loss = koleo_loss(x, group_size, gather, collectives.rank())
    loss.backward()
    return {"loss": loss.detach(), "gradient": weight.grad}


def on_a_rank() -> dict[str, dict[str, Tensor]]:
    """Half of the images; all masked patches but three are on rank 0, then all of them."""
    rank = collectives.rank()
    images = range(4 * rank, 4 * rank + 4)
    few, none = (range(17), range(17, 20)), (range(20), range(20, 20))
    results = {
        "sinkhorn": head_losses(images, few[rank], "sinkhorn"),
        "sinkhorn, a rank without masks": head_losses(images, none[rank], "sinkhorn"),
        "softmax": head_losses(images, few[rank], "softmax"),
        "softmax, a rank without masks": head_losses(images, none[rank], "softmax"),
        "koleo over ranks": koleo(images, None),
        "koleo in groups of 2": koleo(images, 2),
        "koleo in a group of 8": koleo(images, 8),
    }
    for result in results.values():
        for value in result.values():
            collectives.mean_over_ranks(value)
    return results


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    images = range(IMAGES)
    expected = {
        name: head_losses(images, range(20), name.split(",")[0])
        for name in (
            "sinkhorn",
            "sinkhorn, a rank without masks",
            "softmax",
            "softmax, a rank without masks",
        )
    } | {
        "koleo over ranks": koleo(images, None),
        "koleo in groups of 2": koleo(images, 2),
        "koleo in a group of 8": koleo(images, 8),
    }
    for results in run_ranks(on_a_rank, tmp_path):
        # Weights of rows are float32: their rounding differs with the number of rows.
        torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-9)
