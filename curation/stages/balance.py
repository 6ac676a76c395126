"""balance: a sample of everything that survived, even over the hierarchy's concepts."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from configs.ranges import SEEDS, check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.ops.kmeans import balance
from curation.ops.sampling import hierarchical_sample
from curation.stages.cluster import Clustering

VERSION = 1


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
    folder: Folder, clustering: Clustering, gids: np.ndarray, config: BalanceConfig
) -> tuple[list[File], dict[str, Any]]:
    """Draw from the surviving images `gids` (int64, ascending); write balanced.parquet: gid, cluster."""
    if not config.target(len(gids)):
        raise ValueError(
            f"balance.fraction={config.fraction} of the {len(gids):,} images that are left is less than one image: "
            "raise it, or set balance.num_images."
        )
    levels = clustering.levels()
    drawn = np.sort(hierarchical_sample(levels, config.target(len(gids)), config.seed, ids=gids))
    cluster = clustering.assignment()[drawn]
    figures = {
        "balance": {
            name: float(value)
            for name, value in balance(np.bincount(cluster, minlength=len(levels[0].centroids)))._asdict().items()
        }
    }
    table = pa.table({"gid": drawn, "cluster": cluster.astype(np.int64)})
    return [folder.write_table("balanced.parquet", table)], figures
