"""Principal components of patch features, and the colours that show three (DINOv2, arXiv:2304.07193, fig. 1)."""

import numpy as np
import torch
from torch import Tensor


def principal_scores(rows: Tensor, count: int, chosen: Tensor | None = None) -> tuple[np.ndarray, float]:
    """Components of rows [N, D], largest first, of unit variance, each positive where it is skewed to.

    Args:
        chosen: bool [N]: the rows that give mean, directions and variance; all without it.

    Returns:
        float64 [N, count]; and the share of the variance that these components hold.

    Raises:
        ValueError: fewer than 4 such rows, or fewer than `count` dimensions.
    """
    rows = rows.detach().double()  # the third component can be 1e-4 of the first
    base = rows if chosen is None else rows[chosen]
    if len(base) < 4 or rows.shape[1] < count:
        raise ValueError(f"a PCA needs 4 patches of {count} dimensions or more, found {tuple(base.shape)}.")
    centre = base.mean(dim=0)
    values, vectors = torch.linalg.eigh((base - centre).T @ (base - centre))
    directions = vectors[:, -count:].flip(1)
    base = (base - centre) @ directions
    spread = base.std(dim=0, correction=0).clamp(min=1e-12)
    signs = torch.where((base**3).mean(dim=0) < 0, -1.0, 1.0)
    scores = (rows - centre) @ directions / spread * signs
    return scores.cpu().numpy(), float(values[-count:].sum() / values.sum().clamp(min=1e-300))


def as_colours(scores: np.ndarray) -> np.ndarray:
    """uint8 of the same shape: 2.5 standard deviations either way fill the range."""
    return np.clip((scores / 5 + 0.5) * 255, 0, 255).round().astype(np.uint8)
