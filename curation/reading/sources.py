"""The door to what a part holds: its samples in order, and any of its members again by offset."""

import contextlib
import io
from collections.abc import Iterator

from curation.reading.compression import Unpacked, open_tar
from curation.reading.folders import read_folder
from curation.reading.parquet import CellReader, read_parquet
from curation.reading.places import Fetched, RangeFile, is_local, join, open_file, read_range
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


_READ_AHEAD = 4 << 20  # of a remote tar that has to be decompressed up to where a member lies


class MemberReader:
    """Reads members of one part again, by offset: what the shard stage writes out.

    Of a remote source it fetches what it needs: of a tar or a folder the member's own bytes (and once 512 of a tar, to
    see that it is not compressed), of a compressed tar all up to the member, of a Parquet file its footer once, and of
    the member's columns the row group up to the row.
    """

    def __init__(self, kind: PartKind, url: str, fetched: Fetched | None = None) -> None:
        self.kind, self.url = kind, url
        self._fetched = fetched
        self._files = contextlib.ExitStack()
        if kind == "tar":
            self._tar = self._files.enter_context(open_tar(url, self._ranges(url)))
            if isinstance(self._tar, Unpacked) and not is_local(url):
                self._files.close()
                ahead = io.BufferedReader(RangeFile(url, fetched), _READ_AHEAD)
                self._tar = self._files.enter_context(open_tar(url, ahead))
        elif kind == "parquet":
            self._cells = CellReader(self._files.enter_context(self._ranges(url) or open_file(url)))

    def _ranges(self, url: str) -> RangeFile | None:
        return None if is_local(url) else RangeFile(url, self._fetched)

    def read(self, member: Member) -> bytes:
        if self.kind == "tar":
            self._tar.seek(member.offset)
            content = self._tar.read(member.size)
        elif self.kind == "folder":
            url, most = join(self.url, member.name), member.size + 1  # what grew is seen, however large it is now
            if is_local(url):
                with open_file(url) as file:
                    content = file.read(most)
            else:
                content = read_range(url, 0, most, self._fetched)
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
