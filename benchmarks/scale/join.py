"""Cells, join and components of synthetic vectors, as the stages do them, from files and in Ray tasks.

Vectors are the hard case of benchmarks/dedup.py; with --group, so many more are alike, at --similarity to their centre.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.dedup import BLOCK_ROWS, PLANT_EVERY, blocks, default_cells, unit
from benchmarks.scale.measure import Meter
from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, start_ray
from curation.ops.components import component_labels
from curation.ops.recall import measured_recall
from curation.stages.cells import CellsConfig, build_cells
from curation.stages.grouped import open_cells
from curation.stages.join import Joined, JoinSettings, join_pool
from curation.stages.kmeans import KMeansConfig

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
    print(f"{num_rows:,} x {dim}, {num_cells:,} cells, {arguments.group:,} of them alike")
    start_ray(execution)
    meter = Meter()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        root = Folder(scratch)
        images, in_group = _write_vectors(root / "pool", arguments)
        config = CellsConfig(
            rows_per_cell=max(num_rows // num_cells, 1), max_cells=num_cells,
            kmeans=KMeansConfig(num_iterations=8, points_per_cluster=POINTS_PER_CENTROID, seed=1),
        )  # fmt: skip
        ranges = Ranges(num_rows)
        with meter.step("cells"):
            everyone = partial(_everyone, ranges=ranges)
            build_cells(root / "cells", images, "vectors", ranges, everyone, config, execution)
        cells, joined = open_cells(root / "cells"), Joined(root / "join")
        with meter.step("join"):
            settings = JoinSettings(floor=floor, target_recall=0.99, seed=0)
            _, counts, certificate = join_pool(joined.folder, cells, None, settings, execution)
        with meter.step("components"):
            forests = (joined.forest(piece, arguments.threshold) for piece in joined.pieces())
            parent = np.empty(num_rows, np.int32)
            labels = component_labels(num_rows, (_columns(table) for table in forests), parent)
        truth, found = joined.truth(arguments.threshold)
        together = labels[truth.query] == labels[truth.gid]
        planted = _planted(images, arguments.threshold)
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


def _everyone(number: int, ranges: Ranges) -> np.ndarray:
    start, stop = ranges.bounds(number)
    return np.ones(stop - start, bool)


def _write_vectors(folder: Folder, arguments: argparse.Namespace) -> tuple[ImageSet, np.ndarray]:
    """The rows of the group lie among the others, wherever a draw puts them; returns which they are, too."""
    dim = arguments.dim
    rng = np.random.default_rng(1)
    centre = unit(rng.standard_normal((1, dim)))
    # Two rows c + r u of the group, u of unit norm and orthogonal, have cosine 1 / (1 + r^2).
    spread = np.sqrt(1 / arguments.similarity - 1)
    block_of = np.sort(rng.integers(0, max(arguments.rows // BLOCK_ROWS, 1), arguments.group))
    members, files, written = [np.empty(0, np.int64)], [], 0

    def write(x: np.ndarray) -> None:
        nonlocal written
        name = f"part-{len(files):06d}"
        folder.write_array(f"vectors/{name}.npy", x.astype(np.float16))
        files.append(folder.write_bytes(f"index/{name}.parquet", b"", rows=len(x)))
        written += len(x)

    for number, block in enumerate(blocks(arguments.rows, dim, 0)):
        write(block)
        for piece in range(0, int((block_of == number).sum()), BLOCK_ROWS):
            count = min(BLOCK_ROWS, int((block_of == number).sum()) - piece)
            away = rng.standard_normal((count, dim), np.float32)
            members.append(np.arange(written, written + count))
            write(unit(centre + spread * unit(away - (away @ centre.T) * centre)))
    manifest = Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files)
    return ImageSet.of(folder, manifest), np.concatenate(members)


def _planted(images: ImageSet, threshold: float) -> np.ndarray:
    """First rows of the first block's planted pairs that reach the threshold."""
    vectors = images.embeddings("vectors", 0).astype(np.float64)
    first = np.arange(0, len(vectors) - 1, PLANT_EVERY)
    cosine = np.einsum("nd,nd->n", vectors[first], vectors[first + 1])
    return first[cosine.astype(np.float32) >= np.float32(threshold)]


def _columns(table: pa.Table) -> Iterator[np.ndarray]:
    return (table[name].to_numpy() for name in ("a", "b", "similarity"))
