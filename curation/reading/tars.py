"""A tar -> samples, in its order."""

import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO

from fsspec.compression import compr
from fsspec.utils import infer_compression

from curation.reading.places import open_file
from curation.reading.samples import Member, Part, Sample, clean, group_sample, split_key


def read_tar(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    with open_tar(part.url) as file:
        group: list[tuple[Member, bytes | None]] = []
        group_key, position, damage = None, 0, None
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # tarfile remembers every member; a shard can have a million
                    if not info.isreg() or info.sparse is not None:
                        continue  # links and devices point outside the shard
                    position = info.offset
                    key, suffix = split_key(info.name)
                    if group_key is not None and key != group_key:
                        yield group_sample(group_key, group)
                        group = []
                    group_key = key
                    content = None
                    if info.size <= max_file_bytes:
                        file.seek(info.offset_data)
                        content = file.read(info.size)
                        if len(content) < info.size:
                            raise tarfile.ReadError("unexpected end of data")
                    group.append((Member(clean(suffix), clean(info.name), info.offset_data, info.size), content))
        except Exception:  # a hostile header can raise nearly anything out of tarfile
            damage = "damaged_shard"
        if damage is None:
            if group_key is not None:
                yield group_sample(group_key, group)
            elif part.size > 10240:  # more than an empty tar's padding, and nothing in it
                yield Sample(f"{posixpath.basename(part.url)}@0", reason="damaged_shard")
            return
        # The sample in progress cannot be trusted to be whole: it becomes a row with a reason, as does a header that
        # could not be read after a whole sample.
        key = group_key if group_key is not None else f"{posixpath.basename(part.url)}@{position}"
        yield Sample(key, reason=damage)


def open_tar(url: str) -> IO[bytes]:
    """The plain bytes of a tar, decompressed where it is packed."""
    file, packing = open_file(url), infer_compression(url.lower())
    return compr[packing](file, mode="rb") if packing else file
