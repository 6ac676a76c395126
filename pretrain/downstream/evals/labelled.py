"""Labelled images of WebDataset tars (or folders, or Parquet), read as training reads them, cropped for evaluation."""

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from curation.reading.places import open_file
from curation.reading.samples import Part
from curation.reading.sources import read_samples
from pretrain.data.decode import IMAGE_SUFFIXES, Damaged, ImageLimits
from pretrain.downstream.pixels import eval_crop, find_sets

LABELS = (
    'A label is "label" in the json member or the Parquet row of an image, the folder that it lies in below the one '
    "that was named, or a row of a csv with the columns key and label, the key being the image's path without suffix."
)
MAX_LEFT_OUT = 0.01
"""share of a set's images that may be damaged or without a label; a figure on the others is still one on that set"""
_LIMITS = ImageLimits()
_PARTS_PER_RANK = 4
_MOST_NAMES = 5
_MOST_LOOKED_AT = 64


@dataclass(frozen=True)
class Sample:
    """An image as it lies in the set: key, encoded bytes, and its label (None where the set is not labelled)."""

    key: str
    content: bytes | None
    label: str | None
    reason: str = ""
    """why there is no content"""


@dataclass
class LeftOut:
    """What of a set could not be used: counted, and the first ones named."""

    images: int = 0
    """of the whole set, the good ones too"""
    reasons: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)
    """the first few: `key (reason)`"""
    read_bytes: int = 0
    """encoded, so far"""

    def add(self, key: str, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self.names) < _MOST_NAMES:
            self.names.append(f"{key} ({reason})")

    def __len__(self) -> int:
        return sum(self.reasons.values())

    @staticmethod
    def of_all(parts: Iterable["LeftOut"]) -> "LeftOut":
        """What several ranks left out of one set."""
        whole = LeftOut()
        for part in parts:
            whole.images += part.images
            whole.reasons += part.reasons
            whole.read_bytes += part.read_bytes
            whole.names += part.names[: _MOST_NAMES - len(whole.names)]
        return whole

    def check(self, pattern: str, labels: str) -> None:
        """
        Raises:
            ValueError: no image at all, or more than MAX_LEFT_OUT of them left out.
        """
        if not self.images:
            raise ValueError(f"{pattern!r} holds no image.")
        if len(self) > MAX_LEFT_OUT * self.images:
            counted = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
            where = f" A label is a row of {labels}." if labels else f" {LABELS}"
            advice = where if self.reasons["no label"] else ""
            raise ValueError(
                f"{len(self)} of the {self.images} images of {pattern!r} cannot be used ({counted}): "
                f"{', '.join(self.names)}{' ...' if len(self) > len(self.names) else ''}. An evaluation leaves out at "
                f"most {MAX_LEFT_OUT:.0%}.{advice}"
            )


def about_images(part: Part) -> int:
    """How many images a part holds, without reading them: of a tar by where its first ones lie."""
    if part.kind == "folder":
        return sum(name.rpartition(".")[2].lower() in IMAGE_SUFFIXES for name in part.files)
    if part.kind == "parquet":
        with open_file(part.url) as file:
            return pq.ParquetFile(file).metadata.num_rows
    found, end = 0, 0
    for sample in itertools.islice(read_samples(part, _LIMITS.max_file_bytes, headers_first=True), _MOST_LOOKED_AT):
        members = [one for one in (sample.image, *sample.others) if one is not None]
        found += sample.image is not None
        end = max([end, *(one.offset + one.size for one in members)])
    return found if found < _MOST_LOOKED_AT or not end else round(found * part.size / end)


