"""Rows to where their key lives: one operation for all that moves by key, on Ray tasks and files.

Each map task writes the rows of its item grouped by bucket, and where each bucket begins; each reduce task reads its
bucket from all of them by range requests. Files are all that passes between tasks, so nodes share nothing but the run
folder, memory is one bucket, and what was finished before an interruption is not done again. The result does not depend
on workers: pieces are read in the order of items, and then sorted.

Measured against Ray Data's hash shuffle: `python -m benchmarks.exchange`.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa

from curation.engine.devices import run_on
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig, finished_pieces, free_memory, run_pieces

BUCKET = "bucket"
"""int column of what a map function gives: where the row goes; it does not arrive there"""
FILES = ("map-*.arrow", "map-*.npy")
_REQUESTS_AT_ONCE = 16  # of one reduce task on an object store

Map = Callable[..., Iterable[pa.Table]]
Reduce = Callable[..., Any]


def exchange(
    items: Sequence[Any],
    map_rows: Map,
    num_buckets: int,
    reduce_rows: Reduce,
    *shared: Any,
    scratch: Folder,
    outputs: tuple[Folder, Sequence[str]],
    sort_by: Sequence[str],
    execution: ExecutionConfig,
    label: str,
    unit: str,
    weights: Sequence[float] | None = None,
    map_device: str | None = None,
    reduce_device: str | None = None,
) -> None:
    """Move rows by bucket, and make one file of each bucket.

    Args:
        items: what the map tasks start from, a name or a number each; their order is part of the result.
        map_rows: (item, *shared) -> tables, each of a size that fits `execution.memory_gb` a few times over, with a
            column BUCKET.
        num_buckets: so many that the rows of one fit `execution.memory_gb` (`buckets_for`).
        reduce_rows: (bucket, table, *shared) -> what `output_writer` takes; the table is sorted by `sort_by`, and has
            no column at all where no row came.
        scratch: a folder for this exchange alone; emptied when all is done.
        outputs: the folder and the name of each bucket's file, which `reduce_rows` writes as its last act:
            a bucket whose file is there is not done again.
        sort_by: columns that tell all rows apart, or any order among equal ones would do.
        map_device, reduce_device: where those functions compute: see `run_on`.
    """
    folder, names = outputs
    assert len(names) == num_buckets
    done = finished_pieces(folder, names)
    todo = [bucket for bucket, name in enumerate(names) if name not in done]
    if todo:
        maps = [_map_name(number, item, num_buckets) for number, item in enumerate(items)]
        run_pieces(
            _map,
            items,
            maps,
            scratch,
            map_rows,
            num_buckets,
            shared,
            execution=execution,
            label=label,
            unit=unit,
            weights=weights,
            run=partial(run_on, map_device),
        )
        run_on(
            reduce_device,
            _reduce,
            _Jobs(todo, num_buckets, maps, scratch),
            maps,
            reduce_rows,
            scratch,
            list(sort_by),
            shared,
            execution=execution,
            label=f"{label}, by key",
            unit="buckets",
            names=[names[bucket] for bucket in todo],
        )
    scratch.clear(FILES)


def buckets_for(num_bytes: float, execution: ExecutionConfig) -> int:
    """How many buckets cut `num_bytes` into eighths of `execution.memory_gb`: a bucket is read, sorted and grouped.

    The number must not change results, only how they are cut into files that do not stay; those should be named after
    it, since a run may be continued with another memory.
    """
    return max(1, -(-int(num_bytes) // int(execution.memory_gb * 1e9 / 8)))


def bucket_of(keys: np.ndarray, num_buckets: int) -> np.ndarray:
    """int32 [N]: a bucket for each key, by its first 8 bytes; keys are uint64 hashes, or digests as uint8 [N, >= 8]."""
    if keys.dtype == np.uint8:
        keys = np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
    # The high half of the product of two 64-bit numbers, from the key's upper 32 bits: as even as the keys are.
    return ((keys >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)).astype(np.int32)


_Job = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""A bucket, and of each table that has rows of it: number of the map file, offset there and size in bytes, int64 [P]"""


