"""Deduplication of embeddings in memory against Faiss brute force: recall, precision and time.

    python -m benchmarks.dedup [--rows 1000000]

How time and memory grow, from files and in Ray tasks: `python -m benchmarks.scale join`.

Vectors are the hard case of nearly isotropic embeddings: a Zipf mixture of 20,000 modes with so much noise that two
vectors of one mode have cosine 0.3, where every 50th vector has a planted partner at a cosine uniform in 0.6 to 0.99.
Prints a table, and its figures as JSON (to --json, if given).
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import faiss
import numpy as np

from curation.ops.cells import Cells, cells_from_arrays
from curation.ops.components import duplicate_groups
from curation.ops.join import Pairs, merge_pairs
from curation.ops.kmeans import kmeans
from curation.ops.nearest import assign
from curation.ops.neighbours import self_pairs
from curation.ops.randomness import hash_sample
from curation.ops.recall import are_among, certify, measured_recall
from curation.ops.true_pairs import hits_in_range

T = TypeVar("T")
THRESHOLD = 0.6
NUM_MODES = 20_000
NOISE = 1.5
PLANT_EVERY = 50
BLOCK_ROWS = 2**16
POINTS_PER_CENTROID = 64
BUDGET_BYTES = 4 * 2**30


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def blocks(num_rows: int, dim: int, seed: int) -> Iterator[np.ndarray]:
    """The vectors in blocks of 65,536 rows: float16 [n, D]. Row 50 j + 1 is the planted partner of row 50 j."""
    modes = unit(np.random.default_rng(seed).standard_normal((NUM_MODES, dim), np.float32))
    share = 1 / np.arange(1, NUM_MODES + 1)
    cumulative = np.cumsum(share / share.sum())
    for start in range(0, num_rows, BLOCK_ROWS):
        rng = np.random.default_rng((seed, start))
        n = min(BLOCK_ROWS, num_rows - start)
        of_row = np.minimum(np.searchsorted(cumulative, rng.random(n)), NUM_MODES - 1)
        x = unit(modes[of_row] + rng.standard_normal((n, dim), np.float32) * np.float32(NOISE / np.sqrt(dim)))
        first = np.flatnonzero((start + np.arange(n)) % PLANT_EVERY == 0)
        first = first[first + 1 < n]
        cosine = rng.uniform(0.6, 0.99, (len(first), 1))
        away = rng.standard_normal((len(first), dim))
        away = unit(away - (away * x[first]).sum(axis=1, keepdims=True) * x[first])
        x[first + 1] = cosine * x[first] + np.sqrt(1 - cosine**2) * away
        yield x.astype(np.float16)


def default_cells(num_rows: int) -> int:
    """Comparing with centroids costs as many products as there are cells; fewer cells mean more members to look at.
    With the number of probed cells growing as the root of all, the sum is least near N^(2/3) / 10."""
    return max(round(num_rows ** (2 / 3) / 10), 16)


class Clock:
    """Seconds by step, and processor seconds, which tell a busy machine from slow code."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.processor_seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start, processor_start = time.perf_counter(), time.process_time()
        yield
        self.seconds[step] = time.perf_counter() - start
        self.processor_seconds[step] = time.process_time() - processor_start
        print(f"  {step:30s}{self.seconds[step]:9.1f} s{self.processor_seconds[step]:9.1f} s of processor", flush=True)


def warm_up(dim: int) -> None:
    """Compile the kernels on a few vectors: numba keeps them on disk, so only a machine's first run pays."""
    x = np.concatenate(list(blocks(20_000, dim, 9)))
    cells = grouped(x, 32, 1, None)
    certificate, _ = certify(cells, THRESHOLD)
    pairs = self_pairs(cells, 0, len(x), THRESHOLD, 2, certificate.sketch_radius or 180)
    self_pairs(cells, 0, len(x), THRESHOLD, 2, None)
    duplicate_groups(len(x), [(pairs.a, pairs.b, pairs.similarity)], [np.zeros(len(x))], max_component_size=2)


