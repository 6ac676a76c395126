"""Pictures and what is known of each of their pixels: classes, distances, segments."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from curation.reading.samples import Part, Sample
from curation.reading.sources import MemberReader, read_samples
from pretrain.data.decode import Damaged, ImageLimits, open_image
from pretrain.distributed import collectives
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.labelled import LeftOut
from pretrain.downstream.pixels import find_sets, whole_picture
from pretrain.models.vision_transformer import Features
from pretrain.stopping import Stopped

_LIMITS = ImageLimits()
_MOST_APART = 0.02  # share by which the proportions of a picture and its map may differ: a row of pixels, rounded
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """One picture, uint8 [H, W, 3], as the backbone gets it, and its map [H', W'] as it lies in the set (None where
    there is none, which some sets allow)."""

    key: str
    picture: np.ndarray
    truth: np.ndarray | None
    metadata: dict[str, object]
    size: tuple[int, int]
    """height and width of the picture as it lies in the set, in pixels"""
    read_bytes: int


def pairs(
    pattern: str,
    maps: str,
    member: str,
    short_px: int,
    patch: int,
    left_out: LeftOut,
    needs_map: bool = True,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[Pair]:
    """The pictures of a set in order, each at its own aspect, its shorter side near `short_px`.

    Args:
        maps: a second set with the maps under the same keys, in the same order (`FILE.parquet:COLUMN` for a column);
            empty: beside each picture KEY.jpg lies KEY.<member>.png.
        member: `seg` or `depth`.
        patch: sides are multiples of it.
        left_out: filled with what could not be used.
        needs_map: leave out pictures without a map.
        rank, num_ranks: only every so many-th picture.

    Raises:
        ValueError: nothing there; maps that do not come in the order of the pictures.
        OSError: a part cannot be opened.
    """
    beside = _second(maps) if maps else None
    for place, (sample, reader) in enumerate(_samples(pattern)):
        encoded = None if beside is None else _same_key(sample, beside, maps)
        if place % num_ranks != rank:
            continue
        if beside is None:
            encoded = _beside(sample, reader, f"{member}.png")
        left_out.images += 1
        left_out.read_bytes += len(sample.content or b"")
        if sample.content is None or (encoded is None and needs_map):
            left_out.add(sample.key, sample.reason or f"no {member} map")
            continue
        try:
            picture = whole_picture(sample.content, short_px, patch)
            truth = None if encoded is None else decode_map(encoded, member == "depth")
        except Damaged as damage:
            left_out.add(sample.key, damage.reason)
            continue
        upright = open_image(sample.content, _LIMITS)
        if truth is not None and not _is_alike(truth.shape, (upright.height, upright.width)):
            left_out.add(sample.key, "map_of_another_shape")
            continue
        metadata = json.loads(sample.metadata) if sample.metadata else {}
        yield Pair(sample.key, picture, truth, metadata, (upright.height, upright.width), len(sample.content))


def _is_alike(map_: Sequence[int], picture: Sequence[int]) -> bool:
    """Whether heights and widths are in one proportion: a map may be smaller than its picture, but not turned."""
    return abs(map_[0] * picture[1] - map_[1] * picture[0]) <= _MOST_APART * map_[0] * picture[1]


def decode_map(encoded: bytes, needs_16_bits: bool = False) -> np.ndarray:
    """The numbers in a one-channel image, [H, W]: of a palette image its indices; 8 or 16 bits.

    Raises:
        Damaged: no such image; its reason is `not_a_map` where it has colours, `not_16_bits` where those are needed.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG", "TIFF")) as image:
            if image.width * image.height > _LIMITS.max_pixels:
                raise Damaged("too_many_pixels")
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                raise Damaged("not_a_map")
            if needs_16_bits and image.mode in ("1", "L", "P"):
                raise Damaged("not_16_bits")
            return np.array(image).astype(np.int32)
    except Damaged:
        raise
    except Exception:  # a damaged file can raise anything out of the decoder
        raise Damaged("damaged_map") from None


