"""dedup: the cascade. Same bytes, near perceptual hashes, near embeddings; then components, one image kept of each."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from configs.ranges import SEEDS, check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.cells import Cells
from curation.ops.components import Groups, component_labels, duplicate_groups, representatives
from curation.ops.hashes import MIN_QUALITY, equal_groups, hash_distances, hash_pairs
from curation.ops.join import Pairs, pairs_above, self_pairs
from curation.ops.randomness import hash_sample
from curation.ops.recall import TruePairs, certify, measured_recall
from curation.stages.kmeans import unit_rows

VERSION = 1
_ROWS_PER_TASK = 65_536
_NEAR_MISS_MARGIN = 0.1
_NEAR_MISS_PRODUCTS = 2e9  # query-row products spent on looking just below the threshold
_NEAR_MISS_PAIRS = 200
STEPS = ("", "exact", "perceptual", "embedding", "chain")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Source: DINOv2, arXiv:2304.07193, appendix A.3: SSCD at cosine 0.6, components, one representative each."""

    perceptual_distance: int = 16
    """PDQ bits of 256 that two copies may differ in, 0..31; of the image or its mirror image"""
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
    """What the dedup stage wrote, by gid, read back."""

    folder: Folder

    def representative(self) -> np.ndarray:
        """int64 [num_images]: the image kept for this one's group; itself where it is kept; -1 where filtered out."""
        return self.folder.read_array("representative.npy")

    def component(self) -> np.ndarray:
        """int64 [num_images]: smallest gid of the group; -1 where filtered out."""
        return self.folder.read_array("component.npy")

    def similarity(self) -> np.ndarray:
        """float32 [num_images]: cosine to the representative; NaN where they are linked through others only."""
        return self.folder.read_array("similarity.npy")

    def step(self) -> np.ndarray:
        """uint8 [num_images]: index into STEPS, the step of the cascade that made it a copy of its representative."""
        return self.folder.read_array("step.npy")


def deduplicate(
    folder: Folder,
    pool: ImageSet,
    passed: np.ndarray,
    cells: Cells,
    encoder: str,
    mirror: np.ndarray | None,
    config: DedupConfig,
    execution: ExecutionConfig,
    standing: np.ndarray | None = None,
) -> tuple[list[File], dict[str, int], dict[str, Any]]:
    """Group the images `passed` (int64, ascending) and choose one of each group; see Duplicates for what is written.

    Args:
        cells: the copy encoder's vectors of the heads among them.
        mirror: signs that turn a vector into that of the flipped image, or None.
        standing: uint8 [num_images], what images were in an earlier release (Run.standing). Where they can be, those
            that it kept or that stood for their group stand for it again; one that it kept always stands for itself.
    """
    head = heads(pool, passed, standing)
    distinct = passed[head == passed]
    perceptual = _perceptual_pairs(folder, pool, distinct, encoder, config)
    certificate, truth = certify(
        cells, config.similarity_threshold, config.target_recall, seed=config.seed, mirror=mirror
    )
    names = _join(folder, cells, mirror, certificate.nprobe, certificate.sketch_radius, config, execution)
    edges = _Edges(folder, names, perceptual, distinct)

    keys = _priorities(pool, distinct, encoder, edges, config)
    if standing is not None:
        keys.insert(0, standing[distinct].astype(np.int64))
    groups = duplicate_groups(
        len(distinct),
        edges,
        keys,
        max_component_size=config.max_component_size,
        min_similarity=config.min_similarity_to_representative,
    )
    files = _write_groups(folder, pool, passed, head, distinct, groups, config, standing)
    files.append(_write_near_misses(folder, pool, cells, encoder, distinct, mirror, config))
    recall, bound = (
        measured_recall(_pairs_of(folder, names, truth), truth) if len(truth.gid) else (1.0, certificate.lower_bound)
    )
    if certificate.basis == "law":  # too few pairs to measure; the law of sketches holds for any vectors
        bound = certificate.lower_bound
    representative = Duplicates(folder).representative()
    counts = {
        "images in": len(passed),
        "images out": int((representative[passed] == passed).sum()),
        "exact copies": int((equal_groups(pool.column("sha256")[passed]) != np.arange(len(passed))).sum()),
        "images joined": len(distinct),
        "perceptual pairs": perceptual.num_rows,
        "embedding pairs": sum(folder.read_table(name, ["a"]).num_rows for name in names),
        "components split": len(groups.split.label),
    }
    figures = {
        **asdict(certificate),
        "measured_recall": recall,
        "measured_lower_bound": bound,
        "similarity_threshold": config.similarity_threshold,
    }
    return files, counts, figures


def heads(pool: ImageSet, passed: np.ndarray, standing: np.ndarray | None = None) -> np.ndarray:
    """For each image of `passed` (int64, ascending), the gid of the one that stands for all with the same looks.

    The same looks: equal perceptual hashes of the image and of its mirror image; where the hash says little, equal
    bytes. Only heads enter the join: a placeholder that 300,000 pages show in as many encodings would make 10^11 pairs.
    The head is the one of best standing (Run.standing), then the largest of them in pixels, then in bytes, then the one
    of smallest gid.
    """
    looks = np.concatenate([pool.column("pdq"), pool.column("pdq_mirrored")], axis=1)[passed]
    vague = pool.column("pdq_quality")[passed] < MIN_QUALITY
    looks[vague] = np.pad(pool.column("sha256")[passed][vague], ((0, 0), (0, looks.shape[1] - 32)))
    pixels = pool.column("width").astype(np.int64) * pool.column("height")
    keys = [pixels[passed], image_bytes(pool)[passed]]
    if standing is not None:
        keys.insert(0, standing[passed].astype(np.int64))
    return passed[representatives(equal_groups(looks), keys)]


