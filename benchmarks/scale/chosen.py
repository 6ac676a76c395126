"""What the steps behind the groups ask of a synthetic index: leaks, clusters and draws that no one had to look for."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import INDEX_SCHEMA
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.randomness import hash_uint64
from curation.stages.decontaminate import MATCHES
from curation.stages.survivors import Survivors

SEED_IMAGES, EVALUATION_IMAGES = 100_000, 10_000
LEAK_EVERY = 5_000  # images of the pool to one leak
DRAWN_SHARE, BALANCED_SHARE = 0.2, 0.1  # of the survivors
_CLUSTERS = 100_000
_DRAWN = pa.schema([("gid", pa.int64()), ("seed_gid", pa.int64()), ("similarity", pa.float32())])


def write_images(folder: Folder, rows: int) -> Manifest:
    """The index of a set that is small, in one part."""
    known = {"key": [f"image-{row}" for row in range(rows)], "status": ["ok"] * rows}
    arrays = [pa.array(known[f.name], f.type) if f.name in known else pa.nulls(rows, f.type) for f in INDEX_SCHEMA]
    file = folder.write_table("index/part-0.parquet", pa.Table.from_arrays(arrays, schema=INDEX_SCHEMA))
    return Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=[file])


def write_matches(folder: Folder, rows: int) -> list[File]:
    """One image in LEAK_EVERY matches an image of an evaluation set."""
    gid = np.arange(0, rows, LEAK_EVERY)
    other = (hash_uint64(20, gid) % np.uint64(EVALUATION_IMAGES)).astype(np.int64)
    similarity = np.full(len(gid), 0.9, np.float32)
    table = pa.table([gid, other, similarity, ["embedding"] * len(gid)], schema=MATCHES)
    return [folder.write_table("vectors-00000.parquet", table)]


def write_choices(root: Folder, survivors: Survivors, ranges: Ranges, execution: ExecutionConfig) -> None:
    """Clusters of the distinct images; draws of one seed set, `seed`, and balanced ones, of the survivors."""
    numbers = list(range(len(ranges)))
    run_tasks(_write_range, numbers, root, survivors, execution=execution, label="made: draws", unit="files")
    drawn = [range_file("piece-drawn", number) for number in numbers]
    retrieved = root / "retrieve/seed"
    with retrieved.writing("matches.parquet") as file, pq.ParquetWriter(file, _DRAWN, compression="zstd") as writer:
        for name in drawn:
            writer.write_table(retrieved.read_table(name))
            retrieved.delete(name)


def _write_range(number: int, root: Folder, survivors: Survivors) -> None:
    representative, gids = survivors.representative(number), survivors.gids(number)
    cluster = (hash_uint64(21, representative) % np.uint64(_CLUSTERS)).astype(np.int32)
    root.write_array(f"cluster/level-1/assignment-{number:05d}.npy", np.where(representative < 0, -1, cluster))
    share = hash_uint64(22, gids) / 2.0**64
    drawn, balanced = gids[share < DRAWN_SHARE], gids[share > 1 - BALANCED_SHARE]
    by = (hash_uint64(23, drawn) % np.uint64(SEED_IMAGES)).astype(np.int64)
    columns = [drawn, by, np.full(len(drawn), 0.7, np.float32)]
    (root / "retrieve/seed").write_table(range_file("piece-drawn", number), pa.table(columns, schema=_DRAWN))
    columns = [balanced, cluster[balanced - number * survivors.size].astype(np.int64)]
    (root / "balance").write_table(range_file("balanced", number), pa.table(columns, names=["gid", "cluster"]))
