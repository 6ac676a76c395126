"""Exact and perceptual hashes: the cheap first steps of the duplicate cascade.

The perceptual hash is PDQ (256 bits and a quality in 0..100) by the `pdqhash` library, taken from a 128 x 128 squash of
the image. PDQ's own reduction is not antialiased to a fixed size, so two sizes of one image differ by more bits
through it. Source: Meta, "The TMK+PDQF video-hashing algorithm and the PDQ image-hashing algorithm", ThreatExchange,
2019; it advises a distance of at most 31 and a quality of at least 50.
"""

from collections.abc import Callable, Iterator

import numba
import numpy as np
import pdqhash
from PIL import Image

from curation.ops.randomness import hash_uint64

HASH_BYTES = 32
HASH_VIEW_PX = 128
# PDQ's authors: below this an image has too little gradient for its hash to mean anything.
MIN_QUALITY = 50
# Chunks of 16 bits: a table of 65,536 buckets stays in cache, and two hashes within 31 bits differ by at most
# one bit in one of the 16 chunks (16 chunks with two bits each would make 32).
_CHUNKS = 16
_BUFFER_ROWS = 1 << 20


def perceptual_hash(image: Image.Image) -> tuple[bytes, int, bytes]:
    """(PDQ hash, quality 0..100, PDQ hash of the mirror image) of an RGB image; 32 bytes each."""
    size = (HASH_VIEW_PX, HASH_VIEW_PX)
    return hash_pixels(np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)))


def hash_pixels(pixels: np.ndarray) -> tuple[bytes, int, bytes]:
    """`perceptual_hash` of a [128, 128, 3] uint8 array that is already squashed, such as the offline encoder's view."""
    if pixels.shape != (HASH_VIEW_PX, HASH_VIEW_PX, 3) or pixels.dtype != np.uint8:
        expected = [HASH_VIEW_PX, HASH_VIEW_PX, 3]
        raise ValueError(f"pixels must be uint8 {expected}, got {pixels.dtype} {list(pixels.shape)}.")
    bits, quality = pdqhash.compute(np.ascontiguousarray(pixels))
    # pdqhash.compute_dihedral is off by several bits here: its sampling grid is not symmetric.
    mirrored, _ = pdqhash.compute(np.ascontiguousarray(pixels[:, ::-1]))
    return np.packbits(bits.astype(bool)).tobytes(), int(quality), np.packbits(mirrored.astype(bool)).tobytes()


