"""What the offline encoders find on real images, and how fast: SEEDBED_DATA=... python -m benchmarks.descriptors

Copy detection over the whole pool by brute force, so no index, k-means or join stands between encoder and figure: pairs
with cosine (also mirrored) at the threshold or above, with and without the hash step before it, and how a threshold
chosen on half of the clusters does on the other half. Retrieval: natural against junk, and 10-NN accuracy. Speed on one
core. Floors of the data's README: 0.935 of the copies at 0.97 precision; AUROC 0.79; 10-NN 0.352.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import os
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata

from curation.encoders.load import encoder_view, load_encoder
from curation.ops.hashes import equal_groups, hash_pairs, perceptual_hash
from curation.ops.randomness import hash_uint64

DEFAULT = 0.74
THRESHOLDS = (0.64, 0.66, 0.68, 0.70, 0.72, 0.74, 0.76, 0.80)
_SUFFIXES = {"jpg", "jpeg", "png", "webp"}


def read_rgb(data: bytes) -> Image.Image:
    """An image over white where it has alpha."""
    image = Image.open(io.BytesIO(data))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_part(folder: Path, pattern: str) -> dict[str, np.ndarray]:
    """keys, labels, views, hashes, quality, mirrored, sha256 of every image in the tars that match."""
    view = encoder_view("descriptors")
    rows, labels = [], {}
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member).read()  # type: ignore[union-attr]  # regular files only
                if suffix == "json":
                    labels[key] = json.loads(data).get("label", "")
                elif suffix in _SUFFIXES:
                    image = read_rgb(data)
                    code, quality, mirrored = perceptual_hash(image)
                    rows.append((key, view(image), code, quality, mirrored, hashlib.sha256(data).digest()))
    keys, views, codes, quality, mirrored, sha256 = zip(*rows, strict=True)
    as_bytes = [np.array([np.frombuffer(code, np.uint8) for code in column]) for column in (codes, mirrored, sha256)]
    return {
        "keys": np.array(keys),
        "labels": np.array([labels[key] for key in keys]),
        "views": np.array(views),
        "quality": np.array(quality),
    } | dict(zip(("hashes", "mirrored", "sha256"), as_bytes, strict=True))


def near_pairs(rows: np.ndarray, mirrored: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All i < j with the larger of both cosines at the threshold or above, by brute force."""
    found = []
    for start in range(0, len(rows), 1024):
        block = slice(start, start + 1024)
        cosine = np.maximum(rows[block] @ rows[start:].T, rows[block] @ mirrored[start:].T)
        i, j = np.nonzero(np.triu(cosine >= threshold, 1))
        found.append((i + start, j + start, cosine[i, j]))
    i, j, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
    return i, j, cosine


