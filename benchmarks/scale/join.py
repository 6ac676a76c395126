"""Cells, join and components of synthetic vectors, as the stages do them, from files and in Ray tasks.

Vectors are the hard case of benchmarks/dedup.py; with --group, so many more are alike, at --similarity to their centre.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.dedup import BLOCK_ROWS, PLANT_EVERY, blocks, default_cells, unit
from benchmarks.scale.measure import Meter
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig, start_ray
from curation.ops.cells import open_cells, write_cells
from curation.ops.components import component_labels
from curation.ops.kmeans import kmeans
from curation.ops.nearest import assign
from curation.ops.randomness import hash_sample
from curation.ops.recall import measured_recall
from curation.stages.join import Joined, JoinSettings, join_pool

POINTS_PER_CENTROID = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--group", type=int, default=0, help="rows that are all alike, beside the others")
    parser.add_argument("--similarity", type=float, default=0.8, help="mean cosine of two rows of the group")
    parser.add_argument("--threshold", type=float, default=0.6)
    parser.add_argument("--floor", type=float, help="down to which edges are kept; the threshold where absent")
    parser.add_argument("--cells", type=int, help="k-means cells")
    parser.add_argument("--memory-gb", type=float, default=4.0, help="execution.memory_gb")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", help="where temporary files go")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    num_rows, dim = arguments.rows + arguments.group, arguments.dim
    num_cells = arguments.cells or default_cells(num_rows)
    floor = arguments.threshold if arguments.floor is None else arguments.floor
    execution = ExecutionConfig(workers=arguments.workers, memory_gb=arguments.memory_gb, device="cpu")
    faiss.omp_set_num_threads(arguments.workers or faiss.omp_get_max_threads())
    print(f"{num_rows:,} x {dim}, {num_cells:,} cells, {arguments.group:,} of them alike")
    start_ray(execution)
    meter = Meter()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        path = Path(scratch) / "vectors.f16"
        in_group = _write_vectors(path, arguments)
        vectors = np.memmap(path, np.float16, "r", shape=(num_rows, dim))
        starts = range(0, num_rows, BLOCK_ROWS)
        with meter.step("k-means"):
            chosen = hash_sample(1, np.arange(num_rows), POINTS_PER_CENTROID * num_cells)
            centroids = kmeans(vectors[chosen].astype(np.float32), num_cells, 8, seed=1).centroids
        with meter.step("assignment"):
            own = np.concatenate([assign(vectors[s : s + BLOCK_ROWS], centroids)[0] for s in starts])
        with meter.step("cells"):
            rows = (
                (np.arange(s, min(s + BLOCK_ROWS, num_rows)), vectors[s : s + BLOCK_ROWS], own[s : s + BLOCK_ROWS])
                for s in starts
            )
            cells = write_cells(Path(scratch) / "cells", rows, np.bincount(own, minlength=num_cells), centroids)
        joined = Joined(Folder(str(Path(scratch) / "join")))
        with meter.step("join"):
            settings = JoinSettings(floor=floor, target_recall=0.99, seed=0)
            _, counts, certificate = join_pool(
                joined.folder, open_cells(Path(scratch) / "cells"), None, settings, execution
            )
        with meter.step("components"):
            forests = (joined.forest(piece, arguments.threshold) for piece in joined.pieces())
            parent = np.empty(num_rows, np.int32)
            labels = component_labels(num_rows, (_columns(table) for table in forests), parent)
        truth, found = joined.truth(arguments.threshold)
        together = labels[truth.query] == labels[truth.gid]
        planted = _planted(vectors, arguments.rows, arguments.threshold)
        recall, bound = measured_recall(found, truth)
        group = labels[in_group]
        figures = {
            "rows": num_rows, "dim": dim, "cells": cells.num_cells, **meter.figures(), **counts,
            "certificate": certificate, "recall": recall, "lower_bound": bound,
            "true_pairs_in_one_component": float(together.mean()) if len(together) else 1.0,
            "planted_pairs_in_one_component": float((labels[planted] == labels[planted + 1]).mean()),
            "components_of_the_group": len(np.unique(group)),
            "largest_share_of_the_group": float(np.unique(group, return_counts=True)[1].max() / len(group))
            if len(group) else 1.0,
        }  # fmt: skip
    return figures


def _write_vectors(path: Path, arguments: argparse.Namespace) -> np.ndarray:
    """The rows of the group lie among the others, wherever a draw puts them; returns which they are."""
    num_rows, dim = arguments.rows + arguments.group, arguments.dim
    rng = np.random.default_rng(1)
    centre = unit(rng.standard_normal((1, dim)))
    # Two rows c + r u of the group, u of unit norm and orthogonal, have cosine 1 / (1 + r^2).
    spread = np.sqrt(1 / arguments.similarity - 1)
    block_of = np.sort(rng.integers(0, max(arguments.rows // BLOCK_ROWS, 1), arguments.group))
    members: list[np.ndarray] = []
    written = 0
    with path.open("wb") as file:
        for number, block in enumerate(blocks(arguments.rows, dim, 0)):
            file.write(block.tobytes())
            written += len(block)
            for piece in range(0, int((block_of == number).sum()), BLOCK_ROWS):
                count = min(BLOCK_ROWS, int((block_of == number).sum()) - piece)
                away = rng.standard_normal((count, dim), np.float32)
                x = unit(centre + spread * unit(away - (away @ centre.T) * centre)).astype(np.float16)
                file.write(x.tobytes())
                members.append(np.arange(written, written + count))
                written += count
    assert written == num_rows
    return np.concatenate([np.empty(0, np.int64), *members])


def _planted(vectors: np.ndarray, num_rows: int, threshold: float) -> np.ndarray:
    """First rows of planted pairs that reach the threshold, where no group moved them apart."""
    first = np.arange(0, min(num_rows, BLOCK_ROWS) - 1, PLANT_EVERY)
    cosine = np.einsum("nd,nd->n", vectors[first].astype(np.float64), vectors[first + 1].astype(np.float64))
    return first[cosine.astype(np.float32) >= np.float32(threshold)]


def _columns(table: pa.Table) -> Iterator[np.ndarray]:
    return tuple(table[name].to_numpy() for name in ("a", "b", "similarity"))  # type: ignore[return-value]
