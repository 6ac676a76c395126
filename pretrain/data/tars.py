"""Where the image members of a tar lie: what curation's walker of tars finds, as arrays. Nothing is unpacked."""

from collections.abc import Set
from typing import IO

import numpy as np

from curation.reading.compression import sniff_compression
from curation.reading.tars import BLOCK, Gap, Links, TarMember, member_name, walk
from pretrain.data.members import image_members

__all__ = ["BLOCK", "member_name", "scan"]


def scan(file: IO[bytes], size: int, suffixes: Set[str]) -> tuple[np.ndarray, np.ndarray, str]:
    """Offsets and sizes (int64, bytes) of the members that are images by their suffixes (members.py), in order.

    A link to an earlier member counts as that member again. Reading goes on behind damage; the third result says where
    it lies and how many bytes cannot be read, and is empty when there is none.

    Args:
        file: seekable, at any position.
        size: bytes of the whole tar.
    """
    file.seek(0)
    if compression := sniff_compression(file.read(BLOCK)):
        none = np.zeros(0, np.int64)
        return none, none, f"it is compressed ({compression}); training reads by range, so unpack it to a plain tar"
    offsets, sizes, gaps, has_links = _list(file, size, suffixes, None)
    if has_links:  # the names of all members are held in memory only where something refers to them
        offsets, sizes, gaps, _ = _list(file, size, suffixes, Links())
    damage = ""
    if gaps:
        lost = sum(gap.size for gap in gaps)
        damage = gaps[0].why
        damage += f"; {len(gaps):,} such places" if len(gaps) > 1 else ""
        damage += f"; {lost:,} bytes cannot be read" if lost else ""
    return np.array(offsets, np.int64), np.array(sizes, np.int64), damage


def _list(
    file: IO[bytes], size: int, suffixes: Set[str], links: Links | None
) -> tuple[list[int], list[int], list[Gap], bool]:
    """Offsets, sizes, gaps, and whether there are links that are still to be resolved."""
    paths: list[str] = []
    places: list[tuple[int, int]] = []
    gaps: list[Gap] = []
    has_links = False
    for span in walk(file, size):
        if type(span) is TarMember:
            has_links = has_links or span.kind in ("hardlink", "symlink")
            place = (span.offset, span.size) if span.kind == "file" else None
            if links is not None:
                place = links.place(span)
            if place is not None:
                paths.append(span.name)
                places.append(place)
        elif type(span) is Gap:
            gaps.append(span)
    images = [places[number] for number in image_members(paths, suffixes)]
    return [offset for offset, _ in images], [size for _, size in images], gaps, has_links
