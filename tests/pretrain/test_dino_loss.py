"""The DINO loss and its pairings, against a double loop over crops in float64 and lightly's DINOLoss."""

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss as LightlyDINOLoss
from torch import Tensor

from pretrain.losses.centering import SoftmaxCentering, sinkhorn_knopp
from pretrain.losses.dino import dino_loss

IMAGES, WIDTH, PROTOTYPES = 5, 8, 40


def crops(num_crops: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(num_crops, IMAGES, WIDTH, generator=generator, dtype=dtype), dim=-1)


def prototypes_of(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(PROTOTYPES, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mean_over_pairs(
    students: Tensor, prototypes: Tensor, assignments: Tensor, skip_diagonal: bool
) -> tuple[Tensor, int]:
    """Mean cross-entropy and number of pairs, one pair of crops after the other. assignments [V, B, K]."""
    pairs = []
    for s, student in enumerate(students):
        for t, assignment in enumerate(assignments):
            if not (skip_diagonal and s == t):
                log_probabilities = F.log_softmax(student @ prototypes.T / 0.1, dim=-1)
                pairs.append(-(assignment * log_probabilities).sum(dim=-1).mean())
    return torch.stack(pairs).mean(), len(pairs)


@pytest.mark.parametrize("include_same_crop", [False, True])
@pytest.mark.parametrize("num_locals", [0, 1, 8])
@pytest.mark.parametrize("num_globals", [2, 3])
@pytest.mark.parametrize("local_weight", [1.0, 0.5])
def test_equals_the_loop_over_pairs(
    num_globals: int, num_locals: int, include_same_crop: bool, local_weight: float
) -> None:
    students = [crops(num_globals, 0).requires_grad_(), crops(num_locals, 1).requires_grad_(), prototypes_of(2)]
    students[2].requires_grad_()
    teacher = crops(num_globals, 3).flatten(0, 1) @ prototypes_of(4).T
    [targets] = sinkhorn_knopp([teacher], 0.07)
    assignments = targets.rows(0, len(teacher)).unflatten(0, (num_globals, IMAGES))
    global_term, num_global = mean_over_pairs(students[0], students[2], assignments, not include_same_crop)
    expected, num_local, local_term = num_global * global_term, 0, torch.zeros(())
    if num_locals:
        local_term, num_local = mean_over_pairs(students[1], students[2], assignments, False)
        expected = expected + local_weight * num_local * local_term
    expected = expected / (num_global + num_local)
    loss = dino_loss(
        students[0],
        students[1] if num_locals else None,
        students[2],
        targets,
        include_same_crop=include_same_crop,
        local_weight=local_weight,
    )
    # The pairing is float32: a third of three views is exact to 1e-8.
    torch.testing.assert_close(loss.total, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(loss.global_term, global_term.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(loss.local_term.double(), local_term.detach().double(), rtol=1e-7, atol=0)
    wanted = students if num_locals else [students[0], students[2]]
    for got, gradient in zip(
        torch.autograd.grad(loss.total, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("num_locals", [0, 6])
def test_equals_lightly(num_locals: int) -> None:
    """Its DINOLoss: the same pairs, softmax-centred; two steps, so that the centre counts."""
    theirs = LightlyDINOLoss(PROTOTYPES, teacher_temp=0.05, student_temp=0.1)
    ours = SoftmaxCentering(PROTOTYPES)
    students = [crops(2, 0, torch.float32), crops(num_locals, 1, torch.float32)]
    student_prototypes = prototypes_of(2, torch.float32)
    for step in range(2):
        teacher = crops(2, 3 + step, torch.float32) @ prototypes_of(9, torch.float32).T
        expected = theirs(list(teacher), [*(torch.cat(students) @ student_prototypes.T)], teacher_temp=0.05)
        targets = ours(teacher.flatten(0, 1), 0.05)
        ours.update(teacher.flatten(0, 1))
        loss = dino_loss(students[0], students[1] if num_locals else None, student_prototypes, targets)
        torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=0)


def test_no_pair_is_refused() -> None:
    targets = SoftmaxCentering(PROTOTYPES)(torch.zeros(IMAGES, PROTOTYPES), 0.05)
    with pytest.raises(ValueError, match="got 1 global and 0 local"):
        dino_loss(crops(1, 0), None, prototypes_of(1), targets)


def test_one_global_crop_with_locals_has_only_local_pairs() -> None:
    targets = SoftmaxCentering(PROTOTYPES)(torch.randn(IMAGES, PROTOTYPES, dtype=torch.float64), 0.05)
    student = crops(1, 0).requires_grad_()
    loss = dino_loss(student, crops(3, 1), prototypes_of(1), targets)
    torch.testing.assert_close(loss.total, loss.local_term, rtol=1e-6, atol=0)
    loss.total.backward()
    assert (student.grad == 0).all()
