"""DINO: the student's CLS token of one crop predicts the teacher's assignment of another crop of the same image."""

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.losses.prototypes import Targets, prototype_cross_entropy


class DinoLoss(NamedTuple):
    total: Tensor
    # scalar, with gradient
    global_term: Tensor
    # mean cross-entropy over the pairs of global crops, in nats, no gradient
    local_term: Tensor
    # the same over the pairs of a local and a global crop; 0 without local crops


class Pairs(NamedTuple):
    """Which crops of a student answer to which of a teacher, and what each answer weighs in the mean over pairs."""

    pairing: Tensor
    # [V + L, V]: row g holds what the teacher's crops count for student crop g; rows sum to one
    weights: Tensor
    # [(V + L) * B], crop-major


def crop_pairs(
    num_globals: int,
    num_locals: int,
    num_images: int,
    include_same_crop: bool,
    local_weight: float,
    device: torch.device,
) -> Pairs:
    """Pairs of a student's and a teacher's crop of the same image.

    Each global crop goes with the other ones (G = V * (V - 1) pairs, or V * V with `include_same_crop`), each local
    crop with all global ones (V * L).

    The mean over pairs is (G * global_term + local_weight * V * L * local_term) / (G + V * L), as released with DINOv2
    (arXiv:2304.07193) and DINOv3 (arXiv:2508.10104). Raises ValueError if there is no pair.
    """
    num_global_pairs = num_globals * (num_globals if include_same_crop else num_globals - 1)
    num_local_pairs = num_globals * num_locals
    if num_global_pairs + num_local_pairs == 0:
        raise ValueError(
            "the loss on CLS tokens needs two global crops, or a global and a local one, to have a pair; "
            f"got {num_globals} global and {num_locals} local."
        )
    pairing = torch.full((num_globals + num_locals, num_globals), 1 / num_globals, device=device)
    if not include_same_crop:
        pairing[:num_globals] = (1 - torch.eye(num_globals, device=device)) / max(num_globals - 1, 1)
    # Weights of a row of the two kinds; a lone global crop without a pair has none.
    num_pairs = num_global_pairs + num_local_pairs
    global_share = num_global_pairs / num_pairs
    local_share = local_weight * num_local_pairs / num_pairs
    weights = torch.empty(num_globals + num_locals, num_images, device=device)
    weights[:num_globals] = global_share / (num_globals * num_images)
    weights[num_globals:] = local_share / max(num_locals * num_images, 1)
    return Pairs(pairing, weights.flatten())


def dino_loss(
    student_globals: Tensor,
    student_locals: Tensor | None,
    prototypes: Tensor,
    targets: Targets,
    temperature: float = 0.1,
    include_same_crop: bool = False,
    local_weight: float = 1.0,
    compiled: bool = False,
) -> DinoLoss:
    """Mean cross-entropy over all pairs (`crop_pairs`) of a student's and a teacher's crop of the same image.

    Args:
        student_globals: [V, B, d], unit-norm head outputs.
        student_locals: [L, B, d], or None.
        prototypes: [K, d] of the student's head.
        targets: V * B rows, crop-major.
        temperature: of the student.
        include_same_crop: also pair a global crop with itself (a distilled student sees no masks there).
        local_weight: multiplies the local term only (DINOv3 lowers it to 0.5 in its Gram phase).
        compiled: code may be compiled, see `prototype_cross_entropy`.

    Raises ValueError if there is no pair. Source: arXiv:2104.14294.
    """
    num_globals, num_images, _ = student_globals.shape
    num_locals = 0 if student_locals is None else len(student_locals)
    pairs = crop_pairs(
        num_globals, num_locals, num_images, include_same_crop, local_weight, device=student_globals.device
    )
    students = student_globals if student_locals is None else torch.cat([student_globals, student_locals])
    total, cross_entropies = prototype_cross_entropy(
        students.flatten(0, 1), prototypes, targets, pairs.weights, temperature, pairs.pairing, compiled
    )
    cross_entropies = cross_entropies.unflatten(0, (-1, num_images))
    global_term = cross_entropies[:num_globals].mean()
    local_term = cross_entropies[num_globals:].mean() if num_locals else torch.zeros_like(global_term)
    return DinoLoss(total, global_term, local_term)
