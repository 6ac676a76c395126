"""What a task of heads and groups holds, by the peak of its process: it follows execution.memory_gb, not the pool."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.scale.measure import Meter
from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.workers import ExecutionConfig
from curation.ops.randomness import hash_uint64
from curation.stages import filter as filter_stage
from curation.stages.choosing import GroupRules
from curation.stages.groups import EdgeFiles, write_groups
from curation.stages.heads import find_heads
from tests.curation.stages.test_groups import pool_of

ROWS = 3 << 19  # a row group of 2^20, and half of one
LIMIT = ExecutionConfig(workers=1, memory_gb=0.5)
RULES = GroupRules(("resolution",), 16, None, 16, 0.6, None)


def write_filtered(folder: Folder, rows: int) -> None:
    """One image in five has the looks of another."""
    gid = np.arange(rows)
    look = np.where(gid % 5 == 4, gid // 2, gid)
    plain = {"pdq_quality": 100, "pixels": 5, "bytes": 7, "standing": 0}
    arrays = [pa.nulls(rows, pa.string())]
    for field in filter_stage.SCHEMA:
        if field.name in plain:
            arrays.append(pa.array(np.full(rows, plain[field.name]), field.type))
        elif field.name != "reason":
            seed = 10 * len(arrays)
            words = np.stack([hash_uint64(seed + i, gid if field.name == "sha256" else look) for i in range(4)], axis=1)
            arrays.append(pa.FixedSizeBinaryArray.from_buffers(field.type, rows, [None, pa.py_buffer(words)]))
    folder.write_table(range_file("range", 0), pa.Table.from_arrays(arrays, schema=filter_stage.SCHEMA))


def work(root: Folder, rows: int) -> int:
    """Heads and groups of so many images, one in four of which is alike with the next original; how many are heads."""
    ranges, filtered, heads = Ranges(rows), root / "filter", root / "heads"
    _, counts = find_heads(heads, filtered, ranges, LIMIT)
    pool = pool_of(root / "pool", np.zeros((4, 1), np.float16))
    edges = [EdgeFiles(root / "join", ["edges.parquet"], 0.6)]
    none = np.zeros(0, np.int64), np.zeros(0, np.int64)
    write_groups(root / "dedup", filtered, heads, ranges, pool, "e", edges, edges, none, rows // 10, RULES, LIMIT)
    return counts["images joined"]


@pytest.mark.slow
def test_a_task_stays_within_its_memory(tmp_path: Path, ray_session: None) -> None:
    """It took 1.04 GB more than the process of these rows, and more of more, whatever memory_gb; now 0.36 GB."""
    meter, few, many = Meter(), Folder(str(tmp_path / "few")), Folder(str(tmp_path / "many"))
    for root, rows in ((few, 1000), (many, ROWS)):
        write_filtered(root / "filter", rows)
        a = np.arange(0, rows - 10, 10)
        table = {"a": a, "b": a + 5, "similarity": np.full(len(a), 0.9, np.float32)}
        (root / "join").write_table("edges.parquet", pa.table(table))
    with meter.step("few"):  # everything is imported and compiled
        work(few, 1000)
    with meter.step("many"):
        num_heads = work(many, ROWS)
    assert num_heads > 0.75 * ROWS
    grown = meter.steps["many"]["task_gb"] - meter.steps["few"]["task_gb"]
    assert grown < LIMIT.memory_gb
