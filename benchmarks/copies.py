"""How well encoders find copies, and what they take for copies: SEEDBED_DATA=... python -m benchmarks.copies [ENCODER]

Three things of the real data, each by brute force: the copies planted in the pool, and how many of the linked pairs of
two natural images, and of two cartoons, are planted; and the strongly edited queries of `copydet`, of which an encoder
finds those whose cosine with their reference reaches the threshold. Cosines are the larger of those with an image and
with its mirror image. Two thresholds for each encoder, so that lines compare: the least with 0.985 precision over
natural pairs, and the greatest that still finds 0.97 of the planted copies.

    python -m benchmarks.copies descriptors copies
    python -m benchmarks.copies --backbone untrained:RUN/teacher --backbone RUN/teacher

A backbone is measured as this project's trainer leaves it (its CLS token, of the view halved to 64 px), after the same
discriminant analysis and roots as `copies` has; then joined with `copies`, a fifth of the cosine from the backbone.
"""

import argparse
import csv
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg

from benchmarks.descriptors import CopyTruth, near_pairs, read_part
from curation.encoders.load import load_encoder

PRECISION, RECALL = 0.985, 0.97
BACKBONE_SHARE = 0.2
_PICTURES = 500  # of each set, that a backbone's discriminant analysis learns from
_COLUMNS = ("encoder", "ms", "threshold", "copies", "natural pairs", "cartoon pairs", "copydet", "false queries")


class Pool:
    """The pool's views and truth, and the queries and references of `copydet`."""

    def __init__(self, data: Path) -> None:
        pool = read_part(data, "pool/pool-*.tar")
        references, queries = (read_part(data, f"copydet/{name}-*.tar") for name in ("refs", "queries"))
        self.views = [part["views"] for part in (pool, references, queries)]
        truth = data / "pool/pool_truth.csv"
        self.truth = CopyTruth(truth, pool["keys"])
        with truth.open(newline="") as file:
            kinds = {row["key"]: row["kind"] for row in csv.DictReader(file)}
        self.is_cartoon = np.array([kinds[key] == "cartoon" for key in pool["keys"]])
        with (data / "copydet/copydet_truth.csv").open(newline="") as file:
            copied = {row["query"]: row["reference"] for row in csv.DictReader(file)}
        place = {key: row for row, key in enumerate(references["keys"])}
        self.reference = np.array([place.get(copied[key], -1) for key in queries["keys"]])
        """row of the reference of each query; -1 for none"""

    def lines(self, name: str, ms: float, rows: list[np.ndarray], mirror: np.ndarray | None) -> list[tuple[str, ...]]:
        """Two lines of the table.

        Args:
            ms: of one core, for one image.
            rows: unit rows of the pool, the references and the queries.
            mirror: signs of the mirror image, or None.
        """
        signs = np.ones(rows[0].shape[1], np.float32) if mirror is None else mirror
        i, j, cosine = near_pairs(rows[0], rows[0] * signs, _floor(rows[0], signs))
        same = self.truth.cluster[i] == self.truth.cluster[j]
        natural = self.truth.is_natural[i] & self.truth.is_natural[j]
        cartoon = self.is_cartoon[i] & self.is_cartoon[j]
        to_reference = np.maximum(rows[2] @ rows[1].T, (rows[2] * signs) @ rows[1].T)
        has = self.reference >= 0
        own = to_reference[has, self.reference[has]]
        to_reference[has, self.reference[has]] = -1

        def recall(threshold: float) -> float:
            near = cosine >= threshold
            return float(self.truth.found(i[near], j[near])[self.truth.is_copy].mean())

        found = []
        for threshold in (_precise(cosine[natural], same[natural]), _recalling(recall, float(cosine.min()))):
            near = cosine >= threshold
            pairs = [
                f"{(same & kind & near).sum()}/{(kind & near).sum()} ({same[kind & near].mean():.3f})"
                for kind in (natural, cartoon)
            ]
            shares = f"{recall(threshold):.3f}", *pairs, f"{(own >= threshold).sum()}/{has.sum()}"
            found.append((name, f"{ms:.2f}", f"{threshold:.3f}", *shares, str((to_reference >= threshold).sum())))
        return found


