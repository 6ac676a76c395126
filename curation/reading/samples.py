"""A part, a sample, its members: what every reader gives; and how the files of one key become a sample."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from curation.reading.pictures.formats import EXTRA_SUFFIXES, FOREIGN_SUFFIXES, HEAD_BYTES, SUFFIXES, sniff

MAX_METADATA_BYTES = 64 << 10
_MAX_NAME_CHARACTERS = 512

PartKind = Literal["tar", "parquet", "folder"]


@dataclass(frozen=True)
class Part:
    """One source shard: the unit of work, of resume and of row numbers."""

    kind: PartKind
    url: str
    """the tar, the Parquet file, or the folder"""
    size: int
    """bytes to read"""
    version: str
    """etag or modification time: a part that changed is another part"""
    files: tuple[str, ...] = ()
    """for a folder: the files of this part, relative to it"""
    column: str = ""
    """for a Parquet file: the column of images where one was asked for, dotted where nested"""

    @property
    def id(self) -> str:
        asked = [self.column] if self.column else []
        content = json.dumps([self.kind, self.url, self.size, self.version, self.files, *asked])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Member:
    """One file of a sample, and where its bytes lie. In Parquet, `offset` is the row and `name` the column.

    Names are valid UTF-8; bytes of a file's name that are none are written as curation/reading/places.py says.
    """

    suffix: str
    name: str
    offset: int
    size: int


@dataclass
class Sample:
    """What belongs to one key. `content` is None when there is no image to decode, and `reason` says why."""

    key: str
    image: Member | None = None
    content: bytes | None = None
    reason: str | None = None
    metadata: str | None = None
    """the .json member (or the other Parquet columns) as JSON text of an object"""
    warning: str | None = None
    others: list[Member] = field(default_factory=list)
    """captions, .json and every other member, to be carried along untouched"""
    unread_bytes: int | None = None
    """of a row that stands for damage: bytes of the shard that nobody could read"""
    unread_images: int | None = None
    """how many images those are, this row among them; None where nobody can tell"""


def group_sample(key: str, group: Sequence[tuple[Member, bytes | None]]) -> Sample:
    """Choose the image of a sample: a plain image suffix first, then one that an extra reads, then whatever member
    looks like an image, and last a picture of a kind that is not read, so that its row can say so.
    """
    key = clean(key)

    def with_suffix(suffixes: frozenset[str]) -> list[int]:
        return [i for i, (member, _) in enumerate(group) if member.suffix.lower() in suffixes]

    by_content = [i for i, (_, content) in enumerate(group) if content is not None and sniff(content[:HEAD_BYTES])]
    ranked = with_suffix(SUFFIXES) or with_suffix(EXTRA_SUFFIXES) or by_content or with_suffix(FOREIGN_SUFFIXES)
    chosen = next(iter(ranked), None)
    others = [member for i, (member, _) in enumerate(group) if i != chosen and member.size >= 0]
    metadata, warning = None, None
    for i, (member, content) in enumerate(group):
        if i != chosen and member.suffix.lower() == "json" and content is not None:
            metadata = metadata_text(content)
            warning = "bad_metadata" if metadata is None else None
    sample = Sample(key, metadata=metadata, warning=warning, others=others)
    if chosen is None:
        sample.reason = "no_image"
        return sample
    sample.image, sample.content = group[chosen]
    if sample.image.suffix.lower() in FOREIGN_SUFFIXES and chosen not in by_content:
        sample.content, sample.reason = None, "unsupported_format"
    elif sample.content is None:
        sample.reason = "unreadable" if sample.image.size < 0 else "file_too_large"
    return sample


def metadata_text(content: bytes) -> str | None:
    """The text of a .json member if it is a UTF-8 object of a sane size, else None."""
    if len(content) > MAX_METADATA_BYTES:
        return None
    try:
        return content.decode() if isinstance(json.loads(content), dict) else None
    except (ValueError, RecursionError):
        return None


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path component."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem:  # a hidden file: the dot belongs to the name
        stem, suffix = base, ""
    return (f"{folder}/{stem}" if folder else stem), suffix


def clean(name: str) -> str:
    """Names travel into reports, JSON and Parquet: valid UTF-8 of a bounded length, the rest replaced."""
    name = name.encode("utf-8", "replace").decode("utf-8", "replace")
    return name if len(name) <= _MAX_NAME_CHARACTERS else name[:_MAX_NAME_CHARACTERS] + "…"
