"""How many images a set holds, before it is read: by its listing, and by the heads of two of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from curation.reading.folders import has_image_name
from curation.reading.pictures.images import header_pixels
from curation.reading.samples import Part
from curation.reading.sources import read_samples

_HEAD_SAMPLES, _HEAD_BYTES = 1000, 32 << 20  # what is read of each of two parts to estimate a set


@dataclass(frozen=True)
class SetEstimate:
    """One image set, from its listing and the heads of two parts."""

    num_parts: int
    bytes: int
    """of the parts"""
    urls: tuple[str, ...]
    """of the first part and the last"""
    images: int
    image_bytes: float
    """mean bytes of an encoded image"""
    megapixels: float
    """mean width x height / 10^6, from headers"""
    is_exact: bool


# A web image, as LAION's and img2dataset's shards hold them: 500 x 375, 110 kB, 10,000 in a tar.
_WEB_BYTES, _WEB_MEGAPIXELS, _WEB_PART_IMAGES, _SAMPLE_OVERHEAD = 110e3, 0.1875, 10_000, 3072


def described_set(num_images: int) -> SetEstimate:
    """A set that need not exist: so many web images."""
    size = round(num_images * (_WEB_BYTES + _SAMPLE_OVERHEAD))
    num_parts = -(-num_images // _WEB_PART_IMAGES)
    return SetEstimate(num_parts, size, ("described",), num_images, _WEB_BYTES, _WEB_MEGAPIXELS, True)


def estimate_set(parts: Sequence[Part], max_file_bytes: int) -> SetEstimate:
    """Count folders by their listing, and tars and Parquet files by the heads of two, scaled by bytes."""
    loose = [part for part in parts if part.kind == "folder"]
    packed = [part for part in parts if part.kind != "folder"]
    read = list(dict.fromkeys((chosen[0], chosen[len(chosen) // 2]) for chosen in (packed, loose) if chosen))
    heads = {part: _head(part, max_file_bytes) for pair in read for part in pair}
    images = sum(sum(map(has_image_name, part.files)) or 1 for part in loose)
    sampled = [heads[part] for part in heads if part.kind != "folder"]
    is_exact = all(part in heads and heads[part].is_whole for part in packed)
    if packed:
        per_byte = sum(head.samples for head in sampled) / max(sum(head.bytes for head in sampled), 1)
        total = sum(part.size for part in packed)
        images += sum(head.samples for head in sampled) if is_exact else round(per_byte * total)
    sizes = [size for head in heads.values() for size in head.image_bytes]
    pixels = [value for head in heads.values() for value in head.pixels]
    return SetEstimate(
        len(parts),
        sum(part.size for part in parts),
        tuple(dict.fromkeys([parts[0].url, parts[-1].url])),
        images,
        sum(sizes) / max(len(sizes), 1),
        sum(pixels) / max(len(pixels), 1) / 1e6,
        is_exact,
    )


@dataclass(frozen=True)
class _Head:
    samples: int
    bytes: int
    image_bytes: list[int]
    pixels: list[int]
    is_whole: bool


def _head(part: Part, max_file_bytes: int) -> _Head:
    sizes, pixels, count, consumed = [], [], 0, 0
    samples = read_samples(part, max_file_bytes)
    for sample in islice(samples, _HEAD_SAMPLES):
        count += 1
        members = [*sample.others, *([sample.image] if sample.image else [])]
        if part.kind == "tar":
            consumed = max([consumed, *(member.offset + member.size for member in members)])
        else:
            consumed += sum(max(member.size, 0) for member in members)
        if sample.image is not None:
            sizes.append(max(sample.image.size, 0))
        if sample.content is not None and (size := header_pixels(sample.content)):
            pixels.append(size)
        if consumed >= _HEAD_BYTES:
            break
    is_whole = next(samples, None) is None
    return _Head(count, part.size if is_whole else consumed, sizes, pixels, is_whole)
