"""Copy detection offline as learned from drawings: the raw values of `descriptors`, projected, then signed roots.

`descriptors` has a projection learned from shaded pictures that fill the frame and from light edits of them. Drawings
on a plain ground are alike under it, for it never saw ground. This one has seen both kinds, and strong edits too
(benchmarks/copies_fit.py). A root of each entry keeps the few directions in which a picture is extreme, such as much
white or one strong edge, from deciding the cosine alone. Time, width and mirror are those of `descriptors`.

Source: square roots of embeddings against bursts, H. Jegou, M. Douze, C. Schmid, CVPR 2009, and as power-law
normalisation F. Perronnin, J. Sanchez, T. Mensink, ECCV 2010.
"""

import functools
import hashlib
from pathlib import Path

import numba
import numpy as np

from curation.ops import descriptors

STATE_PATH = Path(__file__).with_name("copies.npz")
DIM = 256
_ROWS_PER_BLOCK = 256


def embed(views: np.ndarray) -> np.ndarray:
    """Unit-norm rows [B, 256] float32 of views uint8 [B, 128, 128, 3].

    Each row depends on its own view only, to the last bit.

    Raises:
        ValueError: another shape or type.
    """
    mean, projection, _ = _state()
    out = np.empty((len(views), DIM), np.float32)
    for start in range(0, len(views), _ROWS_PER_BLOCK):
        block = np.ascontiguousarray(views[start : start + _ROWS_PER_BLOCK])
        _project(descriptors.raw_descriptors(block), mean, projection, out[start : start + len(block)])
    return out


def mirror_signs() -> np.ndarray:
    """Signs float32 [256]: embed(mirrored) == embed(view) * signs, up to the rounding of sums (1e-5)."""
    return _state()[2].copy()


def fingerprint() -> str:
    """sha256 of the projection and of the raw values under it; the 1 stands for the code of this file."""
    return hashlib.sha256(f"1 {descriptors.fingerprint()}".encode() + STATE_PATH.read_bytes()).hexdigest()


@functools.cache
def _state() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [RAW_DIM], projection [256, RAW_DIM] and mirror [256], float32; stored as `descriptors` stores its own."""
    with np.load(STATE_PATH) as file:
        mean, half, mirror = (file[name].astype(np.float32) for name in ("mean", "half_projection", "mirror"))
    permutation = descriptors.mirror_permutation()
    left = np.flatnonzero(np.arange(len(permutation)) < permutation)
    projection = np.empty((len(half), len(permutation)), np.float32)
    projection[:, left] = half
    projection[:, permutation[left]] = half * mirror[:, None]
    return mean, projection, mirror


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _project(raw, mean, projection, out):
    """out = unit rows of the signed roots of (raw - mean) @ projection.T, one row at a time."""
    for row in range(raw.shape[0]):
        centred = raw[row] - mean
        norm = np.float32(0)
        for k in range(projection.shape[0]):
            total = np.float32(0)
            for d in range(projection.shape[1]):
                total += projection[k, d] * centred[d]
            size = abs(total)
            norm += size
            out[row, k] = np.sqrt(size) if total >= 0 else -np.sqrt(size)
        out[row] /= np.sqrt(norm) + np.float32(1e-12)
