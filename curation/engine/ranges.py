"""Files of a range of gids: per-image state that no machine holds whole."""

from dataclasses import dataclass

import numpy as np

RANGE_ROWS = 1 << 23


@dataclass(frozen=True)
class Ranges:
    """How gids 0 to num_rows - 1 are cut: range r holds [r * size, (r + 1) * size)."""

    num_rows: int
    size: int = RANGE_ROWS

    def __len__(self) -> int:
        return -(-self.num_rows // self.size)

    def bounds(self, number: int) -> tuple[int, int]:
        """First gid of a range, and the one after its last."""
        return number * self.size, min((number + 1) * self.size, self.num_rows)

    def of(self, gids: np.ndarray) -> np.ndarray:
        """The range of each gid: int64, as `gids`."""
        return np.asarray(gids) // self.size

    def weights(self) -> list[float]:
        """Rows of each range, for a progress line."""
        return [float(stop - start) for start, stop in map(self.bounds, range(len(self)))]


def range_file(name: str, number: int) -> str:
    """The file of one range: `NAME-00012.parquet`."""
    return f"{name}-{number:05d}.parquet"
