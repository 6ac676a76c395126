"""The iBOT loss: weights, images without masks, lightly's IBOTPatchLoss."""

import math

import torch
import torch.nn.functional as F
from lightly.loss import IBOTPatchLoss
from torch import Tensor

from pretrain.losses.centering import SoftmaxCentering, sinkhorn_knopp
from pretrain.losses.ibot import ibot_loss


def unit(num_rows: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def masks_of(seed: int) -> Tensor:
    """[6 images, 4, 5]: half of them masked, by unlike amounts."""
    masks = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(seed)) < torch.tensor(
        [0.1, 0.3, 0.6, 0, 0, 0]
    ).view(-1, 1, 1)
    masks[0, 0, 0] = True
    return masks


def weights_of(masks: Tensor) -> Tensor:
    per_image = masks.flatten(1).sum(dim=1)
    return torch.cat([torch.full((int(count),), 1 / int(count)) for count in per_image if count])


def test_equals_lightly_with_gradients() -> None:
    theirs, ours = IBOTPatchLoss(30, teacher_temp=0.05, student_temp=0.1), SoftmaxCentering(30)
    for step in range(2):
        masks = masks_of(step)
        number = int(masks.sum())
        teacher = unit(number, 8, step) @ unit(30, 8, 10).T
        student, prototypes = unit(number, 8, step + 5).requires_grad_(), unit(30, 8, 11).requires_grad_()
        expected = theirs(teacher, student @ prototypes.T, masks)
        targets = ours(teacher, 0.05)
        ours.update(teacher)
        loss = ibot_loss(student, prototypes, targets, weights_of(masks), len(masks))
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        for got, wanted in zip(
            torch.autograd.grad(loss, [student, prototypes]),
            torch.autograd.grad(expected, [student, prototypes]),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_starts_at_half_of_log_k_when_half_of_the_images_are_masked() -> None:
    masks = masks_of(0)
    number = int(masks.sum())
    [targets] = sinkhorn_knopp([torch.randn(number, 512)], 0.07)
    loss = ibot_loss(torch.zeros(number, 8), unit(512, 8, 1), targets, weights_of(masks), len(masks))
    torch.testing.assert_close(loss, torch.tensor(math.log(512) / 2))


def test_no_masked_patch_is_zero() -> None:
    features = torch.zeros(0, 8, requires_grad=True)
    [targets] = sinkhorn_knopp([torch.zeros(0, 512)], 0.07)
    loss = ibot_loss(features, unit(512, 8, 1), targets, torch.zeros(0), 6)
    loss.backward()
    assert loss == 0


def test_padding_of_zero_weight_changes_nothing() -> None:
    student, prototypes, teacher = unit(9, 8, 0), unit(30, 8, 1), unit(9, 30, 2)
    targets = SoftmaxCentering(30)(teacher, 0.05)
    weights = torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0, 0, 0])
    padded = ibot_loss(student, prototypes, targets, weights, 3)
    targets = SoftmaxCentering(30)(teacher[:6], 0.05)
    torch.testing.assert_close(padded, ibot_loss(student[:6], prototypes, targets, weights[:6], 3))
