"""Rules on the index: which decodable images are not worth having, and the first reason for each."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_pieces
from curation.reading.filters import Filter, first_reasons

VERSION = 2
_COLUMNS = ["key", "sha256", "metadata", "width", "height", "luma_deviation", "status", "reason"]


@dataclass(frozen=True)
class _Rows:
    """Rows [start, stop) of one file of the index."""

    name: str
    start: int
    stop: int


def filter_pool(
    folder: Folder, pool: ImageSet, filters: Sequence[Filter], ranges: Ranges, execution: ExecutionConfig
) -> list[File]:
    """Write reasons-*.parquet, one for each range: a row a gid, `reason` null for the images that go on."""
    items = [_rows_of(pool, *ranges.bounds(number)) for number in range(len(ranges))]
    names = [range_file("reasons", number) for number in range(len(ranges))]
    run_pieces(
        _write_reasons,
        items,
        names,
        folder,
        pool.folder,
        list(filters),
        execution=execution,
        label="filter",
        unit="images",
        weights=ranges.weights(),
    )
    files = []
    for name, rows in zip(names, ranges.weights(), strict=True):
        content = folder.read_bytes(name)
        files.append(File(path=name, rows=int(rows), bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    return files


def read_range(folder: Folder, number: int) -> pa.ChunkedArray:
    """string, by gid of a range: why each image was dropped, null for those that go on."""
    return folder.read_table(range_file("reasons", number))["reason"].cast(pa.string())


def read_reasons(folder: Folder) -> pa.ChunkedArray:
    """string [num_images], null for the images that go on."""
    numbers = range(sum(name.startswith("reasons-") for name in folder.entries()))
    return pa.chunked_array([chunk for number in numbers for chunk in read_range(folder, number).chunks], pa.string())


def passed(folder: Folder) -> np.ndarray:
    """int64, ascending: the gids that go on."""
    return np.flatnonzero(read_reasons(folder).is_null().to_numpy()).astype(np.int64)


def _rows_of(pool: ImageSet, start: int, stop: int) -> list[_Rows]:
    """Where the index has the gids [start, stop)."""
    first, last = np.searchsorted(pool.part_base, [start, stop - 1], side="right") - 1
    bounds = pool.part_base[first : last + 2].clip(start, stop)
    return [
        _Rows(pool.index_files[part].path, int(begin - base), int(end - base))
        for part, base, begin, end in zip(
            range(first, last + 1), pool.part_base[first : last + 1], bounds[:-1], bounds[1:], strict=True
        )
        if end > begin
    ]


def _write_reasons(rows: list[_Rows], folder: Folder, name: str, index: Folder, filters: list[Filter]) -> None:
    chunks = []
    for part in rows:
        table = index.read_table(part.name, _COLUMNS).slice(part.start, part.stop - part.start)
        chunks.append(pa.array(first_reasons(table, filters).tolist(), pa.string()).dictionary_encode())
    folder.write_table(name, pa.table({"reason": pa.chunked_array(chunks).unify_dictionaries()}))
