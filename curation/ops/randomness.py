"""Random choices that depend on (seed, id) alone, never on a generator's position, a worker or an order."""

from typing import Any

import numpy as np

INCREMENT = np.uint64(0x9E3779B97F4A7C15)


def hash_uint64(seed: int, ids: np.ndarray) -> np.ndarray:
    """Hash each id to 64 well-mixed bits: splitmix64 over id plus a hashed seed.

    Args:
        seed: any integer; different seeds give independent streams.
        ids: integers of any shape, gids as a rule.

    Returns:
        uint64, the shape of ids.

    Source: splitmix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):  # wrapping around 2^64 is the point
        return mix((np.asarray(ids).astype(np.uint64) + np.uint64(1)) * INCREMENT ^ stream_of(seed))


def stream_of(seed: int) -> np.uint64:
    """What a seed adds to the hash of each id, for those who hash in a loop of their own."""
    with np.errstate(over="ignore"):
        return mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + INCREMENT)


def hash_uniform(seed: int, ids: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) for each id, 53 random bits."""
    return (hash_uint64(seed, ids) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_sample(seed: int, ids: np.ndarray, size: int) -> np.ndarray:
    """Choose min(size, len(ids)) distinct ids: those with the smallest hashes, returned in ascending id order.

    The choice for a smaller size is a subset of that for a larger one.
    """
    ids = np.asarray(ids)
    if size >= len(ids):
        return np.sort(ids)
    hashes = hash_uint64(seed, ids)
    return np.sort(ids[np.argpartition(hashes, size)[:size]])


def hash_shuffle(seed: int, ids: np.ndarray) -> np.ndarray:
    """The ids in an order that depends on seed and their values only."""
    ids = np.sort(np.asarray(ids))
    return ids[np.argsort(hash_uint64(seed, ids), kind="stable")]


def mix(z: Any) -> Any:
    """splitmix64's finalizer, of uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
