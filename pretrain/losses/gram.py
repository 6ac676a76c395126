"""Gram anchoring: the similarities between a student's patches stay those of an earlier, better teacher.

Source: DINOv3, arXiv:2508.10104, section 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.layers.position import resize_weights, resized

NEGATIVES = ("keep", "remove", "remove_teacher")


def gram_loss(student: Tensor, teacher: Tensor, negatives: str = "keep", per_image: bool = True) -> Tensor:
    """Mean squared difference of cosine similarities between patches, over all pairs of patches: a scalar.

    Args:
        student: [B, N, D] patch features after the final norm; any float dtype, computed in float32.
        teacher: [B, N, E] of the Gram teacher on the same grid (`resize_grid`); no gradient flows there.
        negatives: similarities below zero. "keep"; "remove": they are zero on either side; "remove_teacher": they are
            zero in the teacher, and a pair that is negative on both sides is left alone.
        per_image: pairs within an image, else pairs over all images of the batch.
    """
    if negatives not in NEGATIVES:
        raise ValueError(f"gram negatives={negatives!r} is not one of {', '.join(NEGATIVES)}.")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"gram_loss needs the same images and patches of both, got {tuple(student.shape)} of the student and "
            f"{tuple(teacher.shape)} of the teacher; resize the teacher's grid."
        )
    with torch.autocast(student.device.type, enabled=False):
        student_gram = _gram(student, per_image)
        with torch.no_grad():
            teacher_gram = _gram(teacher, per_image)
        if negatives == "remove":
            student_gram, teacher_gram = student_gram.relu(), teacher_gram.relu_()
        elif negatives == "remove_teacher":
            student_gram = student_gram.masked_fill((student_gram < 0) & (teacher_gram < 0), 0)
            teacher_gram = teacher_gram.relu_()
        return F.mse_loss(student_gram, teacher_gram)


def _gram(patches: Tensor, per_image: bool) -> Tensor:
    """[B, N, D] -> cosines [B, N, N], or [B * N, B * N] over the batch."""
    patches = F.normalize(patches.to(torch.promote_types(patches.dtype, torch.float32)), dim=-1)
    patches = patches if per_image else patches.flatten(0, 1)
    return patches @ patches.mT


def resize_grid(patches: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
    """Patch features [B, h * w, D] -> [B, h' * w', D]: bicubic without antialiasing, as the Gram teacher's are."""
    if grid == target_grid:
        return patches
    assert patches.shape[1] == grid[0] * grid[1], (patches.shape, grid)
    rows, columns = (
        resize_weights(n, target, None, False, patches.device) for n, target in zip(grid, target_grid, strict=True)
    )
    return resized(patches.float(), rows, columns).to(patches.dtype)