def read_table(path: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a csv file with at least these columns; what are keys is as `samples` gives them.

    Raises:
        ValueError: no such file, or a column is missing.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not set(columns) <= set(reader.fieldnames or ()):
                named = " and ".join([", ".join(columns[:-1]), columns[-1]])
                raise ValueError(f"{path} needs the columns {named}, found {', '.join(reader.fieldnames or ())}.")
            for row in reader:
                yield {name: _plain(row[name] or "") for name in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not readable as csv: {error}") from None


def read_labels(path: str) -> dict[str, str]:
    """key -> label of a csv file with at least these two columns.

    Raises:
        ValueError: no such file, or a column is missing.
    """
    return {row["key"]: row["label"] for row in read_table(path, ("key", "label"))}


def samples(
    pattern: str, labels: str = "", max_images: int = 0, block: int = 1, rank: int = 0, num_ranks: int = 1
) -> Iterator[Sample]:
    """Images of the sets in order; the label is that of the csv file `labels`, or lies with the image (LABELS).

    Args:
        max_images: 0 for all; otherwise the first ones.
        block, rank, num_ranks: of several ranks, only this one's images: every so many-th tar where there are four or
            more for each rank, so that no rank reads all of them; else every so many-th block of this many images.

    Raises:
        ValueError: a tar that is damaged or cannot be read, or a csv without a needed column.
    """
    table = read_labels(labels) if labels else None
    parts, by_part = find_sets(pattern), False
    if num_ranks > 1 and not max_images and len(parts) >= _PARTS_PER_RANK * num_ranks:
        parts, by_part = parts[rank::num_ranks], True
    found = itertools.islice(
        itertools.chain.from_iterable(_part_samples(part, table) for part in parts), max_images or None
    )
    if by_part or num_ranks == 1:
        return found
    return (sample for place, sample in enumerate(found) if place // block % num_ranks == rank)


def _part_samples(part: Part, table: dict[str, str] | None) -> Iterator[Sample]:
    try:
        for sample in read_samples(part, _LIMITS.max_file_bytes, headers_first=True):
            if sample.reason == "damaged_shard":
                raise ValueError(
                    f"{part.url} is damaged at {sample.key}: the set is not what it was, so copy it again."
                )
            if sample.image is None and sample.content is None:  # a text, a note beside the images
                continue
            key = _plain(sample.key)
            label = _own_label(part, key, sample.metadata) if table is None else table.get(key)
            yield Sample(key, sample.content, label, sample.reason or "")
    except OSError as error:
        raise ValueError(f"{part.url} is not readable: {error}") from None


def _own_label(part: Part, key: str, metadata: str | None) -> str | None:
    """Of the json member or the columns beside the image; in a folder else the first folder below it."""
    label = _json_label(metadata)
    below, slash, _ = key.partition("/")
    return below if label is None and part.kind == "folder" and slash else label


def _plain(key: str) -> str:
    """A tar packed as `tar -C folder -cf x.tar .` names its members `./a.jpg`; labels say `a`."""
    return key.removeprefix("./")


def _json_label(metadata: str | None) -> str | None:
    label = json.loads(metadata).get("label") if metadata else None
    return None if label in (None, "") else str(label)


class Batch(NamedTuple):
    """Images of a set, cropped: uint8 [B, 3, px, px], their labels (empty where none is needed) and keys."""

    images: Tensor
    labels: list[str]
    keys: list[str]


def batches(
    pattern: str,
    px: int,
    resize_px: int,
    batch_size: int,
    labels: str = "",
    max_images: int = 0,
    num_threads: int = 4,
    left_out: LeftOut | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    needs_label: bool = True,
) -> Iterator[Batch]:
    """The images of a set in order; decoded by threads, at most one batch ahead.

    Args:
        left_out: filled with what could not be used; whoever gives it calls its `check`.
        rank, num_ranks: only this rank's share, see `samples`.

    Raises:
        ValueError: no image, or more than MAX_LEFT_OUT of them damaged or without a label; at the end, where no
            `left_out` is given.
    """
    checked, left_out = left_out is None, LeftOut() if left_out is None else left_out

    def load(sample: Sample) -> np.ndarray | str:
        if sample.content is None:
            return sample.reason
        if needs_label and sample.label is None:
            return "no label"
        try:
            return eval_crop(sample.content, px, resize_px)
        except Damaged as damage:
            return damage.reason

    with ThreadPoolExecutor(num_threads) as pool:
        todo = samples(pattern, labels, max_images, batch_size, rank, num_ranks)
        ahead = [(sample, pool.submit(load, sample)) for sample in itertools.islice(todo, batch_size)]
        while ahead:
            following = [(sample, pool.submit(load, sample)) for sample in itertools.islice(todo, batch_size)]
            images, names, keys = [], [], []
            for sample, future in ahead:
                left_out.images += 1
                left_out.read_bytes += len(sample.content or b"")
                result = future.result()
                if isinstance(result, str):
                    left_out.add(sample.key, result)
                else:
                    images.append(result)
                    names.append(sample.label or "")
                    keys.append(sample.key)
            if images:
                yield Batch(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), names, keys)
            ahead = following
    if checked:
        left_out.check(pattern, labels)
