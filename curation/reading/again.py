"""Members read a second time, long after they were judged: whether they are still there, and still the same.

Promised of what is returned: an image has the sha256 that the index holds; a member beside it has its size there.
"""

import errno
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from curation.reading.places import Fetched, is_local, join, read_range
from curation.reading.samples import Member, PartKind
from curation.reading.sources import MemberReader, SourceChanged

T = TypeVar("T")
R = TypeVar("R")

CHANGED, GONE, UNREADABLE = "changed_since_indexing", "gone_since_indexing", "unreadable_since_indexing"
LOST_REASONS = (CHANGED, GONE, UNREADABLE)
PAUSES_S = (1.0, 4.0, 15.0)
"""before the second and later attempts at a source that does not answer"""
REQUESTS_AT_ONCE = 24
"""of one task on an object store; reads of local files follow one another"""
_MAX_GAP, _MAX_RANGE = 64 << 10, 16 << 20
"""bytes between two members that are fetched rather than asked around, and of one request for several members"""
_PACKED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst")  # what a tar is by its bytes alone; only saves a try
# What the operating system says of a file itself; anything else that it says may pass.
_OF_THE_FILE = {
    errno.ENOENT: GONE,
    errno.ENOTDIR: GONE,
    errno.EISDIR: CHANGED,
    errno.ELOOP: CHANGED,
    errno.ENAMETOOLONG: GONE,
    errno.ENXIO: CHANGED,
    errno.EACCES: UNREADABLE,
    errno.EPERM: UNREADABLE,
}


