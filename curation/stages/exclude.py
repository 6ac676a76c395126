"""exclude: which images of the pool another finished run keeps already, by their bytes or by their looks.

Both runs' images go to where their sha256 lives, and, where their perceptual hash says something, to where that lives;
an image and its mirror image have the same one. Near duplicates beyond that are not looked for.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.earlier import Earlier
from curation.engine.exchange import BUCKET, bucket_of, buckets_for, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet, PartRows, column_values, read_rows
from curation.engine.workers import ExecutionConfig
from curation.ops.hashes import HASH_BYTES, MIN_QUALITY, equal_groups, row_hashes
from curation.stages.asking import pieces

VERSION = 1
EXCLUDED = "excluded"
"""the filter stage's reason for those images"""
SCHEMA = pa.schema(
    [
        ("gid", pa.int64()),  # of the pool, ascending, each once
        ("key", pa.large_string()),  # of an image that the other run keeps
        ("step", pa.string()),  # how they are alike: exact or perceptual
    ]
)
_HASHES = ["sha256", "pdq", "pdq_mirrored", "pdq_quality"]
_BLOCK_ROWS = 1 << 20
_ROW_BYTES = 300  # of an identity while it is compared
_STEPS = ("exact", "perceptual")


@dataclass(frozen=True)
class Kept:
    """What another run keeps: images of its pool, and seed sets that it included as they are."""

    run: Earlier
    seeds: tuple[ImageSet, ...]

    @staticmethod
    def of(run: Earlier) -> "Kept":
        names = [what.removeprefix("seed:") for what in run.manifests["shards"].counts if what.startswith("seed:")]
        steps = [f"embed/seed-{name}" for name in names]
        return Kept(run.decided(), tuple(ImageSet.of(run.folder / step, run.manifests[step]) for step in steps))

    @property
    def num_images(self) -> int:
        """No fewer than it keeps."""
        return self.run.num_images + sum(images.num_images for images in self.seeds)


class _Item(NamedTuple):
    """Images to look at: parts of ours from a gid on, or rows of theirs: of the pool (-1) or of a seed set."""

    start: int
    stop: int
    ours: list[PartRows] | None = None
    seed: int = -1


def find_excluded(
    folder: Folder, pool: ImageSet, ranges: Ranges, run: Earlier, execution: ExecutionConfig
) -> tuple[list[File], dict[str, int]]:
    """Write range-*.parquet (SCHEMA), one file a range of the pool's gids.

    Args:
        run: the other run, finished.

    Returns:
        the files, and the count: images that are excluded.
    """
    kept = Kept.of(run)
    bounds = [ranges.bounds(number) for number in range(len(ranges))]
    items = [_Item(start, stop, pool.rows_between(start, stop)) for start, stop in bounds]
    theirs = Ranges(run.num_images, run.range_rows)
    items += [_Item(*theirs.bounds(number)) for number in range(len(theirs))]
    for seed, images in enumerate(kept.seeds):
        cut = Ranges(images.num_images, run.range_rows)
        items += [_Item(*cut.bounds(number), seed=seed) for number in range(len(cut))]
    num_buckets = buckets_for(2 * (ranges.num_rows + kept.num_images) * _ROW_BYTES, execution)
    between = [f"piece-{num_buckets}-{bucket:05d}.parquet" for bucket in range(num_buckets)]
    names = [range_file("range", number) for number in range(len(ranges))]
    met = folder / "exchange/met"
    if not set(names) <= set(folder.names()):
        exchange(
            items, _identities, num_buckets, _meet, kept, pool.folder, num_buckets, met,
            scratch=folder / "exchange/identities", outputs=(met, between), sort_by=["is_ours", "place", "step"],
            execution=execution, label="exclude: same bytes, same looks", unit="images",
            weights=[float(item.stop - item.start) for item in items],
        )  # fmt: skip
        exchange(
            between, _to_ranges, len(ranges), _write_range, met, ranges, folder,
            scratch=folder / "exchange/ranges", outputs=(folder, names), sort_by=["gid", "step"], execution=execution,
            label="exclude: to their ranges", unit="files",
        )  # fmt: skip
    met.clear(["piece-*.parquet"])
    files = pieces(folder, "range-", execution, "exclude")
    return files, {EXCLUDED: sum(file.rows for file in files)}


def excluded_gids(folders: Sequence[Folder], number: int) -> np.ndarray:
    """int64, ascending: of a range of gids those that any of several exclude steps names."""
    tables = [folder.read_table(range_file("range", number), ["gid"]) for folder in folders]
    return np.unique(np.concatenate([table["gid"].to_numpy() for table in tables] or [np.empty(0, np.int64)]))


def reason_for(folder: Folder, number: int, gid: int) -> tuple[str, str] | None:
    """(key of the other run's image, step) of one image of a range; None where it is not excluded there."""
    rows = folder.table_where(range_file("range", number), pc.field("gid") == gid).to_pylist()
    return (rows[0]["key"], rows[0]["step"]) if rows else None


