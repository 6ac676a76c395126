"""The files of a folder -> samples: every image file is one, and what is named after it comes along."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from curation.reading.pictures.formats import EXTRA_SUFFIXES, FOREIGN_SUFFIXES, HEAD_BYTES, SUFFIXES, sniff
from curation.reading.places import file_size, join, read_file, read_head
from curation.reading.samples import MAX_METADATA_BYTES, Member, Part, Sample, clean, metadata_text

# Pictures that we may not decode are pictures still: each gets a row, with the reason.
_PICTURES = SUFFIXES | EXTRA_SUFFIXES | FOREIGN_SUFFIXES
_LONGEST_KEY = 480


@dataclass
class Cluster:
    """Files that must be judged together: images of one stem, what is named after them, files that may be images."""

    stem: str
    images: list[str] = field(default_factory=list)
    attached: dict[str, list[str]] = field(default_factory=dict)
    """by image: the files that are named after it"""
    loose: list[str] = field(default_factory=list)
    """files that no image has the name of"""

    @property
    def names(self) -> list[str]:
        return sorted({*self.images, *self.loose, *(name for names in self.attached.values() for name in names)})


def has_image_name(name: str) -> bool:
    return split_name(name)[1].lower() in _PICTURES


def split_name(name: str) -> tuple[str, str]:
    """(what stands before the last dot of the last part of a path, what stands behind it)."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return (folder + slash + stem, suffix) if dot and stem else (name, "")


def clusters(names: Iterable[str]) -> list[Cluster]:
    """Files of one folder, relative to it, as clusters in a fixed order: each file is in one of them.

    A file that is no image belongs to the image of the longest name that its own begins with, up to a dot:
    `a.b.txt` to `a.b.jpg` or `a.b`, else to `a.jpg`; where several images share that name, to each of them.
    """
    found: dict[str, Cluster] = {}
    others = []
    for name in sorted(names):
        if has_image_name(name):
            stem = split_name(name)[0]
            found.setdefault(stem, Cluster(stem)).images.append(name)
        else:
            others.append(name)
    whole = {image: cluster for cluster in found.values() for image in cluster.images}
    loose = []
    for name in others:
        stem, suffix = split_name(name)
        while suffix and stem not in whole and stem not in found:
            stem, suffix = split_name(stem)
        if not suffix:
            loose.append(name)
        elif stem in whole:
            whole[stem].attached.setdefault(stem, []).append(name)
        else:
            for image in found[stem].images:
                found[stem].attached.setdefault(image, []).append(name)
    for name in loose:
        stem = name if name in found else split_name(name)[0]
        found.setdefault(stem, Cluster(stem)).loose.append(name)
    return [found[stem] for stem in sorted(found, key=lambda stem: stem + ".")]


def read_folder(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    for cluster in clusters(part.files):
        hidden = [name for name in cluster.loose if begins_like_image(part.url, name)]
        rest = [name for name in cluster.loose if name not in hidden]
        is_alone = len(cluster.images) + bool(rest) == 1 and not hidden and not has_image_name(cluster.stem)
        for name in sorted([*cluster.images, *hidden]):
            key = cluster.stem if is_alone else name
            yield _sample(part.url, key, name, cluster.attached.get(name, []), max_file_bytes)
        if rest:
            yield _sample(part.url, cluster.stem if is_alone else rest[0], None, rest, max_file_bytes)


def begins_like_image(url: str, name: str) -> bool:
    """Whether a file without an image's name is one by its first bytes."""
    try:
        return sniff(read_head(join(url, name), HEAD_BYTES))
    except OSError:
        return False


def _sample(url: str, key: str, image: str | None, attached: list[str], max_file_bytes: int) -> Sample:
    sample = Sample(_bounded(key))
    for name in attached:
        suffix = _suffix_beside(name, image)
        try:
            size, content = read_file(join(url, name), MAX_METADATA_BYTES) if suffix.lower() == "json" else (-1, None)
            sample.others.append(Member(suffix, name, 0, size if size >= 0 else file_size(join(url, name))))
        except OSError:  # deleted since the listing, or not ours to read
            sample.warning = "unreadable_metadata"
            continue
        if suffix.lower() == "json":
            sample.metadata = metadata_text(content) if content is not None else None
            sample.warning = "bad_metadata" if sample.metadata is None else sample.warning
    if image is None:
        sample.reason = "no_image"
        return sample
    suffix = split_name(image)[1]
    try:
        size, sample.content = read_file(join(url, image), max_file_bytes)
        sample.image = Member(suffix, image, 0, size)
        sample.reason = "file_too_large" if sample.content is None else None
    except OSError:
        sample.image, sample.reason = Member(suffix, image, 0, -1), "unreadable"
    return sample


def _suffix_beside(name: str, image: str | None) -> str:
    """What a file's name adds to its image's: beside a.jpg, `txt` for a.txt and a.jpg.txt, `seg.npy` for a.seg.npy."""
    for stem in (image, split_name(image)[0]) if image is not None else ():
        if name.startswith(stem + "."):
            return name[len(stem) + 1 :]
    return split_name(name)[1]


def _bounded(key: str) -> str:
    """A key of bounded length that still differs from every other key of its folder."""
    if len(key) <= _LONGEST_KEY:
        return clean(key)
    return f"{key[:_LONGEST_KEY]}…{hashlib.sha256(key.encode()).hexdigest()[:8]}"
