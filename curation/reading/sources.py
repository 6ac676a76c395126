"""The door to what a part holds: its samples in order, and any of its members again by offset."""

import contextlib
import posixpath
from collections.abc import Iterator
from typing import IO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.reading.folders import read_folder
from curation.reading.parquet import ROW_METADATA, read_parquet, row_metadata
from curation.reading.samples import Member, Part, PartKind, Sample
from curation.reading.tars import read_tar


def read_samples(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    """Every sample of a part, in order. Damage inside becomes a sample with a reason; it never raises for content.

    Raises:
        OSError: the part itself cannot be opened.
    """
    if part.kind == "tar":
        return read_tar(part, max_file_bytes)
    if part.kind == "parquet":
        return read_parquet(part, max_file_bytes)
    return read_folder(part, max_file_bytes)


class SourceChanged(ValueError):
    """A member is not what it was when its source was indexed."""


class MemberReader:
    """Reads members of one part again, by offset: what the shard stage writes out."""

    def __init__(self, kind: PartKind, url: str) -> None:
        self.kind, self.url = kind, url
        self._files = contextlib.ExitStack()
        self._group: tuple[int, pa.Table] | None = None
        if kind == "tar":
            self._tar: IO[bytes] = self._files.enter_context(fsspec.open(url, "rb", compression="infer"))
        elif kind == "parquet":
            self._parquet = pq.ParquetFile(self._files.enter_context(fsspec.open(url, "rb")))
            sizes = [self._parquet.metadata.row_group(i).num_rows for i in range(self._parquet.num_row_groups)]
            self._group_starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def read(self, member: Member) -> bytes:
        if self.kind == "tar":
            self._tar.seek(member.offset)
            content = self._tar.read(member.size)
        elif self.kind == "folder":
            with fsspec.open(posixpath.join(self.url, member.name), "rb") as file:
                content = file.read(member.size + 1)  # what grew is seen as such, however large it is now
        else:
            content = self._read_cell(member)
        if len(content) != member.size:
            raise SourceChanged(
                f"{self.url} changed during the run: {member.name} had {member.size} bytes, now {len(content)}. "
                "Run the same command again; changed parts are read anew."
            )
        return content

    def _read_cell(self, member: Member) -> bytes:
        group = next(i for i in reversed(range(len(self._group_starts))) if self._group_starts[i] <= member.offset)
        if self._group is None or self._group[0] != group:
            self._group = (group, self._parquet.read_row_group(group))
        row = self._group[1].slice(member.offset - self._group_starts[group], 1).to_pylist()[0]
        if member.name == ROW_METADATA:
            return row_metadata(row).encode()
        value = row[member.name]
        if isinstance(value, dict):
            value = value.get("bytes")
        return value.encode() if isinstance(value, str) else value or b""

    def __enter__(self) -> "MemberReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
