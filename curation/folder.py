"""A folder at any fsspec URL, with whole files that appear at once or not at all."""

import contextlib
import hashlib
import io
import os
import posixpath
import uuid
from dataclasses import dataclass
from functools import cached_property

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from curation.manifest import File


@dataclass(frozen=True)
class Folder:
    """One folder of a run. Cheap to pickle, so that workers open it for themselves."""

    url: str

    @cached_property
    def _fs(self) -> tuple[fsspec.AbstractFileSystem, str]:
        # Other processes write here too: a cached listing would hide their files.
        return url_to_fs(self.url, use_listings_cache=False)

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
        return self._fs[0].exists(self.path(name))

    def read_bytes(self, name: str) -> bytes:
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
            fs.pipe_file(path, bytes(content))
        return File(path=name, rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())

    def read_array(self, name: str) -> np.ndarray:
        return np.load(io.BytesIO(self.read_bytes(name)), allow_pickle=False)

    def write_array(self, name: str, array: np.ndarray) -> File:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        return self.write_bytes(name, buffer.getvalue(), rows=len(array))

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        source = self.path(name) if self.is_local else io.BytesIO(self.read_bytes(name))
        return pq.read_table(source, columns=columns, partitioning=None)

    def write_table(self, name: str, table: pa.Table) -> File:
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return self.write_bytes(name, buffer.getvalue(), rows=table.num_rows)

    def names(self) -> list[str]:
        """Files below this folder, relative to it, sorted; temporary files left by a killed process are not listed."""
        if not self.exists():
            return []
        root = self.path().rstrip("/") + "/"
        found = self._fs[0].find(self.path())
        return sorted(path.removeprefix(root) for path in found if not path.endswith(".tmp"))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs[0].rm_file(self.path(name))

    def clear(self) -> None:
        """Delete every file below, temporary ones included."""
        if self.exists():
            for path in self._fs[0].find(self.path()):
                self._fs[0].rm_file(path)