def grouped(x: np.ndarray, num_cells: int, threads: int, clock: Clock | None) -> Cells:
    """k-means on a sample, the assignment of every vector, and the cells."""
    clock = clock or Clock()
    with clock("k-means"):
        sample = x[hash_sample(1, np.arange(len(x)), POINTS_PER_CENTROID * num_cells)].astype(np.float32)
        centroids = kmeans(sample, num_cells, 8, seed=1, num_threads=threads).centroids
    with clock("assignment"):
        starts = range(0, len(x), BLOCK_ROWS)
        own = np.concatenate([assign(x[s : s + BLOCK_ROWS], centroids, num_threads=threads)[0] for s in starts])
    with clock("cells"):
        return cells_from_arrays(x, np.arange(len(x)), own, centroids)


def in_threads(function: Callable[[int, int], T], num_rows: int, step: int, threads: int) -> list[T]:
    """function(start, stop) for runs of rows, in threads, as the stages do it in tasks."""
    with ThreadPoolExecutor(threads, initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(lambda start: function(start, min(start + step, num_rows)), range(0, num_rows, step)))


def joined(cells: Cells, nprobe: int, radius: int | None, threads: int) -> Pairs:
    step = -(-cells.num_rows // threads)
    step = min(step, 2**20)
    return merge_pairs(
        in_threads(
            lambda start, stop: self_pairs(
                cells, start, stop, THRESHOLD, nprobe, radius, max_memory_bytes=BUDGET_BYTES // 2 // threads
            ),
            cells.num_rows, step, threads,
        )
    )  # fmt: skip


def deduplicated(cells: Cells, num_rows: int, threads: int, clock: Clock) -> tuple[dict, Pairs]:
    """Certify, join and group, as the pipeline does; the figures, and the pairs."""
    with clock("certify"):
        certificate, truth = certify(
            cells, THRESHOLD,
            compare=lambda question: in_threads(
                lambda start, stop: hits_in_range(cells, start, stop, question), num_rows, 2**18, threads
            ),
        )  # fmt: skip
    with clock("join"):
        pairs = joined(cells, certificate.nprobe, certificate.sketch_radius, threads)
    with clock("components"):
        groups = duplicate_groups(
            num_rows, [(pairs.a, pairs.b, pairs.similarity)], [], max_component_size=1000, min_similarity=THRESHOLD
        )
    recall, bound = measured_recall(are_among(pairs, truth), truth)
    figures = {
        "num_cells": cells.num_cells,
        "certificate": vars(certificate),
        "measured_recall": recall,
        "measured_lower_bound": bound,
        "num_pairs": len(pairs.a),
        "num_groups": len(groups.table.label),
    }
    return figures, pairs


def brute_force_round(index: faiss.Index, queries: np.ndarray) -> tuple[float, float, tuple[np.ndarray, ...]]:
    """Seconds and processor seconds, and Faiss's answer. Below 1,000 queries a call Faiss is several times slower."""
    clock = Clock()
    with clock(f"Faiss, {len(queries)} queries"):
        answer = index.range_search(queries, THRESHOLD)
    return *clock.seconds.values(), *clock.processor_seconds.values(), answer


def pair_keys(a: np.ndarray, b: np.ndarray, num_rows: int) -> np.ndarray:
    return np.unique(np.minimum(a, b) * num_rows + np.maximum(a, b))


def share_found(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(np.isin(wanted, found).mean()) if len(wanted) else 1.0


def against_brute_force(arguments: argparse.Namespace) -> dict:
    """Cluster + dedup of vectors in memory; rounds of Faiss IndexFlatIP.range_search lie between its steps."""
    num_rows, dim, threads = arguments.rows, 256, arguments.threads
    num_cells = arguments.cells or default_cells(num_rows)
    faiss.omp_set_num_threads(threads)
    print(f"{num_rows:,} x {dim}, {num_cells} cells, {threads} threads")
    warm_up(dim)
    x = np.concatenate(list(blocks(num_rows, dim, 0)))
    index = faiss.IndexFlatIP(dim)
    for start in range(0, num_rows, BLOCK_ROWS):
        index.add(x[start : start + BLOCK_ROWS].astype(np.float32))
    asked = hash_sample(7, np.arange(num_rows), arguments.queries)
    rounds = np.array_split(np.random.default_rng(0).permutation(asked), 4)
    seconds_per_query, processor_seconds_per_query, brute_pairs = [], [], []

    def brute_force() -> None:
        chosen = rounds[len(seconds_per_query)]
        seconds, processor_seconds, (limits, _, labels) = brute_force_round(index, x[chosen].astype(np.float32))
        seconds_per_query.append(seconds / len(chosen))
        processor_seconds_per_query.append(processor_seconds / len(chosen))
        query = np.repeat(chosen, np.diff(limits.astype(np.int64)))
        other = query != labels
        brute_pairs.append(pair_keys(query[other], labels[other], num_rows))

    clock = Clock()
    brute_force()
    cells = grouped(x, num_cells, threads, clock)
    brute_force()
    figures, pairs = deduplicated(cells, num_rows, threads, clock)
    brute_force()
    one_cell = Clock()
    with one_cell("one-cell join (SemDeDup rule)"):
        one = joined(cells, 1, None, threads)
    brute_force()
    found, found_one = (pair_keys(p.a, p.b, num_rows) for p in (pairs, one))
    first = np.arange(0, num_rows - 1, PLANT_EVERY)
    exact = np.einsum("nd,nd->n", x[first].astype(np.float64), x[first + 1].astype(np.float64)).astype(np.float32)
    planted = pair_keys(first[exact >= np.float32(THRESHOLD)], first[exact >= np.float32(THRESHOLD)] + 1, num_rows)
    rescored = np.einsum("nd,nd->n", x[pairs.a].astype(np.float64), x[pairs.b].astype(np.float64))
    brute = np.unique(np.concatenate(brute_pairs))
    seconds = sum(clock.seconds.values())
    brute_seconds = float(np.median(seconds_per_query)) * num_rows
    return figures | {
        "rows": num_rows,
        "dim": dim,
        "threads": threads,
        "seconds": clock.seconds,
        "processor_seconds": clock.processor_seconds,
        "total_seconds": seconds,
        "brute_force_seconds": brute_seconds,
        "brute_force_seconds_spread": [min(seconds_per_query) * num_rows, max(seconds_per_query) * num_rows],
        "times_faster": brute_seconds / seconds,
        "times_less_processor": float(np.median(processor_seconds_per_query))
        * num_rows
        / sum(clock.processor_seconds.values()),
        "recall_of_brute_force_pairs": share_found(brute, found),
        "brute_force_pairs": len(brute),
        "recall_of_planted_pairs": share_found(planted, found),
        "planted_pairs": len(planted),
        "precision": float((rescored.astype(np.float32) >= np.float32(THRESHOLD)).mean()),
        "one_cell_seconds": sum(one_cell.seconds.values())
        + sum(clock.seconds[s] for s in ("k-means", "assignment", "cells")),
        "one_cell_recall_of_brute_force_pairs": share_found(brute, found_one),
        "one_cell_recall_of_planted_pairs": share_found(planted, found_one),
    }


def table(figures: dict, indent: str = "") -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            table(value, indent + "  ")
        else:
            print(f"{indent}{name:38s}{value if not isinstance(value, float) else round(value, 5)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cells", type=int, help="k-means cells")
    parser.add_argument("--queries", type=int, default=4000, help="rows that brute force answers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="file to write the figures to")
    arguments = parser.parse_args()
    figures = against_brute_force(arguments)
    table(figures)
    print(json.dumps(figures))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
