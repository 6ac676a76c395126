"""shard: the original bytes of what was kept, read by range, shuffled over the whole run, as WebDataset tars."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from configs.ranges import SEEDS, check_ranges
from curation.filters import Edit
from curation.folder import Folder
from curation.manifest import File
from curation.ops.randomness import hash_uint64
from curation.reading.samples import Member
from curation.reading.sources import MemberReader
from curation.shards import SUFFIX_OF_FORMAT, Entry, ShardBuilder, safe_key, safe_suffix, split_shards
from curation.store import ImageSet
from curation.workers import ExecutionConfig, run_tasks

VERSION = 1
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


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How large a shard may be. A worker holds one shard in memory."""

    max_images: int = 10_000
    max_mb: float = 256.0
    """10^6 bytes of a tar"""
    seed: int = 0
    """of the global shuffle"""

    def __post_init__(self) -> None:
        check_ranges("shard", self, max_images="[1, inf)", max_mb="(0, inf)", seed=SEEDS)


@dataclass(frozen=True)
class KeptSet:
    """What to write from one image set: the pool, or a seed set that is included as it is."""

    name: str
    images: ImageSet
    gids: np.ndarray
    """int64, ascending"""
    provenance: pa.Table
    """one row a gid: why it was kept; every column goes into the sample's .json, nulls left out"""


def write_shards(
    folder: Folder, kept: Sequence[KeptSet], config: ShardConfig, edits: Sequence[Edit], execution: ExecutionConfig
) -> list[File]:
    """Write shard-*.tar and index/shard-*.parquet; shards that a former run finished are kept."""
    which = np.concatenate([np.full(len(k.gids), i) for i, k in enumerate(kept)]).astype(np.int64)
    gids = np.concatenate([k.gids for k in kept])
    order = np.lexsort((gids, which, hash_uint64(config.seed, gids * len(kept) + which)))
    which, gids = which[order], gids[order]
    sizes = np.zeros(len(gids), np.int64)
    repeated = _repeated_keys(kept)
    for i, k in enumerate(kept):
        sizes[which == i] = _sample_sizes(k, gids[which == i])
    runs = split_shards(sizes.tolist(), config.max_images, int(config.max_mb * 1e6))
    done = set(folder.names())
    names = [f"shard-{number:06d}" for number in range(len(runs))]
    todo = [n for n in range(len(runs)) if f"index/{names[n]}.parquet" not in done]
    batches = split_shards([runs[n][1] - runs[n][0] for n in todo], len(todo) or 1, _ROWS_AT_ONCE)
    for start, stop in batches:
        jobs = [
            (names[n], _samples(kept, which[slice(*runs[n])], gids[slice(*runs[n])], repeated))
            for n in todo[start:stop]
        ]
        run_tasks(
            _write_shard,
            jobs,
            folder,
            list(edits),
            execution=execution,
            label="shard",
            unit="images",
            weights=[samples.num_rows for _, samples in jobs],
        )
    files = []
    for name, (start, stop) in zip(names, runs, strict=True):
        files.append(File(**json.loads(folder.read_bytes(f"done/{name}.json"))))
        assert files[-1].rows == stop - start
    return files


def read_shard_of(folder: Folder, files: Sequence[File], set_name: str, num_images: int) -> np.ndarray:
    """By gid of one image set: the shard (file name) that holds the image, None where none does."""
    shard = np.full(num_images, None, object)
    for file in files:
        table = folder.read_table(f"index/{file.path.removesuffix('.tar')}.parquet", ["gid", "set"])
        shard[table["gid"].to_numpy()[table["set"].to_numpy(zero_copy_only=False) == set_name]] = file.path
    return shard


def _samples(kept: Sequence[KeptSet], which: np.ndarray, gids: np.ndarray, repeated: list[np.ndarray]) -> pa.Table:
    """Index and provenance of one shard's samples, in the shard's order."""
    tables, positions = [], []
    for i, k in enumerate(kept):
        where = np.flatnonzero(which == i)
        if not len(where):
            continue
        rows = k.images.take(gids[where], _COLUMNS)
        provenance = k.provenance.take(pa.array(np.searchsorted(k.gids, gids[where])))
        why = [json.dumps({n: v for n, v in row.items() if v is not None}) for row in provenance.to_pylist()]
        unique = ~np.isin(gids[where], repeated[i])
        rows = rows.append_column("gid", pa.array(gids[where]))
        rows = rows.append_column("set", pa.array([k.name] * len(where)))
        rows = rows.append_column("provenance", pa.array(why))
        tables.append(rows.append_column("is_unique", pa.array(unique)))
        positions.append(where)
    order = np.argsort(np.concatenate(positions))
    return pa.concat_tables(tables).take(pa.array(order))


