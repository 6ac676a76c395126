"""dedup: the cascade. Same bytes, near perceptual hashes, near embeddings; then components, one image kept of each."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.ranges import SEEDS, check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.randomness import hash_uint64
from curation.ops.recall import measured_recall
from curation.stages.choosing import GroupRules
from curation.stages.groups import STEPS, EdgeFiles, read_groups, write_groups
from curation.stages.join import Joined, JoinSettings, default_floor
from curation.stages.perceptual import PairsBefore, perceptual_pairs, second_opinion

VERSION = 2
_NEAR_MISS_SAMPLE = 4096
_NEAR_MISS_PAIRS = 200
_PERCEPTUAL = "edges/perceptual.parquet"


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Source: DINOv2, arXiv:2304.07193, appendix A.3: SSCD at cosine 0.6, components, one representative each."""

    perceptual_distance: int = 16
    """PDQ bits of 256 that two copies may differ in, 0..31; of the image or its mirror image"""
    perceptual_rows: int = 4_000_000
    """up to so many images (after those of equal hashes are one) all hashes are compared with all: minutes of a core;
    beyond, only of the pairs that the join has between `edge_floor` and the threshold"""
    similarity_threshold: float = 0.6
    """cosine of the copy encoder at or above which two images are linked"""
    target_recall: float = 0.99
    """of linked pairs, against brute force, to be certified with 95% confidence"""
    edge_floor: float | None = None
    """cosine down to which pairs are kept, so that a similarity_threshold at or above it needs no new join; null: 0.05
    below the threshold"""
    representative: list[str] = field(default_factory=lambda: ["resolution", "bytes", "central"])
    """which image of a component is kept: the largest by the first key, then the next; last, the smallest gid.
    resolution: width x height; bytes: of the file; central: similarity to the component's mean"""
    max_component_size: int = 16
    """larger components are re-split into stars, so that every member is a direct match of its representative; a
    star of true copies may be as large as it likes, a chain of look-alikes may not"""
    min_similarity_to_representative: float | None = None
    """so are components with a member less similar than this to its representative; null: no such limit"""
    seed: int = 0
    """of the sample that certifies recall"""

    def __post_init__(self) -> None:
        check_ranges(
            "dedup",
            self,
            perceptual_distance="[0, 31]",
            perceptual_rows="[0, inf)",
            similarity_threshold="(-1, 1]",
            target_recall="(0, 1)",
            edge_floor="[-1, 1]",
            max_component_size="[2, inf)",
            min_similarity_to_representative="[-1, 1]",
            seed=SEEDS,
        )
        if unknown := set(self.representative) - {"resolution", "bytes", "central"}:
            raise ValueError(
                f"dedup.representative: {', '.join(sorted(unknown))} unknown; choose from resolution, bytes, central."
            )

        if self.edge_floor is not None and self.edge_floor > self.similarity_threshold:
            raise ValueError(
                f"dedup.edge_floor={self.edge_floor} is above dedup.similarity_threshold={self.similarity_threshold}: "
                "linked pairs would be lost. Lower it, or leave it out."
            )

    @property
    def highest_floor(self) -> float:
        """Edges that reach down to there would do."""
        return self.similarity_threshold if self.edge_floor is None else self.edge_floor

    def join(self, floor: float | None = None) -> JoinSettings:
        """What of these settings the join depends on.

        Args:
            floor: of the edges that a run takes over from one that it extends.
        """
        if floor is None:
            floor = default_floor(self.similarity_threshold) if self.edge_floor is None else self.edge_floor
        return JoinSettings(floor=floor, target_recall=self.target_recall, seed=self.seed)


