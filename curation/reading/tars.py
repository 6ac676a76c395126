"""The headers of a tar -> its members, its padding, and every gap that is neither. Standard library only.

`walk` gives each byte of a tar to one member, padding or gap, in order, and never raises for what the tar holds:

- A header counts when its checksum holds, its type is a letter or digit that tar knows, and its size is a number that
  ends within the file. Anything else opens a gap; reading goes on at the next block that is such a header.
- Names and sizes of GNU long names (`L`, `K`) and pax records (`x`) replace those of the header behind them.
- Zeros are read over: what is behind them counts, so tars that were concatenated are read to their end. Zeros longer
  than any padding that tar writes are a gap: a hole where a transfer stopped, or where a disk lost its blocks.
- A tar that ends without a zero block may have been cut between two members, or its writer left the marker out: nobody
  can tell, so it is a gap of no bytes.

The work is linear in the size of the file and the memory bounded, whatever the headers claim.
"""

import posixpath
import re
from collections.abc import Iterator
from typing import IO, Literal, NamedTuple

BLOCK = 512
NO_END = "its end marker is missing"
_MAX_EXTENDED_BYTES = 1 << 20  # of a pax or GNU long-name record; a sane one is a few hundred
_UNKNOWN_SIZE = 1 << 62
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
# tar fills its last record with zeros: ten kilobytes unless told otherwise, and the marker may open one more record.
_RECORDS = (10240, *(1 << n for n in range(16, 21)))
_PAX_LINE = re.compile(rb"([1-9][0-9]{0,6}) ")

Kind = Literal["file", "hardlink", "symlink", "unreadable", "other"]
_KINDS: dict[bytes, Kind] = {b"0": "file", b"\0": "file", b"7": "file", b"1": "hardlink", b"2": "symlink"}
# Old GNU lists of names (D, N), volume labels, devices and folders are no files; the rest is what we do not unpack:
# sparse files, continuations of another volume, a vendor's own.
_KINDS |= dict.fromkeys((b"3", b"4", b"5", b"6", b"V", b"D", b"N", b"g"), "other")
_WITHOUT_DATA = b"123456V"


