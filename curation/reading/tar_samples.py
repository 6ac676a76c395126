"""A tar -> samples: the members of one key together, in the order of the images, and a row for every damage.

Members belong to one sample when their names agree up to the first dot of the last path component (WebDataset's rule).

- A suffix that comes again under its key begins another sample of that key: two tars in one file may number alike.
- That rule would make one sample of `Shot at 10.11.jpg` and `Shot at 10.12.jpg`. Where a key has no image by it, and
  several pictures by their last suffix, each of these is a sample, named by what stands before its last dot.
- Files of one key that lie apart (all pictures, then all texts) are joined, unless each part has an image of its own:
  then they are two samples of one key. For that the headers are read first, of the tars that need it: on local disks
  they are looked at beforehand; a compressed or remote tar is read on trust, until `HeadersFirst` says otherwise.
- Links to earlier members of the tar are those members again. A link to anything else, a sparse file, or one that goes
  on in another volume has no bytes here: a row with a reason, or a warning where the sample still has its image.
- Samples before and behind damage are whole. One that the damage cuts is a row with the reason `damaged_shard`: its
  own bytes are cut off, the damage lies between its members, or it stands beside the damage and has no image, or lacks
  what every sample of this tar had so far. Rows about damage come last, when the mean size of a sample is known.
"""

import errno
import posixpath
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, replace
from typing import IO

from curation.reading.compression import Unpacked, UnsupportedCompression, open_tar
from curation.reading.pictures.formats import EXTRA_SUFFIXES, FOREIGN_SUFFIXES, HEAD_BYTES, SUFFIXES, sniff
from curation.reading.places import is_local
from curation.reading.samples import Member, Part, Sample, clean, group_sample, split_key
from curation.reading.tars import BLOCK, NO_END, Gap, Links, Padding, Span, TarMember, walk

DAMAGED = "damaged_shard"
NO_END_MARKER = "no_end_marker"
_PICTURES = SUFFIXES | EXTRA_SUFFIXES | FOREIGN_SUFFIXES
_MAX_JOINED_BYTES = 64 << 30  # of a compressed tar whose files are read out of order, from a temporary file


class HeadersFirst(Exception):
    """A tar that was read on trust has links, or files of one key that lie apart: read it again with headers first."""


@dataclass
class _Run:
    """Neighbouring members of one key and the gaps at and between them; `contents` of what a sample needs to have."""

    key: str
    members: list[TarMember] = field(default_factory=list)
    contents: list[bytes | None] = field(default_factory=list)
    suffixes: set[str] = field(default_factory=set)
    gaps: list["_Damage"] = field(default_factory=list)
    """before, between and behind"""
    cut_by: "_Damage | None" = None
    """the gap that for certain takes something from the sample"""

    @property
    def has_image(self) -> bool:
        return any(suffix.lower() in SUFFIXES for suffix in self.suffixes)


@dataclass
class _Damage:
    gap: Gap
    keys: list[str] = field(default_factory=list)
    """of the samples that it cuts"""


class _Totals:
    """What the samples of a tar so far had."""

    def __init__(self) -> None:
        self.samples = self.bytes = 0
        self.common: set[str] | None = None
        self.damages: list[_Damage] = []


def read_tar(part: Part, max_file_bytes: int, headers_first: bool = False) -> Iterator[Sample]:
    """Every sample of a tar, then a row for each damage.

    Args:
        headers_first: for a compressed or remote tar that raised HeadersFirst; others find out by themselves.

    Raises:
        HeadersFirst: what came so far is void.
        OSError: the file cannot be read.
    """
    name = posixpath.basename(part.url)
    totals, dotted = _Totals(), frozenset[str]()
    try:
        with open_tar(part.url) as file:
            size = None if isinstance(file, Unpacked) else file.seek(0, 2)
            on_disk = is_local(part.url) and size is not None
            if on_disk and not headers_first:
                headers_first, dotted = _look_ahead(_spans(file, size))
            elif headers_first:
                _, dotted = _look_ahead(_spans(file, size))
            read = _Contents(file, max_file_bytes)
            if headers_first:
                yield from _join(file, size, read, totals, dotted)
            else:
                known: set[int] | None = None if on_disk else set()
                for run in _runs(_spans(file, size), read.of_next, totals, known, dotted):
                    yield from _finish([run], totals)
    except UnsupportedCompression:
        yield Sample(f"{name}@0", reason="unsupported_compression", unread_bytes=part.size)
        return
    yield from _damage_rows(name, totals)


def _spans(file: "IO[bytes] | Unpacked", size: int | None) -> Iterator[Span]:
    """walk, with what a decompressor or a disk could not read added to the gap at the end."""
    last: Span = Padding(0, 0)
    try:
        for span in walk(file, size):  # type: ignore[arg-type]  # Unpacked reads as a file
            if isinstance(last, Gap):
                yield last
            last = span
            if not isinstance(span, Gap):
                yield span
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        at = last.end if isinstance(last, TarMember) else last.offset + last.size
        last = Gap(at, max((size or 0) - at, 0), "the disk cannot read it")
    if isinstance(file, Unpacked) and file.error:
        held = last if isinstance(last, Gap) else Gap(file.seek(0, 2), 0, "")
        last = Gap(held.offset, held.size + file.unread, file.error)
    if isinstance(last, Gap):
        yield last