def deduplicate(
    folder: Folder,
    pool: ImageSet,
    filtered: Folder,
    heads: Folder,
    ranges: Ranges,
    joined: Joined,
    encoder: str,
    mirror: np.ndarray | None,
    config: DedupConfig,
    execution: ExecutionConfig,
    before: PairsBefore | None = None,
) -> tuple[list[File], dict[str, int], dict[str, Any]]:
    """Group the images that passed the filters and choose one of each group: see `groups.SCHEMA` for what is written.

    Args:
        filtered, heads: folders of those stages.
        joined: the edges of the heads.
        mirror: signs that turn a vector into that of the flipped image, or None.
        before: pairs of near hashes that need not be looked for (`pairs_before`).
    """
    perceptual: list[EdgeFiles] = []
    num_perceptual, threshold = 0, config.similarity_threshold
    joined_counts = joined.counts()
    num_images = joined_counts["images"]
    if num_images <= config.perceptual_rows:
        num_perceptual = perceptual_pairs(
            folder, _PERCEPTUAL, filtered, heads, ranges, pool, encoder, config.perceptual_distance, execution,
            before,
        )  # fmt: skip
        perceptual.append(EdgeFiles(folder, [_PERCEPTUAL], -2.0))
    names = [f"edges/{piece}" for piece in joined.pieces()]
    if num_images > config.perceptual_rows:
        near = second_opinion(
            folder, filtered, ranges, EdgeFiles(joined.folder, names, -2.0), threshold, joined_counts["edges"],
            config.perceptual_distance, execution,
        )  # fmt: skip
        num_perceptual = sum(folder.num_rows(name) for name in near)
        perceptual.append(EdgeFiles(folder, near, -2.0))
    edges = EdgeFiles(joined.folder, names, threshold)
    forest = EdgeFiles(joined.folder, [f"forest/{piece}" for piece in joined.pieces()], threshold)
    counted = run_tasks(_num_edges, edges.names, edges, execution=execution, label="dedup: count pairs", unit="files")
    num_embedding = sum(counted)
    truth, found = joined.truth(threshold)
    certificate = joined.certificate()
    recall, bound = measured_recall(found, truth) if len(found) else (1.0, certificate.lower_bound)
    if certificate.basis == "law":  # too few pairs to measure; the law of sketches holds for any vectors
        bound = certificate.lower_bound
    rules = GroupRules(
        tuple(config.representative),
        config.max_component_size,
        config.min_similarity_to_representative,
        config.perceptual_distance,
        threshold,
        None if mirror is None else tuple(mirror.tolist()),
    )
    split, together = write_groups(
        folder, filtered, heads, ranges, pool, encoder, [*perceptual, edges], [*perceptual, forest],
        (truth.query, truth.gid), num_perceptual + num_embedding, rules, execution,
    )  # fmt: skip
    told = run_tasks(
        _describe, range(len(ranges)), folder, filtered, ranges, execution=execution, label="dedup", unit="files"
    )
    files = [file for file, *_ in told]
    files.append(folder.write_table("split.parquet", split))
    files.append(_write_near_misses(folder, joined, config, execution))
    counts = {
        "images in": sum(row[1] for row in told),
        "images out": sum(row[2] for row in told),
        "exact copies": sum(row[3] for row in told),
        "images joined": num_images,
        "perceptual pairs": num_perceptual,
        "embedding pairs": num_embedding,
        "images with more pairs than are kept": joined_counts["capped images"],
        "components split": split.num_rows,
    }
    figures = {
        **asdict(certificate),
        "measured_recall": recall,
        "measured_lower_bound": bound,
        "measured_together": float(together.mean()) if len(together) else 1.0,  # of true pairs, in one component
        "similarity_threshold": config.similarity_threshold,
        **joined.covered(),
    }
    return files, counts, figures


def pairs_before(
    folder: Folder, settings: Mapping[str, Any], heads: Folder, ranges: Ranges, config: DedupConfig
) -> PairsBefore | None:
    """The pairs of near hashes of the run that is extended; None where it has others than those of this config.

    Args:
        folder, settings: of its dedup step.
        heads, ranges: of what it compared.
    """
    if settings["perceptual_distance"] != config.perceptual_distance or not folder.exists(_PERCEPTUAL):
        return None
    return PairsBefore(folder, _PERCEPTUAL, heads, ranges)


def _num_edges(name: str, edges: EdgeFiles) -> int:
    return sum(table.num_rows for table in edges.batches(name, []))


def _describe(number: int, folder: Folder, filtered: Folder, ranges: Ranges) -> tuple[File, int, int, int]:
    """A range's file; images in it, kept, and copies of the same bytes as their representative."""
    table = read_groups(folder, number, ["representative", "step"])
    start, stop = ranges.bounds(number)
    kept = pc.sum(pc.equal(table["representative"], pa.array(np.arange(start, stop)))).as_py() or 0
    exact = pc.sum(pc.equal(table["step"], STEPS.index("exact"))).as_py() or 0
    name = range_file("range", number)
    return folder.described(name, stop - start), stop - start - table["representative"].null_count, kept, exact


def _write_near_misses(folder: Folder, joined: Joined, config: DedupConfig, execution: ExecutionConfig) -> File:
    """near.parquet: sampled edges on both sides of the threshold, nearest to it first, so that people can judge it."""
    threshold = config.similarity_threshold
    samples = run_tasks(
        _edge_sample, joined.pieces(), joined, threshold, config.seed, execution=execution, label="dedup: near",
        unit="files",
    )  # fmt: skip
    chosen = []
    for side in zip(*samples, strict=True):
        table = _fewest(pa.concat_tables(side), config.seed)
        columns = [table[name].to_numpy() for name in ("a", "b", "similarity")]
        order = np.lexsort((columns[1], columns[0], np.abs(columns[2] - np.float32(threshold))))
        chosen.append(table.take(pa.array(order[:_NEAR_MISS_PAIRS])))
    return folder.write_table("near.parquet", pa.concat_tables(chosen))


def _edge_sample(piece: str, joined: Joined, threshold: float, seed: int) -> tuple[pa.Table, pa.Table]:
    """Edges of one piece at or above the threshold, and below: those of smallest hash."""
    edges = joined.edges(piece, -1.0)
    above = edges["similarity"].to_numpy() >= np.float32(threshold)
    return _fewest(edges.filter(pa.array(above)), seed), _fewest(edges.filter(pa.array(~above)), seed)


def _fewest(edges: pa.Table, seed: int) -> pa.Table:
    """The edges of smallest hash, each once."""
    a, b = edges["a"].to_numpy(), edges["b"].to_numpy()
    hashes = hash_uint64(seed, hash_uint64(seed, a) + b.astype(np.uint64))
    _, first = np.unique(hashes, return_index=True)
    return edges.take(pa.array(first[:_NEAR_MISS_SAMPLE]))
