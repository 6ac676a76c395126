"""Labelled images of WebDataset tars, decoded and cropped for evaluation, in order."""

import csv
import glob
import io
import itertools
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_SUFFIXES = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "ppm"])


@dataclass(frozen=True)
class Sample:
    """An image as it lies in the tar: key, encoded bytes, and its label (None where the set is not labelled)."""

    key: str
    content: bytes
    label: str | None


def shard_paths(pattern: str) -> list[str]:
    """Tars of a glob, a folder, or several of either joined by commas, sorted.

    Raises:
        ValueError: one of them matches nothing.
    """
    found: list[str] = []
    for part in filter(None, (p.strip() for p in pattern.split(","))):
        paths = sorted(glob.glob(os.path.join(part, "*.tar") if os.path.isdir(part) else part))
        if not paths:
            raise ValueError(f"no tar matches {part!r}: give a path, a glob such as eval/val-*.tar, or a folder.")
        found += paths
    if not found:
        raise ValueError("no evaluation tar given: name one or a glob such as eval/val-*.tar.")
    return found


def read_labels(path: str) -> dict[str, str]:
    """key -> label of a csv file with at least these two columns.

    Raises:
        ValueError: a column is missing.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"key", "label"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} needs the columns key and label, found {', '.join(reader.fieldnames or ())}.")
        return {row["key"]: row["label"] for row in reader}


def samples(pattern: str, labels: str = "", max_images: int = 0) -> Iterator[Sample]:
    """Samples of the tars in order; the label is that of the csv file `labels` or of the json member beside the image.

    Args:
        max_images: 0 for all; otherwise the first ones.

    Raises:
        ValueError: a tar that cannot be read, or a csv without a needed column.
    """
    table = read_labels(labels) if labels else None
    found = itertools.chain.from_iterable(_tar_samples(path, table) for path in shard_paths(pattern))
    return itertools.islice(found, max_images or None)


def _tar_samples(path: str, table: dict[str, str] | None) -> Iterator[Sample]:
    """Members of one key stand together, image and json in any order."""
    try:
        with tarfile.open(path) as tar:
            files = (member for member in tar if member.isfile())
            for key, group in itertools.groupby(files, key=lambda member: member.name.partition(".")[0]):
                content, label = None, None if table is None else table.get(key)
                for member in group:
                    suffix = member.name.rpartition(".")[2].lower()
                    if suffix in _SUFFIXES and content is None:
                        content = tar.extractfile(member).read()  # type: ignore[union-attr]  # a file has content
                    elif suffix == "json" and table is None:
                        label = _json_label(tar.extractfile(member).read())  # type: ignore[union-attr]
                if content is not None:
                    yield Sample(key, content, label)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} is not readable as a tar: {error}") from None


def _json_label(content: bytes) -> str | None:
    try:
        label = json.loads(content).get("label")
    except (ValueError, AttributeError):
        return None
    return None if label in (None, "") else str(label)


def eval_crop(content: bytes, px: int, resize_px: int) -> np.ndarray:
    """Encoded image -> uint8 [px, px, 3]: shorter side to `resize_px` by antialiased bicubic, then the centre.

    Raises:
        OSError: the bytes are no image.
    """
    image = Image.open(io.BytesIO(content))
    if image.format == "JPEG":
        image.draft("RGB", (2 * resize_px, 2 * resize_px))  # decodes at a scale that is still twice what is needed
    image = image.convert("RGB")
    scale = resize_px / min(image.size)
    width, height = (max(px, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - px) // 2, (height - px) // 2
    return np.asarray(image.crop((left, top, left + px, top + px)))


def batches(
    pattern: str, px: int, resize_px: int, batch_size: int, labels: str = "", max_images: int = 0, num_threads: int = 4
) -> Iterator[tuple[Tensor, list[str]]]:
    """(uint8 [B, 3, px, px], labels) in order; decoded by threads, at most one batch ahead.

    Raises:
        ValueError: an image that cannot be decoded or that has no label, named by its key.
    """

    def load(sample: Sample) -> tuple[np.ndarray, str]:
        if sample.label is None:
            where = f"a row of {labels}" if labels else 'a json member with "label"'
            raise ValueError(f"image {sample.key} of {pattern} has no label: it needs {where}.")
        try:
            return eval_crop(sample.content, px, resize_px), sample.label
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {sample.key} of {pattern} cannot be decoded: {error}") from None

    with ThreadPoolExecutor(num_threads) as pool:
        todo = samples(pattern, labels, max_images)
        ahead = [pool.submit(load, sample) for sample in itertools.islice(todo, batch_size)]
        while ahead:
            following = [pool.submit(load, sample) for sample in itertools.islice(todo, batch_size)]
            images, names = zip(*(future.result() for future in ahead), strict=True)
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), list(names)
            ahead = following