def _look_ahead(spans: Iterable[Span]) -> tuple[bool, frozenset[str]]:
    """Whether a tar has links, or a key that comes again after others; and the keys of several pictures with dots."""
    needs_headers = False
    known: set[int] = set()
    plain: set[str] = set()  # of the keys that have pictures with dots, those with an image of WebDataset's rule too
    dotted: dict[str, int] = {}
    current, has_plain = None, False
    for span in spans:
        if type(span) is not TarMember or span.kind == "other":
            continue
        needs_headers = needs_headers or span.kind in ("hardlink", "symlink")
        key, suffix = split_key(span.name)
        if key != current:
            needs_headers = needs_headers or hash(key) in known
            known.add(hash(key))
            current, has_plain = key, False
        if suffix.lower() in SUFFIXES:
            has_plain = True
        elif _is_dotted(suffix):
            dotted[key] = dotted.get(key, 0) + 1
        if has_plain and key in dotted:
            plain.add(key)
    return needs_headers, frozenset(key for key, pictures in dotted.items() if pictures > 1 and key not in plain)


def _is_dotted(suffix: str) -> bool:
    """Whether the suffix of WebDataset's rule holds a dot, and ends as an image's does."""
    return "." in suffix and suffix.rpartition(".")[2].lower() in _PICTURES


def _are_two_pictures(run: "_Run", suffix: str) -> bool:
    return not run.has_image and _is_dotted(suffix) and any(map(_is_dotted, run.suffixes))


def _split(name: str, dotted: Set[str]) -> tuple[str, str]:
    """Key and suffix of a member, given the keys whose names are cut at their last dot."""
    key, suffix = split_key(name)
    if key in dotted and "." in suffix:
        stem, _, suffix = name.rpartition(".")
        return stem, suffix
    return key, suffix


class _Contents:
    """Reads members: those bytes that a sample needs, so that a key with a million files fills no memory."""

    def __init__(self, file: "IO[bytes] | Unpacked", max_file_bytes: int) -> None:
        self.file, self.max_file_bytes = file, max_file_bytes

    def of_next(self, run: _Run, member: TarMember, suffix: str) -> tuple[TarMember, bytes | None]:
        """A member about to join a run, with its bytes where it can be the image or the metadata.

        Its size is -1 where the disk cannot read it.
        """
        if member.kind != "file" or member.size > self.max_file_bytes:
            return member, None
        try:
            return member, self._wanted(run, member, suffix)
        except OSError as error:
            if error.errno != errno.EIO:  # the network's failures pass, a bad sector stays
                raise
            return member._replace(size=-1), None

    def _wanted(self, run: _Run, member: TarMember, suffix: str) -> bytes | None:
        wanted = not run.has_image if suffix in _PICTURES else suffix == "json"
        self.file.seek(member.offset)
        head = b""
        if not wanted:
            head = self.file.read(min(HEAD_BYTES, member.size))
            wanted = suffix not in _PICTURES and not run.has_image and sniff(head)
            wanted = wanted and not any(content and sniff(content[:HEAD_BYTES]) for content in run.contents)
            if not wanted:
                return None
        return head + self.file.read(member.size - len(head))


def _runs(
    spans: Iterable[Span],
    read: Callable[[_Run, TarMember, str], tuple[TarMember, bytes | None]],
    totals: _Totals,
    known: set[int] | None,
    dotted: Set[str],
) -> Iterator[_Run]:
    """Group neighbouring members, gaps counting as part of the run before and the run behind.

    Args:
        known: keys so far, by hash, where a key that comes again has to raise HeadersFirst; None where that is known.
    """
    run: _Run | None = None
    pending: list[_Damage] = []  # gaps behind the run, or before the first
    for span in spans:
        if type(span) is TarMember:
            if span.kind == "other":
                continue
            if known is not None and span.kind in ("hardlink", "symlink"):
                raise HeadersFirst
            key, suffix = _split(span.name, dotted)
            if known is not None and run is not None and key == run.key and _are_two_pictures(run, suffix):
                raise HeadersFirst  # an image of WebDataset's rule may follow, or not
            if run is None or key != run.key or suffix in run.suffixes:
                if run is not None:
                    run.gaps += pending
                    yield run
                    if known is not None:
                        known.add(hash(run.key))
                        if key != run.key and hash(key) in known:
                            raise HeadersFirst
                run = _Run(key, gaps=pending)
                pending = []
            elif pending:
                run.cut_by = pending[0]
                run.gaps += pending
                pending = []
            member, content = read(run, span, suffix.lower())
            run.members.append(member)
            run.contents.append(content)
            run.suffixes.add(suffix)
        elif type(span) is Gap:
            damage = _Damage(span)
            totals.damages.append(damage)
            pending.append(damage)
            if span.name:  # also of a stream's last member, of which only the end told that it is not whole
                key = _split(span.name, dotted)[0]
                if run is not None and key == run.key:
                    run.cut_by = damage
                else:
                    damage.keys.append(clean(key))
    if run is not None:
        run.gaps += pending
        yield run


