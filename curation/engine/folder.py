"""A folder at any fsspec URL, with whole files that appear at once or not at all."""

import contextlib
import errno
import hashlib
import io
import os
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from curation.engine.manifest import File

_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")
# What a file manager, a file server or a fresh disk leaves in any folder: nobody's work.
_SYSTEM_FILES = (".DS_Store", "._*", "Thumbs.db", "desktop.ini", ".nfs*", ".directory", "lost+found")


@dataclass(frozen=True)
class Folder:
    """One folder of a run. Cheap to pickle, so that workers open it for themselves."""

    url: str

    @cached_property
    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # Other processes write here too: a cached listing would hide their files.
        with _in_words(self.url):
            return url_to_fs(self.url, use_listings_cache=False)

    def _reached(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.is_local else _in_words(self.url)

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __truediv__(self, name: str) -> "Folder":
        return Folder(posixpath.join(self.url, name))

    @property
    def is_local(self) -> bool:
        return "file" in np.atleast_1d(self._fs[0].protocol)

    def path(self, name: str = "") -> str:
        """The path inside the file system: for a local folder, a plain path."""
        return posixpath.join(self._fs[1], name) if name else self._fs[1]

    def exists(self, name: str = "") -> bool:
        with self._reached():
            return self._fs[0].exists(self.path(name))

    def read_bytes(self, name: str) -> bytes:
        with self._reached():
            return self._fs[0].cat_file(self.path(name))  # type: ignore[return-value]  # fsspec says str | bytes

    def write_bytes(self, name: str, content: bytes | memoryview, rows: int = 0) -> File:
        """Write a file whole: under a temporary name first where the folder is local; object stores are atomic."""
        fs, path = self._fs[0], self.path(name)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                with open(temporary, "wb") as file:
                    file.write(content)
                os.replace(temporary, path)
            except BaseException:
                if os.path.exists(temporary):
                    os.unlink(temporary)
                raise
        else:
            with self._reached():
                fs.pipe_file(path, bytes(content))
        return File(path=name, rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to be written piece by piece, for what is too large to be held; it appears when all is written."""
        fs, path = self._fs[0], self.path(name)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                with open(temporary, "wb") as file:
                    yield file
                os.replace(temporary, path)
            except BaseException:
                if os.path.exists(temporary):
                    os.unlink(temporary)
                raise
            return
        with self._reached(), tempfile.TemporaryFile() as file:  # a store shows the file once it is whole
            yield file
            file.seek(0)
            with fs.open(path, "wb") as remote:
                shutil.copyfileobj(file, remote, 16 << 20)

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file."""
        with self._reached():
            return self._fs[0].cat_file(self.path(name), start=start, end=stop)  # type: ignore[return-value]  # as above

    def read_array(self, name: str) -> np.ndarray:
        return np.load(io.BytesIO(self.read_bytes(name)), allow_pickle=False)

    def write_array(self, name: str, array: np.ndarray) -> File:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return self.write_bytes(name, buffer.getvalue(), rows=len(array))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        source = self.path(name) if self.is_local else io.BytesIO(self.read_bytes(name))
        return pq.read_table(source, columns=columns, partitioning=None)

    def num_rows(self, name: str) -> int:
        """Rows of a table, from its footer."""
        with self.reading(name) as file, pq.ParquetFile(file) as parquet:
            return parquet.metadata.num_rows

    def table_batches(self, name: str, columns: Sequence[str], rows: int = 1 << 20) -> Iterator[pa.Table]:
        """A table piece by piece, at most `rows` at a time, none of more than one row group."""
        with self.reading(name) as file, pq.ParquetFile(file) as parquet:
            for group in range(parquet.num_row_groups):  # one reader of all would hold what it read to its end
                for batch in parquet.iter_batches(rows, row_groups=[group], columns=list(columns)):
                    yield pa.Table.from_batches([batch]).select(columns)

    def write_table(self, name: str, table: pa.Table) -> File:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return self.write_bytes(name, buffer.getvalue(), rows=table.num_rows)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """A file to be read here and there."""
        only = {} if self.is_local else {"cache_type": "none"}  # fsspec would read far ahead
        with self._reached(), self._fs[0].open(self.path(name), "rb", **only) as file:
            yield file  # type: ignore[misc]  # fsspec says any kind of file

    def take(self, name: str, other: "Folder") -> None:
        """A file of another folder, under the same name: linked where both lie on one disk, else copied.

        Only for files that nobody changes in place; ours are written whole under another name, and then renamed.
        """
        if self.is_local and other.is_local:
            path = self.path(name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
            with contextlib.suppress(OSError):  # another disk, or one without links
                os.link(other.path(name), temporary)
                os.replace(temporary, path)
                return
        with other.reading(name) as source, self.writing(name) as file:
            shutil.copyfileobj(source, file, 16 << 20)

    def array_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of an array's file; only they are read."""
        with self.reading(name) as file:
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, _, dtype = read_header[np.lib.format.read_magic(file)[0]](file)
            assert not dtype.hasobject
            width = int(np.prod(shape[1:], dtype=np.int64))
            file.seek(start * width * dtype.itemsize, io.SEEK_CUR)
            content = file.read((stop - start) * width * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(-1, *shape[1:])

    def table_rows(self, name: str, start: int, stop: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows [start, stop) of a Parquet file; row groups that hold none of them are not read."""
        with self.reading(name) as file, pq.ParquetFile(file) as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            ends = np.cumsum(sizes, dtype=np.int64)
            groups = np.flatnonzero((ends > start) & (ends - sizes < stop)).tolist() if stop > start else []
            first = int(ends[groups[0]] - sizes[groups[0]]) if groups else start
            names = list(columns) if columns is not None else None
            return table.read_row_groups(groups, columns=names).slice(start - first, stop - start)

    def table_where(self, name: str, condition: pc.Expression, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a Parquet file that meet a condition; row groups whose statistics exclude it are not read."""
        names = list(columns) if columns is not None else None
        if self.is_local:
            return pq.read_table(self.path(name), columns=names, filters=condition, partitioning=None)
        with self.reading(name) as file:
            return pq.read_table(file, columns=names, filters=condition, partitioning=None)

    def described(self, name: str, rows: int = 0) -> File:
        """The manifest's entry of a file that is there."""
        digest, size = hashlib.sha256(), 0
        with self.reading(name) as file:
            while block := file.read(16 << 20):
                digest.update(block)
                size += len(block)
        return File(path=name, rows=rows, bytes=size, sha256=digest.hexdigest())

    def names(self) -> list[str]:
        """Files below this folder, relative to it, sorted; temporary files left by a killed process are not listed."""
        if not self.exists():
            return []
        root = self.path().rstrip("/") + "/"
        with self._reached():
            found = self._fs[0].find(self.path())
        return sorted(path.removeprefix(root) for path in found if not path.endswith(".tmp"))

    def create_bytes(self, name: str, content: bytes) -> bool:
        """Write a file whole unless one of that name is there: whether it did. Of several that try at once, one does.

        A store that cannot do that lets the later of two win; who relies on it reads the file again.
        """
        fs, path = self._fs[0], self.path(name)
        if not self.is_local:
            with self._reached():
                return _created(fs, path, content)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return os.stat(temporary).st_nlink == 2  # NFS may lose the answer to a link that it made
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK):
                    raise
                return _created_in_place(path, content)  # no hard links there
            return True
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError), self._reached():
            self._fs[0].rm_file(self.path(name))

    def entries(self) -> list[str]:
        """Names of the files and folders directly in this one, sorted, without what operating systems leave."""
        return sorted(self._kinds())

    def folders(self) -> list[str]:
        """Those of `entries` that are folders."""
        return sorted(name for name, kind in self._kinds().items() if kind == "directory")

    def _kinds(self) -> dict[str, str]:
        """file or directory, by name."""
        try:
            with self._reached():
                found = self._fs[0].ls(self.path(), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        root = self.path().rstrip("/")
        kinds = {posixpath.basename(i["name"].rstrip("/")): i["type"] for i in found if i["name"].rstrip("/") != root}
        return {name: kind for name, kind in kinds.items() if name and not is_system_file(name)}

    def clear(self, own: Sequence[str]) -> None:
        """Delete every file below that has one of our names, temporary ones included; none, if others lie among them.

        Args:
            own: patterns of names relative to the folder; `*` does not match a slash.

        Raises:
            ValueError: files of other names are there; nothing was deleted.
        """
        root = self.path().rstrip("/") + "/"
        with self._reached():
            found = self._fs[0].find(self.path()) if self.exists() else []
        names = [str(path).removeprefix(root) for path in found]
        names = [name for name in names if not is_system_file(posixpath.basename(name))]
        if foreign := [name for name in names if not _matches(_TEMPORARY.sub("", name), own)]:
            raise ValueError(
                f"{self.url} holds what this program did not write ({listed(foreign)}), and its own files there must "
                "go for this run: move those away, or give another --out. Nothing was deleted."
            )
        with self._reached():
            for name in names:
                self._fs[0].rm_file(root + name)


@contextlib.contextmanager
def _in_words(url: str) -> Iterator[None]:
    """Every remote file system has its own errors for "cannot get there", many of them no OSError."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
        raise
    except ImportError as error:
        raise ValueError(f"{url} needs a package that is not installed: {error}.") from None
    except Exception as error:
        told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OSError(f"{url} cannot be reached: {told}. Check the address, the credentials and the network") from None


def is_system_file(name: str) -> bool:
    """Whether a file has a name that operating systems give, and people do not."""
    return any(fnmatchcase(name, pattern) for pattern in _SYSTEM_FILES)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _matches(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split("/")
    for pattern in patterns:
        wanted = pattern.split("/")
        if len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted)):
            return True
    return False


def _created(fs: fsspec.AbstractFileSystem, path: str, content: bytes) -> bool:
    try:
        fs.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        if any(word in str(error) for word in ("PreconditionFailed", "pre-conditions", "ConditionalRequestConflict")):
            return False
        if "NotImplemented" not in str(error):
            raise
        if fs.exists(path):
            return False
        fs.pipe_file(path, content)
    return True


def _created_in_place(path: str, content: bytes) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with open(handle, "wb") as file:
        file.write(content)
    return True
