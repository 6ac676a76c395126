"""k-means against faiss.Kmeans: objective, time and balance, interleaved in one run.

    python benchmarks/kmeans.py                       40,000 x 256-d in 1,024 and 200,000 x 256-d in 2,048 cells
    python benchmarks/kmeans.py --sizes 40000x1024    other sizes

Unit vectors of three kinds: a Zipf mixture of 20,000 modes with heavy noise, a curved 12-dimensional surface with
noise, and pure noise. Faiss and ours start from random rows and do the same number of iterations on the same threads
(of ours, the first two fifths look at a quarter of the rows); the third line is ours from a k-means++ start. The
objective is measured afterwards, alike for all: the mean of 1 - cosine to the nearest centroid. Prints a table, and its
figures as JSON (to --json, if given).
"""

import argparse
import json
import time
from pathlib import Path

import faiss
import numpy as np

from curation.ops.kmeans import balance, kmeans
from curation.ops.nearest import assign

WIDTH = 256
NUM_ITERATIONS = 10


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def zipf(num_rows: int, rng: np.random.Generator) -> np.ndarray:
    modes = rng.standard_normal((20_000, WIDTH), np.float32)
    share = 1 / np.arange(1, len(modes) + 1)
    mode = rng.choice(len(modes), num_rows, p=share / share.sum())
    return unit(modes[mode] + 1.5 * rng.standard_normal((num_rows, WIDTH), np.float32))


def surface(num_rows: int, rng: np.random.Generator) -> np.ndarray:
    hidden = np.tanh(0.3 * rng.standard_normal((num_rows, 12), np.float32) ** 3 @ rng.standard_normal((12, 64)))
    return unit(hidden @ rng.standard_normal((64, WIDTH)) + 0.5 * rng.standard_normal((num_rows, WIDTH)))


def noise(num_rows: int, rng: np.random.Generator) -> np.ndarray:
    return unit(rng.standard_normal((num_rows, WIDTH), np.float32))


def train_ours(x: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    return kmeans(x, num_clusters, NUM_ITERATIONS, seed).centroids


def train_ours_spread(x: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    return kmeans(x, num_clusters, NUM_ITERATIONS, seed, init="kmeans++").centroids


def train_faiss(x: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    clustering = faiss.Kmeans(
        WIDTH, num_clusters, niter=NUM_ITERATIONS, spherical=True, seed=seed, max_points_per_centroid=len(x)
    )
    clustering.train(x)
    return clustering.centroids


TRAINERS = {"faiss.Kmeans": train_faiss, "kmeans": train_ours, "kmeans, init kmeans++": train_ours_spread}


def measure(x: np.ndarray, num_clusters: int, num_runs: int) -> dict[str, dict[str, float]]:
    """Medians over seeds; the trainers take turns, so that a busy machine troubles all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    errors: dict[str, list[float]] = {name: [] for name in TRAINERS}
    imbalance: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for seed in range(1, num_runs + 1):
        for name, train in TRAINERS.items():
            start = time.perf_counter()
            centroids = train(x, num_clusters, seed)
            seconds[name].append(time.perf_counter() - start)
            cell, similarity = assign(x, centroids)
            errors[name].append(1 - float(similarity.mean(dtype=np.float64)))
            imbalance[name].append(balance(np.bincount(cell, minlength=num_clusters)).imbalance_factor)
    return {
        name: {
            "seconds": float(np.median(seconds[name])),
            "time_over_faiss": float(np.median(np.divide(seconds[name], seconds["faiss.Kmeans"]))),
            "objective": float(np.median(errors[name])),
            "objective_over_faiss": float(np.median(np.divide(errors[name], errors["faiss.Kmeans"]))),
            "imbalance_factor": float(np.median(imbalance[name])),
        }
        for name in TRAINERS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["40000x1024", "200000x2048"], metavar="ROWSxCLUSTERS")
    parser.add_argument("--runs", type=int, default=5, help="seeds; medians are over them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kmeans(noise(2000, np.random.default_rng(0)), 8, 2, init="kmeans++")  # compile
    figures: dict[str, dict] = {"threads": {"num": faiss.omp_get_max_threads()}}
    for size in args.sizes:
        num_rows, num_clusters = (int(number) for number in size.split("x"))
        for data in (zipf, surface, noise):
            name = f"{data.__name__} {num_rows} x {WIDTH}, {num_clusters} cells, {NUM_ITERATIONS} iterations"
            print(name, flush=True)
            figures[name] = measure(data(num_rows, np.random.default_rng(0)), num_clusters, args.runs)
            for trainer, row in figures[name].items():
                print(f"  {trainer:24}" + "  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    text = json.dumps(figures, indent=2)
    if args.json:
        args.json.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
