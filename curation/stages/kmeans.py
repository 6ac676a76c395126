"""k-means over Ray tasks: the training sample is read once into dense files, and every finished iteration is a file.

The centroids are those of `curation.ops.kmeans.kmeans` on the whole sample, to the last bit: sums are exact, so they do
not depend on how the rows are cut into files, nor on who adds them up.
"""

import hashlib
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from configs.ranges import SEEDS, check_ranges
from curation.engine.devices import call_on, num_at_once, run_on, task_device
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig, run_pieces, run_tasks
from curation.ops import kmeans as ops
from curation.ops.randomness import hash_uint64
from curation.stages.members import RowSource, unit

_FILE_ROWS = 2**16  # of a dense file; a smaller sample is clustered by the driver, on all its threads, or on one GPU
_MOST_SUMS = 64  # files of sums in an iteration
_BLOCK_BYTES = 2**26  # of sums that the driver merges at once
FILES = ("rows-*.npy", "ids-*.npy", "sums-*.f64", "cells-*.npy", "iteration-*.npy", "centroids.npy")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """Spherical k-means; every choice is a hash of (seed, gid)."""

    num_iterations: int = 15
    """Lloyd iterations"""
    points_per_cluster: int = 256
    """training rows per cluster, a hash sample of the pool; stated, because too few ruin small clusters"""
    max_points_in_memory: int = 1_000_000
    """rows that one process clusters, at up to 6 kB each (1024-d): a level of a hierarchy with more is split into
    groups (cluster.clusters_per_group); a clustering of one level has no such limit, its iterations run over Ray tasks
    """
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one = ("num_iterations", "points_per_cluster", "max_points_in_memory")
        check_ranges("kmeans", self, **dict.fromkeys(at_least_one, "[1, inf)"), seed=SEEDS)


def train_centroids(
    source: RowSource,
    num_clusters: int,
    config: KMeansConfig,
    execution: ExecutionConfig,
    scratch: Folder,
    label: str,
    seed: int | None = None,
) -> np.ndarray:
    """float32 [num_clusters, D] unit-norm centroids of a hash sample of the rows.

    Args:
        seed: another than the config's.
        scratch: a folder for this k-means alone; what is finished in it is not done again.
    """
    if scratch.exists("centroids.npy"):
        return scratch.read_array("centroids.npy")
    seed = config.seed if seed is None else seed
    size = min(len(source), config.points_per_cluster * num_clusters)
    names = write_sample(source, size, seed, execution, scratch, label)
    if size <= _FILE_ROWS:
        device = task_device(execution)
        arguments = scratch, names, num_clusters, config.num_iterations, seed, device
        centroids = call_on(device, _centroids_of, *arguments, execution=execution, label=label)
    else:
        centroids = _lloyd(names, num_clusters, config.num_iterations, seed, execution, scratch, label)
    scratch.write_array("centroids.npy", centroids)
    return centroids


def _centroids_of(
    scratch: Folder, names: list[str], num_clusters: int, num_iterations: int, seed: int, device: str | None
) -> np.ndarray:
    rows, ids = read_sample(scratch, names)
    return ops.kmeans(rows, num_clusters, num_iterations, seed, ids=ids, device=device).centroids


def sample_limit(source: RowSource, size: int, seed: int, execution: ExecutionConfig, label: str) -> int | None:
    """The largest hash of (seed, id) among the `size` rows of smallest hash; None where that is every row.

    Hashes of distinct ids differ, so this names `curation.ops.randomness.hash_sample` without its list of ids.
    """
    if size >= len(source):
        return None
    chunks, weights = source.chunks(), source.weights()
    common: dict[str, Any] = {"execution": execution, "label": f"{label}, sample", "unit": "rows", "weights": weights}
    counts = sum(run_tasks(_count_hashes, chunks, source, seed, **common))
    top = int(np.searchsorted(np.cumsum(counts), size))  # the upper 16 bits of the hash that is asked for
    missing = size - int(counts[:top].sum())
    hashes = np.concatenate(run_tasks(_hashes_of, chunks, source, seed, top, **common))
    return int(np.partition(hashes, missing - 1)[missing - 1])


def _count_hashes(chunk: Any, source: RowSource, seed: int) -> np.ndarray:
    return np.bincount((hash_uint64(seed, source.ids(chunk)) >> np.uint64(48)).astype(np.int64), minlength=1 << 16)


def _hashes_of(chunk: Any, source: RowSource, seed: int, top: int) -> np.ndarray:
    hashes = hash_uint64(seed, source.ids(chunk))
    return hashes[hashes >> np.uint64(48) == np.uint64(top)]


