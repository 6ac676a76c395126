"""What an embedder is, and what it says of images; no library runs it here."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, eq=False)
class Embedded:
    """What a backbone says of a batch of images of one size; float32."""

    cls: np.ndarray
    """[B, D]"""
    patches: np.ndarray | None
    """[B, h * w, D], row-major; None where they were not asked for"""
    grid: tuple[int, int]
    """h, w"""


class Embedder(Protocol):
    """A backbone on its device. Calls may come from any one thread at a time."""

    source: str
    """the folder or file that was read"""
    architecture: str
    patch_size: int
    embed_dim: int
    px: int
    """side of the centre crop that it was trained at"""
    runs_on: str
    """library and device, for people"""

    def __call__(self, images: np.ndarray, with_patches: bool) -> Embedded:
        """Embed uint8 [B, H, W, 3]; sides that the patch does not divide are padded with the mean colour."""
        ...
