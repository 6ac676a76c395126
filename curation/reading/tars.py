"""A tar -> samples, in its order."""

import posixpath
import tarfile
from collections.abc import Iterator

import fsspec

from curation.reading.samples import Member, Part, Sample, clean, group_sample, split_key


def read_tar(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    with fsspec.open(part.url, "rb", compression="infer") as file:
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
