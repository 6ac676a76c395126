"""A file -> the same without what carries no pixels of its first picture: what does not carry pixels cannot reject it.

Texts, profiles, thumbnails, later frames and whatever lies behind the end are left out by one pass over the file's own
list of parts; none of them is unpacked. What the list says of the picture (turned, animated, significant bits) is kept
beside it. A list that cannot be followed leaves the file as it is: its decoder decides.
"""

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

_MAX_PARTS = 1 << 20  # a file with more is made to be slow; its decoder gets it whole
_ORIENTATION = 0x0112
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# TIFF tags without which pixels cannot be decoded: sizes, samples, strips, tiles, palettes, and those of the codecs.
_TIFF_PIXEL_TAGS = frozenset(
    (*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332, 338, 339)
).union((347, *range(512, 522), *range(529, 533), 50674))
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


@dataclass(frozen=True)
class Bare:
    """A file for a decoder, and what was said beside its pixels."""

    content: bytes
    orientation: int = 1
    """EXIF, 1 to 8"""
    animated: bool = False
    """more pictures follow the first"""
    depth: int = 8
    """bits of a sample in the file, where they are more than 8"""
    significant: int = 0
    """of them those that carry the picture, as the file declares; 0: it does not"""
    is_preview: bool = False
    """the first picture is a small copy of one that lies elsewhere: a camera's raw file"""


def bare(content: bytes, kind: str) -> Bare:
    """The pixels of a file of this kind (formats.recognise). Never raises for content; linear in its bytes."""
    strip = _STRIPPERS.get(kind)
    try:
        return strip(content) if strip else Bare(content)
    except (IndexError, ValueError, struct.error):  # the list of parts points nowhere
        return Bare(content)


def exif_orientation(exif: bytes) -> int:
    """The orientation tag of an EXIF block, 1 to 8; 1 where it is absent or no such number."""
    exif = exif.removeprefix(b"Exif\0\0")
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", exif, at)
            if tag == _ORIENTATION and number == 1 and kind in (3, 4):
                value = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, at + 8)[0]
                return value if 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


def _png(content: bytes) -> Bare:
    """IHDR, palette, transparency and pixel data; a piece of pixel data that the end cuts is kept as far as it goes."""
    kept, dropped, position = [_PNG_SIGNATURE], False, len(_PNG_SIGNATURE)
    orientation, animated, depth, significant, colour = 1, False, 8, 0, -1
    for _ in range(_MAX_PARTS):
        if position + 8 > len(content):
            break
        length, kind = int.from_bytes(content[position : position + 4], "big"), content[position + 4 : position + 8]
        end = position + 12 + length
        if kind == b"IEND":
            break
        if kind == b"IHDR":
            depth, colour = content[position + 16], content[position + 17]
        if kind in (b"IHDR", b"IDAT") or (kind == b"PLTE" and colour == 3):
            if end > len(content):  # cut: what is there counts, and whether that is every row
                kept.append(_png_chunk(kind, content[position + 8 : position + 8 + length]))
                dropped = True
                break
            kept.append(content[position:end])
        else:
            dropped = True
            # Bounded before they are read: a palette has 256 entries, an orientation stands in the first kilobytes.
            body = content[position + 8 : position + 8 + min(length, 1 << 16)]
            if kind == b"tRNS" and _is_transparency(length, colour) and _sums_up(content, position, end):
                kept.append(content[position:end])
            elif kind == b"eXIf":
                orientation = exif_orientation(body)
            elif kind == b"acTL":
                animated = int.from_bytes(body[:4], "big") > 1
            elif kind == b"sBIT" and body:
                significant = max(body[: length - (colour in (4, 6))] or b"\0")
        position = end
    else:
        return Bare(content)
    if not dropped and content.startswith(b"IEND", position + 4) and position + 12 == len(content):
        return Bare(content, depth=depth)
    kept.append(_png_chunk(b"IEND", b""))
    return Bare(b"".join(kept), orientation, animated, depth, significant)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _is_transparency(length: int, colour: int) -> bool:
    return length == {0: 2, 2: 6}.get(colour, -1) or (colour == 3 and 0 < length <= 256)


def _sums_up(content: bytes, start: int, end: int) -> bool:
    return zlib.crc32(content[start + 4 : end - 4]) == int.from_bytes(content[end - 4 : end], "big")


def _gif(content: bytes) -> Bare:
    """Screen, palette and the first frame."""
    flags, position, control = content[10], 13, b""
    position += 3 << (flags & 7) + 1 if flags & 0x80 else 0
    head = content[:position]
    while (kind := content[position]) == 0x21:
        end = _gif_blocks(content, position + 2)
        if content[position + 1] == 0xF9:
            control = content[position:end]
        position = end
    if kind != 0x2C:
        return Bare(content)
    local = content[position + 9]
    end = _gif_blocks(content, position + 11 + (3 << (local & 7) + 1 if local & 0x80 else 0))
    frame = content[position:end]
    return Bare(head + control + frame + b";", animated=_gif_goes_on(content, end))


def _gif_goes_on(content: bytes, position: int) -> bool:
    """Whether another frame begins at or after the extensions here."""
    try:
        while content[position] == 0x21:
            position = _gif_blocks(content, position + 2)
        return content[position] == 0x2C
    except (IndexError, ValueError):
        return False


