"""Rows to where their key lives: curation's exchange on files against Ray Data's hash shuffle, in turn, in one run.

    python -m benchmarks.exchange [--rows 4000000] [--rounds 3]

Both read the same Parquet files, bring rows of one key together, sort them, and write Parquet files. What Ray Data
cannot do is not timed: to go on after the driver died, and to give the same bytes each time.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.scale.measure import Meter
from curation.engine.exchange import BUCKET, bucket_of, exchange
from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig, start_ray
from curation.ops.randomness import hash_uint64

_FILES, _BUCKETS, _PAYLOAD = 8, 8, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    execution = ExecutionConfig()
    start_ray(execution)
    meter, seconds = Meter(), {"exchange": [], "ray.data": []}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        _write(source, asked.rows)
        for number in range(asked.rounds):
            for name, run in (("exchange", partial(_exchange, execution=execution)), ("ray.data", _ray_data)):
                out = Path(scratch) / f"{name}-{number}"
                start = time.perf_counter()
                with meter.step(f"{name} {number}"):
                    run(source, out)
                seconds[name].append(time.perf_counter() - start)
                written = sum(pq.read_metadata(path).num_rows for path in out.rglob("*.parquet"))
                assert written == asked.rows, f"{name} wrote {written} of {asked.rows} rows"
    for name, times in seconds.items():
        steps = [step for label, step in meter.steps.items() if label.startswith(name)]
        processor = statistics.median(step["processor_seconds"] for step in steps)
        print(f"{name}: {statistics.median(times):.1f} s, {processor:.1f} s of processor (median of {asked.rounds})")
    ratio = statistics.median(seconds["ray.data"]) / statistics.median(seconds["exchange"])
    print(f"exchange is {ratio:.2f} times as fast on {asked.rows:,} rows of {_PAYLOAD + 16} bytes")


def _write(source: Path, rows: int) -> None:
    source.mkdir()
    for number, ids in enumerate(np.array_split(np.arange(rows), _FILES)):
        words = np.stack([hash_uint64(word, ids) for word in range(_PAYLOAD // 8)], axis=1)
        payload = pa.FixedSizeBinaryArray.from_buffers(pa.binary(_PAYLOAD), len(ids), [None, pa.py_buffer(words)])
        key = hash_uint64(99, ids) % np.uint64(rows // 2)
        pq.write_table(pa.table({"key": key, "id": ids, "payload": payload}), source / f"{number}.parquet")


def _exchange(source: Path, out: Path, execution: ExecutionConfig) -> None:
    names = [f"part-{bucket}.parquet" for bucket in range(_BUCKETS)]
    exchange(
        sorted(path.name for path in source.iterdir()), _rows_of, _BUCKETS, _write_bucket, Folder(str(source)),
        Folder(str(out)), names, scratch=Folder(f"{out}-scratch"), outputs=(Folder(str(out)), names),
        sort_by=["key", "id"], execution=execution, label="exchange", unit="files",
    )  # fmt: skip


def _rows_of(name: str, source: Folder, *_: Any) -> Iterator[pa.Table]:
    for table in source.table_batches(name, ["key", "id", "payload"]):
        buckets = bucket_of(hash_uint64(1, table["key"].to_numpy()), _BUCKETS)
        yield table.append_column(BUCKET, pa.array(buckets))


def _write_bucket(bucket: int, table: pa.Table, _: Folder, out: Folder, names: list[str]) -> None:
    out.write_table(names[bucket], table)


def _ray_data(source: Path, out: Path) -> None:
    import ray
    from ray.data.context import ShuffleStrategy

    context = ray.data.DataContext.get_current()
    context.shuffle_strategy = ShuffleStrategy.HASH_SHUFFLE
    context.enable_progress_bars = False
    dataset = ray.data.read_parquet(str(source)).repartition(_BUCKETS, keys=["key"], sort=True)
    dataset.write_parquet(str(out))


if __name__ == "__main__":
    main()
