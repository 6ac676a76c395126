"""dedup: the cascade. Same bytes, near perceptual hashes, near embeddings; then components, one image kept of each."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from configs.ranges import SEEDS, check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.components import Groups, Similar, component_labels, duplicate_groups, representatives
from curation.ops.hashes import MIN_QUALITY, equal_groups, hash_distances, hash_pairs
from curation.ops.randomness import hash_uint64
from curation.ops.recall import measured_recall
from curation.stages.join import Joined, JoinSettings, default_floor
from curation.stages.kmeans import unit_rows

VERSION = 2
_NEAR_MISS_SAMPLE = 4096
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

    def join(self) -> JoinSettings:
        """What of these settings the join depends on."""
        floor = default_floor(self.similarity_threshold) if self.edge_floor is None else self.edge_floor
        return JoinSettings(floor=floor, target_recall=self.target_recall, seed=self.seed)


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
    joined: Joined,
    encoder: str,
    mirror: np.ndarray | None,
    config: DedupConfig,
    execution: ExecutionConfig,
) -> tuple[list[File], dict[str, int], dict[str, Any]]:
    """Group the images `passed` (int64, ascending) and choose one of each group; see Duplicates for what is written.

    Args:
        joined: the edges of the heads among them.
        mirror: signs that turn a vector into that of the flipped image, or None.
    """
    head = heads(pool, passed)
    distinct = passed[head == passed]
    perceptual = _perceptual_pairs(folder, pool, distinct, encoder, config)
    edges = _Edges(joined, "edges", config.similarity_threshold, perceptual, distinct)
    links = _Edges(joined, "forest", config.similarity_threshold, perceptual, distinct)
    labels = component_labels(len(distinct), links)
    truth, found = joined.truth(config.similarity_threshold)
    certificate = joined.certificate()
    recall, bound = measured_recall(found, truth) if len(found) else (1.0, certificate.lower_bound)
    if certificate.basis == "law":  # too few pairs to measure; the law of sketches holds for any vectors
        bound = certificate.lower_bound
    ends = (np.searchsorted(distinct, end) for end in (truth.query, truth.gid))
    together = np.equal(*(labels[end] for end in ends))

    keys = _priorities(pool, distinct, encoder, labels, config)
    capped = joined.capped()
    groups = duplicate_groups(
        len(distinct),
        edges,
        keys,
        max_component_size=config.max_component_size,
        min_similarity=config.min_similarity_to_representative,
        labels=labels,
        capped=np.isin(distinct, capped),
        similar=_similar(pool, distinct, capped, encoder, mirror, config.similarity_threshold),
    )
    files = _write_groups(folder, pool, passed, head, distinct, groups, config)
    files.append(_write_near_misses(folder, joined, config, execution))
    representative = Duplicates(folder).representative()
    counts = {
        "images in": len(passed),
        "images out": int((representative[passed] == passed).sum()),
        "exact copies": int((equal_groups(pool.column("sha256")[passed]) != np.arange(len(passed))).sum()),
        "images joined": len(distinct),
        "perceptual pairs": perceptual.num_rows,
        "embedding pairs": sum(joined.edges(piece, config.similarity_threshold).num_rows for piece in joined.pieces()),
        "images with more pairs than are kept": len(capped),
        "components split": len(groups.split.label),
    }
    figures = {
        **asdict(certificate),
        "measured_recall": recall,
        "measured_lower_bound": bound,
        "measured_together": float(together.mean()) if len(together) else 1.0,  # of true pairs, in one component
        "similarity_threshold": config.similarity_threshold,
    }
    return files, counts, figures


def heads(pool: ImageSet, passed: np.ndarray) -> np.ndarray:
    """For each image of `passed` (int64, ascending), the gid of the one that stands for all with the same looks.

    The same looks: equal perceptual hashes of the image and of its mirror image; where the hash says little, equal
    bytes. Only heads enter the join: a placeholder that 300,000 pages show in as many encodings would make 10^11 pairs.
    The head is the largest of them in pixels, then in bytes, then the one of smallest gid.
    """
    looks = np.concatenate([pool.column("pdq"), pool.column("pdq_mirrored")], axis=1)[passed]
    vague = pool.column("pdq_quality")[passed] < MIN_QUALITY
    looks[vague] = np.pad(pool.column("sha256")[passed][vague], ((0, 0), (0, looks.shape[1] - 32)))
    pixels = pool.column("width").astype(np.int64) * pool.column("height")
    return passed[representatives(equal_groups(looks), [pixels[passed], image_bytes(pool)[passed]])]


@dataclass
class _Edges:
    """Batches of (a, b, similarity) over positions in `distinct`, read anew from the files for each pass."""

    joined: Joined
    kind: Literal["edges", "forest"]
    threshold: float
    perceptual: pa.Table
    distinct: np.ndarray

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        read = self.joined.edges if self.kind == "edges" else self.joined.forest
        for table in chain([self.perceptual], (read(piece, self.threshold) for piece in self.joined.pieces())):
            ends = (np.searchsorted(self.distinct, table[end].to_numpy()) for end in ("a", "b"))
            yield (*ends, table["similarity"].to_numpy())


def _similar(
    pool: ImageSet, distinct: np.ndarray, capped: np.ndarray, encoder: str, mirror: np.ndarray | None, threshold: float
) -> Similar:
    """Cosines as the join computes them, of capped images (gids, ascending) to one; -inf below the threshold."""
    vectors = pool.take_embeddings(encoder, capped) if len(capped) else np.empty((0, 0), np.float16)

    def similar(row: int, others: np.ndarray) -> np.ndarray:
        rows = np.searchsorted(capped, distinct[np.append(others, row)])
        own = vectors[rows[-1]].astype(np.float64)
        ways = np.stack([own] if mirror is None else [own, own * mirror])
        cosine = np.empty(len(others), np.float32)
        for start in range(0, len(others), 1 << 14):  # sums in float64 are exact, whatever the order
            block = slice(start, start + (1 << 14))
            cosine[block] = (vectors[rows[:-1][block]].astype(np.float64) @ ways.T).max(axis=1)
        return np.where(cosine >= np.float32(threshold), cosine, np.float32(-np.inf))

    return similar


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


def _priorities(
    pool: ImageSet, distinct: np.ndarray, encoder: str, labels: np.ndarray, config: DedupConfig
) -> list[np.ndarray]:
    keys = []
    for name in config.representative:
        if name == "resolution":
            keys.append((pool.column("width").astype(np.int64) * pool.column("height"))[distinct])
        elif name == "bytes":
            keys.append(image_bytes(pool)[distinct])
        else:
            keys.append(_centrality(pool, distinct, encoder, labels))
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
) -> list[File]:
    """Groups over heads -> arrays over gids; images that look the same share their head's fate and similarity."""
    at = np.searchsorted(distinct, head)
    representative = np.full(pool.num_images, -1, np.int64)
    component = np.full(pool.num_images, -1, np.int64)
    similarity = np.full(pool.num_images, np.nan, np.float32)
    step = np.zeros(pool.num_images, np.uint8)
    representative[passed] = distinct[groups.representatives[at]]
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
