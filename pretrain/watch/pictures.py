"""The PCA pictures that evaluations left in a run folder: which there are, and which to show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

SHOWN = 7  # pictures over time, beside the image


def pca_files(folder: Path) -> dict[int, Path]:
    """step -> pca.npz of each evaluation; `folder` is `evaluation` of a run folder."""
    return {int(path.parent.name.removeprefix("step-")): path for path in sorted(folder.glob("step-*/pca.npz"))}


def read_pictures(path: Path) -> dict[str, np.ndarray]:
    """`images` uint8 [I, H, W, 3], `colours` uint8 [I, h, w, 3], `scores` float32 [I, h, w, 3]."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def chosen_steps(steps: Sequence[int], count: int = SHOWN) -> list[int]:
    """At most `count` of the steps: the first, the last, and those nearest to even distances between."""
    if len(steps) <= count:
        return sorted(steps)
    ordered = np.array(sorted(steps))
    wanted = np.linspace(ordered[0], ordered[-1], count)
    return sorted({int(ordered[np.abs(ordered - w).argmin()]) for w in wanted})
