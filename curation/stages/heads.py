"""heads: of the images that look the same by their hashes, one that stands for all.

The same looks: equal perceptual hashes of the image and of its mirror image; where the hash says little, equal bytes.
Only heads enter the join: a placeholder that 300,000 pages show in as many encodings would make 10^11 pairs. The head
is the one that an earlier release kept, or that stood for its group there; then the largest of them in pixels, then in
bytes, then the one of smallest gid.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.exchange import BUCKET, bucket_of, buckets_for, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import column_values
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.components import representatives
from curation.ops.hashes import MIN_QUALITY, equal_groups, row_hashes
from curation.stages.filter import read_batches

VERSION = 1
_COLUMNS = ["reason", "sha256", "pdq", "pdq_mirrored", "pdq_quality", "standing", "pixels", "bytes"]
_KEYS = ("standing", "pixels", "bytes")  # of the head, the most important first
_ROW_BYTES = 240  # of one while its looks are compared: twice what travels
_READ_BYTES = 800  # of one while leaders are found
_LOOKS_BYTES = 64


def find_heads(
    folder: Folder, filtered: Folder, ranges: Ranges, execution: ExecutionConfig
) -> tuple[list[File], dict[str, int]]:
    """Write range-*.parquet: `head`, the gid that stands for each image; null for those that the filters left out.

    Of some rows of one range, a million at most, the head among them is found at once; these leaders travel to where
    all of the same looks meet. The others are known by their leader, so no task holds all copies of one placeholder.

    Args:
        filtered: the folder of the filter stage.

    Returns:
        the files, and the counts: images in, images joined (those that are their own head).
    """
    num_buckets = buckets_for(ranges.num_rows * _ROW_BYTES, execution)
    pieces = [f"piece-{num_buckets}-{bucket:05d}.parquet" for bucket in range(num_buckets)]
    names = [range_file("range", number) for number in range(len(ranges))]
    met = folder / "exchange/met"
    if not set(names) <= set(folder.names()):
        exchange(
            range(len(ranges)), _leaders, num_buckets, _meet, filtered, ranges, num_buckets, met,
            execution.rows_at_once(_READ_BYTES),
            scratch=folder / "exchange/looks", outputs=(met, pieces), sort_by=["gid"], execution=execution,
            label="heads: same looks", unit="images", weights=ranges.weights(),
        )  # fmt: skip
        exchange(
            pieces, _to_ranges, len(ranges), _write_heads, met, ranges, filtered, folder,
            scratch=folder / "exchange/ranges", outputs=(folder, names), sort_by=["gid"], execution=execution,
            label="heads: to their ranges", unit="files",
        )  # fmt: skip
    met.clear(["piece-*.parquet"])
    told = run_tasks(
        _describe, list(enumerate(names)), folder, ranges, execution=execution, label="heads", unit="files"
    )
    counts = {"images in": sum(n for _, n, _ in told), "images joined": sum(n for *_, n in told)}
    return [file for file, *_ in told], counts


def read_heads(folder: Folder, number: int, ranges: Ranges) -> np.ndarray:
    """int64 [rows of the range]: the head's gid, -1 where the filters left the image out."""
    table = folder.read_table(range_file("range", number), ["head"])
    return table["head"].fill_null(-1).to_numpy()


def is_head(number: int, folder: Folder, ranges: Ranges) -> np.ndarray:
    """bool [rows of the range]: the images that the join compares."""
    return read_heads(folder, number, ranges) == np.arange(*ranges.bounds(number))


def _leaders(
    number: int, filtered: Folder, ranges: Ranges, num_buckets: int, met: Folder, rows: int
) -> Iterator[pa.Table]:
    start, _ = ranges.bounds(number)
    for table in read_batches(filtered, number, _COLUMNS, rows):
        yield _led(table, start, num_buckets)
        start += table.num_rows


def _led(table: pa.Table, start: int, num_buckets: int) -> pa.Table:
    """The best image of each looks among some rows, the first of which has the gid `start`, and whom others follow."""
    here = np.flatnonzero(table["reason"].is_null().to_numpy())
    if len(here) < table.num_rows:
        table = table.take(pa.array(here))
    looks = _looks(table)
    keys = {name: table[name].to_numpy().astype(np.int64) for name in _KEYS}
    del table
    leader = representatives(equal_groups(looks), list(keys.values()))
    leads = leader == np.arange(len(leader))
    content = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(_LOOKS_BYTES), len(looks), [None, pa.py_buffer(np.ascontiguousarray(looks))]
    ).cast(pa.binary())
    return pa.table(
        {
            "gid": here + start,
            "leader": here[leader] + start,
            "looks": pc.if_else(pa.array(leads), content, pa.scalar(None, pa.binary())),
            **{name: np.where(leads, values, 0) for name, values in keys.items()},
            BUCKET: bucket_of(row_hashes(looks), num_buckets),
        }
    )


def _looks(table: pa.Table) -> np.ndarray:
    """uint8 [N, 64]: what images that look the same have in common."""
    looks = np.concatenate([column_values(table["pdq"]), column_values(table["pdq_mirrored"])], axis=1)
    vague = table["pdq_quality"].fill_null(0).to_numpy() < MIN_QUALITY
    looks[vague] = np.pad(column_values(table["sha256"])[vague], ((0, 0), (0, _LOOKS_BYTES - 32)))
    return looks


def _meet(
    bucket: int, table: pa.Table, filtered: Folder, ranges: Ranges, num_buckets: int, met: Folder, rows_at_once: int
) -> None:
    """(gid, head) of every image of the bucket that is not its own head, by gid."""
    rows = {"gid": np.empty(0, np.int64), "head": np.empty(0, np.int64)}
    if table.num_rows:
        gid, leader = table["gid"].to_numpy(), table["leader"].to_numpy()
        leads = np.flatnonzero(gid == leader)
        own = table.take(pa.array(leads))
        looks = column_values(own["looks"].cast(pa.binary(_LOOKS_BYTES)))
        best = representatives(equal_groups(looks), [own[name].to_numpy() for name in _KEYS])
        head = gid[leads][best][np.searchsorted(gid[leads], leader)]
        rows = {"gid": gid[head != gid], "head": head[head != gid]}
    met.write_table(f"piece-{num_buckets}-{bucket:05d}.parquet", pa.table(rows))


def _to_ranges(name: str, met: Folder, ranges: Ranges, filtered: Folder, folder: Folder) -> Iterator[pa.Table]:
    table = met.read_table(name)
    yield table.append_column(BUCKET, pa.array(ranges.of(table["gid"].to_numpy()).astype(np.int32)))


def _write_heads(number: int, table: pa.Table, met: Folder, ranges: Ranges, filtered: Folder, folder: Folder) -> None:
    start, stop = ranges.bounds(number)
    out = np.concatenate([t["reason"].is_valid().to_numpy() for t in read_batches(filtered, number, ["reason"])])
    head = np.arange(start, stop)
    if table.num_rows:
        head[table["gid"].to_numpy() - start] = table["head"].to_numpy()
    folder.write_table(range_file("range", number), pa.table({"head": pa.array(head, mask=out)}))


def _describe(job: tuple[int, str], folder: Folder, ranges: Ranges) -> tuple[File, int, int]:
    number, name = job
    heads = read_heads(folder, number, ranges)
    start, stop = ranges.bounds(number)
    return folder.described(name, len(heads)), int((heads >= 0).sum()), int((heads == np.arange(start, stop)).sum())