def read_sample(scratch: Folder, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """What `write_sample` wrote: unit rows float32 [N, D], and their ids int64 [N]."""
    ids = [scratch.read_array(f"ids-{name}") for name in names]
    rows = [unit(scratch.read_array(f"rows-{n}")) for n, some in zip(names, ids, strict=True) if len(some)]
    return np.concatenate(rows), np.concatenate(ids)


def write_sample(
    source: RowSource, size: int, seed: int, execution: ExecutionConfig, scratch: Folder, label: str
) -> list[str]:
    """Write the `size` rows of smallest hash to rows-NAME and ids-NAME, of about _FILE_ROWS rows each: the names."""
    share = min(1.0, size / len(source))
    chunks, weights = source.chunks(), np.array(source.weights())
    run_of = (np.cumsum(weights * share) // _FILE_ROWS).astype(np.int64)  # which file a chunk goes to
    runs = [[chunks[i] for i in np.flatnonzero(run_of == number).tolist()] for number in np.unique(run_of)]
    names = [f"{number:05d}.npy" for number in range(len(runs))]
    there = scratch.names()
    if not all(f"rows-{name}" in there for name in names):
        limit = sample_limit(source, size, seed, execution, label)
        run_pieces(
            _write_rows, runs, [f"rows-{name}" for name in names], scratch, source, seed, limit, execution=execution,
            label=f"{label}, reading", unit="rows", weights=[weights[run_of == n].sum() for n in np.unique(run_of)],
        )  # fmt: skip
    return names


def _write_rows(run: list[Any], folder: Folder, name: str, source: RowSource, seed: int, limit: int | None) -> None:
    parts = [part for chunk in run for part in source.read(chunk, seed, limit)]
    ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in parts)])
    rows = np.concatenate([rows for _, rows in parts]) if parts else np.zeros((0, 0), np.float16)
    folder.write_array(name.replace("rows-", "ids-"), ids)
    folder.write_array(name, rows)


# --- Lloyd's iterations ----------------------------------------------------------------------------------------------


def _lloyd(
    names: list[str],
    num_clusters: int,
    num_iterations: int,
    seed: int,
    execution: ExecutionConfig,
    scratch: Folder,
    label: str,
) -> np.ndarray:
    """`ops.kmeans` with its start, its first iterations on a quarter of the rows, and its end where nothing changes."""
    ids = [scratch.read_array(f"ids-{name}") for name in names]
    hashes = np.sort(np.concatenate([hash_uint64(seed, some) for some in ids]))
    names, sizes = (
        [n for n, some in zip(names, ids, strict=True) if len(some)],
        [len(some) for some in ids if len(some)],
    )
    few = len(hashes) // 4
    num_first = 2 * num_iterations // 5 if few >= ops.MIN_FIRST_ROWS * num_clusters else 0
    done = sorted(name for name in scratch.names() if name.startswith("iteration-"))
    start = len(done)
    if done:
        centroids, previous = scratch.read_array(done[-1]), _read(scratch, f"cells-{start - 1:03d}.npy")
    else:
        centroids, previous = _start(names, hashes, num_clusters, seed, execution, scratch, label), None
    # A task adds up several files, so that an iteration leaves few sums of num_clusters x D.
    device = task_device(execution)
    num_shares = min(len(names), _MOST_SUMS, 2 * num_at_once(device, execution))
    shares = [(f"sums-{number:03d}.f64", list(range(len(names)))[number::num_shares]) for number in range(num_shares)]
    counts = np.ones(num_clusters, np.int64)
    for iteration in range(start, num_iterations):
        limit = int(hashes[few - 1]) if iteration < num_first else None
        found = run_on(
            device, _add_up, [(into, [names[i] for i in own]) for into, own in shares], scratch, seed, limit, centroids,
            device, execution=execution, label=f"{label} iteration {iteration + 1}/{num_iterations}", unit="rows",
            weights=[sum(sizes[i] for i in own) for _, own in shares],
        )  # fmt: skip
        counts, scores = sum(f[0] for f in found), sum(f[1] for f in found)
        cells = np.empty((len(names), 16), np.uint8)  # digests, by file
        for (_, own), (_, _, digests) in zip(shares, found, strict=True):
            cells[own] = digests
        if iteration > num_first and previous is not None and np.array_equal(cells, previous):
            break
        centroids = _means([into for into, _ in shares], counts, centroids, scratch)
        centroids, _ = ops.reseed_empty(centroids, counts, scores, "cosine", seed + iteration)
        previous = cells
        scratch.write_array(f"cells-{iteration:03d}.npy", cells)
        scratch.write_array(f"iteration-{iteration:03d}.npy", centroids)
        if iteration:
            scratch.delete(f"cells-{iteration - 1:03d}.npy")
    if num_empty := int(np.count_nonzero(counts == 0)):
        logger.warning("k-means leaves %d of %d cells empty: too few distinct rows.", num_empty, num_clusters)
    return centroids