def _floor(rows: np.ndarray, signs: np.ndarray) -> float:
    """A cosine that about 1 pair in 700 reaches: no threshold of use lies below it, and all pairs would not fit."""
    some = rows[:: max(len(rows) // 600, 1)]
    return float(np.quantile(np.maximum(some @ rows.T, (some * signs) @ rows.T), 0.9985))


def _precise(cosine: np.ndarray, same: np.ndarray) -> float:
    """The least threshold above which PRECISION of the pairs are the same."""
    order = np.argsort(-cosine)
    reached = np.flatnonzero(np.cumsum(same[order]) / np.arange(1, len(order) + 1) >= PRECISION)
    return float(cosine[order][reached[-1]]) if len(reached) else 1.0


def _recalling(recall: Callable[[float], float], lowest: float) -> float:
    """The greatest threshold with RECALL, within 0.0005; `lowest` where none has."""
    low, high = lowest, 1.0
    while high - low > 5e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if recall(middle) >= RECALL else (low, middle)
    return low


def backbone_rows(path: str, views: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
    """Unit rows of the views after discriminant analysis on drawn pictures, and milliseconds of a core for an image.

    A view is turned so that its right half is the lighter one, so a picture and its mirror image have one row.
    """
    import torch

    from benchmarks.copies_fit import FIRST, picture_and_edits
    from benchmarks.copies_pictures import SETS
    from pretrain.downstream.backbone import load_backbone
    from pretrain.models.vision_transformer import VisionTransformer

    torch.set_num_threads(1)
    kind, _, name = path.rpartition(":")
    backbone = load_backbone(name)
    if kind == "untrained":
        assert isinstance(backbone.model, VisionTransformer)
        backbone.model.init_weights(torch.Generator().manual_seed(0))

    def cls(batch: np.ndarray) -> np.ndarray:
        rows = []
        for start in range(0, len(batch), 256):
            view = batch[start : start + 256].astype(np.uint16)
            view = (view[:, ::2, ::2] + view[:, 1::2, ::2] + view[:, ::2, 1::2] + view[:, 1::2, 1::2] + 2) // 4
            lean = (view.sum(axis=(1, 3)) * (np.arange(64) - 31.5)).sum(axis=1)
            view = np.where((lean < 0)[:, None, None, None], view[:, :, ::-1], view).astype(np.uint8)
            pixels = torch.from_numpy(view).permute(0, 3, 1, 2).contiguous()
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                rows.append(backbone.features(backbone.image.normalise(pixels)).cls.float().numpy())
        out = np.concatenate(rows)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    drawn = np.array([picture_and_edits(of, FIRST + number) for of in SETS for number in range(_PICTURES)])
    fit = cls(drawn.reshape(-1, *drawn.shape[2:])).reshape(*drawn.shape[:2], -1)
    mean, projection = discriminants(fit)
    start = time.process_time()
    rows = [_roots((cls(part) - mean) @ projection.T) for part in views]
    return rows, (time.process_time() - start) / sum(map(len, views)) * 1e3


def discriminants(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and directions [D, D] of between-image to within-image variance, of rows [N, 1 + edits, D]."""
    mean = rows.mean(axis=(0, 1))
    centres = rows.mean(axis=1, keepdims=True)
    inner = (rows - centres).reshape(-1, rows.shape[2])
    within = inner.T @ inner / (len(inner) * (1 - 1 / rows.shape[1]))
    within += 0.1 * np.trace(within) / len(within) * np.eye(len(within))
    outer = centres[:, 0] - mean
    ratios, directions = scipy.linalg.eigh(outer.T @ outer / len(outer), within)
    return mean, (directions * np.sqrt(ratios.clip(0) / (ratios.clip(0) + 1))).T


def _roots(rows: np.ndarray) -> np.ndarray:
    rows = np.sign(rows) * np.sqrt(np.abs(rows))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="*", help="descriptors and copies, where no backbone is named")
    parser.add_argument("--backbone", action="append", default=[])
    parser.add_argument("--data", type=Path, default=os.environ.get("SEEDBED_DATA"))
    arguments = parser.parse_args()
    if arguments.data is None:
        raise SystemExit("Set SEEDBED_DATA to the folder of real images, or give --data.")
    pool = Pool(arguments.data)
    print("| " + " | ".join(_COLUMNS) + " |\n|" + " --- |" * len(_COLUMNS))
    for name in arguments.encoders or ([] if arguments.backbone else ["descriptors", "copies"]):
        encoder = load_encoder(name)
        encoder.embed(pool.views[1])  # compiles
        start = time.process_time()
        rows = [encoder.embed(part) for part in pool.views]
        ms = (time.process_time() - start) / sum(map(len, rows)) * 1e3
        _show(pool.lines(name, ms, rows, encoder.mirror))
    for path in arguments.backbone:
        copies = load_encoder("copies")
        rows, ms = backbone_rows(path, pool.views)
        _show(pool.lines(path, ms, rows, None))
        weights = np.sqrt(np.float32([1 - BACKBONE_SHARE, BACKBONE_SHARE]))
        joined = [
            np.concatenate([copies.embed(part) * weights[0], own * weights[1]], axis=1)
            for part, own in zip(pool.views, rows, strict=True)
        ]
        assert copies.mirror is not None
        signs = np.concatenate([copies.mirror, np.ones(rows[0].shape[1], np.float32)])
        _show(pool.lines(f"copies and {path}", ms, joined, signs))


def _show(lines: list[tuple[str, ...]]) -> None:
    for line in lines:
        print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
