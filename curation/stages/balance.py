"""balance: a sample of everything that survived, even over the hierarchy's concepts."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from configs.ranges import SEEDS, check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.workers import ExecutionConfig
from curation.ops.kmeans import balance
from curation.ops.sampling import draw_from_leaves, leaf_quotas
from curation.stages.asking import pieces
from curation.stages.cluster import Clustering
from curation.stages.draws import draw_by_cluster, sizes_of_survivors, to_ranges
from curation.stages.survivors import Survivors

VERSION = 2


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Source: Vo et al., arXiv:2405.15613; the first part of LVD-1689M in DINOv3, arXiv:2508.10104, sec. 3.1."""

    num_images: int = 0
    """images to draw; 0: no balanced branch"""
    fraction: float = 0.0
    """or: this share of the surviving images"""
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges("balance", self, num_images="[0, inf)", fraction="[0, 1]", seed=SEEDS)
        if self.num_images and self.fraction:
            raise ValueError("balance takes num_images or fraction, not both.")

    def is_wanted(self) -> bool:
        return bool(self.num_images or self.fraction)

    def target(self, num_survivors: int) -> int:
        return min(self.num_images or round(self.fraction * num_survivors), num_survivors)


def balance_survivors(
    folder: Folder, clustering: Clustering, survivors: Survivors, config: BalanceConfig, execution: ExecutionConfig
) -> tuple[list[File], dict[str, Any]]:
    """Draw from the survivors; write balanced-RRRRR.parquet, gid and cluster, one file a range of gids."""
    left = sum(survivors.counts())
    if not config.target(left):
        raise ValueError(
            f"balance.fraction={config.fraction} of the {left:,} images that are left is less than one image: "
            "raise it, or set balance.num_images."
        )
    sizes = sizes_of_survivors(survivors, clustering, execution)
    quotas = leaf_quotas(sizes, clustering.parents(), config.target(left), config.seed)
    drawing = partial(_drawn, config.seed)
    names = draw_by_cluster(folder, survivors, clustering, quotas, drawing, execution, "balance")
    to_ranges(folder, names, survivors, "balanced", execution, "balance")
    for name in names:
        folder.delete(name)
    figures = {"balance": {name: float(value) for name, value in balance(quotas)._asdict().items()}}
    return pieces(folder, "balanced-", execution, "balance"), figures


def _drawn(seed: int, gids: np.ndarray, cluster: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    return draw_from_leaves(cluster, quotas, seed, gids)