class _Jobs(Sequence[_Job]):
    """What the reduce tasks start from, made when it is asked for: the driver holds 8 bytes a bucket and table."""

    def __init__(self, buckets: Sequence[int], num_buckets: int, maps: Sequence[str], scratch: Folder) -> None:
        self.buckets = buckets
        with ThreadPoolExecutor(1 if scratch.is_local else _REQUESTS_AT_ONCE) as pool:
            tables = list(pool.map(scratch.read_array, maps))
        self.file = np.repeat(np.arange(len(tables)), [len(bounds) for bounds in tables])
        self.bounds = np.concatenate([np.zeros((0, num_buckets + 1), np.int64), *tables])  # [tables, buckets + 1]

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, number: int) -> _Job:  # type: ignore[override]  # nobody asks for slices
        bucket = self.buckets[number]
        start, stop = self.bounds[:, bucket], self.bounds[:, bucket + 1]
        here = np.flatnonzero(stop > start)
        return bucket, self.file[here], start[here], (stop - start)[here]


def _map_name(number: int, item: object, num_buckets: int) -> str:
    """It tells the item: what an interrupted call left of others, as with another memory, is not taken for ours."""
    return f"map-{num_buckets}-{number:05d}-{sha256(pickle.dumps(item)).hexdigest()[:8]}.npy"


def _rows_file(name: str) -> str:
    return name.removesuffix(".npy") + ".arrow"


def _map(item: Any, scratch: Folder, name: str, map_rows: Map, num_buckets: int, shared: tuple[Any, ...]) -> None:
    """Write the rows, then where each bucket of each table begins: the file whose presence says that all is there."""
    offsets: list[np.ndarray] = []
    with scratch.writing(_rows_file(name)) as file:
        at = 0
        for table in map_rows(item, *shared):
            sizes = np.zeros(num_buckets + 1, np.int64)
            for bucket, rows in _grouped(table, num_buckets):
                content = _to_bytes(rows)
                file.write(content)
                sizes[bucket + 1] = len(content)
                del rows, content
            offsets.append(at + np.cumsum(sizes))
            at = int(offsets[-1][-1])
            del table  # before the next one is made
            free_memory()
    scratch.write_array(name, np.array(offsets, np.int64).reshape(-1, num_buckets + 1))


def _grouped(table: pa.Table, num_buckets: int) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each bucket that has any, in their order; one bucket's are copied at a time."""
    buckets = table[BUCKET].to_numpy()
    table = table.drop_columns([BUCKET]).combine_chunks()
    if num_buckets == 1:
        if table.num_rows:
            yield 0, table
        return
    order = np.argsort(buckets, kind="stable")
    starts = np.searchsorted(buckets[order], np.arange(num_buckets + 1))
    for bucket in np.flatnonzero(np.diff(starts)):
        yield int(bucket), table.take(pa.array(order[starts[bucket] : starts[bucket + 1]]))


def _to_bytes(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _reduce(
    job: _Job, maps: Sequence[str], reduce_rows: Reduce, scratch: Folder, sort_by: list[str], shared: tuple[Any, ...]
) -> None:
    bucket, *pieces = job
    reduce_rows(bucket, _gathered(maps, pieces, scratch, sort_by), *shared)


def _gathered(maps: Sequence[str], pieces: Sequence[np.ndarray], scratch: Folder, sort_by: list[str]) -> pa.Table:
    def read(file: int, offset: int, size: int) -> pa.Table:
        content = scratch.read_range(_rows_file(maps[file]), offset, offset + size)
        with pa.ipc.open_stream(pa.py_buffer(content)) as reader:  # its columns lie in these bytes
            return reader.read_all()

    if not len(pieces[0]):
        return pa.table({})
    with ThreadPoolExecutor(1 if scratch.is_local else _REQUESTS_AT_ONCE) as pool:
        table = pa.concat_tables(pool.map(read, *(column.tolist() for column in pieces)))
    return table.sort_by([(name, "ascending") for name in sort_by]) if sort_by else table
