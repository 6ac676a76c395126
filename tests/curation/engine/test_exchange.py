"""Rows to where their key lives: against NumPy, for any number of workers and buckets, and after an interruption."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from curation.engine.exchange import BUCKET, bucket_of, buckets_for, exchange
from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.workers import ExecutionConfig
from curation.ops.randomness import hash_uint64
from tests.conftest import REPOSITORY

ROWS, ITEMS, KEYS = 500, 4, 37
ALONE = ExecutionConfig(workers=1)


def rows_of(item: int, log: str, num_buckets: int, out: Folder) -> Iterator[pa.Table]:
    """Two tables an item; the item is written down, so that a test can count the work."""
    with open(log, "a") as file:
        file.write(f"map {item}\n")
    for half in (0, 1):
        ids = np.arange(ROWS) + (2 * item + half) * ROWS
        keys = hash_uint64(1, ids) % np.uint64(KEYS)
        buckets = bucket_of(hash_uint64(2, keys.astype(np.int64)), num_buckets)
        yield pa.table({"key": keys, "id": ids, "text": [f"{i:x}" for i in ids], BUCKET: buckets})


def sums_of(bucket: int, table: pa.Table, log: str, num_buckets: int, out: Folder) -> None:
    with open(log, "a") as file:
        file.write(f"reduce {bucket}\n")
    assert table.num_rows == 0 or table.column_names == ["key", "id", "text"]
    assert table.num_rows == 0 or table.equals(table.sort_by([("key", "ascending"), ("id", "ascending")]))
    sums = (
        table.group_by("key").aggregate([("id", "sum"), ("id", "count")]) if table.num_rows else pa.table({"key": []})
    )
    out.write_table(f"piece-{num_buckets}-{bucket}.parquet", sums)


def run(tmp_path: Path, num_buckets: int = 5, execution: ExecutionConfig = ALONE) -> dict[int, tuple[int, int]]:
    """key -> (sum, count) of all ids."""
    out, log = Folder(str(tmp_path / "out")), str(tmp_path / "log")
    names = [f"piece-{num_buckets}-{bucket}.parquet" for bucket in range(num_buckets)]
    exchange(
        range(ITEMS), rows_of, num_buckets, sums_of, log, num_buckets, out,
        scratch=Folder(str(tmp_path / "scratch")), outputs=(out, names),
        sort_by=["key", "id"], execution=execution, label="test", unit="rows",
    )  # fmt: skip
    found = {}
    for name in names:
        for row in out.read_table(name).to_pylist():
            assert row["key"] not in found
            found[row["key"]] = row["id_sum"], row["id_count"]
    return found


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("num_buckets", [1, 5, 64])
def test_every_row_arrives_once_where_its_key_lives(tmp_path: Path, num_buckets: int) -> None:
    ids = np.arange(2 * ITEMS * ROWS)
    keys = (hash_uint64(1, ids) % np.uint64(KEYS)).astype(int)
    expected = {key: (int(ids[keys == key].sum()), int((keys == key).sum())) for key in np.unique(keys).tolist()}
    assert run(tmp_path, num_buckets) == expected
    assert Folder(str(tmp_path / "scratch")).names() == []


@pytest.mark.usefixtures("ray_session")
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, execution=ExecutionConfig(workers=workers))
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name / "out").iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(one) == 5


@pytest.mark.usefixtures("ray_session")
def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    whole = run(tmp_path)
    (tmp_path / "log").unlink()
    assert run(tmp_path) == whole
    assert not (tmp_path / "log").exists()
    (tmp_path / "out" / "piece-5-3.parquet").unlink()
    assert run(tmp_path) == whole
    lines = (tmp_path / "log").read_text().split("\n")[:-1]
    assert sorted(lines) == sorted([*(f"map {item}" for item in range(ITEMS)), "reduce 3"])


def one_row(item: int, fails: bool, out: Folder) -> Iterator[pa.Table]:
    yield pa.table({"id": [item], BUCKET: np.zeros(1, np.int32)})


def write_ids(bucket: int, table: pa.Table, fails: bool, out: Folder) -> None:
    if fails:
        raise RuntimeError("interrupted")
    out.write_table("ids.parquet", table)


@pytest.mark.usefixtures("ray_session")
def test_rows_of_other_items_are_not_taken_for_ours(tmp_path: Path) -> None:
    """An interrupted call whose items were others, as pieces that another memory_gb cuts: their map files are there."""
    out = Folder(str(tmp_path / "out"))

    def moved(items: list[int], fails: bool) -> None:
        exchange(
            items, one_row, 1, write_ids, fails, out, scratch=Folder(str(tmp_path / "scratch")),
            outputs=(out, ["ids.parquet"]), sort_by=["id"], execution=ALONE, label="test", unit="rows",
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="interrupted"):
        moved([1, 2], True)
    moved([2, 3], False)
    assert out.read_table("ids.parquet")["id"].to_pylist() == [2, 3]
    assert Folder(str(tmp_path / "scratch")).names() == []


@pytest.mark.slow
def test_a_killed_driver_continues_with_what_is_left(tmp_path: Path) -> None:
    """SIGKILL of the whole process group when two maps are done, then the same call again."""
    code = (
        "import sys, time; from pathlib import Path; import tests.curation.engine.test_exchange as t\n"
        "from curation.engine.workers import start_ray, ExecutionConfig\n"
        "plain = t.rows_of\n"
        "def slow(item, *shared):\n    time.sleep(1.0)\n    yield from plain(item, *shared)\n"
        "t.rows_of = slow\n"
        "start_ray(ExecutionConfig(workers=1)); t.run(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "scratch").glob("*.npy"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (tmp_path / "log").unlink()
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=60)
    lines = (tmp_path / "log").read_text().split()
    assert lines.count("map") <= ITEMS - 2
    (tmp_path / "clean").mkdir()
    subprocess.run([*command[:-1], str(tmp_path / "clean")], cwd=REPOSITORY, check=True, timeout=60)
    one, two = (
        {p.name: p.read_bytes() for p in (folder / "out").iterdir()} for folder in (tmp_path, tmp_path / "clean")
    )
    assert one == two


def test_buckets_are_even_and_follow_the_first_bytes() -> None:
    counts = np.bincount(bucket_of(hash_uint64(0, np.arange(100_000)), 7), minlength=7)
    assert counts.min() > 0.95 * counts.mean()
    digests = np.array([[0] * 32, [255] * 32, [127] + [255] * 31, [128] + [0] * 31], np.uint8)
    assert bucket_of(digests, 2).tolist() == [0, 1, 0, 1]
    assert buckets_for(4e9, ExecutionConfig(memory_gb=4)) == 8
    assert buckets_for(0, ExecutionConfig()) == 1


def test_ranges_cut_gids() -> None:
    ranges = Ranges(25, 10)
    assert [ranges.bounds(r) for r in range(len(ranges))] == [(0, 10), (10, 20), (20, 25)]
    assert ranges.of(np.array([0, 9, 10, 24])).tolist() == [0, 0, 1, 2]
    assert ranges.weights() == [10, 10, 5]
    assert len(Ranges(0)) == 0
    assert range_file("kept", 12) == "kept-00012.parquet"
