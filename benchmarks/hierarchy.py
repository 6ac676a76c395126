"""Hierarchical k-means with resampling on the published toy's size, and how even its sample is.

    python benchmarks/hierarchy.py

29,700 points in 2-d, in five rings of 20,000, 200, 1,000, 500 and 8,000 points; 1,000 then 300 clusters, 10
resamplings of 15 and 2 points per cluster, 50 iterations; then 1,000 points drawn. A public implementation
(ssl-data-curation) took 166 s on two cores and drew 231, 115, 209, 200 and 245 from the rings; its licence keeps it
from being run here. The geometry of its rings was not recorded, so five equal rings are taken, radii 0.7 to 1.0, that
do not touch: an even draw is 200 of each, but for the ring of 200 points, too few to be drawn so often. Prints a line
per seed, and the figures as JSON (to --json, if given).
"""

import argparse
import json
import time
from pathlib import Path

import faiss
import numpy as np

from curation.ops.hierarchy import hierarchical_kmeans
from curation.ops.kmeans import balance
from curation.ops.sampling import hierarchical_sample

SIZES = [20_000, 200, 1_000, 500, 8_000]
CENTRES = [(-2.2, 1.0), (0.0, 1.0), (2.2, 1.0), (-1.1, -1.0), (1.1, -1.0)]
PUBLIC_SPLIT = [231, 115, 209, 200, 245]
PUBLIC_SECONDS = 166


def rings(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ring = np.repeat(np.arange(5), SIZES)
    angle, radius = rng.uniform(0, 2 * np.pi, len(ring)), rng.uniform(0.7, 1.0, len(ring))
    points = np.array(CENTRES)[ring] + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return points.astype(np.float32), ring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="seeds of the points and of the clustering")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    hierarchical_kmeans(rings(0)[0][::100], [20, 5], 1, num_iterations=2, metric="l2")  # compile
    seconds, splits = [], []
    for seed in range(args.runs):
        x, ring = rings(seed)
        start = time.perf_counter()
        levels = hierarchical_kmeans(x, [1000, 300], 10, [15, 2], 50, seed, "l2")
        drawn = hierarchical_sample(levels, 1000, seed)
        seconds.append(time.perf_counter() - start)
        splits.append(np.bincount(ring[drawn], minlength=5).tolist())
        print(f"seed {seed}: {seconds[-1]:.1f} s, {splits[-1]}, {entropy_of(splits[-1])}", flush=True)
    print(f"public:  {PUBLIC_SECONDS} s, {PUBLIC_SPLIT}, {entropy_of(PUBLIC_SPLIT)}")
    print(f"uniform draw: {entropy_of(SIZES)}")
    figures = {
        "threads": faiss.omp_get_max_threads(),
        "seconds": float(np.median(seconds)),
        "split": np.mean(splits, axis=0).tolist(),
        "entropy": float(np.median([balance(np.array(split)).entropy for split in splits])),
        "public_seconds": PUBLIC_SECONDS,
        "public_entropy": balance(np.array(PUBLIC_SPLIT)).entropy,
        "uniform_entropy": balance(np.array(SIZES)).entropy,
    }
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text)
    else:
        print(text)


def entropy_of(split: list[int]) -> str:
    figures = balance(np.array(split))
    return f"entropy {figures.entropy:.3f}, Gini {figures.gini:.3f}"


if __name__ == "__main__":
    main()
