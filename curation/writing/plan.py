"""Which image goes to which shard, planned by exchange: the driver holds counts, and one line for each shard.

Kept rows of a range of gids meet the index rows of its parts, and go to the bucket of their hash; a bucket, sorted by
the hash, is the order of its shards, which are cut inside it. Its plan is one file, in which a shard's rows are one
piece: a task that writes a shard gets the file's name and a range of bytes. How many buckets there are follows from the
images alone, so that shards are the same for any workers and memory.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.exchange import BUCKET, bucket_of, exchange
from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import INDEX_SCHEMA, ImageSet, PartRows, read_rows
from curation.engine.workers import ExecutionConfig, finished_pieces
from curation.ops.randomness import hash_uint64
from curation.writing.samples import find_layout, sample_bytes
from curation.writing.tars import split_shards

PLAN = "plan"
FILES = ("bucket-*.arrow", "bucket-*.json", "keys-*.npy", "shared-*.npy")
BUCKET_IMAGES, BUCKET_BYTES = 250_000, 256_000_000
"""of one bucket: images, and bytes of their index rows as the index files hold them (compressed)"""
_WHY: dict[str, pa.DataType] = {
    "reason": pa.string(),
    "seed": pa.string(),
    "seed_match": pa.string(),
    "similarity": pa.float32(),
    "cluster": pa.int64(),
    "component": pa.int64(),
    "component_size": pa.int32(),
}
_INDEX = ["key", "source", "source_kind", "image", "others", "metadata", "sha256", "width", "height", "format"]
_ROWS_AT_ONCE = 1 << 17
_EXCHANGES = "exchange"


@dataclass(frozen=True)
class KeptSet:
    """What to write from one image set: the pool, or a seed set that is included as it is."""

    name: str
    """as the .json says it in `set`"""
    images: ImageSet
    ranges: Ranges
    num_kept: int
    decisions: Folder | None = None
    """where `decisions-*.parquet` lie, one file a range; None: every image that could be read is kept"""
    seed: str | None = None
    """name of the seed set, where it is one"""
    release: int = 1
    """of the decisions, those that this release keeps first; the others are in shards that are there"""
    first: int = 0
    """gid from which on there is anything to write"""


@dataclass(frozen=True)
class PlannedShard:
    """One shard to write: where its rows lie in the plan, in its order."""

    bucket: int
    offset: int
    size: int
    num_rows: int


@dataclass(frozen=True)
class Plan:
    """Every shard of a run in order, and what its samples have."""

    shards: list[PlannedShard]
    num_rows: dict[str, int]
    """by set"""
    has_label: bool
    has_others: bool

    def by_bucket(self) -> list[tuple[int, int]]:
        """For each bucket with images, its first shard and the one after its last."""
        buckets = np.array([shard.bucket for shard in self.shards], np.int64)
        starts = np.flatnonzero(np.diff(buckets, prepend=-1)).tolist()
        return list(zip(starts, [*starts[1:], len(buckets)][: len(starts)], strict=True))  # none where nothing is new


@dataclass(frozen=True)
class _Range:
    """Kept rows of one range of one set, with the index files of its parts and the gid that each begins with."""

    set_number: int
    set_name: str
    seed: str | None
    start: int
    stop: int
    index: Folder
    parts: list[tuple[PartRows, int]]
    decisions: tuple[Folder, str] | None
    release: int


def provenance_schema(draw_names: Sequence[str]) -> pa.Schema:
    """Columns of the decisions that a sample's .json tells."""
    return pa.schema([*_WHY.items(), ("draws", pa.struct([(name, pa.int64()) for name in draw_names]))])


def plan_shards(
    folder: Folder, kept: Sequence[KeptSet], draw_names: Sequence[str], seed: int, max_images: int, max_bytes: int,
    execution: ExecutionConfig,
) -> Plan:  # fmt: skip
    """Plan the shards of all sets, below PLAN in the stage's folder; what is there already is not planned again."""
    count = num_buckets(kept)
    plan = folder / PLAN
    names = [f"bucket-{bucket:05d}.json" for bucket in range(count)]
    items = [item for number, k in enumerate(kept) for item in _items(number, k)]
    exchange(
        items, _kept_rows, count, _write_bucket, len(kept), count, seed, provenance_schema(draw_names), plan,
        max_images, max_bytes,
        scratch=folder / _EXCHANGES / "plan", outputs=(plan, names), sort_by=["order", "set_number", "gid"],
        execution=execution, label="shard plan", unit="images", weights=[item.stop - item.start for item in items],
    )  # fmt: skip
    home = [_shared_name(bucket) for bucket in range(count)]
    if len(finished_pieces(plan, home)) < count:
        # Which keys several images have: each bucket's different keys meet where their hash lives, and come home.
        shared, found = folder / _EXCHANGES / "shared", [f"piece-{bucket:05d}.parquet" for bucket in range(count)]
        exchange(
            list(range(count)), _keys_of_bucket, count, _write_shared, count, plan, shared,
            scratch=folder / _EXCHANGES / "keys", outputs=(shared, found), sort_by=["hash", "origin"],
            execution=execution, label="shard keys", unit="buckets",
        )  # fmt: skip
        exchange(
            found, _shared_keys, count, _write_home, shared, plan,
            scratch=folder / _EXCHANGES / "home", outputs=(plan, home), sort_by=["hash"],
            execution=execution, label="shard keys, back", unit="buckets",
        )  # fmt: skip
        shared.clear(["piece-*.parquet"])
    about = [json.loads(plan.read_bytes(name)) for name in names]
    return Plan(
        shards=[PlannedShard(bucket, *shard) for bucket, a in enumerate(about) for shard in a["shards"]],
        num_rows={k.name: sum(a["rows"].get(k.name, 0) for a in about) for k in kept},
        has_label=any(a["has_label"] for a in about),
        has_others=any(a["has_others"] for a in about),
    )


