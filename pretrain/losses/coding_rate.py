"""SimDINO: a student's unit rows are drawn to the teacher's, and their coding rate keeps them apart. No prototypes.

Without prototypes there is nothing to centre, no temperature and no logits: a head ends at its bottleneck. What keeps
all images from one answer is the coding rate of the batch, the volume that its rows span.

Source: arXiv:2502.10385 (SimDINO, SimDINOv2), and the code released with it for the numbers: rate of the mean of
student and teacher, its factor, eps 0.05 for SimDINOv2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.losses.centering import nothing_to_reduce
from pretrain.losses.dino import DinoLoss, crop_pairs


def alignment_loss(
    student_globals: Tensor,
    student_locals: Tensor | None,
    teacher_globals: Tensor,
    include_same_crop: bool = False,
    local_weight: float = 1.0,
) -> DinoLoss:
    """Half the mean squared distance, which is 1 - cosine, over all pairs (`dino.crop_pairs`) of a student's and a
    teacher's crop of the same image.

    Args:
        student_globals: [V, B, d], unit rows.
        student_locals: [L, B, d], or None.
        teacher_globals: [V, B, d], unit rows; no gradient flows there.

    Raises ValueError if there is no pair.
    """
    num_globals, num_images, _ = student_globals.shape
    num_locals = 0 if student_locals is None else len(student_locals)
    students = student_globals if student_locals is None else torch.cat([student_globals, student_locals])
    pairs = crop_pairs(num_globals, num_locals, num_images, include_same_crop, local_weight, device=students.device)
    with torch.autocast(students.device.type, enabled=False):
        teachers = teacher_globals.detach()
        targets = torch.einsum("gv,vbd->gbd", pairs.pairing.to(teachers.dtype), teachers)
        distances = 1 - (students * targets).sum(dim=-1)
    total = (pairs.weights.to(distances.dtype) * distances.flatten()).sum()
    distances = distances.detach()
    global_term = distances[:num_globals].mean()
    local_term = distances[num_globals:].mean() if num_locals else torch.zeros_like(global_term)
    return DinoLoss(total, global_term, local_term)


def patch_alignment_loss(students: Tensor, teachers: Tensor, weights: Tensor, num_images: int) -> Tensor:
    """1 - cosine of each predicted patch and the teacher's, averaged within an image, then over images: a scalar.

    Args:
        students, teachers: [M, d], unit rows; M may be 0. No gradient flows into the teacher's.
        weights: [M], 1 / (number of predicted patches in that image).
        num_images: global crops on this rank, predicted or not.
    """
    return (weights / num_images * (1 - (students * teachers.detach()).sum(dim=-1))).sum()


def coding_rate_loss(
    rows: Tensor, eps: float, num_ranks: int = 1, sum_over_ranks: Callable[[Tensor], Tensor] = nothing_to_reduce
) -> Tensor:
    """Minus the scaled coding rate of a batch, averaged over views: a scalar, in nats.

    The rate of m unit rows Z [m, d] is logdet(I + d / (m eps) Z^T Z) / 2, of coding them up to a distortion of eps.
    It is scaled by (d + m) / (d m), so that its gradient on a row stays of one size for any m and d.

    Args:
        rows: [V, B, d], unit rows of V views: a view never spreads from another of the same image.
        eps: squared distortion, above 0.
        num_ranks, sum_over_ranks: the rate is of the rows of all ranks, m = num_ranks * B: the sum over ranks of
            [V, d, d], whose gradient is the sum over ranks too (`collectives.sum_with_grad`).
    """
    num_rows, dim = num_ranks * rows.shape[1], rows.shape[2]
    with torch.autocast(rows.device.type, enabled=False):  # a determinant needs float32
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        covariance = sum_over_ranks(rows.mT @ rows) * (dim / (num_rows * eps))
        identity = torch.eye(dim, device=rows.device, dtype=rows.dtype)
        # Half a log-determinant is the sum of logarithms on Cholesky's diagonal. `_ex` does not wait for the device.
        factors = torch.linalg.cholesky_ex(identity + covariance).L
        rates = factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    return -(dim + num_rows) / (dim * num_rows) * rates.mean()
