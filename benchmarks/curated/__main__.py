"""Draw a raw pool, curate it, and cut five sets of equal size from it: python -m benchmarks.curated [--work FOLDER]

What `python -m benchmarks.experiment curated` learns from, in FOLDER/curated-images: the pool (pool.py), a run of
`curation.run` over it, and a tar for each of

    raw                    any image that decodes
    deduplicated           one of each group of copies
    retrieved              of those, the nearest of the seed images
    balanced               of those, as many from each cluster of a hierarchy
    retrieved_or_balanced  either, as LVD-1689M is put together

Leaks of the evaluation sets, as the run finds them, are in none; seeds are the curated photographs and the labelled
sets' training images, as the training sets of its benchmarks are DINOv2's. What each holds, by the pool's truth, goes
to benchmarks/records/curated/images.json. MINUTES of two cores and 1 GB; pool and run are not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.curated.pool import EVALUATION, SEED, Sample, Sizes, make_pool, read_images, write_tar
from benchmarks.experiment import WORK
from configs.messages import answered, named_folder
from curation.account.truth import TruthRow, read_truth
from curation.ops.randomness import hash_shuffle

IMAGES = 8_000
SEEDS = ("seed/seed-*.tar", "eval/eval20-train-*.tar", "eval/eval32-train-*.tar")
SETTINGS = (
    "retrieve.k=8",
    f"balance.num_images={IMAGES}",
    "cluster.levels=[2000,400,80]",
    "cluster.num_resamplings=[3,3,3]",
)
ARMS: dict[str, Callable[[str, str], bool]] = {
    "raw": lambda status, reason: status not in ("rejected", "leak"),
    "deduplicated": lambda status, reason: status in ("kept", "not_retrieved"),
    "retrieved": lambda status, reason: "retrieved" in reason.split(),
    "balanced": lambda status, reason: "balanced" in reason.split(),
    "retrieved_or_balanced": lambda status, reason: status == "kept",
}
"""which rows of decisions.parquet each set is drawn from, by status and reason"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=named_folder, help="the folder of images (default: $SEEDBED_DATA)")
    parser.add_argument(
        "--work", type=named_folder, default=WORK, help=f"as of benchmarks.experiment (default: {WORK})"
    )
    asked = parser.parse_args(arguments)
    return answered(lambda: _make(asked), "the same command continues")


def _make(asked: argparse.Namespace) -> int:
    data = asked.data or os.environ.get("SEEDBED_DATA")
    if not data:
        raise ValueError("give --data FOLDER, the folder of images, or name it in SEEDBED_DATA.")
    folder = asked.work.absolute() / "curated-images"
    pool, truth = make_pool(Path(data), folder / "pool", Sizes())
    run = folder / "run"
    if status := curate(Path(data), pool, run):
        return status
    print(json.dumps(contents := cut(pool, run, truth, folder), indent=1))
    path = Path(__file__).parents[1] / "records" / "curated" / "images.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1) + "\n")
    return 0


def curate(data: Path, pool: str, out: Path) -> int:
    """A run of curation over the pool, by its own command; its status."""
    command = [sys.executable, "-m", "curation.run", "--config", "offline", "--pool", pool, "--out", str(out)]
    for seed in SEEDS:
        command += ["--seed", str(data / seed)]
    for name in EVALUATION:
        command += ["--evaluation", str(data / "eval" / f"{name}-*.tar")]
    return subprocess.run([*command, *SETTINGS]).returncode


def cut(pool: str, run: Path, truth: Path, folder: Path) -> list[dict[str, object]]:
    """Write folder/ARM.tar, IMAGES of each, and say what they hold."""
    decisions = pq.read_table(run / "decisions.parquet", columns=["gid", "key", "status", "reason"])
    decisions = decisions.filter(pc.is_valid(decisions["key"]))
    rows = decisions.to_pylist()
    images = {key: Sample(key=key, ext=ext, data=content) for key, ext, content in read_images(Path(pool))}
    known, found = read_truth(truth).rows, []
    for place, (name, belongs) in enumerate(ARMS.items()):
        keys = sorted(row["key"] for row in rows if belongs(row["status"], row["reason"] or ""))
        if len(keys) < IMAGES:
            raise ValueError(f"{name} has {len(keys):,} images, fewer than the {IMAGES:,} asked for: lower IMAGES.")
        chosen = [keys[index] for index in hash_shuffle(SEED + place, np.arange(len(keys)))[:IMAGES]]
        write_tar(folder / f"{name}.tar", (images[key] for key in chosen))
        found.append({"images": name, "of": len(keys), **holds([known[key] for key in chosen])})
    return found


def holds(rows: Sequence[TruthRow]) -> dict[str, float]:
    """Of a set, by the truth: shares of natural pictures, of different ones, of further copies, of leaks missed."""
    pictures = {row.cluster or row.key: row.kind for row in rows}
    counts = {
        "natural": sum(row.kind == "natural" for row in rows),
        "natural, different": sum(kind == "natural" for kind in pictures.values()),
        "copies": len(rows) - len(pictures),
        "leaks": sum(bool(row.leak_of) for row in rows),
    }
    return {name: round(number / len(rows), 4) for name, number in counts.items()}


if __name__ == "__main__":
    sys.exit(main())
