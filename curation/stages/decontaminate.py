"""decontaminate: drop what copies an evaluation image, by the same cascade and the same join."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from configs.ranges import check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.cells import Cells
from curation.ops.hashes import hash_matches
from curation.ops.join import pairs_above
from curation.ops.recall import sketch_radius
from curation.stages.dedup import Duplicates
from curation.stages.heads import read_heads
from curation.stages.kmeans import unit_rows

VERSION = 1
_QUERIES_PER_TASK = 2048
_SKETCH_LOSS = 1e-4  # evaluation sets are small: all cells are probed, sketches may lose this share at the threshold
_EXACT_ROWS = 2**14
MODES = ("component", "direct")
_SCHEMA = pa.schema(
    [
        ("gid", pa.int64()),  # the pool image
        ("evaluation", pa.string()),
        ("evaluation_gid", pa.int64()),  # its row in the evaluation set
        ("similarity", pa.float32()),  # cosine of the copy encoder
        ("step", pa.string()),  # exact, perceptual, embedding; component: through another member of its component
        ("via", pa.int64()),  # the pool image that matched; gid itself unless step is component
    ]
)


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Source: DINOv2, arXiv:2304.07193, appendix A.3: relative deduplication at cosine 0.45, whole components."""

    perceptual_distance: int = 24
    """PDQ bits of 256, 0..31"""
    similarity_threshold: float = 0.45
    """cosine of the copy encoder at or above which a pool image copies an evaluation image"""
    mode: str = "component"
    """component: drop the whole near-duplicate component of a match; direct: the match and what looks the same"""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"decontaminate.mode={self.mode!r} is unknown; choose {' or '.join(MODES)}.")
        check_ranges("decontaminate", self, perceptual_distance="[0, 31]", similarity_threshold="(-1, 1]")


def decontaminate(
    folder: Folder,
    pool: ImageSet,
    evaluations: dict[str, ImageSet],
    dedup_folder: Folder,
    heads: Folder,
    ranges: Ranges,
    cells: Cells,
    encoder: str,
    mirror: np.ndarray | None,
    config: DecontaminateConfig,
    execution: ExecutionConfig,
) -> tuple[list[File], dict[str, int], dict[str, Any]]:
    """Write leaks.parquet (see _SCHEMA; one row an image, its strongest match) and representative.npy.

    Leaked images have representative -1. In direct mode, a group that lost its representative gets a new one, the
    member most similar to the old.
    """
    duplicates = Duplicates(dedup_folder)
    representative, component = duplicates.representative(), duplicates.component()
    matches = [_SCHEMA.empty_table()]
    for name, images in evaluations.items():
        matches += _matches(name, images, pool, component >= 0, cells, encoder, mirror, config, execution)
    direct = _strongest(pa.concat_tables(matches))
    if config.mode == "component":
        leaked = _with_components(direct, component)
    else:  # the join knows the heads; images that look the same share their head's fate
        looks = np.concatenate([read_heads(heads, number, ranges) for number in range(len(ranges))])
        leaked = _with_components(direct, looks)
    gids = leaked["gid"].to_numpy()
    representative[gids] = -1
    if config.mode == "direct":
        _reelect(representative, component, duplicates.similarity(), gids)
    files = [folder.write_table("leaks.parquet", leaked), folder.write_array("representative.npy", representative)]
    counts = {
        "images in": int((duplicates.representative() == np.arange(pool.num_images)).sum()),
        "images out": int((representative == np.arange(pool.num_images)).sum()),
        "leaks, direct": direct.num_rows,
        "leaks, whole components": _with_components(direct, component).num_rows,
    }
    for name in evaluations:
        counts[f"leaks of {name}"] = leaked["evaluation"].to_pylist().count(name)
    return files, counts, {}


def read_survivors(folder: Folder) -> np.ndarray:
    """bool [num_images]: kept representatives."""
    representative = folder.read_array("representative.npy")
    return representative == np.arange(len(representative))


