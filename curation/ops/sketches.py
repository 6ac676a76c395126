"""Arithmetic whose result cannot depend on the shape of a matrix product: sketches, cell ranking, exact dot products.

BLAS adds in an order that changes with the shapes and threads it is given, so a float32 product may differ in its last
bit between two tilings, and a sign or a rank decided by it would differ too. Three facts remove that:

- A product of two float16 numbers is a multiple of 2^-48, and partial sums of a dot product of unit vectors stay
  below 2: float64 holds every one of them, so the dot product of stored vectors is *exact* in any order.
- Integers below 2^24 are exact in float32, and Cauchy-Schwarz bounds every partial sum by the product of the norms.
  Rounding vectors to multiples of 2^-11 and the other side to 2^-12 makes the fast float32 product exact too. The
  rounding (1e-4 in cosine) only chooses candidates: it never decides a pair.
- A bit count is an integer.
"""

import faiss
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from scipy.special import ndtri

from curation.ops.randomness import hash_uniform

SKETCH_WORDS = 8
SKETCH_BITS = 64 * SKETCH_WORDS
HALF_WORDS = SKETCH_WORDS // 2
HALF_BITS = SKETCH_BITS // 2
_ROW_SCALE = np.float32(2.0**11)
_DIRECTION_SCALE = np.float32(2.0**12)
_NORM_TOLERANCE = 5e-3  # a float16 unit vector of up to 4,096 dimensions is within 1e-3


def check_unit_rows(x: np.ndarray, what: str) -> None:
    """Raise ValueError unless every row of x [N, D] is finite and of unit norm within 5e-3."""
    norms = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float32))
    wrong = np.flatnonzero(~(np.abs(norms - 1.0) <= _NORM_TOLERANCE))
    if len(wrong):
        raise ValueError(
            f"{what} must have unit-norm rows: row {wrong[0]} has norm {norms[wrong[0]]:.4g} ({len(wrong)} of {len(x)} "
            "rows are wrong). Divide each row by its norm, and leave out rows that have none."
        )


def round_rows(x: np.ndarray) -> np.ndarray:
    """Unit rows [N, D] to float32 integers of norm about 2^11: the left side of an exact float32 product."""
    return np.rint(np.multiply(x, _ROW_SCALE, dtype=np.float32))


def round_directions(x: np.ndarray) -> np.ndarray:
    """Unit rows [K, D] to float32 integers of norm about 2^12: the right side of an exact float32 product."""
    return np.rint(np.multiply(x, _DIRECTION_SCALE, dtype=np.float32))


def products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x @ y.T for float32 [N, D] and [K, D], in as many threads as Faiss was told in the calling thread.

    NumPy's BLAS has one pool of threads that concurrent callers fight over; Faiss's runs in the caller's own.
    """
    product = faiss.LinearTransform(y.shape[1], y.shape[0], False)
    faiss.copy_array_to_vector(np.ascontiguousarray(y, np.float32).reshape(-1), product.A)
    product.is_trained = True
    return product.apply(np.ascontiguousarray(x, np.float32))


def sketch_directions(dim: int, seed: int) -> np.ndarray:
    """The directions [512, D] whose signs make a sketch: rows of random rotations, rounded for exact products.

    One bit of two vectors at angle t differs with probability t / pi; directions that are orthogonal in groups of
    D keep that mean and lower the variance.

    Source: Charikar, "Similarity estimation techniques from rounding algorithms", STOC 2002; Ji et al., "Super-bit
    locality-sensitive hashing", NeurIPS 2012.
    """
    num_blocks = -(-SKETCH_BITS // dim)
    normal = ndtri(np.clip(hash_uniform(seed, np.arange(num_blocks * dim * dim)), 1e-12, None))
    rotations = [np.linalg.qr(block)[0] for block in normal.reshape(num_blocks, dim, dim)]
    return round_directions(np.concatenate(rotations)[:SKETCH_BITS])


def sketch(x: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Sign sketches of unit rows x [N, D]: uint64 [N, 8]; bit j is set where the product with direction j is >= 0."""
    signs = products(round_rows(x), directions) >= 0
    return np.packbits(signs, axis=1, bitorder="little").view("<u8").astype(np.uint64, copy=False)


def half_radius(radius: int | np.ndarray) -> int | np.ndarray:
    """The radius, in bits of the first half, of a first look at pairs whose whole sketches are within radius.

    Half of the differing bits are expected there, with a standard deviation of sqrt(radius) / 2: two of those on top.
    """
    return radius // 2 + np.ceil(np.sqrt(radius)).astype(np.int64)


def radius_needed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest radius at which the join looks at each pair of sketches, rows of uint64 [N, 8]: int64 [N]."""
    differing = np.bitwise_count(a ^ b)
    first = differing[:, :HALF_WORDS].sum(axis=1, dtype=np.int64)
    return np.maximum(
        differing.sum(axis=1, dtype=np.int64), np.searchsorted(half_radius(np.arange(SKETCH_BITS + 1)), first)
    )


def mirrored(x: np.ndarray, mirror: np.ndarray) -> np.ndarray:
    """The embeddings of the flipped images: rows x [N, D] times the signs mirror [D]."""
    return x * mirror.astype(np.float32)


def check_mirror(mirror: np.ndarray, dim: int) -> None:
    """Raise ValueError unless mirror is a vector [D] of +1 and -1."""
    if mirror.shape != (dim,) or not np.all(np.abs(mirror) == 1):
        raise ValueError(f"mirror must hold {dim} signs, +1 or -1, got shape {mirror.shape}.")


@intrinsic
def bit_count(typingctx, x):
    """Number of set bits of a uint64; numba has no such call of its own, and LLVM vectorises this one."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def lowest_bit(typingctx, x):
    """Position of the lowest set bit of a non-zero uint64."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


def widened(half: np.ndarray) -> np.ndarray:
    """float16 [N, D] to float32, exactly; NumPy's own conversion takes ten times as long.

    Infinities and NaN become numbers of 65,536 and more, which check_unit_rows refuses.
    """
    half = np.ascontiguousarray(half)
    out = np.empty(half.shape, np.float32)
    _widen(half.view(np.uint16).reshape(-1), out.reshape(-1))
    return out


@njit(cache=True, nogil=True)
def _widen(half: np.ndarray, out: np.ndarray) -> None:
    bits = out.view(np.uint32)
    for i in range(half.size):
        word = np.uint32(half[i])
        bits[i] = ((word & np.uint32(0x7FFF)) << np.uint32(13)) | ((word & np.uint32(0x8000)) << np.uint32(16))
    scale = np.float32(2.0**112)  # the two formats' exponent biases differ by 112; denormals come out right as well
    for i in range(half.size):
        out[i] *= scale


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def rough_dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    """float32 dot product in whatever order is fastest: good to ROUGH_MARGIN, to be confirmed by exact_dot."""
    total = np.float32(0.0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


# Far above the error of a float32 dot product of unit rows: D * 2^-24 at worst, 2.4e-4 at 4,096 dimensions.
ROUGH_MARGIN = np.float32(1e-3)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def exact_dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    """The dot product of two float16-valued unit rows, rounded once to float32: no order of addition changes it."""
    total = 0.0
    for i in range(a.size):
        total += np.float64(a[i]) * np.float64(b[i])
    return np.float32(total)
