"""The segments and scans of a JPEG: what libjpeg decodes, and nothing of what else lies in the file."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from curation.reading.pictures.bare import exif_orientation

_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed byte, nor a restart, nor filling
_FRAMES = frozenset([*range(0xC0, 0xD0)]) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
END = b"\xff\xd9"
_MAX_SEGMENTS = 1 << 16  # a JPEG with more is made to be slow


@dataclass(frozen=True)
class Scan:
    """One pass over some components: coefficients first..last (zigzag) down to bit `low`."""

    components: tuple[int, ...]
    first: int
    last: int
    low: int


@dataclass(frozen=True)
class Header:
    """What stands before the first scan."""

    scan_start: int
    """where its SOS marker is, in bytes"""
    precision: int
    """bits of a sample"""
    components: tuple[int, ...]
    progressive: bool
    orientation: int
    kept: tuple[tuple[int, int], ...] = field(repr=False)
    """start and end of the segments that decoding needs"""


def read_header(content: bytes) -> Header | None:
    """Walk the segments up to the first scan; None where there is none to be found."""
    position, orientation, kept = 2, 1, []
    precision, components, progressive = 0, (), False
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(content, position)
        if found is None:
            return None
        position, kind = found.end() - 2, content[found.end() - 1]
        if kind == 0xDA:
            return Header(position, precision, components, progressive, orientation, tuple(kept))
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if kind == 0xD9 or end > len(content) or end < position + 4:
            return None
        if kind in _FRAMES:
            precision, progressive = content[position + 4], kind in _PROGRESSIVE
            components = tuple(content[position + 10 : end : 3])
        elif kind == 0xE1 and content.startswith(b"Exif\0", position + 4):
            orientation = exif_orientation(content[position + 4 : end])
        if _decoding_needs(content, kind, position, end):
            kept.append((position, end))
        position = end
    return None


def without_extras(content: bytes, header: Header) -> bytes:
    """The same JPEG without thumbnails, profiles, texts and the list of further pictures."""
    view = memoryview(content)
    return b"".join([content[:2], *(view[a:b] for a, b in header.kept), view[header.scan_start :]])


def count_scans(content: bytes, header: Header, most: int) -> int:
    """Scans up to the end marker, not counted further than one above `most`.

    Where the first scan of a JPEG that is not progressive holds every component, libjpeg reads no other.
    """
    if not header.progressive and content[header.scan_start + 4] == len(header.components):
        return 1
    count = 0
    for other, scan in enumerate(_scans(content, header)):
        count += scan is not None
        if count > most or other > _MAX_SEGMENTS:
            return most + 1
    return count


def says_it_all(content: bytes, header: Header) -> bool:
    """Whether the scans up to the end cover every bit of every coefficient of every component."""
    left = {component: np.full(64, 99) for component in header.components}
    for scan in filter(None, _scans(content, header)):
        for component in scan.components:
            if component in left:
                left[component][scan.first : scan.last + 1] = scan.low
    return bool(left) and all(not low.any() for low in left.values())


def _decoding_needs(content: bytes, kind: int, start: int, end: int) -> bool:
    """Whether a segment carries pixels or says how: JFIF and Adobe tell the colours, the other APPn and COM nothing."""
    if kind == 0xE0:
        return content.startswith(b"JFIF\0", start + 4) and end - start >= 18
    if kind == 0xEE:
        return content.startswith(b"Adobe", start + 4) and end - start >= 16
    return not (0xE1 <= kind <= 0xEF or kind == 0xFE)


def _scans(content: bytes, header: Header) -> Iterator[Scan | None]:
    """Every scan, and None for each other segment behind the first, up to the end marker or the end of the file."""
    position = header.scan_start
    while position + 4 <= len(content):
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        yield _scan(content[position + 4 : position + 2 + length], header) if content[position + 1] == 0xDA else None
        found = _MARKER_IN_SCAN.search(content, position + 2 + length)
        if found is None or found.group() == END:
            return
        position = found.start()


def _scan(body: bytes, header: Header) -> Scan | None:
    count = body[0] if body else 0
    if len(body) < 4 + 2 * count:
        return None
    first, last, bits = body[1 + 2 * count : 4 + 2 * count]
    components = tuple(body[1 : 1 + 2 * count : 2])
    return Scan(components, first, last, bits & 15) if header.progressive else Scan(components, 0, 63, 0)
