"""What is known of each image, without vectors: from filters to the plan of shards, of a synthetic index.

One image in five has the looks of an earlier one; a group of 300,000 images is alike; others are linked in pairs and
small chains, to as many edges as asked. One in 5,000 leaks; of the survivors a seed set draws a fifth, balance a tenth.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.scale.chosen import EVALUATION_IMAGES, SEED_IMAGES, write_choices, write_images, write_matches
from benchmarks.scale.measure import Meter
from curation.account.decisions import decide
from curation.config import CurationConfig
from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import INDEX_SCHEMA
from curation.engine.workers import ExecutionConfig, run_tasks, start_ray
from curation.ops.randomness import hash_uint64
from curation.reading.filters import build_filters
from curation.reading.listing import Listing
from curation.reading.seeds import RetrievalRule, SeedSet
from curation.stages.balance import BalanceConfig
from curation.stages.choosing import GroupRules
from curation.stages.filter import filter_pool
from curation.stages.groups import EdgeFiles, write_groups
from curation.stages.heads import find_heads
from curation.stages.survivors import Survivors, find_survivors
from curation.state import Inputs, Run
from curation.writing.plan import KeptSet, plan_shards

_PART_ROWS = 100_000
_EDGES_AT_ONCE = 1_000_000
_NEIGHBOURS = 20  # of a row of the large group, beside its leader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--edges", type=int, help="a fifth of the rows where absent")
    parser.add_argument("--group", type=int, default=300_000, help="rows that are all alike; at most a tenth of all")
    parser.add_argument("--memory-gb", type=float, default=2.0, help="execution.memory_gb")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", help="where temporary files go: about 600 bytes a row")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rows, execution = (
        arguments.rows,
        ExecutionConfig(workers=arguments.workers, memory_gb=arguments.memory_gb, device="cpu"),
    )
    num_edges = arguments.edges or rows // 5
    group = min(arguments.group, rows // 10)
    ranges = Ranges(rows, CurationConfig().range_rows)
    start_ray(execution)
    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        folder = Folder(str(scratch))
        run = _run(folder, rows, execution)
        pool = run.pool
        names = write_edges(folder / "join", rows, num_edges, group, execution)
        meter = Meter()
        with meter.step("filter"):
            rules = build_filters([{"kind": "size"}, {"kind": "aspect"}])
            _, kept = filter_pool(folder / "filter", pool, rules, ranges, execution)
        with meter.step("heads"):
            _, heads = find_heads(folder / "heads", folder / "filter", ranges, execution)
        edges = EdgeFiles(folder / "join", names, 0.6)
        with meter.step("groups"):
            split, _ = write_groups(
                folder / "dedup", folder / "filter", folder / "heads", ranges, pool, "none", [edges], [edges],
                (np.zeros(0, np.int64), np.zeros(0, np.int64)), num_edges,
                GroupRules(("resolution", "bytes"), 16, None, 16, 0.6, None), execution,
            )  # fmt: skip
        leaking = {"evaluation": (folder / "decontaminate", write_matches(folder / "decontaminate", rows))}
        with meter.step("survivors"):
            _, survived = find_survivors(
                folder / "survivors", folder / "dedup", folder / "heads", leaking, "component", ranges, execution
            )
        write_choices(folder, Survivors(folder / "survivors"), ranges, execution)
        with meter.step("decide"):
            _, decided, _ = decide(run, folder / "decide")
        with meter.step("shard plan"):
            chosen = [KeptSet("pool", pool, ranges, decided["kept"], folder / "decide")]
            plan = plan_shards(folder / "shards", chosen, ["seed", "balance"], 0, 10_000, 256_000_000, execution)
        figures = {"rows": rows, "edges": num_edges, "group": group, "heads": heads["images joined"]}
        figures |= {"passed": kept["images out"], "split": split.num_rows, "leaks": survived["leaks"]}
        return {**figures, "kept": decided["kept"], "shards": len(plan.shards), **meter.figures()}
    finally:
        shutil.rmtree(scratch)


def _run(folder: Folder, rows: int, execution: ExecutionConfig) -> Run:
    """A run whose pool, seed set and evaluation set are embedded."""
    none = Listing(())
    inputs = Inputs(none, {"seed": (SeedSet(name="seed", urls=(), rule=RetrievalRule()), none)}, {"evaluation": none})
    run = Run(folder, CurationConfig(execution=execution, balance=BalanceConfig(num_images=rows)), inputs)
    run.manifests["embed/pool"] = write_index(folder / "embed/pool", rows, execution)
    for name, count in (("seed-seed", SEED_IMAGES), ("evaluation-evaluation", EVALUATION_IMAGES)):
        run.manifests[f"embed/{name}"] = write_images(folder / "embed" / name, count)
    return run


def write_index(folder: Folder, rows: int, execution: ExecutionConfig) -> Manifest:
    """An index in parts of 100,000 rows."""
    starts = range(0, rows, _PART_ROWS)
    jobs = [(number, start, min(start + _PART_ROWS, rows)) for number, start in enumerate(starts)]
    files = run_tasks(_write_part, jobs, folder, execution=execution, label="made: index", unit="parts")
    return Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=[File(**f) for f in files])


def _write_part(job: tuple[int, int, int], folder: Folder) -> dict[str, Any]:
    number, start, stop = job
    gid = np.arange(start, stop)
    # One in five looks like an image before it, and is smaller than it.
    is_copy = (gid % 5 == 4) & (gid > 4)
    look = np.where(
        is_copy, (hash_uint64(1, gid) % np.maximum(gid // 5, 1).astype(np.uint64)).astype(np.int64) * 5, gid
    )
    side = np.where(is_copy, 300, 640 + gid % 97).astype(np.int32)
    sizes = 20_000 + hash_uint64(2, gid).astype(np.int64) % 100_000
    key = pa.array(np.char.add("image-", gid.astype(str)))
    count = len(gid)
    image = pa.StructArray.from_arrays(
        [pa.array(["jpg"] * count), key, pa.array((gid - start) * 120_000), pa.array(sizes)],
        fields=list(INDEX_SCHEMA.field("image").type),
    )
    columns: dict[str, Any] = {
        "key": key,
        "source": pa.array([f"https://pool.example/{number:06d}.tar"] * count),
        "source_kind": pa.array(["tar"] * count),
        "image": image,
        "others": pa.array([[]] * count, INDEX_SCHEMA.field("others").type),
        "sha256": _bytes(3, gid),
        "pdq": _bytes(4, look),
        "pdq_mirrored": _bytes(5, look),
        "pdq_quality": pa.array(np.where(gid % 16 == 7, 20, 100).astype(np.int32)),
        "width": pa.array(side),
        "height": pa.array(side),
        "format": pa.array(["JPEG"] * count),
        "mode": pa.array(["RGB"] * count),
        "luma_deviation": pa.array(np.full(count, 50, np.float32)),
        "status": pa.array(["ok"] * count),
    }
    arrays = [columns.get(field.name, pa.nulls(count, field.type)) for field in INDEX_SCHEMA]
    file = folder.write_table(f"index/part-{number:06d}.parquet", pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA))
    return {"path": file.path, "rows": file.rows, "bytes": file.bytes, "sha256": file.sha256}


def _bytes(seed: int, ids: np.ndarray) -> pa.Array:
    """binary(32) of each id."""
    words = np.stack([hash_uint64(10 * seed + word, ids) for word in range(4)], axis=1)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(ids), [None, pa.py_buffer(words)])


def write_edges(folder: Folder, rows: int, num_edges: int, group: int, execution: ExecutionConfig) -> list[str]:
    """Edges among images that are nobody's copy: the group first, then pairs that lie near each other."""
    of_group = min(group * (_NEIGHBOURS + 1), num_edges)
    jobs = [
        (f"edges/part-{number:06d}.parquet", start, min(start + _EDGES_AT_ONCE, num_edges))
        for number, start in enumerate(range(0, num_edges, _EDGES_AT_ONCE))
    ]
    run_tasks(_write_edges, jobs, folder, rows, of_group, group, execution=execution, label="made: edges", unit="files")
    return [name for name, *_ in jobs]


def _write_edges(job: tuple[str, int, int], folder: Folder, rows: int, of_group: int, group: int) -> None:
    name, start, stop = job
    edge = np.arange(start, stop)
    originals = rows // 5
    member = edge // (_NEIGHBOURS + 1) % max(group, 1)
    nth = edge % (_NEIGHBOURS + 1)
    other = np.where(nth == 0, 0, (member + nth) % max(group, 1))  # the leader, then the next ones
    in_group = edge < of_group
    left = np.where(in_group, member, (hash_uint64(6, edge) % np.uint64(originals - 2)).astype(np.int64))
    right = np.where(in_group, other, np.minimum(left + 1, originals - 1))
    a, b = np.minimum(left, right) * 5, np.maximum(left, right) * 5
    real = a < b
    similarity = 0.6 + 0.4 * (hash_uint64(7, edge) % np.uint64(1000)).astype(np.float32) / 1000
    folder.write_table(name, pa.table({"a": a[real], "b": b[real], "similarity": similarity[real].astype(np.float32)}))