def _matches(
    name: str,
    images: ImageSet,
    pool: ImageSet,
    passed: np.ndarray,
    cells: Cells,
    encoder: str,
    mirror: np.ndarray | None,
    config: DecontaminateConfig,
    execution: ExecutionConfig,
) -> list[pa.Table]:
    """Every match of one evaluation set, by each step of the cascade; an image may appear several times."""
    status = np.concatenate([images.index(p, ["status"])["status"].to_numpy() for p in range(images.num_parts)])
    good = np.flatnonzero(status == "ok").astype(np.int64)
    pool_gids = np.flatnonzero(passed).astype(np.int64)

    def table(gids: np.ndarray, rows: np.ndarray, similarity: np.ndarray, step: str) -> pa.Table:
        columns = [gids, [name] * len(gids), rows, similarity.astype(np.float32), [step] * len(gids), gids]
        return pa.table(dict(zip(_SCHEMA.names, columns, strict=True)), schema=_SCHEMA)

    hashed = np.concatenate([images.column("sha256"), pool.column("sha256")[pool_gids]])
    digests = np.ascontiguousarray(hashed).view("S32").ravel()
    wanted = {digest: row for row, digest in reversed(list(enumerate(digests[: images.num_images]))) if digest}
    exact = np.array([wanted.get(digest, -1) for digest in digests[images.num_images :]], np.int64)
    found = [table(pool_gids[exact >= 0], exact[exact >= 0], np.ones((exact >= 0).sum()), "exact")]

    query, row, distance = hash_matches(
        images.column("pdq")[good],
        images.column("pdq_quality")[good],
        pool.column("pdq")[pool_gids],
        pool.column("pdq_quality")[pool_gids],
        config.perceptual_distance,
        images.column("pdq_mirrored")[good],
    )
    found.append(table(pool_gids[row], good[query], 1 - distance / 256, "perceptual"))

    at_threshold = np.array([config.similarity_threshold])
    radius = None if cells.num_rows <= _EXACT_ROWS else sketch_radius(at_threshold, _SKETCH_LOSS)
    chunks = [good[i : i + _QUERIES_PER_TASK] for i in range(0, len(good), _QUERIES_PER_TASK)]
    for chunk, (query, gids, similarity) in zip(
        chunks,
        run_tasks(
            _matches_of,
            chunks,
            images,
            encoder,
            cells,
            config.similarity_threshold,
            radius,
            mirror,
            execution=execution,
            label=f"decontaminate {name}",
            unit="evaluation images",
            weights=[len(chunk) for chunk in chunks],
        ),
        strict=True,
    ):
        found.append(table(gids, chunk[query], similarity, "embedding"))
    return found


def _matches_of(
    chunk: np.ndarray,
    images: ImageSet,
    encoder: str,
    cells: Cells,
    threshold: float,
    radius: int | None,
    mirror: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = unit_rows(images.take_embeddings(encoder, chunk))
    found = pairs_above(rows, cells, threshold, cells.num_cells, radius, mirror=mirror, num_threads=1)
    return found.query, found.gid, found.similarity


def _strongest(matches: pa.Table) -> pa.Table:
    """One row a pool image: exact before perceptual before embedding, then the larger similarity."""
    gid, step = matches["gid"].to_numpy(), matches["step"].to_pylist()
    rank = np.array([("exact", "perceptual", "embedding").index(s) for s in step], np.int64)
    order = np.lexsort(
        (
            matches["evaluation_gid"].to_numpy(),
            np.array(matches["evaluation"].to_pylist(), str),
            -matches["similarity"].to_numpy().astype(np.float64),
            rank,
            gid,
        )
    )
    _, first = np.unique(gid[order], return_index=True)
    return matches.take(pa.array(order[first]))


def _with_components(direct: pa.Table, component: np.ndarray) -> pa.Table:
    """The direct matches, and every other member of their components, condemned by the strongest of them."""
    gids = direct["gid"].to_numpy()
    labels, first = np.unique(component[gids], return_index=True)
    members = np.flatnonzero(np.isin(component, labels) & (component >= 0))
    others = np.setdiff1d(members, gids)
    source = direct.take(pa.array(first[np.searchsorted(labels, component[others])]))
    columns = source.to_pydict() | {"gid": others, "step": ["component"] * len(others)}
    indirect = pa.table({name: columns[name] for name in _SCHEMA.names}, schema=_SCHEMA)
    result = pa.concat_tables([direct, indirect])
    return result.take(pa.array(np.argsort(result["gid"].to_numpy(), kind="stable")))


def _reelect(representative: np.ndarray, component: np.ndarray, similarity: np.ndarray, leaked: np.ndarray) -> None:
    """Give each group whose representative leaked the remaining member that was most similar to it, in place."""
    lost = np.isin(representative, leaked) & (representative >= 0)
    members = np.flatnonzero(lost)
    order = np.lexsort((members, -np.nan_to_num(similarity[members], nan=-2.0), component[members]))
    labels, first = np.unique(component[members][order], return_index=True)
    chosen = members[order][first]
    representative[members] = chosen[np.searchsorted(labels, component[members])]
