"""decide: one row for every pool image, kept or not, and why. The account that every other view of a run is made from.

Written by range of gids. What a row says of another image, its key, lies with that image: keys are asked for by its
place and sent back to the range that asked, so that no task holds the names of a pool.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.account.fates import STATUSES, Sources, fates
from curation.engine.exchange import BUCKET, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges, range_file
from curation.engine.workers import run_tasks
from curation.stages.shard import DROPPED_FILE
from curation.state import Run, Written

__all__ = ["SCHEMA", "STATUSES", "decide", "decided_schema", "range_name"]

VERSION = 1

SCHEMA = pa.schema(
    [
        ("gid", pa.int64()),  # row number of the pool image
        ("key", pa.string()),
        ("source", pa.string()),  # URL of the tar, Parquet file or folder it came from
        ("status", pa.string()),  # one of STATUSES
        # kept: retrieved, balanced or both; rejected: why (also *_since_indexing: chosen, but not written, because its
        # bytes were no longer those that had been judged); duplicate: exact, perceptual, embedding, or chain (through
        # others of its component); leak: exact, perceptual, embedding, or component (another member matched)
        ("reason", pa.string()),
        ("duplicate_of", pa.string()),  # key of the image kept in its stead; null unless a duplicate
        ("duplicate_of_gid", pa.int64()),
        ("component", pa.int64()),  # smallest gid of its near-duplicate group; null when alone or rejected
        ("component_size", pa.int32()),  # images in that group; 1 when alone
        ("evaluation", pa.string()),  # evaluation set that a leak matched
        ("eval_match", pa.string()),  # key of the image there
        ("seed", pa.string()),  # seed set whose draw was the strongest
        ("seed_match", pa.string()),  # key of the seed image; null when drawn by cluster or balance
        # cosine to: the representative (duplicate), the evaluation image (leak), the seed image (kept); null elsewhere
        ("similarity", pa.float32()),
        ("cluster", pa.int64()),  # finest concept cluster; null unless it survived to clustering
        # of a rejected row that stands for a shard's damage: bytes that could not be read, and how many images that is
        # at the shard's mean bytes a sample (null where it has no whole sample); null elsewhere
        ("unread_bytes", pa.int64()),
        ("unread_images", pa.int64()),
        # which release first kept it: 1 for a run that extends none; of an image that is not kept: that the earlier
        # release kept it, and this one drops it
        ("release", pa.int32()),
        ("shard", pa.string()),  # file below shards/; null unless kept and written
    ]
)
_DROPPED = pa.schema([SCHEMA.field(name) for name in ("gid", "key", "status", "reason", "release", "shard")])
_INDEX = ["key", "source", "unread_bytes", "unread_images"]
_KEYS = pa.schema([("asker", pa.int64()), ("place", pa.int64()), ("key", pa.large_string())])
_KEY_BLOCK = 1 << 20
_ASKED, _ANSWERS = "exchange/asked", "exchange/answers"


def range_name(number: int) -> str:
    """A range's file in the folder `decide`."""
    return range_file("decisions", number)


def decided_schema(draw_names: list[str]) -> pa.Schema:
    """SCHEMA before there are shards; `draws` says how often each seed set, or balance, drew a kept image."""
    draws = pa.struct([(name, pa.int64()) for name in draw_names])
    return pa.schema([*(SCHEMA.field(name) for name in SCHEMA.names if name != "shard"), pa.field("draws", draws)])


def decide(run: Run, folder: Folder) -> Written:
    """Write decisions-*.parquet (decided_schema), one file a range of gids, rows in gid order."""
    sources, ranges, execution = Sources.of(run), run.ranges, run.config.execution
    names = [range_name(number) for number in range(len(ranges))]
    if set(names) - set(folder.names()):
        places = Ranges(int(sources.set_base[-1]), ranges.size)
        pieces = [range_file("piece", number) for number in range(len(places))]
        exchange(
            range(len(ranges)),
            _asked,
            len(pieces),
            _answer,
            sources,
            folder,
            scratch=folder / _ASKED,
            outputs=(folder / _ANSWERS, pieces),
            sort_by=["place", "asker"],
            execution=execution,
            label="decide: keys",
            unit="images",
            weights=ranges.weights(),
        )
        exchange(
            pieces,
            _answers,
            len(names),
            _decide,
            sources,
            folder,
            scratch=folder / "exchange/answered",
            outputs=(folder, names),
            sort_by=["place"],
            execution=execution,
            label="decide",
            unit="ranges of keys",
        )
    (folder / _ANSWERS).clear(("piece-*.parquet",))
    jobs = [(name, int(rows)) for name, rows in zip(names, ranges.weights(), strict=True)]
    done = run_tasks(_described, jobs, folder, run.release, execution=execution, label="decide: sum up", unit="files")
    counts = {"images": ranges.num_rows, "kept": sum(kept for _, kept in done)}
    return [file for file, _ in done], counts, {}


