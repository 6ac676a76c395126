"""Vectors grouped by cell, in files that tasks write and read on any store: see curation.ops.cells for what they are.

Rows are moved to their cells by an exchange. A file holds the rows of some cells in their order, or some rows of a cell
that is too large for one; within a file gids come first, then sketches, then vectors, so that a range of rows of one
column is a range of bytes. Files are of one size, whatever the memory, so that they are the same for all settings.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from curation.engine.exchange import BUCKET, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.cells import Cells, cell_offsets, check_centroids, sketches_of
from curation.ops.sketches import SKETCH_WORDS, sketch_directions
from curation.stages.members import RowSource

_FILE_BYTES = 2**27
_ITEM_BYTES = 2**30  # of vectors that one task of the exchange reads, at most
_LEAST_ITEMS = 64  # unless chunks are fewer
_MOST_TABLE_BYTES = 2**29
_GID_BITS = 40

Item = list[tuple[int, Any]]
"""Chunks of a source, each with its number."""
CellsOf = Callable[[int, Any], np.ndarray]
"""(number, chunk) of a source -> the cell of each of the chunk's ids; tasks call it."""
Known = Callable[[Any], np.ndarray | None]
"""chunk of a source -> the sketches of its rows, uint64 [n, 8], or None where they are to be made; tasks call it."""


@dataclass(frozen=True)
class _Work:
    """What every task of the exchange knows."""

    source: RowSource
    cells_of: CellsOf
    known: Known | None
    starts: np.ndarray
    """int64 [files]: the key of each file's first row"""
    table_bytes: int
    out: Folder
    directions: np.ndarray