def _read(scratch: Folder, name: str) -> np.ndarray | None:
    return scratch.read_array(name) if scratch.exists(name) else None


def _start(
    names: list[str],
    hashes: np.ndarray,
    num_clusters: int,
    seed: int,
    execution: ExecutionConfig,
    scratch: Folder,
    label: str,
) -> np.ndarray:
    """`ops.initial_centroids` of the whole sample: the distinct rows of smallest hash."""
    looked_at = num_clusters
    while True:
        limit = int(hashes[min(looked_at, len(hashes)) - 1])
        found = run_tasks(
            _small_rows, names, scratch, seed, limit, execution=execution, label=f"{label}, start", unit="files"
        )
        rows, ids = (np.concatenate(column) for column in zip(*found, strict=True))
        centroids, num_distinct = ops.distinct_start(unit(rows), num_clusters, seed, ids)
        if num_distinct == num_clusters or looked_at >= len(hashes):
            return centroids
        looked_at *= 4


def _small_rows(name: str, scratch: Folder, seed: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
    ids = scratch.read_array(f"ids-{name}")
    chosen = hash_uint64(seed, ids) <= np.uint64(limit)
    return scratch.read_array(f"rows-{name}")[chosen], ids[chosen]


def _add_up(
    share: tuple[str, list[str]],
    scratch: Folder,
    seed: int,
    limit: int | None,
    centroids: np.ndarray,
    device: str | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes the sums of some files: counts, sums of scores, and a digest of the rows' cells for each file."""
    into, names = share
    digests = np.zeros((len(names), 16), np.uint8)
    total: ops.PartialSums | None = None
    for number, name in enumerate(names):
        rows = scratch.read_array(f"rows-{name}")
        if limit is not None:
            rows = rows[hash_uint64(seed, scratch.read_array(f"ids-{name}")) <= np.uint64(limit)]
        rows = unit(rows)
        cell, score = ops.assign(rows, centroids, num_threads=1, device=device)
        digests[number] = np.frombuffer(hashlib.blake2b(cell.tobytes(), digest_size=16).digest(), np.uint8)
        sums = ops.partial_sums(rows, cell, score, len(centroids), num_threads=1, device=device)
        total = sums if total is None else ops.add(total, sums)
    assert total is not None
    scratch.write_bytes(into, total.sums.data.cast("B"))
    return total.counts, total.scores, digests


def _means(names: list[str], counts: np.ndarray, centroids: np.ndarray, scratch: Folder) -> np.ndarray:
    """The cells' means from files of sums, a block of cells at a time: float64 sums of all of them are large."""
    num_clusters, width = centroids.shape
    result = np.empty_like(centroids)
    step = max(1, _BLOCK_BYTES // (8 * width))
    for start in range(0, num_clusters, step):
        cells = slice(start, min(start + step, num_clusters))
        sums = np.zeros((cells.stop - start, width))
        for name in names:
            content = scratch.read_range(name, 8 * width * start, 8 * width * cells.stop)
            sums += np.frombuffer(content).reshape(-1, width)
        result[cells] = ops.cell_means(sums, counts[cells], centroids[cells], "cosine")
    return result


# --- assignment ------------------------------------------------------------------------------------------------------


def assign_rows(
    source: RowSource, centroids: np.ndarray, execution: ExecutionConfig, folder: Folder, label: str
) -> list[str]:
    """The nearest centroid of every row, in files of `folder`: int32, one a chunk, in the order of ids."""
    chunks = source.chunks()
    names = [f"assigned-{number:05d}.npy" for number in range(len(chunks))]
    device = task_device(execution)
    run_pieces(
        _assign_chunk, chunks, names, folder, source, centroids, device, execution=execution, label=label, unit="rows",
        weights=source.weights(), run=partial(run_on, device),
    )  # fmt: skip
    return names


def _assign_chunk(
    chunk: Any, folder: Folder, name: str, source: RowSource, centroids: np.ndarray, device: str | None
) -> None:
    cells = [ops.assign(unit(rows), centroids, num_threads=1, device=device)[0] for _, rows in source.read(chunk)]
    folder.write_array(name, np.concatenate([np.zeros(0, np.int32), *cells]).astype(np.int32))
