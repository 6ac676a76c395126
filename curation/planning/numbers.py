"""What the plan of a run starts from: its sets, its encoders, its cluster, and what a line of it holds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from curation.encoders.encoder import View
from curation.encoders.load import encoder_view
from curation.planning import costs
from curation.planning.costs import EncoderCost, Work
from curation.planning.estimates import SetEstimate, estimate_set
from curation.planning.machines import Cluster, this_machine
from curation.reading.seeds import RetrievalRule
from curation.stages.cluster import LevelShape
from curation.state import Run


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One line of the plan: what a step does, what it leaves, what that takes."""

    name: str
    what: str
    files: str
    bytes: float
    """of the files that it leaves"""
    work: Work
    """of all tasks"""
    images: int = 0
    tasks: float = 1
    """that can run side by side"""
    driver_s: float = 0.0
    """for which all wait"""
    read: float = 0.0
    moved: float = 0.0
    """written beside the files, and deleted: exchanges"""
    requests: float = 0.0
    """to an object store, were all files there"""
    driver_bytes: float = 0.0
    """beside its process"""
    task_bytes: float = 0.0
    """beside its process"""

    @property
    def written(self) -> float:
        return self.bytes + self.moved

    def seconds(self, cluster: Cluster) -> float:
        return cluster.seconds(self.work, self.tasks, self.driver_s, self.read + self.written, self.requests)


class PlanNumbers:
    """The numbers behind the plan of one run.

    Args:
        cluster: what it would run on; this machine where absent.
        described: sets that need not exist, by the step that would read them, as `embed/pool`.
    """

    def __init__(
        self, run: Run, cluster: Cluster | None = None, described: Mapping[str, SetEstimate] | None = None
    ) -> None:
        self.run, self.config = run, run.config
        limit, described = run.config.embed.max_file_bytes, described or {}
        self.estimates = {
            step: described[step] if step in described else estimate_set(listing, limit)
            for step, listing in run.inputs.listings().items()
        }
        self.pool = self.estimates["embed/pool"]
        self.seeds = {name: self.estimates[f"embed/seed-{name}"] for name in run.inputs.seeds}
        self.evaluations = {name: self.estimates[f"embed/evaluation-{name}"] for name in run.inputs.evaluations}
        specs = run.config.embed.encoders()
        self.views: dict[str, View] = {spec: encoder_view(spec, run.config.embed.image_px) for spec in specs}
        self.cluster = cluster or this_machine(run.config.execution)
        if run.config.execution.device == "cpu":
            self.cluster = replace(self.cluster, gpus=0)
        self.memory = run.config.execution.memory_gb * 1e9

    @cached_property
    def encoder_costs(self) -> dict[str, EncoderCost]:
        return {spec: costs.encoder_cost(spec, view) for spec, view in self.views.items()}

    @cached_property
    def levels(self) -> list[LevelShape]:
        """The levels, finest first, as the cluster stage will make them."""
        return self.config.cluster.shapes_for(self.pool.images)

    @property
    def num_kept(self) -> int:
        """Images of the pool that are kept, at most."""
        rules = ((seed.rule, self.seeds[name].images) for name, (seed, _) in self.run.inputs.seeds.items())
        drawn = sum(most_drawn(rule, images) for rule, images in rules)
        return min(self.pool.images, drawn + self.config.balance.target(self.pool.images))

    @property
    def num_ranges(self) -> int:
        return -(-self.pool.images // self.config.range_rows)

    @property
    def _copies(self) -> EncoderCost:
        return self.encoder_costs[self.config.embed.encoders()[-1]]

    @property
    def _looks(self) -> EncoderCost:
        return self.encoder_costs[self.config.embed.encoders()[0]]

    @property
    def _retrieval_cells(self) -> int:
        """What seed images look into: the finest clusters, or the groups that those are made in."""
        finest = self.levels[0]
        return finest.num_clusters if finest.num_groups == 1 else finest.num_groups

    @property
    def _range_bytes(self) -> float:
        """What a task holds that works on a range, or on a bucket of an exchange."""
        rows = min(self.pool.images, self.config.range_rows) * costs.RANGE_BYTES
        return max(rows, costs.BUCKET_COPIES * min(self.memory / 8, self.pool.images * 2 * costs.RANGE_BYTES))

    def _grouping_bytes(self, dim: int) -> float:
        """Vectors of a part, as stored and as float32; of a table of the exchange, which is sorted by bucket."""
        table = min(self.memory / 8, 2.0**29, self.pool.images * 2.0 * dim)
        return max(self.pool.images / max(self.pool.num_parts, 1) * 6.0 * dim, 3 * table)

    @staticmethod
    def _tables(count: int) -> str:
        return f"{count:,} {'table' if count == 1 else 'tables'}"


def most_drawn(rule: RetrievalRule, num_seeds: int) -> int:
    """Images of the pool that a seed set draws, at most."""
    return {"sample": rule.k * num_seeds, "cluster": rule.max_images, "none": 0}[rule.mode]
