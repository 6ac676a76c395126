"""Reading and writing tars against ray.data.read_webdataset and webdataset.ShardWriter, interleaved in one run.

    python -m benchmarks.tars [--samples 12000] [--repeats 5]

Both readers read every sample's bytes, nothing decoded, each as it is used: ours part by part in Ray tasks, Ray Data
through its batches. Both writers write the same samples, ours with sha256 of every member and of the shard, and the
index of offsets.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
import webdataset

from curation.engine.folder import Folder
from curation.engine.workers import ExecutionConfig, run_tasks, start_ray
from curation.ops.randomness import hash_uint64
from curation.reading.listing import find_parts
from curation.reading.samples import Part
from curation.reading.sources import read_samples
from curation.stages.shard import _entry_table
from curation.writing.tars import ShardBuilder

_IMAGE_BYTES = 18_000
_SHARDS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=12_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    start_ray(ExecutionConfig(workers=2))
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = _samples(options.samples)
        per_shard = -(-len(samples) // _SHARDS)
        shards = [samples[i : i + per_shard] for i in range(0, len(samples), per_shard)]
        write_ours(shards, folder / "pool")
        urls = sorted(str(path) for path in (folder / "pool").glob("*.tar"))
        result = {
            "read": compare(
                {"ours": lambda: read_ours(urls), "ray.data.read_webdataset": lambda: read_ray(urls)}, options
            ),
            "write": compare(
                {
                    "ours": lambda: write_ours(shards, folder / "ours"),
                    "webdataset.ShardWriter": lambda: write_webdataset(shards, folder / "theirs"),
                },
                options,
            ),
        }
    print(json.dumps(result, indent=1))


def compare(jobs: dict[str, Callable[[], int]], options: argparse.Namespace) -> dict[str, float]:
    """Samples a second, median of the repeats, the jobs taking turns; the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(options.repeats + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            count = job()
            seconds = time.perf_counter() - start
            assert count == options.samples, f"{name} delivered {count} of {options.samples} samples"
            if repeat:
                times[name].append(seconds)
    rates = {name: round(options.samples / statistics.median(values)) for name, values in times.items()}
    ours, peer = rates.values()
    return {**rates, "ratio": round(ours / peer, 2)}


def read_ours(urls: list[str]) -> int:
    return sum(run_tasks(_read_part, find_parts(urls), execution=ExecutionConfig(workers=2), label="read", unit="tars"))


def _read_part(part: Part) -> int:
    return sum(1 for sample in read_samples(part, 1 << 30) if sample.content is not None)


def read_ray(urls: list[str]) -> int:
    dataset = ray.data.read_webdataset(urls, decoder=None)  # map_batches(count) in a task was slower still, by half
    return sum(len(batch["__key__"]) for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"))


def write_ours(shards: list[list[tuple[str, bytes, bytes]]], folder: Path) -> int:
    target, count = Folder(str(folder)), 0
    for number, samples in enumerate(shards):
        builder = ShardBuilder()
        for key, image, text in samples:
            builder.add(key, [("jpg", image), ("json", text)])
        target.write_bytes(f"shard-{number:06d}.tar", builder.finish(), rows=len(samples))
        entries = builder.entries
        target.write_table(
            f"index/shard-{number:06d}.parquet", _entry_table(entries, [0] * len(entries), [""] * len(entries))
        )
        count += len(samples)
    return count


def write_webdataset(shards: list[list[tuple[str, bytes, bytes]]], folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    count = 0
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=len(shards[0]), verbose=0) as writer:
        for samples in shards:
            for key, image, text in samples:
                writer.write({"__key__": key, "jpg": image, "json": text})
                count += 1
    return count


def _samples(number: int) -> list[tuple[str, bytes, bytes]]:
    noise = hash_uint64(0, np.arange(_IMAGE_BYTES // 8 + number)).tobytes()
    return [
        (f"s{i:08d}", noise[8 * i : 8 * i + _IMAGE_BYTES], json.dumps({"index": i, "label": i % 10}).encode())
        for i in range(number)
    ]


if __name__ == "__main__":
    main()