def _write_shard(job: tuple[str, pa.Table], folder: Folder, edits: list[Edit]) -> None:
    name, samples = job
    rows = samples.to_pylist()
    # Reads go source by source and forward within each; the shard's own order is the shuffle's.
    contents: list[list[tuple[str, bytes]]] = [[] for _ in rows]
    by_source = sorted(range(len(rows)), key=lambda i: (rows[i]["source"], rows[i]["image"]["offset"]))
    reader: MemberReader | None = None
    for i in by_source:
        row = rows[i]
        if reader is None or reader.url != row["source"]:
            if reader is not None:
                reader.__exit__()
            reader = MemberReader(row["source_kind"], row["source"])
        contents[i] = _members(row, reader, edits)
    if reader is not None:
        reader.__exit__()
    builder = ShardBuilder()
    gid_of, set_of = [], []
    for i, row in enumerate(rows):
        before = len(builder.entries)
        builder.add(safe_key(row["key"], row["gid"], row["is_unique"]), contents[i])
        contents[i] = []
        gid_of += [row["gid"]] * (len(builder.entries) - before)
        set_of += [row["set"]] * (len(builder.entries) - before)
    file = folder.write_bytes(f"{name}.tar", builder.finish(), rows=len(rows))
    folder.write_bytes(f"done/{name}.json", json.dumps(asdict(file)).encode())
    folder.write_table(f"index/{name}.parquet", _entry_table(builder.entries, gid_of, set_of))


def _entry_table(entries: list[Entry], gids: list[int], sets: list[str]) -> pa.Table:
    columns = {
        name: [getattr(entry, name) for entry in entries] for name in ("key", "suffix", "offset", "size", "sha256")
    }
    return pa.table({"gid": gids, **columns}, schema=_ENTRY_SCHEMA).append_column("set", pa.array(sets, pa.string()))


def _members(row: dict[str, Any], reader: MemberReader, edits: list[Edit]) -> list[tuple[str, bytes]]:
    """The image first, then the .json with provenance, then whatever else the sample had."""
    content = reader.read(Member(**row["image"]))
    suffix = SUFFIX_OF_FORMAT.get(row["format"], "img")
    about: dict[str, Any] = {
        "gid": row["gid"],
        "set": row["set"],
        "key": row["key"],
        "sha256": row["sha256"].hex(),
        "source": row["source"],
        "offset": row["image"]["offset"],
        "size": row["image"]["size"],
        "width": row["width"],
        "height": row["height"],
        **json.loads(row["provenance"]),
    }
    for edit in edits:
        original, content = content, edit.function()(content, about)
        if content != original:
            about["edited_by"] = [*about.get("edited_by", []), edit.path]
    if "edited_by" in about:
        about["sha256_original"] = about["sha256"]
        about["sha256"] = hashlib.sha256(content).hexdigest()
    if row["metadata"] is not None:
        about["original"] = json.loads(row["metadata"])
    members = [(suffix, content), ("json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode())]
    taken = {suffix, "json"}
    for other in row["others"]:
        name = safe_suffix(other["suffix"])
        if name == "json":
            if row["metadata"] is not None:
                continue  # it stands in the new .json
            name = "json_original"  # not an object, or not JSON at all: carried as it was
        while name in taken:
            name = f"other.{name}"
        taken.add(name)
        members.append((name, reader.read(Member(**other))))
    return members


def _sample_sizes(kept: KeptSet, gids: np.ndarray) -> np.ndarray:
    """Bytes of each sample's members in a tar, headers and padding included; the new .json counts as 1.5 kB."""
    result = np.zeros(len(gids), np.int64)
    for start in range(0, len(gids), _ROWS_AT_ONCE):
        rows = kept.images.take(gids[start : start + _ROWS_AT_ONCE], ["image", "others"])
        for i, (image, others) in enumerate(zip(rows["image"].to_pylist(), rows["others"].to_pylist(), strict=True)):
            result[start + i] = 2048 + 1024 + image["size"] + sum(1024 + member["size"] for member in others)
    return result


def _repeated_keys(kept: Sequence[KeptSet]) -> list[np.ndarray]:
    """For each set, the gids whose key another kept image has too, in any set: those get the gid into their name."""
    keys = [k.images.take(k.gids, ["key"])["key"].to_numpy().astype(str) for k in kept]
    _, inverse, counts = np.unique(np.concatenate(keys), return_inverse=True, return_counts=True)
    ends = np.cumsum([len(k.gids) for k in kept])[:-1]
    return [k.gids[repeated] for k, repeated in zip(kept, np.split(counts[inverse] > 1, ends), strict=True)]
