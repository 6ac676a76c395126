"""Gram anchoring against a loop over pairs in float64; the grid's resize against one pixel at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.losses.gram import gram_loss, resize_grid


def patches(seed: int, width: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 7, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loop(student: Tensor, teacher: Tensor, negatives: str) -> Tensor:
    """student [N, D], teacher [N, E]: mean over ordered pairs, one by one."""
    terms = []
    for i in range(len(student)):
        for j in range(len(student)):
            s = F.cosine_similarity(student[i], student[j], dim=0)
            t = F.cosine_similarity(teacher[i], teacher[j], dim=0)
            if negatives == "remove":
                s, t = s.clamp(min=0), t.clamp(min=0)
            elif negatives == "remove_teacher":
                s, t = (torch.zeros_like(s), torch.zeros_like(t)) if s < 0 and t < 0 else (s, t.clamp(min=0))
            terms.append((s - t) ** 2)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("negatives", ["keep", "remove", "remove_teacher"])
@pytest.mark.parametrize("per_image", [True, False])
def test_equals_the_loop_with_gradients(negatives: str, per_image: bool) -> None:
    student, teacher = patches(0).requires_grad_(), patches(1, width=9)
    if per_image:
        expected = torch.stack([loop(s, t, negatives) for s, t in zip(student, teacher, strict=True)]).mean()
    else:
        expected = loop(student.flatten(0, 1), teacher.flatten(0, 1), negatives)
    loss = gram_loss(student, teacher, negatives, per_image)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))
    single = gram_loss(student.detach().float(), teacher.float(), negatives, per_image)
    torch.testing.assert_close(single.double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_depends_on_similarities_only() -> None:
    """A rotation and a scale of the features change nothing, so student and teacher need not share a basis."""
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert gram_loss(patches(0), 3 * patches(0) @ rotation) < 1e-20


def test_float32_inside_autocast_without_gradient_by_the_teacher() -> None:
    student, teacher = (
        patches(0, dtype=torch.float32).requires_grad_(),
        patches(1, dtype=torch.float32).requires_grad_(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gram_loss(student, teacher)
    torch.testing.assert_close(loss, gram_loss(student, teacher), rtol=0, atol=0)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="keep, remove, remove_teacher"):
        gram_loss(patches(0), patches(1), "drop")
    with pytest.raises(ValueError, match="resize the teacher's grid"):
        gram_loss(patches(0), patches(1)[:, :5])


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, as torch and OpenCV have it."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resize_matrix(size: int, target: int) -> Tensor:
    """Four taps around each target centre whatever the scale (no antialias), clamped at the border."""
    matrix = torch.zeros(target, size, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * size / target - 0.5
        first = int(torch.tensor(centre).floor()) - 1
        for tap in range(first, first + 4):
            matrix[i, min(max(tap, 0), size - 1)] += cubic(centre - tap)
    return matrix


@pytest.mark.parametrize(("grid", "target"), [((8, 12), (4, 6)), ((6, 4), (3, 4)), ((3, 5), (7, 5))])
def test_resize_is_bicubic_without_antialias(grid: tuple[int, int], target: tuple[int, int]) -> None:
    x = torch.randn(2, grid[0] * grid[1], 3)
    expected = torch.einsum(
        "ih,jw,bhwd->bijd",
        resize_matrix(grid[0], target[0]),
        resize_matrix(grid[1], target[1]),
        x.double().unflatten(1, grid),
    )
    torch.testing.assert_close(resize_grid(x, grid, target).double(), expected.flatten(1, 2), rtol=1e-5, atol=1e-6)


def test_resize_to_the_same_grid_is_the_same() -> None:
    x = torch.randn(2, 12, 3)
    assert resize_grid(x, (3, 4), (3, 4)) is x
