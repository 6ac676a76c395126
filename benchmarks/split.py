"""A hierarchy whose levels are split, as the stage runs it over Ray tasks, beside k-means of the whole level.

    python -m benchmarks.split [--rows 300000] [--dim 64]

The published hierarchy of configs/curation/lvd1689m.yaml (200 M / 8 M / 800 k / 100 k / 25 k for 17 billion images)
scaled to the rows, at its 85 images a cluster, with groups so small that levels 1 and 2 are split as they would be at
full size. Vectors are clumps of clumps. Compared with one flat k-means of level 1 on the same rows: mean cosine to the
centroid, and processor time. Prints one line of JSON.
"""

import argparse
import json
import resource
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import ray

from configs.loader import load_config
from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, start_ray
from curation.ops.kmeans import kmeans
from curation.ops.nearest import assign
from curation.stages.cluster import Clustering, cluster_images
from curation.stages.members import unit_rows

PART_ROWS = 10_000


def clumps(rows: int, dim: int, seed: int) -> np.ndarray:
    """float16 [rows, dim], unit-norm: clumps about clumps, of sizes that differ a hundredfold."""
    generator = np.random.default_rng(seed)
    coarse = generator.standard_normal((rows // 2000 + 2, dim))
    fine = coarse[generator.integers(0, len(coarse), rows // 60 + 2)]
    fine = fine + 0.7 * generator.standard_normal(fine.shape)
    weights = generator.pareto(1.2, len(fine)) + 0.05
    x = fine[generator.choice(len(fine), rows, p=weights / weights.sum())] + 0.5 * generator.standard_normal(
        (rows, dim)
    )
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def image_set(root: Path, x: np.ndarray) -> ImageSet:
    folder, files = Folder(str(root)), []
    for number, start in enumerate(range(0, len(x), PART_ROWS)):
        part = x[start : start + PART_ROWS]
        folder.write_array(f"vectors/part-{number:05d}.npy", part)
        files.append(folder.write_bytes(f"index/part-{number:05d}.parquet", b"", rows=len(part)))
    return ImageSet.of(folder, Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files))


def everyone(number: int, rows: int) -> np.ndarray:
    return np.ones(rows, bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--dim", type=int, default=64)
    args = parser.parse_args()
    config = load_config(CurationConfig, "curation", "lvd1689m", []).cluster
    config = replace(
        config, clusters_per_group=64,
        kmeans=replace(config.kmeans, num_iterations=10, max_points_in_memory=max(1000, args.rows // 150)),
    )  # fmt: skip
    execution = ExecutionConfig()
    x = clumps(args.rows, args.dim, 0)
    with tempfile.TemporaryDirectory() as root:
        images = image_set(Path(root) / "pool", x)
        start_ray(execution)
        ranges = Ranges(args.rows)
        start = time.perf_counter()
        out = Folder(f"{root}/cluster")
        cluster_images(
            out,
            images,
            "vectors",
            ranges,
            partial(everyone, rows=args.rows),
            config,
            execution,
        )
        seconds = time.perf_counter() - start
        driver_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        ray.shutdown()  # so that the processor time of its workers is counted
        clustering = Clustering(out)
        centroids = np.concatenate([out.read_array(name) for name in clustering.centroid_files()])
        cell, levels = (
            clustering.between(0, args.rows),
            [len(clustering.sizes(n + 1)) for n in range(clustering.num_levels)],
        )
    rows = unit_rows(x)
    split = float(np.einsum("nd,nd->n", rows, centroids[cell]).mean())
    start = time.perf_counter()
    flat = float(assign(rows, kmeans(rows, len(centroids), config.kmeans.num_iterations).centroids)[1].mean())
    figures = {
        "rows": args.rows,
        "levels": levels,
        "groups": [shape.num_groups for shape in config.shapes_for(args.rows)],
        "seconds": seconds,
        "mean_cosine": split,
        "flat_seconds": time.perf_counter() - start,
        "flat_mean_cosine": flat,
        "driver_gb": driver_gb,
        "task_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
