"""k-means in torch, on a GPU: candidates for the nearest centroids, and the exact sums of a Lloyd iteration.

The processor decides among the candidates, and sums are exact in any order, so results are the processor's own bits.
"""

import numpy as np
import torch
from torch.linalg import vector_norm

from curation.ops.torch_tiles import ENTRY_BYTES, MAX_ENTRIES, float_products, half_products, memory_bytes, on_device

_BLOCK_ROWS = 65_536  # rows that travel to the device at once
_SUM_BYTES = 24  # of a coordinate while it is summed: float32, rounded in float64 and its sum


class CentroidSearch:
    """Which centroids may be among the k nearest of a row: all whose rough score leaves that open.

    Unit rows (cosine) meet as float16: what rounding took from a row and from the centroids is measured, and bounds the
    error of a score. Points (L2) meet in float32, around an origin that the caller chose near them.
    """

    def __init__(self, centroids: np.ndarray, k: int, metric: str, device: str, max_bytes: int | None = None) -> None:
        self._k, self._device, self._cosine = k, device, metric == "cosine"
        max_bytes = memory_bytes(device) if max_bytes is None else max_bytes
        row_bytes = ENTRY_BYTES * len(centroids) + 16 * centroids.shape[1]
        self.block_rows = max(min(max_bytes // row_bytes, MAX_ENTRIES // len(centroids), _BLOCK_ROWS), 1)
        exact = on_device(centroids, device)
        self._centroids = exact.half() if self._cosine else exact
        lengths = vector_norm(exact, dim=1, dtype=torch.float64)
        self._squared, self._longest = lengths.square().float(), lengths.max().float()
        self._lost = vector_norm(exact - self._centroids.float(), dim=1).max()

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Float32 rows [n, D] to their candidates: cells int64, those of row i from bounds[i] to bounds[i + 1]."""
        exact = on_device(rows, self._device)
        # More than adding in any order can lose, by tensor cores that cut or others that round, and the last steps.
        adding = (exact.shape[1] + 8) * 2.0**-22
        norms = vector_norm(exact, dim=1)
        if self._cosine:
            half = exact.half()
            scores = half_products(half, self._centroids)
            lost = vector_norm(exact - half.float(), dim=1)
            error = 1.01 * (lost * self._longest + self._lost * norms) + adding * self._longest * norms
        else:
            scores = 2 * float_products(exact, self._centroids) - self._squared
            error = adding * (2 * norms + self._longest) * self._longest
        # The k best scores are too high by one error at most, another's is too low by as much.
        floor = scores.amax(dim=1) if self._k == 1 else scores.topk(self._k, dim=1).values[:, -1]
        row, cell = torch.nonzero(scores >= (floor - 2 * error)[:, None], as_tuple=True)
        bounds = torch.zeros(len(rows) + 1, dtype=torch.int64, device=row.device)
        bounds[1:] = torch.bincount(row, minlength=len(rows)).cumsum(0)
        return cell.cpu().numpy(), bounds.cpu().numpy()


def cell_sums(
    x: np.ndarray,
    cell: np.ndarray,
    score: np.ndarray,
    num_clusters: int,
    quantum: float,
    score_quantum: float,
    device: str,
    max_bytes: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [K, D] and [K]: rows [N, D] and scores [N], rounded to multiples of their quanta, added up by cell."""
    max_bytes = memory_bytes(device) if max_bytes is None else max_bytes
    sums = torch.zeros((num_clusters, x.shape[1]), dtype=torch.float64, device=device)
    scores = torch.zeros(num_clusters, dtype=torch.float64, device=device)
    step = max(max_bytes // (_SUM_BYTES * x.shape[1]), 1)
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        at = on_device(cell[rows], device, torch.int64)
        sums.index_add_(0, at, _rounded(on_device(x[rows], device, torch.float32), quantum))
        scores.index_add_(0, at, _rounded(on_device(score[rows], device, torch.float32), score_quantum))
    return sums.cpu().numpy(), scores.cpu().numpy()


def _rounded(x: torch.Tensor, quantum: float) -> torch.Tensor:
    to_grid = 1.5 * 2.0**52 * quantum  # adding this and taking it away rounds to a multiple of the quantum
    return (x.double() + to_grid) - to_grid
