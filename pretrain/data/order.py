"""Which images make up a step's batch: a pure function of (seed, phase, step), over any mixture of datasets.

Within a dataset, every epoch is a permutation: the shards are shuffled, and the images inside each window of
`shuffle_shards` consecutive ones. Reading stays local to a window, and the windows' permutations are all that is held.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from pretrain.data.randomness import Stream, generator

_HOMOGENEOUS_BLOCK = 100  # steps: each block has its exact share of homogeneous ones, at random places
_WEIGHT_UNITS = 1 << 40  # weights become integers, so that quotas are exact at any step
_WINDOWS_HELD = 4


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What the order is drawn from: for each dataset its shards' starts and its weight."""

    starts: Sequence[np.ndarray]
    """for each dataset int64 [S + 1], images before each shard"""
    weights: Sequence[float]
    """at least 0, of heterogeneous batches; need not sum to 1"""
    homogeneous: int = -1
    """the dataset of the homogeneous batches, -1 for none"""
    homogeneous_share: float = 0.0
    """of the steps, 0 to 1"""
    shuffle_shards: int = 64
    """shards whose images are mixed; 0 for all"""


class SampleOrder:
    """(step) -> (dataset, row) of each image of the global batch.

    Quotas are exact: after any number of blocks each dataset has had its weight's share of draws within the number of
    datasets; a block is one global batch, or a few where batches are smaller than the square of the number of
    datasets. No image comes twice before all of its dataset have come once. It caches, and remembers nothing else.
    """

    def __init__(self, mixture: Mixture, global_batch_size: int, seed: int, phase: int) -> None:
        self.mixture, self.batch_size, self.seed, self.phase = mixture, global_batch_size, seed, phase
        total = sum(mixture.weights)
        self._units = [round(weight / total * _WEIGHT_UNITS) if total else 0 for weight in mixture.weights]
        self._share = Fraction(mixture.homogeneous_share).limit_denominator(1_000_000)  # 0.29 of 100 steps is 29
        self._largest = int(np.argmax(self._units))
        self._block_steps = -(-(len(self._units) ** 2) // global_batch_size)
        self._windows: OrderedDict[tuple[int, int, int], np.ndarray] = OrderedDict()
        self._epochs: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """dataset int64 [B] and row int64 [B] of the global batch at this step of the phase."""
        datasets, draws = self._draws(step)
        rows = np.empty(self.batch_size, np.int64)
        for dataset in np.unique(datasets):
            mine = datasets == dataset
            rows[mine] = self._rows(int(dataset), draws[mine])
        return datasets, rows

    def redraw(self, step: int, position: int, dataset: int, attempt: int) -> int:
        """The row that stands in, at the attempt-th try, for a damaged image at this position of the global batch."""
        count = int(self.mixture.starts[dataset][-1])
        return int(generator(self.seed, self.phase, Stream.REDRAW, step, position, attempt).integers(count))

    def epoch(self, step: int) -> list[float]:
        """For each dataset, how often it has been gone through before this step."""
        homogeneous = self._homogeneous_steps(step)
        before = self._quotas((step - homogeneous) * self.batch_size)
        if self.mixture.homogeneous >= 0:
            before[self.mixture.homogeneous] += homogeneous * self.batch_size
        return [draws / int(starts[-1]) for draws, starts in zip(before, self.mixture.starts, strict=True)]

    def is_homogeneous(self, step: int) -> bool:
        return self._homogeneous_steps(step + 1) > self._homogeneous_steps(step)

    def _homogeneous_steps(self, step: int) -> int:
        """How many of the steps before this one are homogeneous."""
        if self.mixture.homogeneous < 0:
            return 0
        share, (block, inside) = self._share, divmod(step, _HOMOGENEOUS_BLOCK)
        before = int(block * _HOMOGENEOUS_BLOCK * share)
        if not inside:
            return before
        count = int((block + 1) * _HOMOGENEOUS_BLOCK * share) - before
        places = generator(self.seed, self.phase, Stream.HOMOGENEOUS, block).permutation(_HOMOGENEOUS_BLOCK)[:count]
        return before + int((places < inside).sum())

    def _quotas(self, draws: int) -> list[int]:
        """How many of the first `draws` mixed draws each dataset gets; the largest takes what rounding leaves."""
        quotas = [draws * units // _WEIGHT_UNITS for units in self._units]
        quotas[self._largest] += draws - sum(quotas)
        return quotas

    def _draws(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """dataset [B], and which draw from that dataset each position is, counted from the phase's start [B]."""
        homogeneous, special = self._homogeneous_steps(step), self.mixture.homogeneous
        mixed = step - homogeneous
        block, inside = divmod(mixed, self._block_steps)
        length = self._block_steps * self.batch_size
        before, after = self._quotas(block * length), self._quotas((block + 1) * length)
        counts = np.subtract(after, before)
        assert (counts >= 0).all()
        assert counts.sum() == length
        labels = generator(self.seed, self.phase, Stream.MIXTURE, block).permutation(
            np.repeat(np.arange(len(counts)), counts)
        )
        offset = np.array(before)
        if special >= 0:
            offset[special] += homogeneous * self.batch_size
        offset += np.bincount(labels[: inside * self.batch_size], minlength=len(counts))
        if self.is_homogeneous(step):
            return np.full(self.batch_size, special), offset[special] + np.arange(self.batch_size)
        labels = labels[inside * self.batch_size : (inside + 1) * self.batch_size]
        ranks = np.empty(self.batch_size, np.int64)
        for dataset in np.unique(labels):
            mine = labels == dataset
            ranks[mine] = offset[dataset] + np.arange(mine.sum())
        return labels, ranks

    def _rows(self, dataset: int, draws: np.ndarray) -> np.ndarray:
        """The rows of these draws [n], ascending: position in an epoch -> window -> the window's permutation."""
        count = int(self.mixture.starts[dataset][-1])
        rows = np.empty(len(draws), np.int64)
        epochs, positions = np.divmod(draws, count)
        for epoch in np.unique(epochs):
            _, ends = self._epoch(dataset, int(epoch))
            windows = np.searchsorted(ends, positions, side="right")
            for window in np.unique(windows[epochs == epoch]):
                mine = (epochs == epoch) & (windows == window)
                start = int(ends[window - 1]) if window else 0
                rows[mine] = self._window(dataset, int(epoch), int(window))[positions[mine] - start]
        return rows

    def _epoch(self, dataset: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards' order in an epoch [S], and where in the epoch each window ends [windows]."""
        key = (dataset, epoch)
        if key not in self._epochs:
            sizes = np.diff(self.mixture.starts[dataset])
            shards = generator(self.seed, self.phase, Stream.SHARDS, dataset, epoch).permutation(len(sizes))
            every = self.mixture.shuffle_shards or len(sizes)
            last = np.append(np.arange(every, len(sizes), every), len(sizes)) - 1
            _hold(self._epochs, key, (shards, np.cumsum(sizes[shards])[last]), 2 * len(self.mixture.starts))
        return self._epochs[key]

    def _window(self, dataset: int, epoch: int, window: int) -> np.ndarray:
        """The rows of a window in their order, int64."""
        key = (dataset, epoch, window)
        if key not in self._windows:
            shards, _ = self._epoch(dataset, epoch)
            every = self.mixture.shuffle_shards or len(shards)
            starts = self.mixture.starts[dataset]
            inside = shards[window * every : (window + 1) * every]
            rows = np.concatenate([np.arange(int(starts[shard]), int(starts[shard + 1])) for shard in inside])
            generator(self.seed, self.phase, Stream.WINDOW, dataset, epoch, window).shuffle(rows)
            _hold(self._windows, key, rows, _WINDOWS_HELD * len(self.mixture.starts))
        return self._windows[key]


def _hold(cache: OrderedDict, key: tuple[int, ...], value: object, limit: int) -> None:
    """Keep the most recent few."""
    while len(cache) >= limit:
        cache.popitem(last=False)
    cache[key] = value
