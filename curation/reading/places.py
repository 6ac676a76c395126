"""Where files lie: on this machine or in a store; how they are opened without harm, and how their names are written.

A name of this machine is bytes. Inside `Part`, `Member` and everything written from them it is text that a report can
hold: bytes that are no UTF-8 stand there as `\\xe9`, and `raw` gives the name back that the system knows.
"""

import errno
import io
import os
import re
import stat
import threading
from dataclasses import dataclass, field
from typing import IO

import fsspec
from fsspec.core import url_to_fs

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[A-Za-z0-9+.-]+)*://")
_LOCAL = re.compile(r"(file|local)://")
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


def is_local(url: str) -> bool:
    return _LOCAL.match(url) is not None or _URL.match(url) is None


def local_path(url: str) -> str:
    """The absolute path of a local URL; `~` is the home folder unless something is really called so."""
    path = _LOCAL.sub("", url, count=1)
    return os.path.abspath(path if os.path.lexists(path) else os.path.expanduser(path))


def file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store of a remote URL and the path in it. `::` chains URLs only where a URL follows it, else it is a name."""
    first, *others = url.split("::")
    if not others or "://" not in first or all("://" in other for other in others):
        return url_to_fs(url)
    protocol = url.partition("://")[0]
    kind = fsspec.get_filesystem_class(protocol)
    return fsspec.filesystem(protocol, **kind._get_kwargs_from_urls(url)), str(kind._strip_protocol(url))


def readable(name: str) -> str:
    """A name as valid UTF-8 that `raw` turns back; ordinary names stay as they are."""
    content = name.encode("utf-8", "surrogateescape" if _is_escaped(name) else "surrogatepass")
    return _ESCAPED.sub(rb"\\x5cx\1", content).decode("utf-8", "backslashreplace")


def raw(name: str) -> str:
    """The name that the system knows, for one that `readable` wrote."""
    content = _ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), name.encode())
    return content.decode("utf-8", "surrogateescape")


def join(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}" if url else name


def open_file(url: str, block_size: int | None = None) -> IO[bytes]:
    """Open a file of a part (named as `readable` names it). Nothing but a regular file is opened, so none can hang.

    Args:
        block_size: bytes that a store is asked for at once; None for what its client does.

    Raises:
        OSError: it is not there, not readable, or no regular file.
    """
    url = raw(url)
    if is_local(url):
        return open(local_path(url), "rb", opener=_open_regular)
    fs, path = file_system(url)
    return fs.open(path, "rb", **({"block_size": block_size} if block_size else {}))  # type: ignore[return-value]  # fsspec says text or bytes


def file_size(url: str) -> int:
    """Bytes of a file, named as for open_file. Raises OSError."""
    url = raw(url)
    if is_local(url):
        return os.stat(local_path(url)).st_size
    fs, path = file_system(url)
    return fs.size(path) or 0


def read_file(url: str, max_bytes: int) -> tuple[int, bytes | None]:
    """The size of a file and its bytes; None for bytes when there are more than max_bytes. Raises OSError."""
    if is_local(url):
        with open_file(url) as file:
            size = os.fstat(file.fileno()).st_size
            return size, file.read() if size <= max_bytes else None
    size = file_size(url)
    fs, path = file_system(raw(url))
    return size, bytes(fs.cat_file(path)) if size <= max_bytes else None  # type: ignore[arg-type]  # fsspec says text or bytes


def read_head(url: str, num_bytes: int) -> bytes:
    """The first bytes of a file. Raises OSError."""
    if is_local(url):
        with open_file(url) as file:
            return file.read(num_bytes)
    fs, path = file_system(raw(url))
    return bytes(fs.cat_file(path, start=0, end=min(num_bytes, file_size(url))))  # type: ignore[arg-type]  # fsspec says text or bytes


@dataclass
class Fetched:
    """What remote reads cost; any number of threads may add to it."""

    requests: int = 0
    bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self.requests += 1
            self.bytes += num_bytes


def read_range(url: str, start: int, stop: int, fetched: Fetched | None = None) -> bytes:
    """Bytes [start, stop) of a remote file by one request and no more than these; fewer where it ends before.

    Raises:
        OSError: it is not there, or does not give ranges; each store has errors of its own beside.
    """
    if stop <= start:
        return b""
    fs, path = file_system(raw(url))
    try:
        content = bytes(fs.cat_file(path, start=start, end=stop))  # type: ignore[arg-type]  # fsspec says text or bytes
    except FileNotFoundError:
        raise
    except Exception:
        if (fs.size(path) or 0) <= start:  # a range behind the end is an error in most stores
            return b""
        raise
    if fetched is not None:
        fetched.add(len(content))
    if len(content) > stop - start:
        raise OSError(errno.ENOTSUP, f"{url} gives no ranges: asked for {stop - start} bytes, got {len(content)}")
    return content


class RangeFile(io.RawIOBase):
    """A remote file in which each read is one request for just these bytes."""

    def __init__(self, url: str, fetched: Fetched | None = None) -> None:
        self.url = url
        self._fetched = fetched
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (self._position if whence == 1 else file_size(self.url) if whence == 2 else 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # io says any buffer
        content = read_range(self.url, self._position, self._position + len(buffer), self._fetched)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a regular file")
    return descriptor


def _is_escaped(name: str) -> bool:
    return all(not 0xD800 <= ord(c) <= 0xDFFF or 0xDC80 <= ord(c) <= 0xDCFF for c in name)