class CopyTruth:
    """The pool's planted copies: who belongs together, and the two scores of a set of linked pairs."""

    def __init__(self, path: Path, keys: np.ndarray) -> None:
        with path.open(newline="") as file:
            by_key = {row["key"]: row for row in csv.DictReader(file)}
        truth = [by_key[key] for key in keys]
        index = {key: row for row, key in enumerate(keys)}
        self.cluster = np.array([index[row["cluster"] or row["key"]] for row in truth])
        self.is_copy = np.array([bool(row["duplicate_of"]) for row in truth])
        self.transform = np.array([row["transform"] for row in truth])
        self.is_natural = np.array([row["kind"] == "natural" for row in truth])
        self.leak_of = np.array([row["leak_of"] for row in truth])

    def found(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether each row's component of links holds another member of its cluster."""
        links = coo_array((np.ones(len(i)), (i, j)), shape=(len(self.cluster),) * 2)
        component = connected_components(links, directed=False)[1].astype(np.int64)
        both = component * len(self.cluster) + self.cluster
        _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
        return counts[inverse] > 1

    def precision(self, i: np.ndarray, j: np.ndarray, chosen: np.ndarray | bool = True) -> float:
        """Share of linked pairs of two natural images that are of one cluster."""
        counted = self.is_natural[i] & self.is_natural[j] & chosen
        return float((self.cluster[i] == self.cluster[j])[counted].mean())

    def pair_recall(self, i: np.ndarray, j: np.ndarray) -> float:
        """Share of all pairs of one cluster that are linked directly."""
        sizes = np.bincount(self.cluster)
        return float((self.cluster[i] == self.cluster[j]).sum() / (sizes * (sizes - 1) // 2).sum())


def report_copies(part: dict[str, np.ndarray], truth: CopyTruth) -> None:
    encoder = load_encoder("descriptors")
    rows = encoder.embed(part["views"])
    i, j, cosine = near_pairs(rows, rows * encoder.mirror, 0.5)
    labels = equal_groups(part["sha256"])
    exact = np.flatnonzero(labels != np.arange(len(labels)))
    hash_i, hash_j, bits = hash_pairs(part["hashes"], part["quality"], 31, part["mirrored"])
    print("hash step alone: bits, copy recall, precision over natural, over all")
    for limit in (0, 8, 16, 24, 31):
        near = bits <= limit
        a, b = np.unique(np.c_[[labels[exact], exact], [hash_i[near], hash_j[near]]], axis=1)
        same = (truth.cluster[a] == truth.cluster[b]).mean()
        print(f"  {limit:3d} {truth.found(a, b)[truth.is_copy].mean():.4f} {truth.precision(a, b):.4f} {same:.4f}")
    print("embedding: threshold, copy recall, pair recall, precision | with hashes: copy recall, precision")
    for threshold in THRESHOLDS:
        near = cosine >= threshold
        a, b = np.r_[i[near], labels[exact], hash_i], np.r_[j[near], exact, hash_j]
        a, b = np.unique(np.stack([a, b]), axis=1)  # both steps find most pairs
        print(
            f"  {threshold:.2f} {truth.found(i[near], j[near])[truth.is_copy].mean():.4f}"
            f" {truth.pair_recall(i[near], j[near]):.4f} {truth.precision(i[near], j[near]):.4f}"
            f" | {truth.found(a, b)[truth.is_copy].mean():.4f} {truth.precision(a, b):.4f}"
        )
    near = cosine >= DEFAULT
    found = truth.found(i[near], j[near])
    by_transform = {
        name: f"{found[truth.is_copy & (truth.transform == name)].mean():.3f}"
        for name in sorted(set(truth.transform[truth.is_copy]))
    }
    print(f"  by transform at {DEFAULT}:", " ".join(f"{name} {value}" for name, value in by_transform.items()))
    for num_bits in range(1, 4):  # how false pairs grow with the pool: random subsets by cluster
        kept = hash_uint64(3, truth.cluster) % np.uint64(1 << num_bits) == 0
        inside = near & kept[i] & kept[j]
        print(f"  precision at {DEFAULT} on 1/{1 << num_bits} of the pool: {truth.precision(i[inside], j[inside]):.4f}")
    half = (hash_uint64(1, truth.cluster) & np.uint64(1)).astype(bool)
    for chosen in (half, ~half):
        threshold = _threshold_at(truth, i, j, cosine, chosen, 0.98)
        near, other = cosine >= threshold, ~chosen
        precision = truth.precision(i[near], j[near], (other[i] & other[j])[near])
        recall = truth.found(i[near], j[near])[truth.is_copy & other].mean()
        print(
            f"  chosen on one half {threshold:.3f}: on the other, copy recall {recall:.4f}, precision {precision:.4f}"
        )


def _threshold_at(
    truth: CopyTruth, i: np.ndarray, j: np.ndarray, cosine: np.ndarray, chosen: np.ndarray, precision: float
) -> float:
    """Least threshold whose precision over natural pairs of the chosen rows reaches the one given."""
    counted = chosen[i] & chosen[j] & truth.is_natural[i] & truth.is_natural[j]
    order = np.argsort(-cosine[counted])
    good = (truth.cluster[i] == truth.cluster[j])[counted][order]
    reached = np.flatnonzero(np.cumsum(good) / np.arange(1, len(good) + 1) >= precision)
    return float(cosine[counted][order][reached[-1]])


def report_leaks(pool: dict[str, np.ndarray], parts: list[dict[str, np.ndarray]], truth: CopyTruth) -> None:
    encoder = load_encoder("descriptors")
    rows = encoder.embed(pool["views"])
    evaluation = np.concatenate([encoder.embed(part["views"]) for part in parts])
    cosine = np.maximum(rows @ evaluation.T, rows @ (evaluation * encoder.mirror).T).max(axis=1)
    is_leak = truth.leak_of != ""
    is_exact = is_leak & (truth.transform == "exact")
    print("leaks: threshold, verbatim found, edited found, other pool images dropped")
    for threshold in THRESHOLDS:
        hit = cosine >= threshold
        print(
            f"  {threshold:.2f} {hit[is_exact].sum()}/{is_exact.sum()}"
            f" {hit[is_leak & ~is_exact].sum()}/{(is_leak & ~is_exact).sum()} {hit[~is_leak].sum()}"
        )
    missed = [f"{truth.transform[row]} {cosine[row]:.2f}" for row in np.flatnonzero(is_leak & (cosine < 0.70))]
    print("  missed at 0.70:", ", ".join(missed) or "none")


def report_retrieval(
    pool: dict[str, np.ndarray], seed: dict[str, np.ndarray], parts: list[dict[str, np.ndarray]], truth: CopyTruth
) -> None:
    train, val = parts
    for name in ("descriptors", "descriptors-likeness"):
        encoder = load_encoder(name)
        seed_rows, rows, train_rows, val_rows = (encoder.embed(part["views"]) for part in (seed, pool, train, val))
        scores = np.sort(rows @ seed_rows.T, axis=1)[:, -5:].mean(axis=1)
        ranks, num_natural = rankdata(scores), truth.is_natural.sum()
        above = ranks[truth.is_natural].sum() - num_natural * (num_natural + 1) / 2
        auroc = above / num_natural / (~truth.is_natural).sum()
        top = np.argsort(-(seed_rows @ rows.T), axis=1, kind="stable")[:, :8]
        votes = train["labels"][np.argsort(-(val_rows @ train_rows.T), axis=1, kind="stable")[:, :10]]
        guess = np.array([Counter(row.tolist()).most_common(1)[0][0] for row in votes])
        print(
            f"{name}: AUROC natural against junk {auroc:.3f}, 10-NN {(guess == val['labels']).mean():.3f},"
            f" natural among 8 nearest of a seed image {truth.is_natural[top].mean():.3f}"
            f" (pool: {truth.is_natural.mean():.3f}), images chosen so {truth.is_natural[np.unique(top)].mean():.3f}"
        )


def report_speed() -> None:
    image = Image.fromarray(hash_uint64(0, np.arange(500 * 375 * 3)).astype(np.uint8).reshape(375, 500, 3))
    view = encoder_view("descriptors")
    views = np.repeat(view(image)[None], 256, axis=0)
    timed = {
        "view": lambda: [view(image) for _ in range(256)],
        "hashes": lambda: [perceptual_hash(image) for _ in range(256)],
    }
    copies, likeness = load_encoder("descriptors"), load_encoder("descriptors-likeness")
    timed |= {encoder.name: functools.partial(encoder.embed, views) for encoder in (copies, likeness)}
    for name, work in timed.items():
        work()
        start = time.process_time()
        work()
        seconds = (time.process_time() - start) / 256
        print(f"{name}: {seconds * 1e3:.2f} ms, {1 / seconds:,.0f} images/s/core (375 x 500 noise, decoded)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=os.environ.get("SEEDBED_DATA"))
    arguments = parser.parse_args()
    report_speed()
    if arguments.data is None:
        raise SystemExit("Set SEEDBED_DATA to the folder of real images for the rest.")
    pool = read_part(arguments.data, "pool/pool-*.tar")
    seed = read_part(arguments.data, "seed/seed-*.tar")
    parts = [read_part(arguments.data, f"eval/eval20-{split}-*.tar") for split in ("train", "val")]
    truth = CopyTruth(arguments.data / "pool/pool_truth.csv", pool["keys"])
    report_copies(pool, truth)
    report_leaks(pool, parts, truth)
    report_retrieval(pool, seed, parts, truth)


if __name__ == "__main__":
    main()