class TarMember(NamedTuple):
    """One member: a file, a link with its target, or what is no file (`other`) or is one that we do not unpack."""

    name: str
    """as in the tar; bytes that are not UTF-8 as surrogates"""
    kind: Kind
    start: int
    """byte of its first header, extended ones included"""
    offset: int
    """byte of its data"""
    size: int
    """bytes of its data"""
    target: str = ""
    """of a link"""

    @property
    def end(self) -> int:
        """Where the next header is due."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


class Padding(NamedTuple):
    """Zeros that end a tar or fill its last record."""

    offset: int
    size: int


class Gap(NamedTuple):
    """Bytes that belong to no member, and why; of no bytes where the end marker is missing or the file is empty."""

    offset: int
    size: int
    why: str
    name: str = ""
    """of the member that it begins with, where its header can be read and its data cannot"""


Span = TarMember | Padding | Gap


class _Header(NamedTuple):
    type: bytes
    size: int
    name: bytes
    target: bytes
    is_extended_sparse: bool


def walk(file: IO[bytes], size: int | None) -> Iterator[Span]:
    """The spans of a tar, in order. Between two of them the caller may read from the file and move in it.

    Args:
        file: seekable; forward only when `size` is None.
        size: bytes of the whole tar; None for a stream that has to be read to be measured. There a member that the end
            cuts comes first as a member, then again as the gap that starts at the same byte.

    Raises:
        OSError: the file cannot be read.
    """
    end = _UNKNOWN_SIZE if size is None else size
    position = start = 0  # start: of the first extended header before the member that is due
    extended: dict[str, bytes] = {}
    is_closed = False  # by zeros, or by a gap that reaches the end
    last = TarMember("", "other", 0, 0, 0)
    while position < end:
        lost = ""
        block = _read_at(file, position, min(BLOCK, end - position))
        if len(block) < min(BLOCK, end - position):  # a stream's end, or a file that got shorter
            end = min(end, file.seek(0, 2))
            if end < last.offset + last.size:
                yield Gap(last.start, end - last.start, f"it ends inside the member at byte {last.offset}", last.name)
                return
            continue
        if not block.strip(b"\0"):
            if start < position:
                yield Gap(start, position - start, f"no member behind the extended header at byte {start}")
            run_end, end = _zeros_end(file, position, end)
            start, extended = position, {}
            following = _read_at(file, run_end, BLOCK)
            if run_end - position > BLOCK or run_end >= end or parse_header(following, end - run_end):
                is_closed = True
                if _is_padding(position, run_end):
                    yield Padding(position, run_end - position)
                else:
                    yield Gap(position, run_end - position, f"only zeros from byte {position} on")
                position = start = run_end
                continue
            # One zero block before something that is no header: it was the header that is missing.
            why = f"zeros in place of a header at byte {position}"
        elif len(block) < BLOCK:
            why = f"it ends inside a header at byte {position}"
        else:
            header = parse_header(block)
            if header is None:
                why = f"no tar header at byte {position}"
            else:
                data = position + BLOCK
                if header.type in b"xXLK":
                    if header.size <= _MAX_EXTENDED_BYTES and data + header.size <= end:
                        record = _read_at(file, data, header.size)
                        if len(record) == header.size and _extend(extended, header.type, record):
                            position = data + -(-header.size // BLOCK) * BLOCK
                            continue
                    why = f"an extended header that cannot be read at byte {position}"
                else:
                    if header.is_extended_sparse:
                        data = _sparse_data(file, data, end)
                    member = _member(header, extended, start, data)
                    if data + member.size <= end:
                        last, is_closed = member, False
                        yield member
                        position = start = member.end if member.end <= end else end
                        extended = {}
                        continue
                    why, lost = f"it ends inside the member at byte {data}", member.name
        resume, lost_end, end = _next_header(file, position, end)
        yield Gap(start, lost_end - start, why, lost)
        position = start = lost_end
        extended = {}
        is_closed = lost_end >= end
        if lost_end < resume and not _is_padding(lost_end, resume):
            continue  # the zeros behind what was lost are looked at like any
        if lost_end < resume:
            yield Padding(lost_end, resume - lost_end)
            position = start = resume
            is_closed = is_closed or resume >= end
    if start < end:
        yield Gap(start, end - start, f"no member behind the extended header at byte {start}")
    elif not end:
        yield Gap(0, 0, "it is empty")
    elif not is_closed:
        yield Gap(end, 0, NO_END)


class Links:
    """Resolves links to what stands earlier in the same tar, and to nothing else."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[int, int]] = {}

    def place(self, member: TarMember) -> tuple[int, int] | None:
        """Offset and size of the file that this member is or links to, through other links too; None where nowhere.

        Has to see every member, in order.
        """
        if member.kind == "file":
            place = (member.offset, member.size)
        elif member.kind in ("hardlink", "symlink"):
            folder = "" if member.kind == "hardlink" else posixpath.dirname(member.name)
            place = self._places.get(_normal(posixpath.join(folder, member.target)))
        else:
            place = None
        if place is not None:
            self._places[_normal(member.name)] = place
        else:
            self._places.pop(_normal(member.name), None)  # unpacked, it would stand in the way of the one before
        return place


def parse_header(block: bytes, room: int | None = None) -> _Header | None:
    """What one block of 512 bytes says when it is a header; None when it is none.

    Args:
        room: bytes from the block on to the end of the file; a header that claims more is none.
    """
    if len(block) < BLOCK:
        return None
    try:
        checksum = int(block[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return None
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if checksum != unsigned:
        signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])  # as some old tars summed
        if checksum != signed:
            return None
    type_ = block[156:157]
    if not (type_ in b"\x0001234567" or type_.isalpha()):
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    if room is not None and type_ not in _WITHOUT_DATA and BLOCK + size > room:
        return None
    return _Header(type_, size, _path(block), block[157:257].split(b"\0", 1)[0], type_ == b"S" and block[482] != 0)


def member_name(header: bytes) -> str:
    """The path in a 512-byte header, as USTAR splits it; empty when that is none."""
    return _path(header).decode("utf-8", "replace") if len(header) >= BLOCK else ""