def equal_groups(digests: np.ndarray) -> np.ndarray:
    """Label each row with the smallest row index that holds the same bytes: int64 [N] of digests uint8 [N, W].

    Rows are sorted by 64 bits of a hash, and compared in full with their neighbour there.
    """
    order = np.argsort(row_hashes(digests), kind="stable")
    words = _words(digests)[order]
    starts = np.ones(len(digests), dtype=bool)
    starts[1:] = (words[1:] != words[:-1]).any(axis=1)
    hashes = row_hashes(words[starts].view(np.uint8))
    if (hashes[1:] == hashes[:-1]).any():  # rows that differ and hash alike may lie between equal ones
        order = np.lexsort(_words(digests).T)
        words = _words(digests)[order]
        starts[1:] = (words[1:] != words[:-1]).any(axis=1)
    labels = np.empty(len(digests), dtype=np.int64)
    # The sorts are stable, so the first row of a run is its smallest.
    labels[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return labels


def row_hashes(digests: np.ndarray) -> np.ndarray:
    """uint64 [N]: 64 well-mixed bits of each row of digests uint8 [N, W]."""
    words = _words(digests)
    hashes = np.zeros(len(words), np.uint64)
    for column in range(words.shape[1]):
        hashes = hash_uint64(column, hashes ^ words[:, column])
    return hashes


def _words(digests: np.ndarray) -> np.ndarray:
    """Rows of bytes as uint64 [N, ceil(W / 8)], padded with zeros."""
    padding = -digests.shape[1] % 8
    padded = np.pad(digests, ((0, 0), (0, padding))) if padding else digests
    return np.ascontiguousarray(padded, dtype=np.uint8).view(np.uint64)


def hash_pairs(
    hashes: np.ndarray,
    quality: np.ndarray,
    max_distance: int,
    mirrored: np.ndarray | None = None,
    min_quality: int = MIN_QUALITY,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of rows whose hashes differ by at most max_distance bits, of the image or of its mirror image.

    Exact, by multi-index hashing: near hashes agree in one of 16 chunks up to one bit, and each chunk's 65,536 buckets
    are compared with those one bit away. Rows with equal hashes (and equal mirrored ones) are grouped first: a group
    gives one pair per member with its smallest row, at distance 0, and enters the comparison once, so 300,000 copies of
    a placeholder cost nothing. Memory is about 200 bytes a row plus 24 a pair.

    Args:
        hashes: uint8 [N, 32].
        quality: [N]; rows below min_quality take no part.
        max_distance: bits, 0..31.
        mirrored: uint8 [N, 32], the hashes of the mirror images; None compares the images as they are.

    Returns:
        i, j int64 with i < j, in lexicographic order, each pair once; distance int64, the least of
        d(hash, hash), d(hash, mirrored) and d(mirrored, hash).

    Raises:
        ValueError: shapes that do not match, or a distance for which the search would not be exact.

    Source: M. Norouzi, A. Punjani, D. Fleet, "Fast exact search in Hamming space with multi-index hashing",
    arXiv:1307.2982.
    """
    if not 0 <= max_distance <= 31:
        raise ValueError(f"max_distance={max_distance} is outside 0..31, where multi-index hashing is exact.")
    stacked = [hashes] if mirrored is None else [hashes, mirrored]
    if any(array.dtype != np.uint8 or array.shape != (len(quality), HASH_BYTES) for array in stacked):
        raise ValueError(f"hashes must be uint8 [{len(quality)}, {HASH_BYTES}], got {[a.shape for a in stacked]}.")
    rows = np.flatnonzero(np.asarray(quality) >= min_quality)
    labels = equal_groups(np.concatenate([array[rows] for array in stacked], axis=1))
    copies = np.flatnonzero(labels != np.arange(len(rows)))
    unique = np.flatnonzero(labels == np.arange(len(rows)))
    found = [np.stack([rows[labels[copies]], rows[copies], np.zeros(len(copies), np.int64)])]
    words = [np.ascontiguousarray(array[rows[unique]]).view(np.uint64) for array in stacked]
    for other in words:
        for left, right, distance in _near(words[0], other, max_distance, other is words[0]):
            ends = rows[unique[left]], rows[unique[right]]
            found.append(np.stack([np.minimum(*ends), np.maximum(*ends), distance]))
    i, j, distance = np.concatenate(found, axis=1)
    order = np.lexsort((distance, j, i))
    i, j, distance = i[order], j[order], distance[order]
    first = np.ones(len(i), dtype=bool)
    first[1:] = (i[1:] != i[:-1]) | (j[1:] != j[:-1])
    return i[first], j[first], distance[first]


def hash_matches(
    queries: np.ndarray,
    query_quality: np.ndarray,
    hashes: np.ndarray,
    quality: np.ndarray,
    max_distance: int,
    queries_mirrored: np.ndarray | None = None,
    min_quality: int = MIN_QUALITY,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All (query, row) whose hashes differ by at most max_distance bits, of the query or of its mirror image.

    Exact, as hash_pairs; for two sets rather than one.

    Returns:
        query, row int64, sorted, each pair once; distance int64, the least.

    Raises:
        ValueError: a distance for which the search would not be exact.
    """
    if not 0 <= max_distance < 2 * _CHUNKS:
        raise ValueError(f"max_distance={max_distance} must be 0 to {2 * _CHUNKS - 1} bits for the search to be exact.")
    asked = np.flatnonzero(query_quality >= min_quality)
    rows = np.flatnonzero(quality >= min_quality)
    right = np.ascontiguousarray(hashes[rows]).view(np.uint64)
    found = [(np.empty(0, np.int64),) * 3]
    for side in (queries, queries_mirrored):
        if side is not None and len(asked) and len(rows):
            left = np.ascontiguousarray(side[asked]).view(np.uint64)
            # _near takes equal row numbers for one image; here they are two sets.
            for low, high, bits in _near(left, right, max_distance, False, first_right=len(left)):
                found.append((low, high - len(left), bits))
    query, row, distance = (np.concatenate(columns) for columns in zip(*found, strict=True))
    query, row = asked[query], rows[row]
    order = np.lexsort((distance, row, query))
    query, row, distance = query[order], row[order], distance[order]
    is_first = np.r_[True, (np.diff(query) != 0) | (np.diff(row) != 0)][: len(query)]
    return query[is_first], row[is_first], distance[is_first]


def hash_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bits in which rows of a and b differ: int64 [N] of uint8 [N, W]."""
    return np.bitwise_count(a ^ b).sum(axis=1, dtype=np.int64)


def _near(
    left: np.ndarray, right: np.ndarray, max_distance: int, is_same: bool, first_right: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of (row of left, row of right, distance); rows of right count from first_right, no row meets itself."""
    radius = max_distance // _CHUNKS
    flips = np.array([0, *(1 << bit for bit in range(16 * radius))], dtype=np.int64)
    for chunk in range(_CHUNKS):
        tables = [_bucket_table(words, chunk) for words in ((left,) if is_same else (left, right))]
        if first_right:
            tables[-1] = (tables[-1][0], tables[-1][1] + first_right, tables[-1][2])
        bucket = 0
        block = np.empty((_BUFFER_ROWS, 3), dtype=np.int64)
        while bucket < 1 << 16:
            size, stopped = _compare_buckets(
                *tables[0], *tables[-1], flips, chunk, radius, max_distance, is_same, bucket, block
            )
            if stopped == bucket:  # one bucket alone overflows the buffer
                block = np.empty((2 * len(block), 3), dtype=np.int64)
                continue
            bucket = stopped
            yield tuple(block[:size].T.copy())


def _bucket_table(words: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(hashes sorted by their chunk-th 16 bits, their rows, start of each bucket int64 [65537])."""
    keys = words.view(np.uint16)[:, chunk]
    order = np.argsort(keys, kind="stable")
    starts = np.zeros((1 << 16) + 1, dtype=np.int64)
    np.cumsum(np.bincount(keys, minlength=1 << 16), out=starts[1:])
    return words[order], order, starts


def _compile(function: Callable) -> Callable:
    return numba.njit(cache=True, nogil=True, boundscheck=False)(function)


@_compile
def _popcount(x):  # LLVM knows this form and makes one instruction of it
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@_compile
def _is_candidate_of_earlier_chunk(a, b, chunk, radius):
    for earlier in range(chunk):
        difference = (a[earlier // 4] ^ b[earlier // 4]) >> np.uint64(16 * (earlier % 4)) & np.uint64(0xFFFF)
        if _popcount(difference) <= radius:
            return True
    return False


@_compile
def _compare_buckets(
    left,
    left_rows,
    left_starts,
    right,
    right_rows,
    right_starts,
    flips,
    chunk,
    radius,
    max_distance,
    is_same,
    bucket,
    out,
):
    """Fill out with near pairs of whole buckets from `bucket` on; returns (rows filled, first bucket not done)."""
    size = 0
    while bucket < len(left_starts) - 1:
        before = size
        for flip in flips:
            other = bucket ^ flip
            if is_same and other < bucket:
                continue  # met from the other side
            for i in range(left_starts[bucket], left_starts[bucket + 1]):
                a0, a1, a2, a3 = left[i, 0], left[i, 1], left[i, 2], left[i, 3]
                begin = i + 1 if is_same and other == bucket else right_starts[other]
                for j in range(begin, right_starts[other + 1]):
                    distance = _popcount(a0 ^ right[j, 0]) + _popcount(a1 ^ right[j, 1])
                    distance += _popcount(a2 ^ right[j, 2]) + _popcount(a3 ^ right[j, 3])
                    if distance > max_distance or left_rows[i] == right_rows[j]:
                        continue
                    if _is_candidate_of_earlier_chunk(left[i], right[j], chunk, radius):
                        continue
                    if size == len(out):
                        return before, bucket
                    out[size, 0], out[size, 1], out[size, 2] = left_rows[i], right_rows[j], distance
                    size += 1
        bucket += 1
    return size, bucket