def _samples(pattern: str) -> Iterator[tuple[Sample, MemberReader]]:
    for part in find_sets(pattern):
        with MemberReader(part.kind, part.url) as reader:
            for sample in read_samples(part, _LIMITS.max_file_bytes, headers_first=True):
                if sample.reason == "damaged_shard":
                    raise ValueError(f"{part.url} is damaged at {sample.key}: copy it again.")
                if sample.image is not None or sample.content is not None:
                    yield sample, reader


def _beside(sample: Sample, reader: MemberReader, suffix: str) -> bytes | None:
    member = next((other for other in sample.others if other.suffix == suffix), None)
    return None if member is None or member.size > _LIMITS.max_file_bytes else reader.read(member)


def _second(maps: str) -> Iterator[Sample]:
    path, _, column = maps.rpartition(":")
    if path.endswith(".parquet"):
        parts: list[Part] = [replace(part, column=column) for part in find_sets(path)]
    else:
        parts = find_sets(maps)
    for part in parts:
        yield from read_samples(part, _LIMITS.max_file_bytes, headers_first=True)


def _same_key(sample: Sample, beside: Iterator[Sample], maps: str) -> bytes | None:
    other = next(beside, None)
    if other is None or other.key != sample.key:
        found = "nothing more" if other is None else other.key
        raise ValueError(f"{maps} has {found} where the pictures have {sample.key}: both need the same keys.")
    return other.content


def over_pictures(
    frozen: Frozen,
    name: str,
    pattern: str,
    reading: Callable[[LeftOut, int, int], Iterator[Pair]],
    work: Callable[[Pair, Callable[[Tensor], Features]], T],
) -> tuple[list[T], LeftOut]:
    """What `work` makes of each picture of a set with the backbone's features, of all ranks, in the order of keys.

    Args:
        name: shown beside the progress.
        reading: this rank's pictures, from what it leaves out, its rank and the number of ranks.
        work: gets the pair, and what gives the features of uint8 images [B, 3, H, W], to be called once: the ranks call
            it in step.

    Raises:
        ValueError: no picture, or more than MAX_LEFT_OUT of them could not be used.
        Stopped: a rank was asked to stop.
    """
    mine, made = LeftOut(), []

    def one(pair: Pair | None) -> None:
        if pair is None:
            smallest = torch.zeros(1, 3, *[frozen.tokens.patch_size] * 2, dtype=torch.uint8, device=frozen.device)
            frozen.features(smallest)
            return
        made.append((pair.key, work(pair, lambda images: frozen.features(images.to(frozen.device)))))
        progress.advance(pair.read_bytes / 1e6)

    size = sum(part.size for part in find_sets(pattern)) / 1e6 / collectives.world_size()
    with frozen.progress(name, size, "MB") as progress:
        pictures = reading(mine, collectives.rank(), collectives.world_size())
        is_done = collectives.in_step(pictures, one, frozen.left)
    if not is_done:
        raise Stopped
    left_out = LeftOut.of_all(collectives.from_every_rank(mine))
    try:
        left_out.check(pattern, "")
    except ValueError as error:
        hint = (
            " A map is KEY.seg.png or KEY.depth.png (16 bits) beside KEY.jpg, or lies in train_maps or val_maps; it "
            "has the proportions of the picture as that is shown, turned as its EXIF says."
        )
        is_of_maps = any("map" in reason or "16_bits" in reason for reason in left_out.reasons)
        raise ValueError(f"{error}{hint if is_of_maps else ''}") from None
    every = [found for rank in collectives.from_every_rank(made) for found in rank]
    return [found for _, found in sorted(every, key=lambda pair: pair[0])], left_out


def as_images(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> [1, 3, H, W]"""
    return torch.tensor(picture).permute(2, 0, 1)[None]
