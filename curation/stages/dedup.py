"""dedup: the cascade. Same bytes, near perceptual hashes, near embeddings; then components, one image kept of each."""

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
from curation.ops.cells import Cells
from curation.ops.join import Pairs, pairs_above, self_pairs
from curation.ops.randomness import hash_sample
from curation.ops.recall import TruePairs, certify, measured_recall
from curation.stages.groups import STEPS, EdgeFiles, GroupRules, read_groups, write_groups
from curation.stages.members import unit_rows
from curation.stages.perceptual import perceptual_pairs

VERSION = 2
_ROWS_PER_TASK = 65_536
_NEAR_MISS_MARGIN = 0.1
_NEAR_MISS_PRODUCTS = 2e9  # query-row products spent on looking just below the threshold
_NEAR_MISS_PAIRS = 200
_PERCEPTUAL = "edges/perceptual.parquet"


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Source: DINOv2, arXiv:2304.07193, appendix A.3: SSCD at cosine 0.6, components, one representative each."""

    perceptual_distance: int = 16
    """PDQ bits of 256 that two copies may differ in, 0..31; of the image or its mirror image"""
    perceptual_rows: int = 4_000_000
    """up to so many images (after those of equal hashes are one) all hashes are compared with all: minutes of a core"""
    similarity_threshold: float = 0.6
    """cosine of the copy encoder at or above which two images are linked"""
    target_recall: float = 0.99
    """of linked pairs, against brute force, to be certified with 95% confidence"""
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
            max_component_size="[2, inf)",
            min_similarity_to_representative="[-1, 1]",
            seed=SEEDS,
        )
        if unknown := set(self.representative) - {"resolution", "bytes", "central"}:
            raise ValueError(
                f"dedup.representative: {', '.join(sorted(unknown))} unknown; choose from resolution, bytes, central."
            )


@dataclass(frozen=True)
class Duplicates:
    """What the dedup stage wrote, read back whole: only where the pool is small. `read_groups` reads one range."""

    folder: Folder

    def _column(self, name: str, missing: int | float) -> np.ndarray:
        names = [file for file in self.folder.names() if file.startswith("range-")]
        tables = [self.folder.read_table(file, [name]) for file in names]
        return pa.concat_tables(tables)[name].fill_null(missing).to_numpy().copy()

    def representative(self) -> np.ndarray:
        """int64 [num_images]: the image kept for this one's group; itself where it is kept; -1 where filtered out."""
        return self._column("representative", -1)

    def component(self) -> np.ndarray:
        """int64 [num_images]: smallest gid of the group; -1 where filtered out."""
        return self._column("component", -1)

    def similarity(self) -> np.ndarray:
        """float32 [num_images]: cosine to the representative; NaN where they are linked through others only."""
        return self._column("similarity", np.nan)

    def step(self) -> np.ndarray:
        """uint8 [num_images]: index into STEPS, the step of the cascade that made it a copy of its representative."""
        return self._column("step", 0)


def deduplicate(
    folder: Folder,
    pool: ImageSet,
    filtered: Folder,
    heads: Folder,
    ranges: Ranges,
    cells: Cells,
    encoder: str,
    mirror: np.ndarray | None,
    config: DedupConfig,
    execution: ExecutionConfig,
) -> tuple[list[File], dict[str, int], dict[str, Any]]:
    """Group the images that passed the filters and choose one of each group: see `groups.SCHEMA` for what is written.

    Args:
        filtered, heads: folders of those stages.
        cells: the copy encoder's vectors of the heads.
        mirror: signs that turn a vector into that of the flipped image, or None.
    """
    links: list[EdgeFiles] = []
    num_perceptual = 0
    if cells.num_rows <= config.perceptual_rows:
        num_perceptual = perceptual_pairs(
            folder, _PERCEPTUAL, filtered, heads, ranges, pool, encoder, config.perceptual_distance, execution
        )
        links.append(EdgeFiles(folder, [_PERCEPTUAL], -2.0))
    certificate, truth = certify(
        cells, config.similarity_threshold, config.target_recall, seed=config.seed, mirror=mirror
    )
    names = _join(folder, cells, mirror, certificate.nprobe, certificate.sketch_radius, config, execution)
    links.append(EdgeFiles(folder, names, config.similarity_threshold))
    num_embedding = sum(folder.num_rows(name) for name in names)
    rules = GroupRules(
        tuple(config.representative),
        config.max_component_size,
        config.min_similarity_to_representative,
        config.perceptual_distance,
    )
    split = write_groups(
        folder, filtered, heads, ranges, pool, encoder, links, num_perceptual + num_embedding, rules, execution
    )
    told = run_tasks(
        _describe, range(len(ranges)), folder, filtered, ranges, execution=execution, label="dedup", unit="files"
    )
    files = [file for file, *_ in told]
    files.append(folder.write_table("split.parquet", split))
    distinct = cells.read_gids(0, cells.num_rows)
    files.append(_write_near_misses(folder, pool, cells, encoder, np.sort(distinct), mirror, config))
    recall, bound = (
        measured_recall(_pairs_of(folder, names, truth), truth) if len(truth.gid) else (1.0, certificate.lower_bound)
    )
    if certificate.basis == "law":  # too few pairs to measure; the law of sketches holds for any vectors
        bound = certificate.lower_bound
    counts = {
        "images in": sum(row[1] for row in told),
        "images out": sum(row[2] for row in told),
        "exact copies": sum(row[3] for row in told),
        "images joined": cells.num_rows,
        "perceptual pairs": num_perceptual,
        "embedding pairs": num_embedding,
        "components split": split.num_rows,
    }
    figures = {
        **asdict(certificate),
        "measured_recall": recall,
        "measured_lower_bound": bound,
        "similarity_threshold": config.similarity_threshold,
    }
    return files, counts, figures


