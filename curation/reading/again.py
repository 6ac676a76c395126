"""Members read a second time, long after they were judged: whether they are still there, and still the same.

Promised of what is returned: an image has the sha256 that the index holds; a member beside it has its size there.
"""

import errno
import hashlib
import time
from collections.abc import Sequence

from curation.reading.places import is_local
from curation.reading.samples import Member, PartKind
from curation.reading.sources import MemberReader, SourceChanged

CHANGED, GONE, UNREADABLE = "changed_since_indexing", "gone_since_indexing", "unreadable_since_indexing"
LOST_REASONS = (CHANGED, GONE, UNREADABLE)
PAUSES_S = (1.0, 4.0, 15.0)
"""before the second and later attempts at a source that does not answer"""
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


class SecondReader:
    """Reads members of any source; keeps the last one open, so ask source by source and forward within each."""

    def __init__(self, pauses_s: Sequence[float] = PAUSES_S) -> None:
        self._pauses_s = pauses_s
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
                    self._reader = MemberReader(kind, url)
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
