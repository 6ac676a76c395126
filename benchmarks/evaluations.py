"""Every evaluation on real images: a backbone, the same untrained, raw pixels and colour histograms, side by side.

    SEEDBED_DATA=DATA python -m benchmarks.evaluations TEACHER --out FOLDER [EVALUATION.setting=value ...]

DATA is the folder of real images that the tests use. Writes FOLDER/sets.yaml, truths and FOLDER/results: it runs
`python -m pretrain.downstream.evals all`. Retrieval looks for the planted copies of a pool image in the pool:
re-encoded, resized, recoloured ones are easy; crops, turns, mirror images, borders and combined edits hard. Objects are
segments of BSDS photographs. About 11 minutes on two cores with a small backbone.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

import yaml

from pretrain.downstream.evals.__main__ import main as evaluate

_EASY = {"reencode", "resize", "color", "exact", "gray", "blur", "noise", "text", "real_copy", "real_copy_other_size"}
_MOST_QUERIES = 400
SETS = {
    "eval20": {"kind": "labelled", "train": "eval/eval20-train-*.tar", "val": "eval/eval20-val-*.tar"},
    "eval32": {"kind": "labelled", "train": "eval/eval32-train-*.tar", "val": "eval/eval32-val-*.tar"},
    "copydet": {
        "kind": "copies",
        "queries": "copydet/queries-*.tar",
        "references": "copydet/refs-*.tar",
        "background": "seed/seed-*.tar",
    },
    "camvid": {
        "kind": "segmentation",
        "train": "dense/seg-camvid-train-*.tar",
        "val": "dense/seg-camvid-val-*.tar",
        "classes": 11,
        "ignore": [11],
    },
    "kitchen": {
        "kind": "depth",
        "train": "dense/depth-kitchen-train-*.tar",
        "val": "dense/depth-kitchen-val-*.tar",
    },
    "bsds": {"kind": "objects", "val": "dense/seg-bsds-*.tar"},
}


def write_sets(data: Path, out: Path) -> Path:
    """sets.yaml of the real images, and truth and queries of retrieval beside it."""
    out.mkdir(parents=True, exist_ok=True)
    queries = _write_retrieval(data, out)
    placed: dict[str, dict[str, object]] = {
        name: {key: str(data / value) if "/" in str(value) else value for key, value in entry.items()}
        for name, entry in SETS.items()
    }
    placed["copydet"]["truth"] = str(_write_copies(data, out).resolve())
    pool = str(data / "pool" / "pool-*.tar")
    placed["copies in a pool"] = {
        "kind": "retrieval",
        "queries": pool,
        "database": pool,
        "truth": str(queries.resolve()),
    }
    path = out / "sets.yaml"
    path.write_text(yaml.safe_dump(placed, sort_keys=False), encoding="utf-8")
    return path


def _write_retrieval(data: Path, out: Path) -> Path:
    """Query: the first image of a group of copies; itself is junk, for it would be found first."""
    groups: dict[str, list[dict[str, str]]] = {}
    with (data / "pool" / "pool_truth.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["cluster"] and row["kind"] == "natural":
                groups.setdefault(row["cluster"], []).append(row)
    path = out / "retrieval_truth.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "image", "relation"])
        for original, rows in list(groups.items())[:_MOST_QUERIES]:
            for row in rows:
                hard = row["transform"] not in _EASY
                relation = "junk" if row["key"] == original else "hard" if hard else "easy"
                writer.writerow([original, row["key"], relation])
    return path


def _write_copies(data: Path, out: Path) -> Path:
    """The pairs of the queries alone; the file of the set has those of its bridge pictures, too."""
    path = out / "copies_truth.csv"
    with (data / "copydet" / "copydet_truth.csv").open(newline="", encoding="utf-8") as source:
        rows = [row for row in csv.DictReader(source) if row["query"].startswith("sq")]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "reference"])
        writer.writerows((row["query"], row["reference"]) for row in rows)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--evaluations", default="all")
    parser.add_argument("settings", nargs="*", metavar="EVALUATION.setting=value")
    asked = parser.parse_args()
    if "SEEDBED_DATA" not in os.environ:
        print("error: SEEDBED_DATA must name the folder of real images.", file=sys.stderr)
        return 2
    sets = write_sets(Path(os.environ["SEEDBED_DATA"]), asked.out)
    backbones = [asked.teacher, f"untrained:{asked.teacher}", "pixels", "colours"]
    return evaluate(
        [asked.evaluations, *backbones, "--data", str(sets), "--out", str(asked.out / "results"), *asked.settings]
    )


if __name__ == "__main__":
    sys.exit(main())
