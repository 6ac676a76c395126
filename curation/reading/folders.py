"""The files of a folder -> samples."""

import posixpath
from collections.abc import Iterator

from fsspec.core import url_to_fs

from curation.reading.samples import Member, Part, Sample, clean, group_sample, split_key


def read_folder(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    fs, root = url_to_fs(part.url)
    group: list[tuple[Member, bytes | None]] = []
    group_key = None
    for name in part.files:
        key, suffix = split_key(name)
        if group_key is not None and key != group_key:
            yield group_sample(group_key, group)
            group = []
        group_key = key
        if clean(name) != name:  # not UTF-8, so it could not be named in a report or asked for again
            group.append((Member("", clean(name), 0, -1), None))
            continue
        try:
            path = posixpath.join(root, name)
            size = fs.size(path) or 0
            content = fs.cat_file(path) if size <= max_file_bytes else None
            group.append((Member(suffix, name, 0, size), content))
        except OSError:  # deleted since the listing, or not readable by us
            group.append((Member(suffix, name, 0, -1), None))
    if group_key is not None:
        yield group_sample(group_key, group)