def _path(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[345] and header[257:263] == b"ustar\0":  # the old and the GNU formats have no prefix there
        return header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _number(digits: bytes) -> int | None:
    """Octal text, or GNU's base 256; None for what is neither."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    digits = digits.split(b"\0", 1)[0].strip()
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None if digits else 0


def _member(header: _Header, extended: dict[str, bytes], start: int, data: int) -> TarMember:
    name, size = extended.get("path", header.name), header.size
    kind = _KINDS.get(header.type, "unreadable")
    if header.type == b"\0" and name.endswith(b"/"):
        kind = "other"  # how the oldest tars wrote a folder
    if header.type in _WITHOUT_DATA:
        size = 0  # what some writers put there is the size of the file that a link points to
    elif extended.get("size", b"").isdigit():
        size = int(extended["size"])
    if "sparse" in extended:
        kind = "unreadable"
    return TarMember(_text(name), kind, start, data, size, _text(extended.get("linkpath", header.target)))


def _extend(extended: dict[str, bytes], type_: bytes, record: bytes) -> bool:
    """Add what an extended header says of the member behind it; False where its form is broken."""
    if type_ in b"LK":
        extended["path" if type_ == b"L" else "linkpath"] = record.split(b"\0", 1)[0]
        return True
    at = 0
    while at < len(record) and record[at]:
        match = _PAX_LINE.match(record, at)
        stop = at + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(record) or record[stop - 1 : stop] != b"\n":
            return False
        key, equals, value = record[match.end() : stop - 1].partition(b"=")
        if not equals:
            return False
        if key in (b"path", b"linkpath", b"size"):
            extended[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            extended["sparse"] = b""
            if key == b"GNU.sparse.name":
                extended["path"] = value
        at = stop
    return True


def _sparse_data(file: IO[bytes], position: int, end: int) -> int:
    """Where the data of an old GNU sparse file begins: behind further blocks that map it."""
    while position + BLOCK <= end:
        block = _read_at(file, position, BLOCK)
        position += BLOCK
        if len(block) < BLOCK or not block[504]:
            break
    return position


def _next_header(file: IO[bytes], position: int, end: int) -> tuple[int, int, int]:
    """(next header behind this block, end of the last block before it that is not zeros, end of the file)."""
    position += BLOCK
    lost_end = position
    for chunk in _chunks(file, position, end):
        if chunk != _ZEROS[: len(chunk)]:
            for at in range(0, len(chunk), BLOCK):
                # A header has its magic here, or zeros from before there was one: the cheap look first.
                if chunk[at + 257 : at + 262] == b"ustar" or chunk[at + 257 : at + 258] == b"\0":
                    block = chunk[at : at + BLOCK]
                    if block == _ZEROS[: len(block)]:
                        continue
                    if parse_header(block, end - position - at):
                        return position + at, lost_end, end
                elif not chunk[at : at + BLOCK].strip(b"\0"):  # the file's last block, and not a whole one
                    continue
                lost_end = position + min(at + BLOCK, len(chunk))
        position += len(chunk)
    end = min(position, end)
    return end, min(lost_end, end), end


def _zeros_end(file: IO[bytes], position: int, end: int) -> tuple[int, int]:
    """(where the run of zero blocks from here on ends, end of the file)."""
    for chunk in _chunks(file, position, end):
        if chunk != _ZEROS[: len(chunk)]:
            return position + (len(chunk) - len(chunk.lstrip(b"\0"))) // BLOCK * BLOCK, end
        position += len(chunk)
    return position, position


def _chunks(file: IO[bytes], position: int, end: int) -> Iterator[bytes]:
    """The bytes from here to the end; small pieces first, so that many short looks ahead stay cheap."""
    size = 8 * BLOCK
    while position < end:
        chunk = _read_at(file, position, min(size, end - position))
        if chunk:
            yield chunk
        if len(chunk) < min(size, end - position):
            return  # a stream's end, or a file that got shorter
        position += len(chunk)
        size = min(2 * size, _CHUNK)


def _is_padding(start: int, end: int) -> bool:
    """Whether zeros from here to there are no longer than what tar writes behind its last member."""
    size = end - start
    if start == 0 or size <= _RECORDS[0] + BLOCK:
        return size <= _RECORDS[0] + BLOCK
    return any(end % record == 0 and size <= record + BLOCK for record in _RECORDS)


def _read_at(file: IO[bytes], position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(size)


def _normal(path: str) -> str:
    return posixpath.normpath("/" + path)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