@dataclass
class _Edges:
    """Batches of (a, b, similarity) over positions in `distinct`, read anew from the files for each pass."""

    folder: Folder
    names: list[str]
    perceptual: pa.Table
    distinct: np.ndarray

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for table in [self.perceptual, *(self.folder.read_table(name) for name in self.names)]:
            ends = (np.searchsorted(self.distinct, table[end].to_numpy()) for end in ("a", "b"))
            yield (*ends, table["similarity"].to_numpy())


def _perceptual_pairs(
    folder: Folder, pool: ImageSet, distinct: np.ndarray, encoder: str, config: DedupConfig
) -> pa.Table:
    """Pairs of near PDQ hashes, with the exact cosine of their embeddings for the record."""
    a, b, distance = hash_pairs(
        pool.column("pdq")[distinct],
        pool.column("pdq_quality")[distinct],
        config.perceptual_distance,
        pool.column("pdq_mirrored")[distinct],
    )
    ends = np.unique(np.concatenate([a, b]))
    similarity = np.zeros(len(a), np.float32)
    if len(ends):
        rows = unit_rows(pool.take_embeddings(encoder, distinct[ends]))
        for start in range(0, len(a), 1 << 16):
            block = slice(start, start + (1 << 16))
            left, right = (rows[np.searchsorted(ends, end[block])] for end in (a, b))
            similarity[block] = np.einsum("nd,nd->n", left, right)
    table = pa.table({"a": distinct[a], "b": distinct[b], "similarity": similarity, "distance": distance})
    folder.write_table("edges/perceptual.parquet", table)
    return table


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


def _priorities(
    pool: ImageSet, distinct: np.ndarray, encoder: str, edges: _Edges, config: DedupConfig
) -> list[np.ndarray]:
    keys = []
    for name in config.representative:
        if name == "resolution":
            keys.append((pool.column("width").astype(np.int64) * pool.column("height"))[distinct])
        elif name == "bytes":
            keys.append(image_bytes(pool)[distinct])
        else:
            keys.append(_centrality(pool, distinct, encoder, component_labels(len(distinct), edges)))
    return keys


def image_bytes(pool: ImageSet) -> np.ndarray:
    """int64 [num_images]: bytes of each image's file; 0 where there is none."""
    sizes = [pool.index(part, ["image"])["image"].combine_chunks().field("size") for part in range(pool.num_parts)]
    return np.concatenate([s.fill_null(0).to_numpy(zero_copy_only=False) for s in sizes]).astype(np.int64)


def _centrality(pool: ImageSet, distinct: np.ndarray, encoder: str, labels: np.ndarray) -> np.ndarray:
    """float32 [distinct]: cosine to the mean of the image's component, NaN for images that are alone."""
    result = np.full(len(labels), np.nan, np.float32)
    members = np.flatnonzero(np.bincount(labels, minlength=len(labels))[labels] > 1)
    if not len(members):
        return result
    rows = unit_rows(pool.take_embeddings(encoder, distinct[members]))
    order = np.argsort(labels[members], kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(labels[members][order]) > 0])
    sums = np.add.reduceat(rows[order].astype(np.float64), starts, axis=0)
    mean = np.repeat(sums, np.diff(np.r_[starts, len(order)]), axis=0)
    cosine = np.einsum("nd,nd->n", rows[order], mean) / np.maximum(np.linalg.norm(mean, axis=1), 1e-12)
    result[members[order]] = cosine
    return result


def _write_groups(
    folder: Folder,
    pool: ImageSet,
    passed: np.ndarray,
    head: np.ndarray,
    distinct: np.ndarray,
    groups: Groups,
    config: DedupConfig,
    standing: np.ndarray | None,
) -> list[File]:
    """Groups over heads -> arrays over gids; images that look the same share their head's fate and similarity."""
    at = np.searchsorted(distinct, head)
    representative = np.full(pool.num_images, -1, np.int64)
    component = np.full(pool.num_images, -1, np.int64)
    similarity = np.full(pool.num_images, np.nan, np.float32)
    step = np.zeros(pool.num_images, np.uint8)
    representative[passed] = distinct[groups.representatives[at]]
    if standing is not None:
        kept = passed[standing[passed] == 2]
        representative[kept] = kept
    _, smallest, of_label = np.unique(groups.labels[at], return_index=True, return_inverse=True)
    component[passed] = passed[smallest[of_label]]
    similarity[passed] = groups.similarity[at]
    own = representative[passed]
    hashes, mirrored = pool.column("pdq"), pool.column("pdq_mirrored")
    digests = pool.column("sha256")
    is_exact = (digests[passed] == digests[own]).all(axis=1)
    distance = np.minimum(hash_distances(hashes[passed], hashes[own]), hash_distances(hashes[passed], mirrored[own]))
    is_near = distance <= config.perceptual_distance
    step[passed] = np.select(
        [own == passed, is_exact, is_near, ~np.isnan(similarity[passed])],
        [STEPS.index(name) for name in ("", "exact", "perceptual", "embedding")],
        STEPS.index("chain"),
    )
    arrays = {"representative": representative, "component": component, "similarity": similarity, "step": step}
    files = [folder.write_array(f"{name}.npy", values) for name, values in arrays.items()]
    split = groups.split
    table = pa.table(
        {"component": component[distinct[split.label]], "size": split.size, "num_groups": split.num_groups}
    )
    return [*files, folder.write_table("split.parquet", table)]


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
