"""Shards planned by exchange, against the plain sort of all rows: repeated keys, sets of two kinds, any execution."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import INDEX_SCHEMA, ImageSet
from curation.engine.workers import ExecutionConfig
from curation.ops.randomness import hash_uint64
from curation.writing import plan as planning
from curation.writing.plan import (
    KeptSet,
    PlannedShard,
    forget_plan,
    num_buckets,
    plan_shards,
    planned_rows,
    provenance_schema,
)

PARTS, ROWS, RANGE = 7, 60, 100
SEED, MAX_IMAGES, MAX_BYTES = 3, 9, 400_000
PROVENANCE = provenance_schema(["s", "balance"])


def image_set(folder: Folder, name: str, keys: list[str], rng: np.random.Generator) -> ImageSet:
    """Index files of PARTS parts; about one row in ten is rejected."""
    files = []
    for part, rows in enumerate(np.array_split(np.arange(len(keys)), PARTS)):
        sizes = rng.integers(1_000, 90_000, len(rows)).tolist()
        table = [
            {
                "key": keys[row],
                "source": f"{name}/{part}.tar",
                "source_kind": "tar",
                "image": {"suffix": "jpg", "name": f"{keys[row]}.jpg", "offset": 512 + 100_000 * i, "size": sizes[i]},
                "others": [{"suffix": "txt", "name": "x.txt", "offset": 0, "size": 40}],
                "sha256": bytes(32),
                "width": row,
                "height": 1,
                "format": "JPEG",
                "status": "ok" if rng.random() < 0.9 else "rejected",
            }
            for i, row in enumerate(rows.tolist())
        ]
        files.append(folder.write_table(f"index/part-{part}.parquet", pa.Table.from_pylist(table, INDEX_SCHEMA)))
    return ImageSet.of(folder, Manifest(stage="embed", version=1, key="", settings={}, inputs={}, files=files))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[KeptSet]:
    """A pool with decisions by range, and a seed set as it is; one key in four stands in several parts or sets."""
    root, rng = Folder(str(tmp_path_factory.mktemp("plan"))), np.random.default_rng(0)
    keys = [f"k{rng.integers(3 * PARTS * ROWS)}" for _ in range(PARTS * ROWS)]
    pool, seeds = image_set(root / "pool", "pool", keys, rng), image_set(root / "seed", "seed", keys[:50], rng)
    is_kept = (pool.rows(0, len(keys), ["status"])["status"].to_numpy() == "ok") & (rng.random(len(keys)) < 0.6)
    ranges = Ranges(len(keys), RANGE)
    for number in range(len(ranges)):
        gids = np.arange(*ranges.bounds(number))
        rows = [
            {
                "gid": gid,
                "status": "kept" if is_kept[gid] else "duplicate",
                "reason": f"why {gid}",
                "seed": "s",
                "similarity": 0.5,
                "cluster": gid % 5,
                "component_size": 1,
                "release": 1,
                "draws": {"s": gid, "balance": None},
            }
            for gid in gids.tolist()
        ]
        schema = pa.schema([("gid", pa.int64()), ("status", pa.string()), ("release", pa.int32()), *PROVENANCE])
        (root / "decide").write_table(range_file("decisions", number), pa.Table.from_pylist(rows, schema))
    return [
        KeptSet("pool", pool, ranges, int(is_kept.sum()), root / "decide"),
        KeptSet("seed:s", seeds, Ranges(50, RANGE), 50, seed="s"),
    ]


def expected(kept: list[KeptSet]) -> list[tuple[int, int]]:
    """(set, gid) of every row to write, in the order of the hash."""
    found = []
    for number, k in enumerate(kept):
        gids = np.arange(k.images.num_images)
        if k.decisions is None:
            gids = gids[k.images.rows(0, k.images.num_images, ["status"])["status"].to_numpy() == "ok"]
        else:
            names = [range_file("decisions", r) for r in range(len(k.ranges))]
            status = [k.decisions.read_table(name)["status"].to_numpy(zero_copy_only=False) for name in names]
            gids = gids[np.concatenate(status) == "kept"]
        order = hash_uint64(SEED, gids * len(kept) + number)
        found += list(zip(order.tolist(), [number] * len(gids), gids.tolist(), strict=True))
    return [(number, gid) for _, number, gid in sorted(found)]


def rows_of(folder: Folder, shards: list[PlannedShard]) -> list[dict]:
    tables = [planned_rows(folder, shard) for shard in shards]
    assert [table.num_rows for table in tables] == [shard.num_rows for shard in shards]
    return [row for table in tables for row in table.to_pylist()]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("bucket_images", [1 << 20, 40])
def test_every_kept_image_is_planned_once_in_the_order_of_its_hash(kept, tmp_path, monkeypatch, bucket_images):
    monkeypatch.setattr(planning, "BUCKET_IMAGES", bucket_images)
    folder = Folder(str(tmp_path))
    plan = plan_shards(folder, kept, ["s", "balance"], SEED, MAX_IMAGES, MAX_BYTES, ExecutionConfig(workers=2))
    rows = rows_of(folder, plan.shards)
    assert [(row["set_number"], row["gid"]) for row in rows] == expected(kept)
    assert plan.num_rows == dict(Counter(row["set"] for row in rows))
    assert len({shard.bucket for shard in plan.shards}) == num_buckets(kept) == (1 if bucket_images > 1000 else 8)
    times = Counter(row["key"] for row in rows)
    assert {row["is_unique"] for row in rows} == {True, False}
    assert all(row["is_unique"] == (times[row["key"]] == 1) for row in rows)
    for row in rows:
        images = kept[row["set_number"]].images
        assert row["width"] == row["gid"]
        assert (
            row["source"]
            == f"{row['set'].partition(':')[0]}/{np.searchsorted(images.part_base, row['gid'], 'right') - 1}.tar"
        )
        why = row["provenance"]
        assert (why["reason"], why["draws"]) == (
            (f"why {row['gid']}", {"s": row["gid"], "balance": None}) if row["set"] == "pool" else (None, None)
        )
        assert why["seed"] == "s"
    assert (plan.has_label, plan.has_others) == (False, False)
    first_of = [start for start, _ in plan.by_bucket()]
    for number, shard in enumerate(plan.shards):
        assert 1 <= shard.num_rows <= MAX_IMAGES
        if (
            number + 1 not in [*first_of, len(plan.shards)] and shard.num_rows < MAX_IMAGES
        ):  # cut by bytes, not by chance
            assert sum(row["image"]["size"] + 3072 for row in rows_of(folder, [shard])) > MAX_BYTES - 100_000
    forget_plan(folder)
    assert folder.names() == []


@pytest.mark.usefixtures("ray_session")
def test_the_plan_is_the_same_for_any_execution_and_after_an_interruption(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "BUCKET_IMAGES", 40)
    contents = []
    for name, execution in (("a", ExecutionConfig(workers=1)), ("b", ExecutionConfig(workers=2, memory_gb=0.25))):
        folder = Folder(str(tmp_path / name))
        plan = plan_shards(folder, kept, ["s", "balance"], SEED, MAX_IMAGES, MAX_BYTES, execution)
        contents.append({name: folder.read_bytes(name) for name in folder.names()})
    assert contents[0] == contents[1]
    for name in ("plan/bucket-00003.json", "plan/shared-00001.npy", "plan/shared-00005.npy"):
        Path(folder.path(name)).unlink()
    assert plan_shards(folder, kept, ["s", "balance"], SEED, MAX_IMAGES, MAX_BYTES, ExecutionConfig()) == plan
    assert {name: folder.read_bytes(name) for name in folder.names()} == contents[0]


def test_a_task_reads_each_index_file_once(kept, monkeypatch):
    """And so a run does, but for the parts on the border of two ranges."""
    read: list[str] = []

    def counted(self: Folder, name: str, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        read.append(name)
        return original(self, name, start, stop, columns)

    original = Folder.table_rows
    monkeypatch.setattr(Folder, "table_rows", counted)
    for item in planning._items(0, kept[0]):
        read.clear()
        rows = pa.concat_tables(planning._joined(item, PROVENANCE)).num_rows
        assert rows
        assert sorted(read) == sorted(rows.path for rows, _ in item.parts)
        assert len(read) <= 3
    read.clear()
    list(planning._joined(next(planning._items(1, kept[1])), PROVENANCE))
    assert len(read) == PARTS


def test_the_number_of_buckets_follows_from_counts(kept, monkeypatch):
    assert num_buckets(kept) == 1
    monkeypatch.setattr(planning, "BUCKET_BYTES", kept[1].images.parts.index_bytes // 2)
    assert num_buckets(kept[1:]) in (2, 3)
