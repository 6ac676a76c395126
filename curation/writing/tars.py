"""WebDataset tars: bytes in, bytes out, with an index of offsets and digests. The same input gives the same bytes."""

import hashlib
import io
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SUFFIX_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "ICO": "ico",
    "HEIF": "heic",
    "JXL": "jxl",
}
_BLOCK = 512


@dataclass(frozen=True)
class Entry:
    """One member of a shard: its key and suffix, where its bytes lie in the tar, and their sha256 (hex)."""

    key: str
    suffix: str
    offset: int
    size: int
    sha256: str


@dataclass
class ShardBuilder:
    """Builds one tar in memory. Times, owners and modes are fixed, so content alone decides the bytes."""

    entries: list[Entry] = field(default_factory=list)
    _buffer: io.BytesIO = field(default_factory=io.BytesIO)

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> None:
        """Append one sample: (suffix without the leading dot, content) for each member, the image first."""
        for suffix, content in members:
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(content)
            header.mode = 0o644
            self._buffer.write(header.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
            offset = self._buffer.tell()
            self._buffer.write(content)
            self._buffer.write(b"\0" * (-len(content) % _BLOCK))
            self.entries.append(Entry(key, suffix, offset, len(content), hashlib.sha256(content).hexdigest()))

    def finish(self) -> memoryview:
        """The whole tar, closed by its two zero blocks."""
        self._buffer.write(b"\0" * (2 * _BLOCK))
        return self._buffer.getbuffer()


def safe_key(key: str, tag: str, is_unique: bool) -> str:
    """A key that any reader can take: no dots, no way out of a folder, no control characters, not hidden, bounded.

    The pool's own key where that is already so and no other image of the run has it; else made so, with the tag.

    Args:
        tag: `g` and the gid, which no other image of the set has; behind `s` and the set's number but for the first.
    """
    clean = re.sub(r"[^\w/-]+", "_", key, flags=re.UNICODE).strip("/")
    clean = re.sub(r"/+", "/", clean)[:150]
    clean = re.sub(r"(^|/)__+(?=[^/]*$)", r"\1", clean)  # `datasets` skips files whose name begins so
    is_tagged = re.search(r"_(s\d+)?g\d+$", clean)  # or it could be taken for a key that was made so
    return clean if clean and clean == key and is_unique and not is_tagged else f"{clean or 'image'}_{tag}"


def safe_suffix(suffix: str) -> str:
    """The suffix of a carried member, reduced to letters, digits, dots and dashes; `bin` when nothing is left."""
    return re.sub(r"[^a-z0-9._-]+", "", suffix.lower())[:40].strip(".") or "bin"


def split_shards(sizes: np.ndarray | Sequence[int], max_images: int, max_bytes: int) -> list[tuple[int, int]]:
    """Cut samples of these sizes (bytes), in order, into runs [start, stop) within both limits; one sample at least."""
    ends = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    runs, start = [], 0
    while start < len(sizes):
        fits = int(np.searchsorted(ends, ends[start] + max_bytes, side="right")) - 1
        stop = min(max(fits, start + 1), start + max_images, len(sizes))
        runs.append((start, stop))
        start = stop
    return runs