def _describe(number: int, folder: Folder, filtered: Folder, ranges: Ranges) -> tuple[File, int, int, int]:
    """A range's file; images in it, kept, and copies of the same bytes as their representative."""
    table = read_groups(folder, number, ["representative", "step"])
    start, stop = ranges.bounds(number)
    kept = pc.sum(pc.equal(table["representative"], pa.array(np.arange(start, stop)))).as_py() or 0
    exact = pc.sum(pc.equal(table["step"], STEPS.index("exact"))).as_py() or 0
    name = range_file("range", number)
    return folder.described(name, stop - start), stop - start - table["representative"].null_count, kept, exact


def _join(
    folder: Folder,
    cells: Cells,
    mirror: np.ndarray | None,
    nprobe: int,
    sketch_radius: int | None,
    config: DedupConfig,
    execution: ExecutionConfig,
) -> list[str]:
    starts = range(0, cells.num_rows, _ROWS_PER_TASK)
    names = [f"edges/embedding-{number:06d}.parquet" for number in range(len(starts))]
    done = set(folder.names())
    todo = [
        (name, start, min(start + _ROWS_PER_TASK, cells.num_rows))
        for name, start in zip(names, starts, strict=True)
        if name not in done
    ]
    run_tasks(
        _join_range,
        todo,
        folder,
        cells,
        mirror,
        config.similarity_threshold,
        nprobe,
        sketch_radius,
        int(execution.memory_gb * 0.5e9),
        execution=execution,
        label="dedup: join",
        unit="images",
        weights=[stop - start for _, start, stop in todo],
    )
    return names


def _join_range(
    job: tuple[str, int, int],
    folder: Folder,
    cells: Cells,
    mirror: np.ndarray | None,
    threshold: float,
    nprobe: int,
    sketch_radius: int | None,
    memory_bytes: int,
) -> None:
    name, start, stop = job
    pairs = self_pairs(
        cells,
        start,
        stop,
        threshold,
        nprobe,
        sketch_radius,
        mirror=mirror,
        max_memory_bytes=memory_bytes,
        num_threads=1,
    )
    folder.write_table(name, pa.table(pairs._asdict()))


def _pairs_of(folder: Folder, names: list[str], truth: TruePairs) -> Pairs:
    """The pairs found whose smaller end belongs to a sampled pair, sorted: what recall is measured on."""
    wanted = np.unique(np.minimum(truth.query, truth.gid))
    found = []
    for name in names:
        table = folder.read_table(name)
        found.append(table.filter(pa.array(np.isin(table["a"].to_numpy(), wanted))))
    table = pa.concat_tables(found)
    columns = [table[name].to_numpy() for name in ("a", "b", "similarity", "mirrored")]
    order = np.lexsort((columns[1], columns[0]))
    return Pairs(*(column[order] for column in columns))


def _write_near_misses(
    folder: Folder,
    pool: ImageSet,
    cells: Cells,
    encoder: str,
    distinct: np.ndarray,
    mirror: np.ndarray | None,
    config: DedupConfig,
) -> File:
    """near.parquet: sampled pairs on both sides of the threshold, nearest to it first, so that people can judge it."""
    sample = hash_sample(config.seed, distinct, int(min(1024, max(1, _NEAR_MISS_PRODUCTS / max(len(distinct), 1)))))
    found = pairs_above(
        unit_rows(pool.take_embeddings(encoder, sample)),
        cells,
        config.similarity_threshold - _NEAR_MISS_MARGIN,
        cells.num_cells,
        mirror=mirror,
    )
    a, b = sample[found.query], found.gid
    low, high = np.minimum(a, b), np.maximum(a, b)
    gap = np.abs(found.similarity - config.similarity_threshold)
    order = np.lexsort((high, low, gap))
    order = order[(a != b)[order]]
    _, unique = np.unique(np.stack([low, high])[:, order], axis=1, return_index=True)
    order = order[np.sort(unique)]
    above = found.similarity[order] >= config.similarity_threshold
    chosen = np.concatenate([order[above][:_NEAR_MISS_PAIRS], order[~above][:_NEAR_MISS_PAIRS]])
    table = pa.table(
        {
            "a": low[chosen],
            "b": high[chosen],
            "similarity": found.similarity[chosen],
            "mirrored": found.mirrored[chosen],
        }
    )
    return folder.write_table("near.parquet", table)