def _finish(runs: list[_Run], totals: _Totals) -> Iterator[Sample]:
    """The sample that these runs of one key make; nothing where damage cuts it, for then its row comes at the end."""
    members = [member for run in runs for member in run.members]
    contents = [content for run in runs for content in run.contents]
    suffixes = set().union(*(run.suffixes for run in runs))
    gaps = [gap for run in runs for gap in run.gaps]
    group = [(_as_member(member, runs[0].key), content) for member, content in zip(members, contents, strict=True)]
    sample = group_sample(runs[0].key, group)
    cut_by = next((run.cut_by for run in runs if run.cut_by), None)
    if cut_by is None and gaps and (sample.image is None or not (totals.common or set()) <= suffixes):
        cut_by = next((gap for gap in gaps if not gap.keys), gaps[0])
    if cut_by is not None:
        if sample.key not in cut_by.keys:
            cut_by.keys.append(sample.key)
        return
    problems = [_PROBLEMS[member.kind] for member in members if member.kind in _PROBLEMS]
    if problems:
        if sample.reason in ("unreadable", "no_image"):
            sample = replace(sample, reason=problems[0])
        else:
            sample = replace(sample, warning=sample.warning or problems[0])
    else:
        totals.common = suffixes if totals.common is None else totals.common & suffixes
    totals.samples += 1
    totals.bytes += sum(BLOCK if m.offset < m.start else m.end - m.start for m in members)  # a link is its header
    yield sample


_PROBLEMS = {"hardlink": "unresolved_link", "symlink": "unresolved_link", "unreadable": "not_unpacked"}


def _as_member(member: TarMember, key: str) -> Member:
    suffix = clean(member.name[len(key) + 1 :])
    if member.kind != "file":
        return Member(suffix, clean(member.name), 0, -1)
    return Member(suffix, clean(member.name), member.offset, member.size)


def _join(
    file: "IO[bytes] | Unpacked", size: int | None, read: _Contents, totals: _Totals, dotted: Set[str]
) -> Iterator[Sample]:
    """All headers, then the samples by key, in the order of their images."""
    links = Links()

    def resolved() -> Iterator[Span]:
        for span in _spans(file, size):
            if type(span) is TarMember and (place := links.place(span)) is not None:
                span = span._replace(kind="file", offset=place[0], size=place[1])
            yield span

    samples: dict[str, list[list[_Run]]] = {}
    for run in _runs(resolved(), lambda _, member, suffix: (member, None), totals, None, dotted):
        of_key = samples.setdefault(run.key, [])
        last = of_key[-1] if of_key else []
        taken = set().union(*(before.suffixes for before in last))
        if not last or taken & run.suffixes or (run.has_image and any(before.has_image for before in last)):
            of_key.append([run])
        else:
            last.append(run)
    limit = _MAX_JOINED_BYTES if isinstance(file, Unpacked) else None
    for runs in sorted((runs for of_key in samples.values() for runs in of_key), key=_image_offset):
        so_far = _Run("")  # what of the sample is read already, over its runs
        for run in runs:
            if limit is not None and any(m.offset + m.size > limit for m in run.members):
                run.members = [m._replace(kind="unreadable") for m in run.members]
            for i, member in enumerate(run.members):
                suffix = _split(member.name, dotted)[1]
                run.members[i], run.contents[i] = read.of_next(so_far, member, suffix.lower())
                so_far.contents.append(run.contents[i])
                so_far.suffixes.add(suffix)
        yield from _finish(runs, totals)
        for run in runs:
            run.contents = []


def _image_offset(runs: list[_Run]) -> int:
    members = [member for run in runs for member in run.members]
    images = [m.start for m in members if split_key(m.name)[1].lower() in SUFFIXES]
    return min(images or [m.start for m in members])


def _damage_rows(name: str, totals: _Totals) -> Iterator[Sample]:
    """A row for each gap and each sample that one cuts; the bytes stand in the first row of their gap."""
    for damage in totals.damages:
        gap, images = damage.gap, None
        if totals.samples:
            images = round(gap.size * totals.samples / totals.bytes)
            images = max(images, 1) if gap.size >= 2 * BLOCK else images  # a member takes two blocks
        reason = NO_END_MARKER if gap.why == NO_END and not damage.keys else DAMAGED
        for i, key in enumerate(damage.keys or [f"{name}@{gap.offset}"]):
            yield Sample(key, reason=reason, unread_bytes=0 if i else gap.size, unread_images=0 if i else images)
