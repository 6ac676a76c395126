"""shard: the original bytes of what was kept, read by range, shuffled over the whole run, as tars or Parquet files."""

import hashlib
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.ranges import SEEDS, check_ranges
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.randomness import hash_uint64
from curation.reading.again import Lost, SecondReader
from curation.reading.filters import Edit
from curation.reading.samples import Member
from curation.writing.card import shard_card
from curation.writing.parquet import ParquetShardBuilder
from curation.writing.samples import (
    Layout,
    ShardSample,
    assign_roles,
    complete,
    find_layout,
    read_label,
    read_text,
    sample_bytes,
    tar_members,
)
from curation.writing.tars import Entry, ShardBuilder, safe_key, split_shards

VERSION = 2
_ROWS_AT_ONCE = 500_000  # index rows of this many kept images are gathered for one batch of shards
_COLUMNS = ["key", "source", "source_kind", "image", "others", "metadata", "sha256", "width", "height", "format"]
_ENTRY_SCHEMA = pa.schema(
    [
        ("gid", pa.int64()),
        ("key", pa.string()),
        ("suffix", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
    ]
)
_LOST_SCHEMA = pa.schema([("set", pa.string()), ("gid", pa.int64()), ("reason", pa.string())])
_LOST_FILE = "not_written.parquet"
_SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet"}


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What a shard is, and how large it may be. A worker holds one shard in memory."""

    format: str = "webdataset"
    """webdataset: tars; parquet: the same samples as rows, with the `image` feature of Hugging Face's `datasets`"""
    max_images: int = 10_000
    max_mb: float = 256.0
    """10^6 bytes of a shard; a member beside an image that is larger than this is left out"""
    seed: int = 0
    """of the global shuffle"""

    def __post_init__(self) -> None:
        if self.format not in _SUFFIXES:
            raise ValueError(f"shard.format={self.format!r} must be one of {', '.join(_SUFFIXES)}.")
        check_ranges("shard", self, max_images="[1, inf)", max_mb="(0, inf)", seed=SEEDS)
        if self.format == "parquet" and self.max_mb > 2000:  # the trainer counts its bytes in 32 bits
            raise ValueError(f"shard.max_mb={self.max_mb:g} must be at most 2000 with shard.format=parquet.")


@dataclass(frozen=True)
class KeptSet:
    """What to write from one image set: the pool, or a seed set that is included as it is."""

    name: str
    images: ImageSet
    gids: np.ndarray
    """int64, ascending"""
    provenance: pa.Table
    """one row a gid: why it was kept; each column is a field of the sample's .json"""


@dataclass(frozen=True)
class _Job:
    """One shard to write: what its samples are, in its order."""

    name: str
    samples: pa.Table


def write_shards(
    folder: Folder,
    kept: Sequence[KeptSet],
    draw_names: Sequence[str],
    config: ShardConfig,
    edits: Sequence[Edit],
    execution: ExecutionConfig,
    max_lost_fraction: float,
) -> tuple[list[File], pa.Table]:
    """Write the shards and index/shard-*.parquet; shards that a former run finished are kept.

    Args:
        draw_names: what can have drawn an image: the fields of its `draws`.
        max_lost_fraction: of the images that were chosen; when more of them are not what they were, nothing is kept
            of the shards that lack them, and the run stops.

    Returns:
        the shards, and a row (set, gid, reason) for each image that was chosen and is not in them, because its bytes
        are no longer those that were judged.

    Raises:
        ValueError: too many images changed, or a source does not answer.
    """
    which = np.concatenate([np.full(len(k.gids), i) for i, k in enumerate(kept)]).astype(np.int64)
    gids = np.concatenate([k.gids for k in kept])
    is_unique = _unique_keys(kept)
    order = np.lexsort((gids, which, hash_uint64(config.seed, gids * len(kept) + which)))
    max_bytes = int(config.max_mb * 1e6)
    sizes = np.concatenate([sample_bytes(table, max_bytes) for k in kept for table in _batches(k, ["image", "others"])])
    layout = find_layout((table for k in kept for table in _batches(k, ["others", "metadata"])), draw_names, max_bytes)
    which, gids, is_unique = which[order], gids[order], is_unique[order]
    runs = split_shards(sizes[order], config.max_images, max_bytes)
    done = set(folder.names())
    names = [f"shard-{number:06d}" for number in range(len(runs))]
    todo = [n for n in range(len(runs)) if f"index/{names[n]}.parquet" not in done]
    batches = split_shards([runs[n][1] - runs[n][0] for n in todo], len(todo) or 1, _ROWS_AT_ONCE)
    for start, stop in batches:
        rows = np.concatenate([np.arange(*runs[n]) for n in todo[start:stop]])
        samples = _samples(kept, which[rows], gids[rows], is_unique[rows])
        ends = np.cumsum([runs[n][1] - runs[n][0] for n in todo[start:stop]])
        jobs = [
            _Job(names[n], samples.slice(end - (runs[n][1] - runs[n][0]), runs[n][1] - runs[n][0]).combine_chunks())
            for n, end in zip(todo[start:stop], ends.tolist(), strict=True)
        ]
        run_tasks(
            _write_shard,
            jobs,
            folder,
            layout,
            config.format,
            list(edits),
            execution=execution,
            label="shard",
            unit="images",
            weights=[job.samples.num_rows for job in jobs],
        )
    records = [json.loads(folder.read_bytes(f"done/{name}.json")) for name in names]
    lost = pa.Table.from_pylist([entry for record in records for entry in record["lost"]], _LOST_SCHEMA)
    if lost.num_rows > max_lost_fraction * len(gids) or lost.num_rows == len(gids):
        for name, record in zip(names, records, strict=True):
            if record["lost"]:
                folder.delete(f"index/{name}.parquet")
        raise ValueError(_too_many_lost(lost, len(gids), max_lost_fraction))
    files = [File(**record["file"]) for record in records if record["file"] is not None]
    assert sum(file.rows for file in files) + lost.num_rows == len(gids)
    folder.write_table(_LOST_FILE, lost)
    folder.write_bytes("README.md", shard_card(layout, f"shard-*{_SUFFIXES[config.format]}").encode())
    return files, lost


def read_shard_of(folder: Folder, shards: Sequence[str], set_name: str, start: int, stop: int) -> np.ndarray:
    """For the gids [start, stop) of one image set: the shard (file name) that holds the image, None where none does."""
    shard = np.full(stop - start, None, object)
    ours = (pc.field("set") == set_name) & (pc.field("gid") >= start) & (pc.field("gid") < stop)
    for name in shards:
        shard[folder.table_where(index_name(name), ours, ["gid"])["gid"].to_numpy() - start] = name
    return shard


def read_lost(folder: Folder, set_name: str) -> pa.Table:
    """gid and reason of the images of one set that were chosen and not written."""
    table = folder.read_table(_LOST_FILE)
    return table.filter(pc.equal(table["set"], set_name)).select(["gid", "reason"])


def index_name(shard: str) -> str:
    """The index of a shard, from its file name."""
    return f"index/{posixpath.splitext(shard)[0]}.parquet"


def _batches(kept: KeptSet, columns: list[str]) -> Iterator[pa.Table]:
    """Index rows of a set's kept images, in the order of its gids, a bounded number at a time."""
    for start in range(0, len(kept.gids), _ROWS_AT_ONCE):
        yield kept.images.take(kept.gids[start : start + _ROWS_AT_ONCE], columns)


def _samples(kept: Sequence[KeptSet], which: np.ndarray, gids: np.ndarray, is_unique: np.ndarray) -> pa.Table:
    """Index and provenance of samples, in this order."""
    tables, positions = [], []
    for i, k in enumerate(kept):
        where = np.flatnonzero(which == i)
        if not len(where):
            continue
        rows = k.images.take(gids[where], _COLUMNS)
        why = k.provenance.take(pa.array(np.searchsorted(k.gids, gids[where])))
        rows = rows.append_column("gid", pa.array(gids[where]))
        rows = rows.append_column("set", pa.array([k.name] * len(where)))
        rows = rows.append_column("set_number", pa.array(np.full(len(where), i)))
        rows = rows.append_column("is_unique", pa.array(is_unique[where]))
        # As a struct of its own, so that no name can meet another.
        provenance = pa.StructArray.from_arrays([c.combine_chunks() for c in why.columns], why.column_names)
        tables.append(rows.append_column("provenance", provenance))
        positions.append(where)
    order = np.argsort(np.concatenate(positions))
    return pa.concat_tables(tables, promote_options="permissive").take(pa.array(order))


def _write_shard(job: _Job, folder: Folder, layout: Layout, format_: str, edits: list[Edit]) -> None:
    rows = job.samples.to_pylist()
    # Reads go source by source and forward within each; the shard's own order is the shuffle's.
    samples: list[ShardSample | None] = [None] * len(rows)
    lost: dict[int, str] = {}
    with SecondReader() as reader:
        for i in sorted(range(len(rows)), key=lambda i: (rows[i]["source"], rows[i]["image"]["offset"])):
            try:
                samples[i] = _read_sample(rows[i], reader, layout, edits)
            except Lost as loss:
                lost[i] = loss.reason
    builder = ShardBuilder() if format_ == "webdataset" else ParquetShardBuilder(layout)
    row_of: list[int] = []
    for i, sample in enumerate(samples):
        samples[i] = None
        if sample is None:
            continue
        if isinstance(builder, ShardBuilder):
            members = tar_members(sample, layout)
            builder.add(sample.key, members)
            row_of += [i] * len(members)
        else:
            builder.add(sample)
            row_of.append(i)
    file = None
    if row_of:  # some readers cannot open a file of no samples
        name = job.name + _SUFFIXES[format_]
        file = folder.write_bytes(name, builder.finish(), rows=len(rows) - len(lost))
    entries = builder.entries if row_of else []
    record = {
        "file": asdict(file) if file is not None else None,
        "lost": [{"set": rows[i]["set"], "gid": rows[i]["gid"], "reason": lost[i]} for i in sorted(lost)],
    }
    folder.write_bytes(f"done/{job.name}.json", json.dumps(record).encode())
    gid_of, set_of = [rows[i]["gid"] for i in row_of], [rows[i]["set"] for i in row_of]
    folder.write_table(f"index/{job.name}.parquet", _entry_table(entries, gid_of, set_of))


def _entry_table(entries: list[Entry], gids: list[int], sets: list[str]) -> pa.Table:
    columns = {
        name: [getattr(entry, name) for entry in entries] for name in ("key", "suffix", "offset", "size", "sha256")
    }
    return pa.table({"gid": gids, **columns}, schema=_ENTRY_SCHEMA).append_column("set", pa.array(sets, pa.string()))


def _read_sample(row: dict[str, Any], reader: SecondReader, layout: Layout, edits: list[Edit]) -> ShardSample:
    """The image that was judged, what stands beside it, and why it is here.

    Raises:
        Lost: the source does not hold it any more.
    """
    kind, url = row["source_kind"], row["source"]
    content = reader.image(kind, url, Member(**row["image"]), row["sha256"])
    digest = row["sha256"].hex()
    others = [Member(**other) for other in row["others"]]
    roles = assign_roles(
        [m.suffix for m in others], [m.size for m in others], row["metadata"] is not None, layout.max_member_bytes
    )
    text, encoding, label = "", "", ""
    if roles.text is not None:
        text, encoding = read_text(reader.read(kind, url, others[roles.text]))
    if roles.label is not None:
        label = read_text(reader.read(kind, url, others[roles.label]))[0]
    about = complete(
        {
            "gid": row["gid"],
            "set": row["set"],
            "key": row["key"],
            "format": row["format"],
            "width": row["width"],
            "height": row["height"],
            "sha256": digest,
            "sha256_original": digest,
            "source": url,
            "offset": row["image"]["offset"],
            "size": row["image"]["size"],
            "original": row["metadata"],
            "text_encoding": encoding,
            "label_text": label,
            "left_out": json.dumps([others[i].name for i in roles.left_out]) if roles.left_out else "",
            **{name: value for name, value in row["provenance"].items() if value is not None},
        },
        layout,
    )
    edited_by = []
    for edit in edits:
        original, content = content, edit.function()(content, dict(about))
        if content != original:
            edited_by.append(edit.path)
    if edited_by:
        about |= {"edited_by": ", ".join(edited_by), "sha256": hashlib.sha256(content).hexdigest()}
    return ShardSample(
        safe_key(
            row["key"],
            f"s{row['set_number']}g{row['gid']}" if row["set_number"] else f"g{row['gid']}",
            row["is_unique"],
        ),
        content,
        about,
        text,
        read_label(label) if roles.label is not None else None,
        [(others[i].suffix, reader.read(kind, url, others[i])) for i in roles.carried],
    )


def _unique_keys(kept: Sequence[KeptSet]) -> np.ndarray:
    """bool, for all kept images of all sets: no other has its key, so it goes by that key alone."""
    chunks = [chunk for k in kept for table in _batches(k, ["key"]) for chunk in table["key"].chunks]
    keys = pa.chunked_array([chunk.cast(pa.large_string()) for chunk in chunks], pa.large_string())
    numbers = np.concatenate([chunk.indices.to_numpy() for chunk in keys.dictionary_encode().chunks])
    return np.bincount(numbers)[numbers] == 1


def _too_many_lost(lost: pa.Table, total: int, fraction: float) -> str:
    counts = {entry["values"]: entry["counts"] for entry in lost["reason"].value_counts().to_pylist()}
    worst = max(sorted(counts), key=lambda reason: counts[reason])
    return (
        f"{lost.num_rows:,} of the {total:,} images to write are not what they were when they were indexed, most with "
        f"{worst!r}; that is more than embed.max_rejected_fraction={fraction}. If a disk or a share is missing, bring "
        "it back; if the pool changed, let it come to rest. Then run the same command: what changed is read anew."
    )