class Lost(Exception):
    """What was chosen cannot be written. `reason` is one of LOST_REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Wanted:
    """What to read of one sample: the image that was judged, and members beside it."""

    kind: PartKind
    url: str
    image: Member
    sha256: bytes
    others: Sequence[Member] = ()


def read_again(
    wanted: Sequence[Wanted], fetched: Fetched | None = None, pauses_s: Sequence[float] = PAUSES_S
) -> list[list[bytes] | Lost]:
    """For each sample the bytes of its image and of its other members in their order, or why it is lost.

    Members of remote tars and folders are fetched by exact ranges, many at once: neighbours in one request, of which at
    most half are bytes between them. What comes out otherwise than expected, and every other source, is read member by
    member as `SecondReader` does, which knows damage from a store that does not answer.

    Args:
        fetched: where requests and bytes of remote sources are added.

    Raises:
        ValueError: a source does not answer, after several attempts.
    """
    results: list[list[bytes] | Lost | None] = [None] * len(wanted)
    exact = [i for i, w in enumerate(wanted) if not is_local(w.url) and _has_ranges(w)]
    for i, contents in _by_ranges(wanted, exact, fetched):
        results[i] = contents
    by_source: dict[tuple[PartKind, str], list[int]] = {}
    for i, w in enumerate(wanted):
        if results[i] is None:
            by_source.setdefault((w.kind, w.url), []).append(i)

    def read_source(rows: list[int]) -> list[tuple[int, list[bytes] | Lost]]:
        found: list[tuple[int, list[bytes] | Lost]] = []
        with SecondReader(pauses_s, fetched) as reader:
            for i in sorted(rows, key=lambda i: wanted[i].image.offset):
                w = wanted[i]
                try:
                    image = reader.image(w.kind, w.url, w.image, w.sha256)
                    found.append((i, [image, *(reader.read(w.kind, w.url, other) for other in w.others)]))
                except Lost as loss:
                    found.append((i, loss))
        return found

    local = [rows for (_, url), rows in by_source.items() if is_local(url)]
    remote = [rows for (_, url), rows in by_source.items() if not is_local(url)]
    for rows in local:
        for i, result in read_source(rows):
            results[i] = result
    for found in _at_once(read_source, remote):
        for i, result in found:
            results[i] = result
    return [result for result in results if result is not None]


class SecondReader:
    """Reads members of any source; keeps the last one open, so ask source by source and forward within each."""

    def __init__(self, pauses_s: Sequence[float] = PAUSES_S, fetched: Fetched | None = None) -> None:
        self._pauses_s = pauses_s
        self._fetched = fetched
        self._reader: MemberReader | None = None

    def image(self, kind: PartKind, url: str, member: Member, sha256: bytes) -> bytes:
        """The bytes that were judged.

        Raises:
            Lost: they are not there any more.
            ValueError: the source does not answer, after several attempts.
        """
        content = self.read(kind, url, member)
        if hashlib.sha256(content).digest() != sha256:
            raise Lost(CHANGED)
        return content

    def read(self, kind: PartKind, url: str, member: Member) -> bytes:
        """A member of the size that the index holds. Raises as `image` does."""
        for pause in (*self._pauses_s, None):
            try:
                if self._reader is None or self._reader.url != url:
                    self.close()
                    self._reader = MemberReader(kind, url, self._fetched)
                return self._reader.read(member)
            except MemoryError:
                raise
            except Exception as error:
                self.close()
                if (reason := _reason(error, url)) is not None:
                    raise Lost(reason) from error
                if pause is None:
                    raise ValueError(
                        f"cannot read {url}: {' '.join(str(error).split()).rstrip('.') or type(error).__name__}. "
                        "When it answers again, run the same command; it continues where it stopped."
                    ) from None
            time.sleep(pause)
        raise AssertionError

    def close(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.__exit__(None, None, None)

    def __enter__(self) -> "SecondReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- exact ranges -----------------------------------------------------------------------------------------------------


@dataclass
class _Range:
    """One request: bytes of a file, and which members of which samples they hold."""

    url: str
    start: int
    stop: int
    num_wanted: int
    pieces: list[tuple[int, int, int, int]]
    """sample, member (0: the image), offset in the file, size"""


def _has_ranges(wanted: Wanted) -> bool:
    return wanted.kind == "folder" or (wanted.kind == "tar" and not wanted.url.lower().endswith(_PACKED))


def _by_ranges(
    wanted: Sequence[Wanted], which: Sequence[int], fetched: Fetched | None
) -> Iterator[tuple[int, list[bytes]]]:
    """Samples whose every member came as the index knows it. A compressed tar gives other bytes: the sha256 tells."""

    def fetch(asked: _Range) -> list[tuple[int, int, bytes]]:
        try:
            content = read_range(asked.url, asked.start, asked.stop, fetched)
        except MemoryError:
            raise
        except Exception:  # each store has its own; whoever asks again, with patience, says what it means
            return []
        start = asked.start
        return [(i, m, content[offset - start : offset - start + size]) for i, m, offset, size in asked.pieces]

    found: dict[int, dict[int, bytes]] = {}
    for pieces in _at_once(fetch, _ranges(wanted, which)):
        for i, m, content in pieces:
            w, members = wanted[i], found.setdefault(i, {})
            member = w.others[m - 1] if m else w.image
            if len(content) == member.size and (m or hashlib.sha256(content).digest() == w.sha256):
                members[m] = content
            if len(members) == 1 + len(w.others):
                yield i, [found[i][n] for n in range(len(members))]
                del found[i]


def _ranges(wanted: Sequence[Wanted], which: Sequence[int]) -> list[_Range]:
    """Requests for all members of these samples, file by file."""
    pieces: dict[str, list[tuple[int, int, int, int]]] = {}
    requests: list[_Range] = []
    for i in which:
        w = wanted[i]
        for m, member in enumerate((w.image, *w.others)):
            if w.kind == "tar":
                pieces.setdefault(w.url, []).append((member.offset, member.size, i, m))
            else:  # a file of its own; one byte more, so that what grew is seen
                most = member.size + 1
                requests.append(_Range(join(w.url, member.name), 0, most, most, [(i, m, 0, most)]))
    for url, found in pieces.items():
        last: _Range | None = None
        for offset, size, i, m in sorted(found):
            if last is not None:
                stop, gap = max(last.stop, offset + size), max(0, offset - last.stop)
                wasted = stop - last.start - last.num_wanted - size
                if gap <= _MAX_GAP and wasted <= last.num_wanted + size and stop - last.start <= _MAX_RANGE:
                    last.stop, last.num_wanted = stop, last.num_wanted + size
                    last.pieces.append((i, m, offset, size))
                    continue
            last = _Range(url, offset, offset + size, size, [(i, m, offset, size)])
            requests.append(last)
    return requests


def _at_once(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """function of each item, on threads that wait for the network, in order; the first error ends it."""
    items = list(items)
    pool = ThreadPoolExecutor(max(1, min(REQUESTS_AT_ONCE, len(items))))
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _reason(error: Exception, url: str) -> str | None:
    """Why the member is lost; None for what may pass."""
    if isinstance(error, SourceChanged):
        return CHANGED
    if not is_local(url):
        if isinstance(error, FileNotFoundError) and _answers_absent(error):
            return GONE
        return None  # a store's own errors seldom tell damage from a bad connection: better to ask than to drop
    if isinstance(error, OSError) and error.errno is not None:
        return _OF_THE_FILE.get(error.errno)
    if isinstance(error, FileNotFoundError):
        return GONE
    return CHANGED  # it is there, and no longer the tar, archive or Parquet file that it was


def _answers_absent(error: BaseException) -> bool:
    """Whether the store said so itself. Some file systems say "not found" of a server that does not answer, too."""
    while error.__cause__ is not None:
        error = error.__cause__
    status = getattr(error, "status", None)  # aiohttp
    answer = getattr(error, "response", None)  # botocore
    if isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(error, FileNotFoundError) or status in (404, 410)
