"""Copy detection offline as learned from drawings: the raw values of `descriptors`, projected, then signed roots.

`descriptors` has a projection learned from shaded pictures that fill the frame and from light edits of them. Drawings
on a plain ground are alike under it, for it never saw ground. This one has seen both kinds, and strong edits too
(benchmarks/copies_fit.py). A root of each entry keeps the few directions in which a picture is extreme, such as much
white or one strong edge, from deciding the cosine alone. Time, width and mirror are those of `descriptors`.

Source: square roots of embeddings against bursts, H. Jegou, M. Douze, C. Schmid, CVPR 2009, and as power-law
normalisation F. Perronnin, J. Sanchez, T. Mensink, ECCV 2010.
"""

import hashlib
from pathlib import Path

import numpy as np

from curation.ops import descriptors

STATE_PATH = Path(__file__).with_name("copies.npz")
DIM = 256


def embed(views: np.ndarray) -> np.ndarray:
    """Unit-norm rows [B, 256] float32 of views uint8 [B, 128, 128, 3].

    Each row depends on its own view only, to the last bit.

    Raises:
        ValueError: another shape or type.
    """
    projection = descriptors.load_projection(STATE_PATH)
    return descriptors.by_block(views, lambda _, raw: _roots(descriptors.project(raw, projection)), DIM)


def mirror_signs() -> np.ndarray:
    """Signs float32 [256]: embed(mirrored) == embed(view) * signs, up to the rounding of sums (1e-5)."""
    return descriptors.load_projection(STATE_PATH).mirror.copy()


def fingerprint() -> str:
    """sha256 of the projection and of the raw values under it; the 1 stands for the code of this file."""
    return hashlib.sha256(f"1 {descriptors.fingerprint()}".encode() + STATE_PATH.read_bytes()).hexdigest()


def _roots(rows: np.ndarray) -> np.ndarray:
    return descriptors.unit(np.copysign(np.sqrt(np.abs(rows)), rows))
