"""Standard errors of figures over the images that they were measured on."""

from collections.abc import Callable

import numpy as np

DRAWS = 200
"""of a bootstrap; its own error is then a twentieth of the standard error"""


def of_share(share: float, count: int) -> float:
    """Of a share of `count` images, each right or wrong."""
    return float(np.sqrt(share * (1 - share) / count))


def of_mean(values: np.ndarray) -> float:
    """Of the mean of one value an image; NaN for fewer than two."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def bootstrap(count: int, figure: Callable[[np.ndarray], float], draws: int = DRAWS, seed: int = 0) -> float:
    """Of a figure that is no mean: its spread over sets of `count` images drawn with replacement.

    Args:
        figure: numbers of images, int64 [count], some more than once -> the figure on those.
    """
    generator = np.random.default_rng(seed)
    found = [figure(generator.integers(0, count, count)) for _ in range(draws)]
    return float(np.std(found, ddof=1))
