"""Section K: curation's products on the device: assignment, k-means, the join and its certificate, retrieval, leaks.

`curation.ops` promises the same bits with torch on a GPU and with the processor's own kernels: what a GPU finds are
candidates, or similarities that are exact in any order. So every part that is compared has a tolerance of nothing.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import faiss
import numpy as np

from benchmarks.gpu.measure import Setting, check, memory, milliseconds
from benchmarks.gpu.table import Absent, Figures, Part
from curation.ops import join
from curation.ops.cells import Cells, cells_from_arrays, nearest_cells
from curation.ops.kmeans import kmeans
from curation.ops.nearest import assign
from curation.ops.neighbours import self_pairs
from curation.ops.recall import question_about
from curation.ops.torch_tiles import Rows, half_products, near_pairs
from curation.ops.true_pairs import hits_in_range

ITERATIONS = 5
SIMILARITY, NPROBE, SKETCH_RADIUS = 0.8, 16, 120
NEIGHBOURS = 8
QUERIES = 4096

Work = Callable[[str | None], Sequence[np.ndarray]]


def vectors(at: Setting) -> Iterator[Part]:
    yield "Faiss", lambda: {"faiss": faiss.__version__, "note": "on the processor only"}
    yield "Ray", ray
    sizes, device = at.sizes, str(at.device)
    x = copied_rows(sizes.vectors, sizes.vector_dim)
    few = x[: sizes.checked_vectors]
    centroids = x[:: len(x) // sizes.centroids][: sizes.centroids]
    yield "products with a threshold", lambda: tiles(at, x)
    yield "compiling, on a thousand rows", lambda: same(len(few[:1000]), device, joins(cells_of(few[:1000], 4)))
    yield "assignment", partial(rows_a_second, lambda: assign(x, centroids, device=device), len(x))
    yield "assignment against the processor", lambda: same(len(few), device, lambda d: assign(few, centroids, device=d))
    yield (
        f"k-means, {ITERATIONS} iterations",
        partial(rows_a_second, lambda: kmeans(x, sizes.centroids, ITERATIONS, device=device), ITERATIONS * len(x)),
    )
    yield (
        "k-means against the processor",
        lambda: same(len(few), device, lambda d: [kmeans(few, sizes.centroids // 8, ITERATIONS, device=d).centroids]),
    )
    cells = cells_of(few, sizes.centroids // 8)
    queries = few[:: max(len(few) // QUERIES, 1)][:QUERIES]
    yield "probed cells", lambda: same(len(few), device, lambda d: probes(few, cells, d))
    yield "join", lambda: same(len(few), device, joins(cells))
    yield "certificate", lambda: same(len(queries), device, certificate(cells))
    yield "retrieval", lambda: same(len(queries), device, lambda d: nearest(queries, cells, d))
    yield "leaks", lambda: same(len(queries), device, lambda d: leaks(queries, cells, d))
    everything = cells_of(x, sizes.centroids, device)
    yield "join of all rows", partial(rows_a_second, lambda: joins(everything)(device), len(x))
    yield "all rows against these queries", partial(rows_a_second, lambda: leaks(queries, everything, device), len(x))


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


def cells_of(x: np.ndarray, num_cells: int, device: str | None = None) -> Cells:
    """k-means is not what this measures: rows go to the nearest of some of them."""
    centroids = x[:: max(len(x) // num_cells, 1)][:num_cells]
    return cells_from_arrays(x, np.arange(len(x)), assign(x, centroids, device=device)[0], centroids)


def rows_a_second(work: Callable[[], object], rows: int) -> Figures:
    start = time.perf_counter()
    work()
    return {"rows_per_s": rows / (time.perf_counter() - start)}


def same(rows: int, device: str, work: Work) -> Figures:
    """The same bits from the device and from the processor's own kernels."""
    start = time.perf_counter()
    here = work(device)
    here_s = time.perf_counter() - start
    start = time.perf_counter()
    there = work(None)
    there_s = time.perf_counter() - start
    differing = sum(not np.array_equal(a, b) for a, b in zip(here, there, strict=True))
    return check(differing, 0, rows=rows, rows_per_s=rows / here_s, processor_rows_per_s=rows / there_s)


def tiles(at: Setting, x: np.ndarray) -> list[Figures]:
    """A large tile: the product alone, and all that is done with it down to exact pairs on the host."""
    queries, members = (Rows(x[:n], None, str(at.device)) for n in (len(x) // 32, len(x) // 4))
    asking = np.arange(len(queries))
    flops = 2 * len(queries) * len(members) * x.shape[1]

    def all_pairs() -> None:
        for _ in near_pairs(queries, asking, members, 0, len(members), SIMILARITY):
            pass

    def product() -> None:
        half_products(queries.vectors, members.vectors)

    lines = []
    for what, work in (("product", product), ("pairs", all_pairs)):
        took = milliseconds(work, at)
        lines.append({"part": what, **took, "tflops": flops / took["ms"] / 1e9, **memory(at)})
    return lines


def joins(cells: Cells) -> Work:
    nprobe = min(NPROBE, cells.num_cells)
    return lambda device: self_pairs(cells, 0, cells.num_rows, SIMILARITY, nprobe, SKETCH_RADIUS, device=device)


def certificate(cells: Cells) -> Work:
    rows = np.arange(0, cells.num_rows, max(cells.num_rows // QUERIES, 1))
    asked = question_about(cells, rows, cells.gids_of_rows(rows), SIMILARITY, len(rows) // 4, SKETCH_RADIUS)
    return lambda device: hits_in_range(cells, 0, cells.num_rows, asked, device=device)


def probes(x: np.ndarray, cells: Cells, device: str | None) -> Sequence[np.ndarray]:
    return [nearest_cells(x, cells.centroids, min(NPROBE, cells.num_cells), device=device)]


def nearest(queries: np.ndarray, cells: Cells, device: str | None) -> Sequence[np.ndarray]:
    return join.nearest(queries, cells, NEIGHBOURS, min(NPROBE, cells.num_cells), device=device)


def leaks(queries: np.ndarray, cells: Cells, device: str | None) -> Sequence[np.ndarray]:
    return join.pairs_above(queries, cells, SIMILARITY, cells.num_cells, SKETCH_RADIUS, device=device)
