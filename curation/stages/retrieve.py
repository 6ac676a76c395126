"""retrieve: what of the surviving pool resembles a seed set, image by image or cluster by cluster."""

from typing import Any

import numpy as np
import pyarrow as pa

from curation.engine.devices import run_on, task_device
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import Cells
from curation.ops.join import nearest
from curation.ops.kmeans import assign
from curation.ops.retrieval import num_probes, resolve_collisions
from curation.ops.sampling import sample_per_cluster
from curation.reading.seeds import RetrievalRule
from curation.stages.kmeans import unit_rows

VERSION = 2
_SCHEMA = pa.schema(
    [
        ("gid", pa.int64()),  # the pool image
        ("seed_gid", pa.int64()),  # row of the seed set; -1 when its cluster was hit
        ("similarity", pa.float32()),  # cosine to the seed image; null for a cluster
        ("rank", pa.int32()),  # 0: the seed image's nearest
        ("cluster", pa.int64()),
    ]
)
_QUERIES_PER_TASK = 4096
_DEPTH = 8  # next_neighbor looks this many times deeper than k


def retrieve_set(
    folder: Folder,
    seeds: ImageSet,
    encoder: str,
    rule: RetrievalRule,
    cells: Cells,
    assignment: np.ndarray,
    survivors: np.ndarray,
    execution: ExecutionConfig,
    label: str,
) -> tuple[list[File], dict[str, Any]]:
    """Draw for one seed set; write matches.parquet (see _SCHEMA), one row for each draw that counts."""
    status = np.concatenate([seeds.index(p, ["status"])["status"].to_numpy() for p in range(seeds.num_parts)])
    seed_gids = np.flatnonzero(status == "ok").astype(np.int64)
    if not len(seed_gids):
        raise ValueError(f"seed {label!r} has no readable image among its {seeds.num_images}.")
    if rule.mode == "sample":
        table, figures = _by_sample(seeds, encoder, seed_gids, rule, cells, assignment, execution, label)
    elif rule.mode == "cluster":
        table, figures = _by_cluster(seeds, encoder, seed_gids, rule, cells, assignment, survivors)
    else:
        table, figures = _SCHEMA.empty_table(), {}
    figures |= {"mode": rule.mode, "num_seeds": len(seed_gids), "num_draws": table.num_rows}
    figures["num_images"] = len(np.unique(table["gid"].to_numpy()))
    return [folder.write_table("matches.parquet", table)], figures


def _by_sample(
    seeds: ImageSet,
    encoder: str,
    seed_gids: np.ndarray,
    rule: RetrievalRule,
    cells: Cells,
    assignment: np.ndarray,
    execution: ExecutionConfig,
    label: str,
) -> tuple[pa.Table, dict[str, Any]]:
    depth = min(cells.num_rows, rule.k * (_DEPTH if rule.collisions == "next_neighbor" else 1))
    chunks = [seed_gids[i : i + _QUERIES_PER_TASK] for i in range(0, len(seed_gids), _QUERIES_PER_TASK)]
    device = task_device(execution)
    found = run_on(
        device,
        _nearest_of,
        chunks,
        seeds,
        encoder,
        cells,
        depth,
        device,
        execution=execution,
        label=f"retrieve {label}",
        unit="seed images",
        weights=[len(chunk) for chunk in chunks],
    )
    gids = np.concatenate([g for g, _ in found])
    similarity = np.concatenate([s for _, s in found])
    gids = np.where(similarity >= rule.min_similarity, gids, -1)
    query, rank = resolve_collisions(gids, similarity, rule.k, rule.collisions)
    chosen = gids[query, rank]
    table = pa.table(
        {
            "gid": chosen,
            "seed_gid": seed_gids[query],
            "similarity": similarity[query, rank],
            "rank": rank.astype(np.int32),
            "cluster": assignment[chosen].astype(np.int64),
        },
        schema=_SCHEMA,
    )
    wanted = rule.k * len(seed_gids)
    return table, {"num_wanted": wanted, "shortfall": wanted - table.num_rows}


def _nearest_of(
    chunk: np.ndarray, seeds: ImageSet, encoder: str, cells: Cells, depth: int, device: str | None
) -> tuple[np.ndarray, np.ndarray]:
    queries = unit_rows(seeds.take_embeddings(encoder, chunk))
    return nearest(queries, cells, depth, num_probes(cells.num_rows, cells.num_cells), num_threads=1, device=device)


def _by_cluster(
    seeds: ImageSet,
    encoder: str,
    seed_gids: np.ndarray,
    rule: RetrievalRule,
    cells: Cells,
    assignment: np.ndarray,
    survivors: np.ndarray,
) -> tuple[pa.Table, dict[str, Any]]:
    hits = np.zeros(cells.num_cells, np.int64)
    for part in range(seeds.num_parts):
        inside = seed_gids[(seed_gids >= seeds.part_base[part]) & (seed_gids < seeds.part_base[part + 1])]
        if len(inside):
            rows = unit_rows(seeds.embeddings(encoder, part)[inside - seeds.part_base[part]])
            hits += np.bincount(assign(rows, cells.centroids)[0], minlength=cells.num_cells)
    hot = np.flatnonzero(hits >= rule.min_hits)
    draw = sample_per_cluster(
        assignment[survivors].astype(np.int64), hot, rule.images_per_cluster, rule.max_images, seed=0, ids=survivors
    )
    gids = np.sort(draw.ids)
    table = pa.table(
        {
            "gid": gids,
            "seed_gid": np.full(len(gids), -1, np.int64),
            "similarity": pa.nulls(len(gids), pa.float32()),
            "rank": np.zeros(len(gids), np.int32),
            "cluster": assignment[gids].astype(np.int64),
        },
        schema=_SCHEMA,
    )
    wanted = min(len(hot) * rule.images_per_cluster, rule.max_images)
    return table, {"num_hit_clusters": len(hot), "num_wanted": wanted, "shortfall": max(0, wanted - len(gids))}
