"""One random generator for each (seed, phase, purpose, position): nothing carries a position over steps."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What a generator is for. The numbers are part of what a seed means: never renumber them."""

    SHARDS = 1
    WINDOW = 2
    MIXTURE = 3
    HOMOGENEOUS = 4
    REDRAW = 5
    SIZES = 6
    CROPS = 7
    MASK_RATIOS = 8
    MASK_BLOCKS = 9


def generator(seed: int, phase: int, stream: Stream, *position: int) -> np.random.Generator:
    """A fresh generator: the same arguments give the same numbers, in any process. All are at least 0."""
    return np.random.default_rng([seed, phase, stream, *position])
