"""The pictures of a page: chosen from a set, embedded, and their features made small enough to travel in a file."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from curation.engine.progress import StageProgress
from curation.reading.samples import Member, Part
from curation.reading.sources import MemberReader, read_samples
from pretrain.data.decode import Damaged, ImageLimits
from pretrain.downstream.backbone import Backbone
from pretrain.downstream.components import as_colours, principal_scores
from pretrain.downstream.pixels import whole_picture

MAX_IMAGES = 2_000
"""of a page, which holds the cosine of every one with every other"""
MAX_PATCHES = 500_000
"""of a page: each is up to 128 bytes of a browser's memory"""
_MOST_DIMS, _ENOUGH = 128, 0.99
_LEVELS = 127  # of int8, either way
_JPEG_PX, _JPEG_QUALITY = 448, 82
_PAIRS = 2_000  # squared: cosines that are compared
_LIMITS = ImageLimits()


@dataclass(frozen=True)
class Place:
    """Where an image of a set lies."""

    part: Part
    key: str
    member: Member


@dataclass
class Choice:
    """Images of a set, evenly spaced over it."""

    places: list[Place]
    of: int
    """images of the whole set that can be read"""
    left_out: list[tuple[str, str]]
    """key and reason of those that cannot"""


def choose(sets: Sequence[Part], most: int) -> Choice:
    """At most so many images, evenly spaced over the set, however many it turns out to hold; it is read once.

    Every 2^n-th image is kept: whenever there are twice as many as wanted, every other one goes. At the end as many as
    are too many go, evenly.

    Raises:
        ValueError: not one that can be read.
        OSError: a part cannot be opened.
    """
    kept: list[Place] = []
    left_out: list[tuple[str, str]] = []
    seen, stride = 0, 1
    with StageProgress("reading", sum(part.size for part in sets) / 1e6, "MB") as progress:
        for part in sets:
            read = 0
            for sample in read_samples(part, _LIMITS.max_file_bytes, headers_first=True):
                if sample.image is None or sample.content is None:
                    if sample.image is not None or sample.reason == "damaged_shard":  # else a text beside the images
                        left_out.append((sample.key, sample.reason or "unreadable"))
                    continue
                if seen % stride == 0:
                    kept.append(Place(part, sample.key, sample.image))
                    if len(kept) == 2 * most:
                        kept, stride = kept[::2], 2 * stride
                seen += 1
                read += len(sample.content)
                progress.advance(len(sample.content) / 1e6)
            progress.advance(max(part.size - read, 0) / 1e6)
    if not kept:
        reasons = ", ".join(sorted({reason for _, reason in left_out}))
        raise ValueError(f"no image can be read{f': {len(left_out)} are not ({reasons})' if reasons else ''}.")
    if len(kept) > most:
        kept = [kept[number * len(kept) // most] for number in range(most)]
    return Choice(kept, seen, left_out)


@dataclass
class Embedded:
    """Pictures and their features; rows of patches are those of picture after picture, each row-major."""

    keys: list[str] = field(default_factory=list)
    jpegs: list[bytes] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    patches: list[Tensor] = field(default_factory=list)
    """float16 [h w, D], of unit length"""
    cls: list[Tensor] = field(default_factory=list)
    """float32 [D], of unit length"""
    left_out: list[tuple[str, str]] = field(default_factory=list)


def embed(backbone: Backbone, places: Sequence[Place], short_px: int) -> Embedded:
    """Features of whole pictures, one at a time: they may be large. What cannot be decoded is left out and named.

    Raises:
        ValueError: features that are not finite, no picture that can be decoded, more than MAX_PATCHES, or a set that
            has changed since it was read.
    """
    found = Embedded()
    patch = backbone.model.patch_size
    num_patches = 0
    _check_number(len(places) * (short_px // patch) ** 2, len(places), short_px)  # at the least: if all were square
    with StageProgress("embedding", len(places), "images") as progress:
        for part, group in itertools.groupby(places, key=lambda place: place.part):
            with MemberReader(part.kind, part.url) as reader:
                for place in group:
                    try:
                        pixels = whole_picture(reader.read(place.member), short_px, patch)
                    except Damaged as damage:
                        found.left_out.append((place.key, damage.reason))
                    else:
                        num_patches += pixels.shape[0] * pixels.shape[1] // patch**2
                        _check_number(num_patches, len(found.keys) + 1, short_px)
                        _add(found, backbone, place.key, pixels)
                    progress.advance(1)
    if not found.keys:
        reasons = ", ".join(sorted({reason for _, reason in found.left_out}))
        raise ValueError(f"none of {len(places)} images can be shown ({reasons}).")
    return found


def _check_number(patches: int, pictures: int, short_px: int) -> None:
    if patches > MAX_PATCHES:
        raise ValueError(
            f"{pictures:,} pictures at --px {short_px} have {patches:,} patches or more, and a page holds "
            f"{MAX_PATCHES:,}; lower --px or --max-images."
        )


def _add(found: Embedded, backbone: Backbone, key: str, pixels: np.ndarray) -> None:
    device = next(backbone.model.parameters()).device
    image = torch.tensor(pixels, device=device).permute(2, 0, 1)[None]
    features = backbone.features(backbone.image.normalise(image))
    if not features.patches.isfinite().all() or not features.cls.isfinite().all():
        raise ValueError(f"{backbone.source} gives features of {key} that are not finite.")
    found.keys.append(key)
    found.jpegs.append(_jpeg(pixels))
    found.grids.append(features.grid)
    found.patches.append(F.normalize(features.patches[0].float(), dim=1).half().cpu())
    found.cls.append(F.normalize(features.cls[0].float(), dim=0).cpu())


def _jpeg(pixels: np.ndarray) -> bytes:
    """What the model saw, small: the grid of patches lies on it exactly."""
    image = Image.fromarray(pixels)
    image.thumbnail((_JPEG_PX, _JPEG_PX), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


@dataclass(frozen=True)
class Compact:
    """Unit rows in few dimensions: the dot product of two, times `step` squared, is near their cosine."""

    values: np.ndarray
    """int8 [K, N]"""
    colours: np.ndarray
    """uint8 [3, N]: three principal components"""
    step: float
    kept: float
    """share of the rows' squared length that the K directions hold"""
    mean_error: float
    high_error: float
    """how far such cosines are from the exact ones: the mean, and what 99% stay within"""


def compact(patches: Sequence[Tensor]) -> Compact:
    """Reduce unit rows [n, D] to what a page can carry.

    The directions are those that keep dot products best in the sum of squares (of the rows as they are, without
    subtracting a mean: Eckart and Young 1936), as many as hold 99% of the squared length, at most 128. Rows are not
    stretched to unit length again: measured, that moves cosines more. One step for all directions, so that later ones
    have small numbers, which a deflater packs well.

    Raises:
        ValueError: fewer than 4 rows or 3 dimensions, which have no colours.
    """
    moment = sum(rows.float().T @ rows.float() for rows in patches)
    assert isinstance(moment, Tensor)
    lengths, vectors = torch.linalg.eigh(moment.double())
    share = lengths.flip(0).clamp(min=0).cumsum(0) / lengths.sum()
    dims = min(max(int((share < _ENOUGH).sum()) + 1, 3), _MOST_DIMS, len(share))  # 3 are the colours
    basis = vectors.flip(1)[:, :dims].float()
    reduced = torch.cat([rows.float() @ basis for rows in patches])
    step = float(reduced.abs().max()) / _LEVELS
    values = (reduced / step).round().to(torch.int8)
    colours = as_colours(principal_scores(reduced, 3)[0])
    mean_error, high_error = _errors(torch.cat(list(patches)), values, step)
    return Compact(
        values=np.ascontiguousarray(values.T.numpy()),
        colours=np.ascontiguousarray(colours.T),
        step=step,
        kept=float(share[dims - 1]),
        mean_error=mean_error,
        high_error=high_error,
    )


def _errors(rows: Tensor, values: Tensor, step: float) -> tuple[float, float]:
    """Of the cosines of randomly drawn patches with each other."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randperm(len(rows), generator=generator)[:_PAIRS] for _ in range(2))
    exact = rows[one].float() @ rows[other].float().T
    shown = values[one].float() @ values[other].float().T * step**2
    errors = np.abs((shown - exact).numpy())[(one[:, None] != other).numpy()]
    return float(errors.mean()), float(np.quantile(errors, 0.99))