def _identities(item: _Item, kept: Kept, index: Folder, num_buckets: int, met: Folder) -> Iterator[pa.Table]:
    """What the images are known by: 64 bytes, of ours and of what the other run keeps."""
    for place, table in _ours(item, index) if item.ours is not None else _theirs(item, kept):
        sha256, pdq, mirrored = (column_values(table[name]) for name in _HASHES[:3])
        clear = table["pdq"].is_valid().to_numpy() & (table["pdq_quality"].fill_null(0).to_numpy() >= MIN_QUALITY)
        for step, here, content in (
            (0, table["sha256"].is_valid().to_numpy(), np.pad(sha256, ((0, 0), (0, HASH_BYTES)))),
            (1, clear, _either_way(pdq, mirrored)),
        ):
            rows, identity = np.flatnonzero(here), np.ascontiguousarray(content[here])
            yield pa.table(
                {
                    "is_ours": np.full(len(rows), item.ours is not None),
                    "place": place[rows],
                    "step": np.full(len(rows), step, np.int8),
                    "key": table["key"].take(pa.array(rows)).cast(pa.large_string()),
                    "identity": pa.FixedSizeBinaryArray.from_buffers(
                        pa.binary(2 * HASH_BYTES), len(rows), [None, pa.py_buffer(identity)]
                    ),
                    BUCKET: bucket_of(row_hashes(identity), num_buckets),
                }
            )


def _either_way(pdq: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """uint8 [N, 64]: the two hashes in an order that is the same for the mirror image."""
    first = pdq.view(f"S{HASH_BYTES}")[:, 0] <= mirrored.view(f"S{HASH_BYTES}")[:, 0]
    smaller, larger = (np.where(is_first[:, None], pdq, mirrored) for is_first in (first, ~first))
    return np.concatenate([smaller, larger], axis=1)


def _ours(item: _Item, index: Folder) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """gids and hashes of our images that can be read, about a million at a time; their keys play no part."""
    assert item.ours is not None
    at, held, rows_held = item.start, [], 0
    for rows in item.ours:
        held.append(read_rows(index, rows, ["status", *_HASHES]))
        rows_held += held[-1].num_rows
        if rows_held >= _BLOCK_ROWS or rows is item.ours[-1]:
            table = pa.concat_tables(held).combine_chunks()
            good = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy())
            keys = pa.nulls(len(good), pa.string())
            yield at + good, table.take(pa.array(good)).append_column("key", keys)
            at, held, rows_held = at + rows_held, [], 0


def _theirs(item: _Item, kept: Kept) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Places, keys and hashes of what the other run keeps: its pool first, then its seed sets, one behind the other."""
    before = [kept.run.num_images, *(images.num_images for images in kept.seeds)]
    for start in range(item.start, item.stop, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, item.stop)
        if item.seed < 0:
            size = kept.run.range_rows
            number, first = start // size, start // size * size
            table = kept.run.decisions(start, stop, ["status", "key"])
            filtered = kept.run.folder / "filter"
            hashes = filtered.table_rows(range_file("range", number), start - first, stop - first, _HASHES)
            for name in _HASHES:
                table = table.append_column(name, hashes[name])
            wanted, base = "kept", 0
        else:
            table = kept.seeds[item.seed].rows(start, stop, ["status", "key", *_HASHES])
            wanted, base = "ok", sum(before[: item.seed + 1])
        chosen = np.flatnonzero(pc.equal(table["status"], wanted).to_numpy())
        yield base + start + chosen, table.take(pa.array(chosen)).combine_chunks()


def _meet(bucket: int, table: pa.Table, kept: Kept, index: Folder, num_buckets: int, met: Folder) -> None:
    """(gid, step, key of the first of theirs that is alike) of ours. Theirs come first, in the order of places."""
    rows = pa.schema([("gid", pa.int64()), ("step", pa.int8()), ("key", pa.large_string())]).empty_table()
    if table.num_rows:
        identity = column_values(table["identity"])
        num_theirs = table.num_rows - pc.sum(table["is_ours"]).as_py()
        like = equal_groups(identity)[num_theirs:]
        found = np.flatnonzero(like < num_theirs)
        ours = table.slice(num_theirs).take(pa.array(found))
        key = table["key"].take(pa.array(like[found]))
        rows = pa.table({"gid": ours["place"], "step": ours["step"], "key": key})
    met.write_table(f"piece-{num_buckets}-{bucket:05d}.parquet", rows)


def _to_ranges(name: str, met: Folder, ranges: Ranges, folder: Folder) -> Iterable[pa.Table]:
    table = met.read_table(name)
    yield table.append_column(BUCKET, pa.array(ranges.of(table["gid"].to_numpy()).astype(np.int32)))


def _write_range(number: int, table: pa.Table, met: Folder, ranges: Ranges, folder: Folder) -> None:
    rows = SCHEMA.empty_table()
    if table.num_rows:
        _, first = np.unique(table["gid"].to_numpy(), return_index=True)
        table = table.take(pa.array(first))
        step = pa.array(_STEPS).take(table["step"])
        rows = pa.table({"gid": table["gid"], "key": table["key"], "step": step}, schema=SCHEMA)
    folder.write_table(range_file("range", number), rows)
