"""Where every chosen image is in the end: in a shard, or lost, with the reason; by range of gids for the account."""

import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.engine.exchange import BUCKET, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges, range_file
from curation.engine.workers import ExecutionConfig, run_tasks

R = TypeVar("R")

PLACED = "placed"
LOST_FILE = "not_written.parquet"
PLACED_SCHEMA = pa.schema([("gid", pa.int64()), ("shard", pa.string()), ("reason", pa.string())])
_LOST_SCHEMA = pa.schema([("set", pa.string()), ("gid", pa.int64()), ("reason", pa.string())])
_READS_AT_ONCE = 16  # of one task on an object store


@dataclass
class Outcome:
    """What became of some shards."""

    files: list[File]
    lost: Counter[tuple[str, str]]
    """images by set and reason"""
    losers: list[str]
    """shards that lack some of what they were to hold"""
    fetched: Counter[str]
    """requests and bytes that it took to read what was kept, from remote sources alone; and the bytes that were kept"""


def index_name(shard: str) -> str:
    """The index of a shard, from its name with or without a suffix."""
    return f"index/{posixpath.splitext(shard)[0]}.parquet"


def record_name(shard: str) -> str:
    """The record of a shard, from its name without suffix."""
    return f"done/{shard}.json"


def outcome_of(folder: Folder, buckets: Sequence[Sequence[str]], execution: ExecutionConfig) -> Outcome:
    """Add up the records of all shards; each task reads those of one bucket."""
    parts = run_tasks(
        _outcome,
        buckets,
        folder,
        execution=execution,
        label="shard records",
        unit="shards",
        weights=list(map(len, buckets)),
    )
    return Outcome(
        [file for part in parts for file in part.files],
        sum((part.lost for part in parts), Counter()),
        [name for part in parts for name in part.losers],
        sum((part.fetched for part in parts), Counter()),
    )


def write_lost(folder: Folder, losers: Iterable[str]) -> None:
    """LOST_FILE: set, gid and reason of every image that was chosen and is in no shard; one shard's at a time."""
    with folder.writing(LOST_FILE) as file, pq.ParquetWriter(file, _LOST_SCHEMA, compression="zstd") as writer:
        for name in losers:
            record = json.loads(folder.read_bytes(record_name(name)))
            writer.write_table(pa.Table.from_pylist(record["lost"], _LOST_SCHEMA))


def place(
    folder: Folder, buckets: Sequence[Sequence[str]], set_name: str, ranges: Ranges, execution: ExecutionConfig
) -> None:
    """Write PLACED_SCHEMA by range of the gids of one set, sorted by gid: every image of it that was chosen."""
    exchange(
        buckets, _rows_of_bucket, len(ranges), _write_range, folder, set_name, ranges, 
        scratch=folder / "exchange/placed",
        outputs=(folder / PLACED, [range_file("placed", number) for number in range(len(ranges))]), sort_by=["gid"],
        execution=execution, label="placed", unit="shards", weights=list(map(len, buckets)),
    )  # fmt: skip


def read_placed(folder: Folder, number: int) -> pa.Table:
    """The chosen pool images of one range, sorted by gid: `shard` (a file name; null where lost) and `reason`."""
    return (folder / PLACED).read_table(range_file("placed", number))


def _outcome(names: Sequence[str], folder: Folder) -> Outcome:
    outcome = Outcome([], Counter(), [], Counter())
    for name, record in zip(names, _at_once(lambda name: _record(folder, name), names, folder), strict=True):
        if record["file"] is not None:
            outcome.files.append(File(**record["file"]))
        if record["lost"]:
            outcome.losers.append(name)
        outcome.lost.update((row["set"], row["reason"]) for row in record["lost"])
        outcome.fetched.update(record["fetched"])
    return outcome


def _rows_of_bucket(names: Sequence[str], folder: Folder, set_name: str, ranges: Ranges) -> Iterator[pa.Table]:
    for table in _at_once(lambda name: _rows_of_shard(folder, name, set_name), names, folder):
        buckets = ranges.of(table["gid"].to_numpy()).astype(np.int32)
        yield table.append_column(BUCKET, pa.array(buckets))


def _rows_of_shard(folder: Folder, name: str, set_name: str) -> pa.Table:
    record = _record(folder, name)
    entries = folder.read_table(index_name(name), ["gid", "set"])
    gids = np.unique(entries["gid"].to_numpy()[entries["set"].to_numpy(zero_copy_only=False) == set_name])
    lost = [row for row in record["lost"] if row["set"] == set_name]
    columns = {
        "gid": [*gids.tolist(), *(row["gid"] for row in lost)],
        "shard": [record["file"]["path"]] * len(gids) + [None] * len(lost) if len(gids) else [None] * len(lost),
        "reason": [None] * len(gids) + [row["reason"] for row in lost],
    }
    return pa.table(columns, schema=PLACED_SCHEMA)


def _write_range(number: int, table: pa.Table, folder: Folder, set_name: str, ranges: Ranges) -> None:
    rows = table.select(PLACED_SCHEMA.names) if table.num_rows else PLACED_SCHEMA.empty_table()
    (folder / PLACED).write_table(range_file("placed", number), rows)


def _record(folder: Folder, name: str) -> dict[str, Any]:
    return json.loads(folder.read_bytes(record_name(name)))


def _at_once(read: Callable[[str], R], names: Sequence[str], folder: Folder) -> Iterator[R]:
    with ThreadPoolExecutor(1 if folder.is_local else _READS_AT_ONCE) as pool:
        yield from pool.map(read, names)
