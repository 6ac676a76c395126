"""Does a backbone see a pool better than what chose its training images: python -m benchmarks.loop RUN AGAIN TRUTH.csv

RUN is a curation of a pool by the offline encoder, AGAIN one of the same pool and seeds by a backbone that learned from
what RUN kept; `make demo` makes both. Over the images that survive in RUN, by brute force:

    natural         of what is drawn, the K nearest of each seed image, the share that is natural
    seed concepts   of the natural ones drawn, the share that shows a concept of the seed set, where the truth says so
    10-NN           of the survivors with a label, the share whose 10 nearest others vote for it

with their standard errors, for the vectors of RUN, for those of AGAIN, for these centred and whitened to 64 values
(H. Jegou, O. Chum, ECCV 2012), and for the latter beside RUN's at a share of the cosine.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from configs.messages import answered
from curation.account.report.account import Account, open_account
from curation.account.truth import TruthRow, read_truth
from curation.engine.store import ImageSet, encoder_folder
from curation.ops.descriptors import unit

K, VOTERS = 4, 10
WHITENED = 64
SHARES = (0.3, 0.5)


def vectors(run: Account, images: ImageSet) -> tuple[list[str], np.ndarray]:
    """Keys, and float32 rows [N, D] of the run's own encoder, of all images of a set that were decoded."""
    encoder = encoder_folder(json.loads(run.folder.read_bytes("run.json"))["config"]["embed"]["encoder"])
    rows = images.take_embeddings(encoder, np.arange(images.num_images)).astype(np.float32)
    decoded = np.flatnonzero(np.abs(rows).sum(1))
    keys = images.take(decoded, ["key"])["key"].to_pylist()
    return keys, unit(rows[decoded])


def whitened(pool: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both on the pool's principal axes, each scaled to variance 1; unit rows."""
    mean = pool.mean(0)
    values, axes = np.linalg.eigh(np.cov((pool - mean).T, dtype=np.float64))
    axes = axes[:, ::-1][:, :WHITENED] / np.sqrt(np.maximum(values[::-1][:WHITENED], 1e-12))
    return unit(((pool - mean) @ axes).astype(np.float32)), unit(((seeds - mean) @ axes).astype(np.float32))


def beside(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """Unit rows whose cosine is `share` of the other's and the rest of the one's."""
    return np.concatenate([one * np.sqrt(1 - share), other * np.sqrt(share)], axis=1)


def figures(pool: np.ndarray, seeds: np.ndarray, truth: list[TruthRow]) -> list[str]:
    """natural, seed concepts and 10-NN, as the table has them."""
    drawn = np.unique(np.argpartition(-seeds @ pool.T, K, axis=1)[:, :K])
    natural = [row for row in (truth[place] for place in drawn) if row.kind == "natural"]
    told = [row.in_seed for row in natural if row.in_seed is not None]
    is_natural = np.array([truth[place].kind == "natural" for place in drawn])
    return [_share(is_natural), _share(np.array(told)), _share(votes(pool, truth))]


def votes(pool: np.ndarray, truth: list[TruthRow]) -> np.ndarray:
    """Of each image with a label: whether most of its nearest others have it."""
    chosen = np.array([place for place, row in enumerate(truth) if row.label and row.kind == "natural"])
    labels = np.unique([truth[place].label for place in chosen], return_inverse=True)[1]
    right = []
    for start in range(0, len(chosen), 1024):
        cosine = pool[chosen[start : start + 1024]] @ pool[chosen].T
        cosine[np.arange(len(cosine)), np.arange(start, start + len(cosine))] = -2
        nearest = labels[np.argpartition(-cosine, VOTERS, axis=1)[:, :VOTERS]]
        counts = (nearest[:, :, None] == np.arange(labels.max() + 1)).sum(1)
        right.append(counts.argmax(1) == labels[start : start + len(cosine)])
    return np.concatenate(right)


def _share(hits: np.ndarray) -> str:
    if not len(hits):
        return ""
    mean = float(hits.mean())
    return f"{100 * mean:.1f} ± {100 * np.sqrt(mean * (1 - mean) / len(hits)):.1f}"


def compared(first: Account, again: Account, truth: dict[str, TruthRow]) -> Iterator[list[str]]:
    """Rows of the table."""
    survived = pc.field("status").isin(["kept", "not_retrieved"])
    survivors = set(first.decisions(survived, ["key"])["key"].to_pylist())
    found = {}
    for name, run in (("first", first), ("again", again)):
        keys, pool = vectors(run, run.pool)
        sets = [vectors(run, run.images(step))[1] for step in run.steps if step.startswith("embed/seed-")]
        found[name] = dict(zip(keys, pool, strict=True)), np.concatenate(sets)
    both = sorted(survivors & found["first"][0].keys() & found["again"][0].keys() & truth.keys())
    if not both:
        raise ValueError("no image is in both runs and in the truth: give two runs over one pool, and its truth.csv.")
    rows = [truth[key] for key in both]
    one, other = ((np.stack([pool[key] for key in both]), seeds) for pool, seeds in found.values())
    white = whitened(*other)
    yield ["the offline encoder", *figures(*one, rows)]
    yield ["the backbone", *figures(*other, rows)]
    yield ["the backbone, whitened", *figures(*white, rows)]
    for share in SHARES:
        joined = [beside(a, b, share) for a, b in zip(one, white, strict=True)]
        yield [f"both, {share:.0%} from the backbone", *figures(*joined, rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of the curation by the offline encoder")
    parser.add_argument("again", help="run folder of the curation by the backbone")
    parser.add_argument("truth", type=Path, help="csv with a row for every pool image")
    asked = parser.parse_args(arguments)
    return answered(lambda: _print(asked), "nothing was written")


def _print(asked: argparse.Namespace) -> int:
    first, again, truth = open_account(asked.run), open_account(asked.again), read_truth(asked.truth).rows
    rows = list(compared(first, again, truth))
    print("| vectors | natural, % | seed concepts, % | 10-NN, % |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
