"""The demo in a few figures: python -m curation.demo.figures TRUTH.csv CURATED TRAINED CURATED_AGAIN

What the pool's first curation kept, what the backbone trained on it tells apart, and what the second curation, which
embedded the same pool with that backbone, keeps.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from curation.account.truth import Truth, read_truth, score


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m curation.demo.figures", description="The demo in a few figures: curation, training, curation."
    )
    parser.add_argument("truth", type=Path, help="csv with a row for every pool image")
    parser.add_argument("curated", type=Path, help="run folder of the first curation")
    parser.add_argument("trained", type=Path, help="run folder of the training on what it kept")
    parser.add_argument("again", type=Path, help="run folder of the curation with the trained teacher")
    asked = parser.parse_args(arguments)
    try:
        truth = read_truth(asked.truth)
        print(knn_figures(asked.trained))
        print(curation_figures({"descriptors": asked.curated, "the teacher": asked.again}, truth))
        print(f"Look at {', '.join(map(str, pages(asked.curated, asked.trained, asked.again)))}.")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def knn_figures(trained: Path) -> str:
    """k-NN accuracy of the teacher's last evaluation over those of what was not trained.

    Raises:
        OSError: the run folder holds no evaluation.
    """
    evaluation = trained / "evaluation"
    results = sorted(evaluation.glob("step-*/result.json"))
    if not results:
        raise FileNotFoundError(f"{evaluation} holds no result.json; train with evaluation.every_steps set.")
    first, last = (json.loads(path.read_text()) for path in (results[0], results[-1]))
    knn = last["evaluations"]["knn"]
    baselines = json.loads((evaluation / "baselines.json").read_text())[-1]["figures"]
    rows = {
        "chance": knn["figures"]["chance"],
        "raw pixels": baselines["knn_pixels"],
        "random features": baselines["knn_random"],
        f"teacher, step {first['step']}": first["evaluations"]["knn"]["value"],
        f"teacher, step {last['step']}": knn["value"],
    }
    k, classes = next(iter(knn["figures"])).removeprefix("k="), round(1 / knn["figures"]["chance"])
    images = knn["images"]
    title = f"{k}-NN: {images['train']} labelled pictures vote on {images['val']}, {classes} concepts"
    return "\n".join([title, *(f"  {name:<18} {value:6.1%}" for name, value in rows.items())])


def curation_figures(runs: dict[str, Path], truth: Truth) -> str:
    """A row for each run: what it kept of the pool, and what of that shows a concept of the seed set."""
    lines = [f"{'Curation with':<20} {'kept':>6} {'seed concepts':>14} {'junk':>5} {'leaks':>6}"]
    for name, run in runs.items():
        scores = score(pq.read_table(run / "decisions.parquet"), truth)
        kept, seed, leaks = scores["account"]["statuses"]["kept"], scores["seed_concepts"], scores["leaks"]
        purity = "-" if seed is None or seed["purity"] is None else f"{seed['purity']:.1%}"
        num_leaks = sum(len(leaks[how]["kept"]) for how in ("verbatim", "edited"))
        junk = scores["kinds"]["junk"]["kept"]
        lines.append(f"  {name:<18} {kept:>6,} {purity:>14} {junk:>5} {num_leaks:>6}")
    return "\n".join(lines)


def pages(curated: Path, trained: Path, again: Path) -> list[Path]:
    """What to look at."""
    reports = [run / "report.html" for run in (curated, trained, again)]
    return [*reports, trained / "evaluation" / "pca.png"]


if __name__ == "__main__":
    sys.exit(main())
