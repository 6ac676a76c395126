"""The door to what a part holds: its samples in order, and any of its members again by offset."""

import contextlib
from collections.abc import Iterator

from curation.reading.compression import open_tar
from curation.reading.folders import read_folder
from curation.reading.parquet import CellReader, read_parquet
from curation.reading.places import join, open_file
from curation.reading.samples import Member, Part, PartKind, Sample
from curation.reading.tar_samples import read_tar


def read_samples(part: Part, max_file_bytes: int, headers_first: bool = False) -> Iterator[Sample]:
    """Every sample of a part, in order. Damage inside becomes a sample with a reason; it never raises for content.

    Raises:
        HeadersFirst: of a compressed or remote tar: what came so far is void, call again with `headers_first`.
        OSError: the part itself cannot be opened.
    """
    if part.kind == "tar":
        return read_tar(part, max_file_bytes, headers_first)
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
        if kind == "tar":
            self._tar = self._files.enter_context(open_tar(url))
        elif kind == "parquet":
            self._cells = CellReader(self._files.enter_context(open_file(url)))

    def read(self, member: Member) -> bytes:
        if self.kind == "tar":
            self._tar.seek(member.offset)
            content = self._tar.read(member.size)
        elif self.kind == "folder":
            with open_file(join(self.url, member.name)) as file:
                content = file.read(member.size + 1)  # what grew is seen as such, however large it is now
        else:
            content = self._cells.read(member)
        if len(content) != member.size:
            raise SourceChanged(
                f"{self.url} changed during the run: {member.name} had {member.size} bytes, now {len(content)}. "
                "Run the same command again; changed parts are read anew."
            )
        return content

    def __enter__(self) -> "MemberReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
