"""CurationConfig: the stages' configs put together, as configs/curation/*.yaml and key=value change them."""

from dataclasses import dataclass, field
from typing import Any

from configs.ranges import check_ranges
from curation.engine.ranges import RANGE_ROWS
from curation.engine.workers import ExecutionConfig
from curation.reading.filters import build_filters
from curation.reading.seeds import RetrievalRule
from curation.stages.balance import BalanceConfig
from curation.stages.cells import CellsConfig
from curation.stages.cluster import ClusterConfig
from curation.stages.decontaminate import DecontaminateConfig
from curation.stages.dedup import DedupConfig
from curation.stages.embed import EmbedConfig
from curation.stages.shard import ShardConfig


def _default_filters() -> list[Any]:
    return [{"kind": "size"}, {"kind": "aspect"}, {"kind": "blank"}]


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Everything that decides what a run keeps; `execution` alone decides how it runs."""

    embed: EmbedConfig = field(default_factory=EmbedConfig)
    filters: list[Any] = field(default_factory=_default_filters)
    """in order; the first that rejects an image names the reason; kinds are in curation/reading/filters.py"""
    cells: CellsConfig = field(default_factory=CellsConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    retrieve: RetrievalRule = field(default_factory=RetrievalRule)
    """for seed sets given by path; those in configs/seeds/ bring their published rule"""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    range_rows: int = RANGE_ROWS
    """images whose state is kept in one file and worked on in one task; decisions.parquet is one file up to here"""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)

    def __post_init__(self) -> None:
        check_ranges("", self, range_rows="[1, inf)")
        build_filters(self.filters)