def write_dropped(run: Run, folder: Folder) -> None:
    """DROPPED_FILE in the folder of the shards: what the earlier release kept and this one does not, by gid: why, and
    the shard of that release that holds it. One range in memory at a time."""
    assert run.earlier is not None
    is_dropped = pc.is_valid(pc.field("release")) & (pc.field("status") != "kept")
    files = run.earlier.manifests["report"].files
    with folder.writing(DROPPED_FILE) as file, pq.ParquetWriter(file, _DROPPED, compression="zstd") as writer:
        for number, earlier in enumerate(files):
            rows = (run.folder / "decide").table_where(range_name(number), is_dropped, _DROPPED.names[:-1])
            ours = pc.field("gid").isin(rows["gid"].combine_chunks())
            shard = run.earlier.folder.table_where(earlier.path, ours, ["shard"])["shard"]
            writer.write_table(rows.append_column("shard", shard).cast(_DROPPED))


def _described(job: tuple[str, int], folder: Folder, release: int) -> tuple[File, int]:
    """The manifest's entry of a range's file, and how many of its images are kept that no earlier release has."""
    name, rows = job
    is_new = (pc.field("status") == "kept") & (pc.field("release") == release)
    kept = folder.table_where(name, is_new, ["gid"]).num_rows
    return folder.described(name, rows), kept


def _asked(number: int, sources: Sources, _: Folder) -> Iterator[pa.Table]:
    """The images, by place, whose keys this range's rows name."""
    for start, stop in sources.spans(number):
        place = fates(sources, start, stop).place
        wanted = np.unique(place[place >= 0])
        bucket = (wanted // sources.ranges.size).astype(np.int32)
        yield pa.table({"asker": np.full(len(wanted), number, np.int64), "place": wanted, BUCKET: bucket})


def _answer(bucket: int, asked: pa.Table, sources: Sources, folder: Folder) -> None:
    """Write the keys of one span of places for all who asked."""
    with (folder / _ANSWERS).writing(range_file("piece", bucket)) as file, pq.ParquetWriter(file, _KEYS) as writer:
        if not asked.num_columns:
            return
        place = asked["place"].to_numpy()
        for start in range(bucket * sources.ranges.size, int(place[-1]) + 1, _KEY_BLOCK):
            stop = min(start + _KEY_BLOCK, int(place[-1]) + 1)
            first, end = np.searchsorted(place, [start, stop]).tolist()
            if first < end:
                key = sources.keys(start, stop).take(pa.array(place[first:end] - start))
                rows = asked.slice(first, end - first).select(["asker", "place"])
                writer.write_table(rows.append_column("key", key).cast(_KEYS))


def _answers(piece: str, _: Sources, folder: Folder) -> Iterator[pa.Table]:
    """A span's keys, each to the range that asked for it."""
    with (folder / _ANSWERS).reading(piece) as file, pq.ParquetFile(file) as table:
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group)
            bucket = pa.array(rows["asker"].to_numpy().astype(np.int32))
            yield rows.select(["place", "key"]).append_column(BUCKET, bucket)


def _decide(number: int, keys: pa.Table, sources: Sources, folder: Folder) -> None:
    schema = decided_schema(sources.draw_names)
    place = keys["place"].to_numpy() if keys.num_columns else np.zeros(0, np.int64)
    key = keys["key"] if keys.num_columns else pa.chunked_array([], pa.large_string())
    with folder.writing(range_name(number)) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for start, stop in sources.spans(number):
            fate = fates(sources, start, stop)
            at = np.searchsorted(place, fate.place)
            named = partial(_named, key, at)
            is_seed = (fate.place >= sources.set_base[1]) & (fate.place < sources.set_base[1 + len(sources.seeds)])
            columns: dict[str, Any] = {
                **fate.columns,
                "duplicate_of": named((fate.place >= 0) & (fate.place < sources.set_base[1])),
                "seed_match": pc.coalesce(named(is_seed), fate.columns["seed_match"]),
                "eval_match": named(fate.place >= sources.set_base[1 + len(sources.seeds)]),
            }
            index = sources.pool.rows(start, stop, _INDEX)
            columns |= dict(zip(_INDEX, index.columns, strict=True))
            writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))


def _named(key: pa.ChunkedArray, at: np.ndarray, where: np.ndarray) -> pa.ChunkedArray:
    """The keys at these positions, null elsewhere."""
    return key.take(pa.array(np.where(where, at, 0), mask=~where)).cast(pa.string())