def num_buckets(kept: Sequence[KeptSet]) -> int:
    """From counts alone: so many that a bucket's rows are few and small."""
    images = sum(k.num_kept for k in kept)
    size = sum(k.images.parts.index_bytes * k.num_kept / max(k.images.num_images, 1) for k in kept)
    return max(1, -(-images // BUCKET_IMAGES), -(-int(size) // BUCKET_BYTES))


def planned_rows(folder: Folder, shard: PlannedShard) -> pa.Table:
    """A shard's rows in its order: index columns, `gid`, `set`, `set_number`, `provenance` and `is_unique`: whether no
    other image of the run has its key."""
    plan = folder / PLAN
    content = plan.read_range(_bucket_name(shard.bucket), shard.offset, shard.offset + shard.size)
    with pa.ipc.open_stream(io.BytesIO(content)) as reader:
        table = reader.read_all()
    shared = plan.read_array(_shared_name(shard.bucket))
    is_unique = ~np.isin(table["key_hash"].to_numpy(), shared)
    return table.drop_columns(["key_hash"]).append_column("is_unique", pa.array(is_unique))


def forget_plan(folder: Folder) -> None:
    """Delete the plan, of no use once all shards are written."""
    (folder / PLAN).clear(FILES)


# --- rows to the bucket of their hash ---------------------------------------------------------------------------------


def _items(number: int, kept: KeptSet) -> Iterator[_Range]:
    for r in range(len(kept.ranges)):
        start, stop = kept.ranges.bounds(r)
        if (start := max(start, kept.first)) >= stop:
            continue
        parts = kept.images.whole_parts(start, stop)
        decisions = (kept.decisions, range_file("decisions", r)) if kept.decisions is not None else None
        yield _Range(number, kept.name, kept.seed, start, stop, kept.images.folder, parts, decisions, kept.release)


def _kept_rows(
    item: _Range, num_sets: int, num_buckets: int, seed: int, provenance: pa.Schema, *_: object
) -> Iterator[pa.Table]:
    held: list[pa.Table] = []
    for table in _joined(item, provenance):
        held.append(table)
        if sum(t.num_rows for t in held) >= _ROWS_AT_ONCE:
            yield _addressed(pa.concat_tables(held), item, num_sets, num_buckets, seed)
            held = []
    if held:
        yield _addressed(pa.concat_tables(held), item, num_sets, num_buckets, seed)


def _joined(item: _Range, provenance: pa.Schema) -> Iterator[pa.Table]:
    """Index rows of what is kept, with gid and provenance. Each index file is read once."""
    firsts = np.array([first for _, first in item.parts], np.int64)
    current, index = -1, INDEX_SCHEMA.empty_table()
    for gids, why in _chosen(item, provenance):
        part_of = np.searchsorted(firsts, gids, side="right") - 1
        for part in np.unique(part_of).tolist():
            if part != current:
                current, index = part, read_rows(item.index, item.parts[part][0], [*_INDEX, "status"])
            where = np.flatnonzero(part_of == part)
            rows = index.take(pa.array(gids[where] - firsts[part])).append_column("gid", pa.array(gids[where]))
            rows = rows.append_column("provenance", why.take(pa.array(where)))
            if item.decisions is None:
                rows = rows.filter(pc.equal(rows["status"], "ok"))
            yield rows.drop_columns(["status"])


def _chosen(item: _Range, provenance: pa.Schema) -> Iterator[tuple[np.ndarray, pa.StructArray]]:
    """gids, ascending, and the provenance of each."""
    if item.decisions is None:
        ends = [*(first for _, first in item.parts[1:]), item.stop]
        for (_, first), end in zip(item.parts, ends, strict=True):
            gids = np.arange(max(first, item.start), min(end, item.stop))
            columns = {field.name: pa.nulls(len(gids), field.type) for field in provenance}
            columns["seed"] = pa.array([item.seed] * len(gids), pa.string())
            yield gids, _struct(pa.table(columns, schema=provenance))
        return
    folder, name = item.decisions
    for table in folder.table_batches(name, ["gid", "status", "release", *provenance.names]):
        table = table.filter(pc.and_(pc.equal(table["status"], "kept"), pc.equal(table["release"], item.release)))
        if table.num_rows:
            yield table["gid"].to_numpy(), _struct(table.select(provenance.names).cast(provenance))


def _struct(table: pa.Table) -> pa.StructArray:
    # As a struct of its own, so that no name can meet one of the index.
    columns = [column.combine_chunks() for column in table.columns]
    return pa.StructArray.from_arrays(columns, fields=list(table.schema))


def _addressed(table: pa.Table, item: _Range, num_sets: int, num_buckets: int, seed: int) -> pa.Table:
    order = hash_uint64(seed, table["gid"].to_numpy() * num_sets + item.set_number)
    columns = {
        "set": pa.array([item.set_name] * table.num_rows, pa.string()),
        "set_number": pa.array(np.full(table.num_rows, item.set_number, np.int32)),
        "key_hash": pa.array(_key_hashes(table["key"])),
        "order": pa.array(order),
        BUCKET: pa.array(bucket_of(order, num_buckets)),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def _write_bucket(
    bucket: int, table: pa.Table, num_sets: int, num_buckets: int, seed: int, provenance: pa.Schema, plan: Folder,
    max_images: int, max_bytes: int,
) -> None:  # fmt: skip
    hashes, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    shards: list[tuple[int, int, int]] = []
    rows: dict[str, int] = {}
    has_label = has_others = False
    if table.num_rows:
        table = table.drop_columns(["order"]).combine_chunks()
        hashes, counts = np.unique(table["key_hash"].to_numpy(), return_counts=True)
        layout = find_layout([table], (), max_bytes)
        has_label, has_others = layout.has_label, layout.has_others
        rows = {entry["values"]: entry["counts"] for entry in table["set"].value_counts().to_pylist()}
        with plan.writing(_bucket_name(bucket)) as file:
            for start, stop in split_shards(sample_bytes(table, max_bytes), max_images, max_bytes):
                offset = file.tell()
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table.slice(start, stop - start))
                shards.append((offset, file.tell() - offset, stop - start))
    plan.write_array(_keys_name(bucket), np.stack([hashes, counts.astype(np.uint64)]))
    if num_buckets == 1:
        plan.write_array(_shared_name(bucket), hashes[counts > 1])
    about = {"shards": shards, "rows": rows, "has_label": has_label, "has_others": has_others}
    plan.write_bytes(f"bucket-{bucket:05d}.json", json.dumps(about).encode())


# --- which keys are shared --------------------------------------------------------------------------------------------


def _key_hashes(keys: pa.ChunkedArray) -> np.ndarray:
    """uint64 of each key: where two keys met in one, both would only get names that are unique in any case."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys.to_pylist())
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def _keys_of_bucket(bucket: int, num_buckets: int, plan: Folder, shared: Folder) -> Iterator[pa.Table]:
    hashes, counts = plan.read_array(_keys_name(bucket))
    origin = np.full(len(hashes), bucket, np.int32)
    yield pa.table({"hash": hashes, "count": counts, "origin": origin, BUCKET: bucket_of(hashes, num_buckets)})


def _write_shared(bucket: int, table: pa.Table, num_buckets: int, plan: Folder, shared: Folder) -> None:
    if table.num_rows:
        hashes = table["hash"].to_numpy()
        is_next = hashes[1:] == hashes[:-1]
        again = (table["count"].to_numpy() > 1) | np.append(is_next, False) | np.insert(is_next, 0, False)
        table = table.filter(pa.array(again)).select(["hash", "origin"])
    shared.write_table(f"piece-{bucket:05d}.parquet", table)


def _shared_keys(name: str, shared: Folder, plan: Folder) -> Iterator[pa.Table]:
    table = shared.read_table(name)
    if table.num_rows:
        yield table.rename_columns(["hash", BUCKET])


def _write_home(bucket: int, table: pa.Table, shared: Folder, plan: Folder) -> None:
    hashes = table["hash"].to_numpy() if table.num_rows else np.zeros(0, np.uint64)
    plan.write_array(_shared_name(bucket), hashes)


def _bucket_name(bucket: int) -> str:
    return f"bucket-{bucket:05d}.arrow"


def _keys_name(bucket: int) -> str:
    return f"keys-{bucket:05d}.npy"


def _shared_name(bucket: int) -> str:
    return f"shared-{bucket:05d}.npy"
