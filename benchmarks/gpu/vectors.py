"""Section K: nearest centroids, k-means and the join of curation, with Faiss on the GPU against Faiss on the processor.

`curation.ops` promises the same bits from both: what a GPU finds are candidates, decided in float64.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import faiss
import numpy as np
import torch

from benchmarks.gpu.measure import Setting, check
from benchmarks.gpu.table import Absent, Figures, Part
from curation.ops.cells import cells_from_arrays
from curation.ops.kmeans import kmeans
from curation.ops.nearest import assign
from curation.ops.neighbours import self_pairs

T = TypeVar("T")
ITERATIONS = 5
SIMILARITY, NPROBE, SKETCH_RADIUS = 0.8, 16, 120


def vectors(at: Setting) -> Iterator[Part]:
    yield "Faiss", lambda: libraries(at)
    yield "Ray", ray
    sizes = at.sizes
    x = copied_rows(sizes.vectors, sizes.vector_dim)
    few = x[: sizes.checked_vectors]
    centroids = x[:: len(x) // sizes.centroids][: sizes.centroids]
    yield "compiling, on a thousand rows", lambda: rows_a_second(lambda: joined(at, few[:1000]), 1000)
    yield "assignment", partial(rows_a_second, lambda: assign(x, centroids), len(x))
    yield "assignment against the processor", lambda: same(lambda: np.stack(assign(few, centroids)))
    yield (
        f"k-means, {ITERATIONS} iterations",
        partial(rows_a_second, lambda: kmeans(x, sizes.centroids, ITERATIONS), ITERATIONS * len(x)),
    )
    yield "k-means against the processor", lambda: same(lambda: kmeans(few, sizes.centroids // 8, ITERATIONS).centroids)
    yield "join", lambda: joined(at, few)


def libraries(at: Setting) -> Figures:
    found = {"faiss": faiss.__version__, "gpus": faiss.get_num_gpus()}
    if at.on_gpu and not found["gpus"]:
        return {**found, "note": "faiss-gpu is absent: all below is the processor alone"}
    return found


def ray() -> Figures:
    if importlib.util.find_spec("ray") is None:
        raise Absent("Ray is not installed; the arithmetic of curation needs none, its stages do")
    return {"note": "installed; this section calls curation.ops, which needs none"}


def copied_rows(count: int, dim: int) -> np.ndarray:
    """Unit rows around modes of very unlike sizes; one in twenty is a near copy of the row before it."""
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((count // 100, dim), np.float32)
    rows = rng.standard_normal((count, dim), np.float32)
    rows += modes[(rng.random(count, np.float32) ** 3 * len(modes)).astype(np.int64)]
    rows[20::20] = rows[19:-1:20] + 0.3 * rows[20::20]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def rows_a_second(work: Callable[[], object], rows: int) -> Figures:
    start = time.perf_counter()
    work()
    return {"rows_per_s": rows / (time.perf_counter() - start)}


def same(work: Callable[[], np.ndarray]) -> Figures:
    """The same bits with and without a GPU."""
    start = time.perf_counter()
    here = work()
    here_s = time.perf_counter() - start
    with without_gpus():
        start = time.perf_counter()
        there = work()
        there_s = time.perf_counter() - start
    differing = float(np.mean(here != there))
    return check(differing, 0.0, here_s=here_s, processor_s=there_s)


@contextmanager
def without_gpus() -> Iterator[None]:
    count = faiss.get_num_gpus
    faiss.get_num_gpus = lambda: 0
    try:
        yield
    finally:
        faiss.get_num_gpus = count


def joined(at: Setting, x: np.ndarray) -> Figures:
    """Near pairs by the join (on the processor), and the share that it finds of all, by brute force on the device."""
    start = time.perf_counter()
    centroids = kmeans(x, max(at.sizes.centroids // 8, 1), ITERATIONS).centroids
    cells = cells_from_arrays(x, np.arange(len(x)), assign(x, centroids)[0], centroids)
    pairs = self_pairs(cells, 0, len(x), SIMILARITY, min(NPROBE, len(centroids)), SKETCH_RADIUS)
    join_s = time.perf_counter() - start
    rows = torch.from_numpy(x).half().float().to(at.device)
    queries = torch.arange(0, len(x), max(len(x) // 2000, 1), device=at.device)
    true = set()
    for some in queries.split(500):
        near = rows[some] @ rows.T >= SIMILARITY
        near[torch.arange(len(some)), some] = False
        a, b = near.nonzero().T
        true |= {(min(i, j), max(i, j)) for i, j in zip(some[a].tolist(), b.tolist(), strict=True)}
    found = true & set(zip(pairs.a.tolist(), pairs.b.tolist(), strict=True))
    recall = len(found) / max(len(true), 1)
    return {"rows_per_s": len(x) / join_s, "pairs": len(pairs.a), "recall": recall, "true_pairs_looked_at": len(true)}
