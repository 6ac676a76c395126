"""filter: rules on the index, and what the steps after it ask of every image, in files of a range of gids.

The index has twenty columns and lies in as many files as the pool has shards. Here the few that are read again (hashes,
sizes) are written once, beside the reason why an image is left out, in the order of gids.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.engine.earlier import Earlier
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet, PartRows, read_rows
from curation.engine.workers import ExecutionConfig, run_pieces, run_tasks
from curation.reading.filters import Filter, first_reasons
from curation.stages.exclude import EXCLUDED, excluded_gids

VERSION = 3
_INDEX = ["key", "sha256", "metadata", "width", "height", "luma_deviation", "status", "reason"]
_COLUMNS = [*_INDEX, "image", "pdq", "pdq_mirrored", "pdq_quality"]
_ROW_GROUP = 1 << 20
SCHEMA = pa.schema(
    [
        ("reason", pa.string()),  # null for the images that go on
        ("sha256", pa.binary(32)),
        ("pdq", pa.binary(32)),
        ("pdq_mirrored", pa.binary(32)),
        ("pdq_quality", pa.int32()),
        ("pixels", pa.int64()),  # width x height; 0 where unknown
        ("bytes", pa.int64()),  # of the image's file; 0 where there is none
        ("standing", pa.uint8()),  # in an earlier release: 2 kept, 1 it stood for its group; else 0
    ]
)


def filter_pool(
    folder: Folder,
    pool: ImageSet,
    filters: Sequence[Filter],
    ranges: Ranges,
    execution: ExecutionConfig,
    earlier: Earlier | None = None,
    excluded: Sequence[Folder] = (),
) -> tuple[list[File], dict[str, int]]:
    """Write range-*.parquet (SCHEMA, one row a gid); ranges that a former run finished are kept.

    Args:
        excluded: folders of exclude steps; what they name and no filter rejects is left out for that.

    Returns:
        the files, and the counts: images that go on, and images by reason.
    """
    names = [range_file("range", number) for number in range(len(ranges))]
    run_pieces(
        _filter_range,
        [
            (number, ranges.bounds(number)[0], pool.rows_between(*ranges.bounds(number)))
            for number in range(len(ranges))
        ],
        names,
        folder,
        pool.folder,
        list(filters),
        earlier.decided() if earlier is not None else None,
        list(excluded),
        execution=execution,
        label="filter",
        unit="images",
        weights=ranges.weights(),
    )
    told = run_tasks(_describe, names, folder, execution=execution, label="filter: count", unit="files")
    counts: dict[str, int] = {}
    for _, of_range in told:
        for reason, number in of_range.items():
            counts[reason] = counts.get(reason, 0) + number
    return [file for file, _ in told], dict(sorted(counts.items()))


def read_range(folder: Folder, number: int, columns: Sequence[str]) -> pa.Table:
    """The rows of one range of gids."""
    return folder.read_table(range_file("range", number), list(columns))


def read_batches(folder: Folder, number: int, columns: Sequence[str], rows: int = _ROW_GROUP) -> Iterator[pa.Table]:
    """The rows of one range of gids, so many at a time."""
    yield from folder.table_batches(range_file("range", number), columns, rows)


def _filter_range(
    item: tuple[int, int, list[PartRows]],
    folder: Folder,
    name: str,
    index: Folder,
    filters: list[Filter],
    earlier: Earlier | None,
    excluded: list[Folder],
) -> None:
    number, at, parts = item
    elsewhere = excluded_gids(excluded, number)
    with (
        folder.writing(name) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd", compression_level=1) as writer,
    ):
        held: list[pa.Table] = []
        for rows in parts:
            first, end = np.searchsorted(elsewhere, [at, at + rows.stop - rows.start]).tolist()
            table = _judged(read_rows(index, rows, _COLUMNS), filters, elsewhere[first:end] - at)
            standing = np.zeros(table.num_rows, np.uint8)
            if earlier is not None:
                standing = earlier.standing(at, at + table.num_rows)
            held.append(table.append_column(SCHEMA.field("standing"), pa.array(standing)))
            at += table.num_rows
            if sum(table.num_rows for table in held) >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(held), row_group_size=_ROW_GROUP)
                held = []
        if held:
            writer.write_table(pa.concat_tables(held), row_group_size=_ROW_GROUP)


def _judged(table: pa.Table, filters: list[Filter], excluded: np.ndarray) -> pa.Table:
    """The filters' verdict on rows of the index, of which some (indices) are excluded beside."""
    reasons = first_reasons(table.select(_INDEX), filters)
    reasons[excluded] = np.where(reasons[excluded] == None, EXCLUDED, reasons[excluded])  # noqa: E711  elementwise
    pixels = pc.multiply(table["width"].cast(pa.int64()), table["height"].cast(pa.int64()))
    columns = {
        "reason": pa.array(reasons.tolist(), pa.string()),
        "pixels": pc.fill_null(pixels, 0),
        "bytes": pc.fill_null(pc.struct_field(table["image"], "size"), 0),
    }
    schema = SCHEMA.remove(SCHEMA.get_field_index("standing"))
    arrays = [columns[name] if name in columns else table[name] for name in schema.names]
    return pa.table(dict(zip(schema.names, arrays, strict=True)), schema=schema)


def _describe(name: str, folder: Folder) -> tuple[File, dict[str, int]]:
    reasons = folder.read_table(name, ["reason"])["reason"]
    counts = {"images out": reasons.null_count}
    counts |= {entry["values"]: entry["counts"] for entry in reasons.drop_null().value_counts().to_pylist()}
    return folder.described(name, len(reasons)), counts