def _gif_blocks(content: bytes, position: int) -> int:
    """Where the blocks that begin here end."""
    for _ in range(_MAX_PARTS):
        if not content[position]:
            return position + 1
        position += content[position] + 1
    raise ValueError("too many blocks")


def _webp(content: bytes) -> Bare:
    """The picture, its transparency and the canvas; of an animation the first frame."""
    kept: list[bytes] = []
    orientation, frames, position = 1, 0, 12
    end = min(len(content), 8 + int.from_bytes(content[4:8], "little"))
    for _ in range(_MAX_PARTS):
        if position + 8 > end:
            break
        kind, length = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "little")
        body = content[position + 8 : position + 8 + length] if kind != b"EXIF" else b""
        if kind == b"VP8X" and body:
            kept.append(content[position : position + 8] + bytes([body[0] & ~0x2C]) + body[1:])  # no ICC, EXIF, XMP
        elif kind in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM") or (kind == b"ANMF" and not frames):
            kept.append(content[position : position + 8] + body + b"\0" * (len(body) & 1))
        elif kind == b"EXIF":
            orientation = exif_orientation(content[position + 8 : position + 8 + min(length, 1 << 16)])
        frames += kind == b"ANMF"
        position += 8 + length + (length & 1)
    else:
        return Bare(content)
    joined = b"".join(kept)
    return Bare(b"RIFF" + struct.pack("<I", len(joined) + 4) + b"WEBP" + joined, orientation, frames > 1)


def _tiff(content: bytes) -> Bare:
    """The first picture's list of tags, rewritten behind the file with those alone that pixels need."""
    order = "<" if content[:2] == b"II" else ">"
    if struct.unpack_from(order + "H", content, 2)[0] == 43:
        offset_at, word, entry, count_of = 8, "Q", 20, "Q"
    else:
        offset_at, word, entry, count_of = 4, "I", 12, "H"
    inline = struct.calcsize(word)
    (start,) = struct.unpack_from(order + word, content, offset_at)
    (count,) = struct.unpack_from(order + count_of, content, start)
    if count > 1 << 16:
        raise ValueError("too many tags")
    first = start + struct.calcsize(count_of)
    said: dict[int, int] = {}
    entries = []
    for at in range(first, first + count * entry, entry):
        tag, kind, number = struct.unpack_from(f"{order}HH{word}", content, at)
        if tag in _TIFF_PIXEL_TAGS:
            entries.append(content[at : at + entry])
        if kind in (1, 3, 4, 7) and tag not in said:
            size = _TIFF_SIZES[kind]
            where = at + entry - inline
            if number * size > inline:
                (where,) = struct.unpack_from(order + word, content, where)
            if number > 0 and where + size <= len(content):
                said[tag] = struct.unpack_from(order + {1: "B", 2: "H", 4: "I"}[size], content, where)[0]
    (following,) = struct.unpack_from(order + word, content, first + count * entry)
    new_start = len(content) + len(content) % 2
    new = struct.pack(order + count_of, len(entries)) + b"".join(entries) + bytes(inline)
    head = content[:offset_at] + struct.pack(order + word, new_start)
    orientation = said.get(_ORIENTATION, 1)
    return Bare(
        b"".join([head, memoryview(content)[len(head) :], bytes(len(content) % 2), new]),
        orientation if 1 <= orientation <= 8 else 1,
        animated=0 < following < len(content),
        depth=said.get(258, 8),
        significant=said.get(281, 0).bit_length(),  # MaxSampleValue
        is_preview=50706 in said or (330 in said and bool(said.get(254, 0) & 1)),
    )


def _bmp(content: bytes) -> Bare:
    """A header of another length than the usual ones (OS/2 has 16 to 64) becomes one of 40 bytes."""
    (pixels, size) = struct.unpack_from("<II", content, 10)
    if size in (12, 40, 52, 56, 64, 108, 124) or not 16 <= size <= 256:
        return Bare(content)
    header = content[18 : 14 + size][:36].ljust(36, b"\0")
    return Bare(content[:10] + struct.pack("<II", pixels - size + 40, 40) + header + content[14 + size :])


_ITEM = re.compile(rb"infe[\x02\x03].{3}(?:.{4}|.{6})(Exif|mime)", re.S)


def _items(content: bytes) -> Bare:
    """AVIF and HEIF: items of EXIF and XMP get a type that no decoder knows, in place, so that nothing moves."""
    position = 0
    while position + 8 <= len(content):
        size, kind = int.from_bytes(content[position : position + 4], "big"), content[position + 4 : position + 8]
        if kind == b"meta" and size >= 8:
            meta = content[position : position + size]
            hidden = bytearray(meta)
            for found in _ITEM.finditer(meta):
                hidden[found.start(1) : found.end(1)] = b"skip"
            return Bare(content[:position] + bytes(hidden) + content[position + size :])
        if size < 8:
            break
        position += size
    return Bare(content)


_STRIPPERS: dict[str, Callable[[bytes], Bare]] = {
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
    "TIFF": _tiff,
    "BMP": _bmp,
    "AVIF": _items,
    "HEIF": _items,
}