def write_cells(
    folder: Folder,
    source: RowSource,
    cells_of: CellsOf,
    centroids: np.ndarray,
    execution: ExecutionConfig,
    label: str,
    known: Known | None = None,
    *,
    seed: int = 0,
) -> list[File]:
    """Group the rows of a source, with an exchange; a bucket that is written is not written again.

    Args:
        folder: of the stage; files go to `cells/` in it, the exchange's own to `exchange/`.
        source: float16 rows of norm 1; its bounds cut large cells.
        centroids: [K, D].
        known: sketches of this seed that need not be made, of whole chunks.
        seed: of the sketches.

    Raises:
        ValueError: rows or centroids not of unit norm.
    """
    centroids = np.ascontiguousarray(centroids, np.float32)
    num_cells, dim = centroids.shape
    check_centroids(centroids, dim)
    first_ids = np.array([start for start, _ in source.bounds()], np.int64)
    assert num_cells < 2 ** (63 - _GID_BITS)
    assert source.bounds()[-1][1] < 2**_GID_BITS
    out = folder / "cells"
    items = _items(source.chunks(), 2 * dim * len(source))
    told: dict[str, Any] = {"execution": execution, "label": f"{label}: sizes", "unit": "rows"}
    of_chunk = source.weights()
    weights = [sum(of_chunk[number] for number, _ in item) for item in items]
    sizes = np.zeros(num_cells, np.int64)
    for counts in run_tasks(_sizes, items, cells_of, num_cells, weights=weights, **told):
        sizes += counts
    row_bytes = 2 * dim + 8 * SKETCH_WORDS + 8
    rows_per_file = max(_FILE_BYTES // row_bytes, 1)
    large = np.flatnonzero(sizes > rows_per_file)
    by_interval = np.zeros((0, len(large)), np.int64)
    if len(large):
        by_interval = sum(run_tasks(_sizes_by_id, items, source, cells_of, large, first_ids, weights=weights, **told))
    starts, first_rows = _cut(sizes, large, by_interval, first_ids, rows_per_file)
    table_bytes = min(int(execution.memory_gb * 1e9 / 8), _MOST_TABLE_BYTES)
    directions = sketch_directions(dim, seed)
    work = _Work(source, cells_of, known, starts, table_bytes, out, directions)
    names = [f"rows-{number:05d}.json" for number in range(len(starts))]
    exchange(
        items, _rows_of_item, len(starts), _write_file, work,
        scratch=folder / "exchange" / "cells", outputs=(out / "done", names), sort_by=["cell", "gid"],
        execution=execution, label=label, unit="rows", weights=weights,
    )  # fmt: skip
    files = [File(**json.loads((out / "done").read_bytes(name))) for name in names]
    arrays = {"offsets": cell_offsets(sizes), "centroids": centroids, "directions": directions}
    files += [out.write_array(f"{name}.npy", array) for name, array in arrays.items()]
    shape = {"num_rows": len(source), "dim": dim, "num_cells": num_cells, "first_rows": first_rows.tolist()}
    files.append(out.write_bytes("cells.json", json.dumps(shape).encode()))
    return [File(**{**asdict(file), "path": f"cells/{file.path}"}) for file in files]


def open_cells(folder: Folder) -> Cells:
    """What write_cells wrote for a stage. Raises ValueError where no finished cells lie."""
    cells = folder / "cells"
    try:
        shape = json.loads(cells.read_bytes("cells.json"))
    except FileNotFoundError:
        raise ValueError(f"{cells.url} holds no finished cells (no cells.json): write them first.") from None
    dim, first_rows = shape["dim"], np.array(shape["first_rows"], np.int64)
    column = partial(_Column, cells, first_rows)
    return Cells(
        shape["num_rows"],
        dim,
        cells.read_array("offsets.npy"),
        cells.read_array("centroids.npy"),
        cells.read_array("directions.npy"),
        column(8 * SKETCH_WORDS + 8, dim, np.dtype(np.float16)),
        column(8, SKETCH_WORDS, np.dtype(np.uint64)),
        column(0, 1, np.dtype(np.int64)),
    )


@dataclass(frozen=True)
class _Column:
    """One column of all files; slicing reads just those rows.

    Read by offset and never mapped, so that pages of a file do not count as the process's memory.
    """

    folder: Folder
    first_rows: np.ndarray
    """int64 [files + 1]: the first row of each file, then the number of rows"""
    bytes_before: int
    """of a row, in the columns before this one"""
    width: int
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop = rows.start, max(rows.stop, rows.start)
        found = [np.empty((0, self.width), self.dtype)]
        number = int(np.searchsorted(self.first_rows, start, side="right")) - 1
        while start < stop:
            first, end = self.first_rows[number : number + 2].tolist()
            until = min(stop, end)
            found.append(self._read(number, end - first, start - first, until - first))
            start, number = until, number + 1
        return found[-1] if len(found) < 3 else np.concatenate(found)

    def _read(self, number: int, num_rows: int, start: int, stop: int) -> np.ndarray:
        name, size = f"rows-{number:05d}.bin", self.width * self.dtype.itemsize
        offset = num_rows * self.bytes_before + start * size
        if self.folder.is_local:
            values = np.fromfile(self.folder.path(name), self.dtype, (stop - start) * self.width, offset=offset)
        else:
            content = self.folder.read_range(name, offset, offset + (stop - start) * size)
            values = np.frombuffer(content, self.dtype, len(content) // self.dtype.itemsize)
        if values.size != (stop - start) * self.width:
            raise OSError(
                f"{self.folder.url}/{name} is shorter than its cells.json says: delete that folder to have it written "
                "again."
            )
        return values.reshape(-1, self.width)


def _items(chunks: Sequence[Any], num_bytes: int) -> list[Item]:
    """Runs of chunks for a task each; they depend on nothing but the source."""
    number = min(len(chunks), max(_LEAST_ITEMS, -(-num_bytes // _ITEM_BYTES)))
    cuts = np.linspace(0, len(chunks), number + 1).astype(int).tolist()
    numbered = list(enumerate(chunks))
    return [numbered[first:stop] for first, stop in pairwise(cuts)]


def _sizes(item: Item, cells_of: CellsOf, num_cells: int) -> np.ndarray:
    return sum((np.bincount(cells_of(*chunk), minlength=num_cells) for chunk in item), np.zeros(num_cells, int))


def _sizes_by_id(
    item: Item, source: RowSource, cells_of: CellsOf, cells: np.ndarray, first_ids: np.ndarray
) -> np.ndarray:
    """int64 [intervals of ids, cells]."""
    counts = np.zeros((len(first_ids), len(cells)), np.int64)
    for number, chunk in item:
        of_row = cells_of(number, chunk)
        at = np.minimum(np.searchsorted(cells, of_row), len(cells) - 1)
        here = cells[at] == of_row
        interval = np.searchsorted(first_ids, source.ids(chunk)[here], side="right") - 1
        np.add.at(counts, (interval, at[here]), 1)
    return counts


def _cut(
    sizes: np.ndarray, large: np.ndarray, by_interval: np.ndarray, first_ids: np.ndarray, rows_per_file: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where files begin: the key of each one's first row, int64 [files], and its number, int64 [files + 1].

    Whole cells, as many as fit; of a large cell, the rows of whole intervals of ids.
    """
    starts, rows, held, at = [0], [0], 0, 0
    column_of = {cell: column for column, cell in enumerate(large.tolist())}
    for cell, size in enumerate(sizes.tolist()):
        pieces = [(0, size)]
        if cell in column_of:
            pieces = list(zip(first_ids.tolist(), by_interval[:, column_of[cell]].tolist(), strict=True))
        for first_id, count in pieces:
            if held and held + count > rows_per_file:
                starts.append(_key(cell, first_id))
                rows.append(at)
                held = 0
            held, at = held + count, at + count
    return np.array(starts, np.int64), np.array([*rows, at], np.int64)


def _key(cell: Any, gid: Any) -> Any:
    """int64: ascending by cell, then gid."""
    return (cell << _GID_BITS) + gid


def _rows_of_item(item: Item, work: _Work) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    for number, chunk in item:
        cells, at = work.cells_of(number, chunk).astype(np.int64), 0
        sketches = work.known(chunk) if work.known is not None else None
        for gids, rows in work.source.read(chunk):
            here = slice(at, at + len(gids))
            at += len(gids)
            half = np.ascontiguousarray(rows, np.float16)
            columns = {
                BUCKET: np.searchsorted(work.starts, _key(cells[here], gids), side="right") - 1,
                "cell": cells[here],
                "gid": gids,
                "sketch": _as_bytes(sketches_of(half, work.directions) if sketches is None else sketches[here]),
                "vector": _as_bytes(half),
            }
            held.append(pa.table(columns))
        if sum(table.nbytes for table in held) >= work.table_bytes:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _as_bytes(rows: np.ndarray) -> pa.Array:
    kind = pa.binary(rows.itemsize * rows.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows))])


def _bytes_of(column: pa.ChunkedArray) -> memoryview:
    """Of all rows of a column of _as_bytes, one after the other."""
    whole = column.combine_chunks()
    [array] = whole.chunks if isinstance(whole, pa.ChunkedArray) else [whole]
    width = array.type.byte_width
    return memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width]


def _write_file(bucket: int, table: pa.Table, work: _Work) -> None:
    content = b""
    if table.num_rows:
        gids = table["gid"].to_numpy().astype(np.int64)
        content = b"".join((gids.tobytes(), _bytes_of(table["sketch"]), _bytes_of(table["vector"])))
    written = work.out.write_bytes(f"rows-{bucket:05d}.bin", content, rows=table.num_rows)
    (work.out / "done").write_bytes(f"rows-{bucket:05d}.json", json.dumps(asdict(written)).encode())
