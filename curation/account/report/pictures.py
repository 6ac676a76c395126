"""Thumbnails for the report, made from the original bytes read again by range."""

import io
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from curation.engine.store import ImageSet
from curation.reading.pictures.images import ImageLimits, Rejected, decode
from curation.reading.samples import Member
from curation.reading.sources import MemberReader

_SOURCES_AT_ONCE = 8  # remote reads wait, they do not compute
_JPEG_QUALITY = 74
_COLUMNS = ["key", "source", "source_kind", "image", "width", "height", "format", "reason"]


class Ref(NamedTuple):
    """One image of a run: the set as the embed stage names it ("pool", "seed-NAME", "evaluation-NAME"), and its gid."""

    set: str
    gid: int


@dataclass(frozen=True)
class Picture:
    """What the page shows of one image. Without `jpeg`, `problem` says why there is nothing to see."""

    key: str
    width: int
    height: int
    format: str
    jpeg: bytes | None = None
    problem: str = ""


def read_pictures(
    sets: Mapping[str, ImageSet], wanted: Iterable[Ref], limits: ImageLimits, side_px: int = 128
) -> dict[Ref, Picture]:
    """A thumbnail of at most side_px pixels for each image; never raises for what the sources hold, or hold no more."""
    jobs: dict[tuple[str, str], list[tuple[Ref, dict[str, Any]]]] = {}
    by_set: dict[str, list[int]] = {}
    for ref in dict.fromkeys(wanted):
        by_set.setdefault(ref.set, []).append(ref.gid)
    for name, gids in by_set.items():
        for gid, row in zip(gids, sets[name].take(np.array(gids, np.int64), _COLUMNS).to_pylist(), strict=True):
            jobs.setdefault((row["source_kind"], row["source"]), []).append((Ref(name, gid), row))
    result: dict[Ref, Picture] = {}
    with ThreadPoolExecutor(_SOURCES_AT_ONCE) as pool:
        for found in pool.map(lambda job: _read_source(job[0], job[1], limits, side_px), jobs.items()):
            result.update(found)
    return result


def _read_source(
    source: tuple[str, str], rows: list[tuple[Ref, dict[str, Any]]], limits: ImageLimits, side_px: int
) -> dict[Ref, Picture]:
    """The pictures of one tar, Parquet file or folder, in the order in which they lie there."""
    result: dict[Ref, Picture] = {}
    reader = None
    try:
        for ref, row in sorted(rows, key=lambda item: (item[1]["image"] or {}).get("offset", 0)):
            content, problem = None, ""
            member = row["image"]
            if member is None or member["size"] < 0:
                problem = row["reason"] or "no image"
            elif member["size"] > limits.max_file_bytes:
                problem = "file_too_large"
            else:
                try:
                    reader = reader or MemberReader(*source)  # type: ignore[arg-type]  # an image has one
                    content = reader.read(Member(**member))
                except Exception:  # gone, changed, or unreachable: each store has its own errors, none worth a failure
                    problem = "source not readable any more"
            result[ref] = _picture(row, content, problem, limits, side_px)
    finally:
        if reader is not None:
            reader.__exit__(None, None, None)
    return result


def _picture(row: dict[str, Any], content: bytes | None, problem: str, limits: ImageLimits, side_px: int) -> Picture:
    width, height, format_ = row["width"] or 0, row["height"] or 0, row["format"] or ""
    if content is None:
        return Picture(row["key"], width, height, format_, None, problem)
    decoded = decode(content, limits)
    if isinstance(decoded, Rejected):
        return Picture(row["key"], width, height, format_, None, decoded.reason)
    return Picture(row["key"], width, height, format_, thumbnail(decoded.image, side_px))


def thumbnail(image: Image.Image, side_px: int) -> bytes:
    """RGB image -> JPEG no larger than side_px on its long side; never enlarged, at least 1 pixel a side."""
    scale = min(1.0, side_px / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return buffer.getvalue()
