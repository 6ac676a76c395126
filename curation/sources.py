"""Where samples come from: tars, Parquet files and folders at any fsspec URL -> parts, and a part -> samples."""

import contextlib
import glob
import hashlib
import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from braceexpand import braceexpand
from fsspec.core import url_to_fs

from curation.images import SUFFIXES, sniff

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "data")
_KEY_COLUMNS = ("__key__", "key", "id", "uid", "image_id", "image_path", "file_name", "filename", "path", "url")
_CAPTION_COLUMNS = ("caption", "text", "txt")
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_MAX_METADATA_BYTES = 64 << 10
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
    """for a folder: the files of this part, relative to it, sorted"""

    @property
    def id(self) -> str:
        content = json.dumps([self.kind, self.url, self.size, self.version, self.files])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Member:
    """One file of a sample, and where its bytes lie. In Parquet, `offset` is the row and `name` the column."""

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


def find_parts(urls: Sequence[str], images_per_folder_part: int = 1000) -> list[Part]:
    """List what the URLs (braces, globs, folders, files) hold, in the order given, names sorted within each.

    Raises:
        ValueError: nothing there, an unreachable place, or a file of an unknown kind.
    """
    parts = [part for url in urls for part in _expand(url, images_per_folder_part)]
    seen: dict[tuple[str, tuple[str, ...]], Part] = {}
    for part in parts:
        seen.setdefault((part.url, part.files), part)  # a shard named twice is read once
    return list(seen.values())


def read_samples(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    """Every sample of a part, in order. Damage inside becomes a sample with a reason; it never raises for content.

    Raises:
        OSError: the part itself cannot be opened.
    """
    if part.kind == "tar":
        return _read_tar(part, max_file_bytes)
    if part.kind == "parquet":
        return _read_parquet(part, max_file_bytes)
    return _read_folder(part, max_file_bytes)


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
                content = file.read()
        else:
            content = self._read_cell(member)
        if len(content) != member.size:
            raise ValueError(
                f"{self.url} changed during the run: {member.name} had {member.size} bytes, now {len(content)}. "
                "Run the same command again; changed parts are read anew."
            )
        return content

    def _read_cell(self, member: Member) -> bytes:
        group = next(i for i in reversed(range(len(self._group_starts))) if self._group_starts[i] <= member.offset)
        if self._group is None or self._group[0] != group:
            self._group = (group, self._parquet.read_row_group(group))
        row = self._group[1].slice(member.offset - self._group_starts[group], 1).to_pylist()[0]
        if member.name == _ROW_METADATA:
            return _row_metadata(row).encode()
        value = row[member.name]
        if isinstance(value, dict):
            value = value.get("bytes")
        return value.encode() if isinstance(value, str) else value or b""

    def __enter__(self) -> "MemberReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()


# --- listing ---------------------------------------------------------------------------------------------------------


def _expand(url: str, images_per_folder_part: int) -> list[Part]:
    found: list[Part] = []
    for pattern in braceexpand(url):
        try:
            fs, path = url_to_fs(pattern)
            names = sorted(fs.glob(path)) if glob.has_magic(path) else ([path] if fs.exists(path) else [])
            for name in names:
                found += _parts_at(fs, str(name), images_per_folder_part)
        except (ImportError, ValueError) as error:
            raise ValueError(f"cannot read {pattern!r}: {_sentence(error)}") from None
        except Exception as error:  # every remote file system has its own errors for "cannot get there"
            raise ValueError(
                f"cannot list {pattern!r}: {_sentence(error)}. Check the address, the credentials and the network."
            ) from None
    if not found:
        raise ValueError(
            f"nothing found at {url!r}: give a .tar, a .parquet, a folder of them or of images, or a glob."
        )
    return found


def _parts_at(fs: fsspec.AbstractFileSystem, path: str, images_per_folder_part: int) -> list[Part]:
    if not fs.isdir(path):
        return [_file_part(fs, fs.info(path))]
    files = fs.find(path, detail=True)
    shards = [info for name, info in sorted(files.items()) if _kind(name) is not None]
    if shards:
        return [_file_part(fs, info) for info in shards]
    root = path.rstrip("/") + "/"
    names = [name.removeprefix(root) for name in sorted(files)]
    if not names:
        raise ValueError("the folder is empty")
    parts, chunk, last_key = [], [], None
    for name in names:  # a picture and its caption stay together
        key = _split_key(name)[0]
        if len(chunk) >= images_per_folder_part and key != last_key:
            parts.append(chunk)
            chunk = []
        chunk.append(name)
        last_key = key
    parts.append(chunk)
    url = fs.unstrip_protocol(path) if not _is_local(fs) else path
    return [
        Part(
            "folder",
            url,
            sum(files[root + name].get("size") or 0 for name in chunk),
            hashlib.sha256("".join(_version(files[root + name]) for name in chunk).encode()).hexdigest()[:16],
            tuple(chunk),
        )
        for chunk in parts
    ]


def _file_part(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> Part:
    name = info["name"]
    kind = _kind(name)
    if kind is None:
        raise ValueError(f"{name} is neither a .tar nor a .parquet file; for loose images give their folder")
    url = name if _is_local(fs) else fs.unstrip_protocol(name)
    return Part(kind, url, info.get("size") or 0, _version(info))


def _kind(name: str) -> Literal["tar", "parquet"] | None:
    if name.endswith(_TAR_SUFFIXES):
        return "tar"
    return "parquet" if name.endswith(".parquet") else None


def _version(info: dict[str, Any]) -> str:
    for field_name in ("ETag", "etag", "LastModified", "mtime", "updated", "last_modified"):
        if info.get(field_name) is not None:
            return str(info[field_name])
    return ""


def _is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in ([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_tar(part: Part, max_file_bytes: int) -> Iterator[Sample]:
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
                    key, suffix = _split_key(info.name)
                    if group_key is not None and key != group_key:
                        yield _group_sample(group_key, group)
                        group = []
                    group_key = key
                    content = None
                    if info.size <= max_file_bytes:
                        file.seek(info.offset_data)
                        content = file.read(info.size)
                        if len(content) < info.size:
                            raise tarfile.ReadError("unexpected end of data")
                    group.append((Member(_clean(suffix), _clean(info.name), info.offset_data, info.size), content))
        except Exception:  # a hostile header can raise nearly anything out of tarfile
            damage = "damaged_shard"
        if damage is None:
            if group_key is not None:
                yield _group_sample(group_key, group)
            elif part.size > 10240:  # more than an empty tar's padding, and nothing in it
                yield Sample(f"{posixpath.basename(part.url)}@0", reason="damaged_shard")
            return
        # The sample in progress cannot be trusted to be whole: it becomes a row with a reason, as does a header that
        # could not be read after a whole sample.
        key = group_key if group_key is not None else f"{posixpath.basename(part.url)}@{position}"
        yield Sample(key, reason=damage)


def _read_folder(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    fs, root = url_to_fs(part.url)
    group: list[tuple[Member, bytes | None]] = []
    group_key = None
    for name in part.files:
        key, suffix = _split_key(name)
        if group_key is not None and key != group_key:
            yield _group_sample(group_key, group)
            group = []
        group_key = key
        if _clean(name) != name:  # not UTF-8, so it could not be named in a report or asked for again
            group.append((Member("", _clean(name), 0, -1), None))
            continue
        try:
            path = posixpath.join(root, name)
            size = fs.size(path) or 0
            content = fs.cat_file(path) if size <= max_file_bytes else None
            group.append((Member(suffix, name, 0, size), content))
        except OSError:  # deleted since the listing, or not readable by us
            group.append((Member(suffix, name, 0, -1), None))
    if group_key is not None:
        yield _group_sample(group_key, group)


def _group_sample(key: str, group: list[tuple[Member, bytes | None]]) -> Sample:
    """Choose the image of a sample: a plain image suffix first, else whatever member looks like an image."""
    key = _clean(key)
    by_suffix = [i for i, (member, _) in enumerate(group) if member.suffix.lower() in SUFFIXES]
    by_content = [i for i, (_, content) in enumerate(group) if content is not None and sniff(content[:16])]
    chosen = next(iter(by_suffix or by_content), None)
    others = [member for i, (member, _) in enumerate(group) if i != chosen and member.size >= 0]
    metadata, warning = None, None
    for i, (member, content) in enumerate(group):
        if i != chosen and member.suffix.lower() == "json" and content is not None:
            metadata = _metadata_text(content)
            warning = "bad_metadata" if metadata is None else None
    sample = Sample(key, metadata=metadata, warning=warning, others=others)
    if chosen is None:
        sample.reason = "no_image"
        return sample
    sample.image, sample.content = group[chosen]
    if sample.content is None:
        sample.reason = "unreadable" if sample.image.size < 0 else "file_too_large"
    return sample


_ROW_METADATA = "*"  # not a column: the row's scalar columns together


def _read_parquet(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    stem = posixpath.basename(part.url).removesuffix(".parquet")
    row_number = 0
    with fsspec.open(part.url, "rb") as file:
        try:
            parquet = pq.ParquetFile(file)
            column = _image_column(parquet.schema_arrow)
            if column is None:
                yield Sample(f"{stem}@schema", reason="no_image_column")
                return
            for batch in parquet.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield _row_sample(row, row_number, column, stem, max_file_bytes)
                    row_number += 1
        except Exception:  # a damaged file can raise anything out of the reader
            yield Sample(f"{stem}@{row_number}", reason="damaged_shard")


def _row_sample(row: dict[str, Any], number: int, column: str, stem: str, max_file_bytes: int) -> Sample:
    value = row[column]
    path = value.get("path") if isinstance(value, dict) else None
    content = value.get("bytes") if isinstance(value, dict) else value
    named = next((row[name] for name in _KEY_COLUMNS if isinstance(row.get(name), str | int)), None)
    key = _clean(str(named if named is not None else _split_key(path)[0] if path else f"{stem}_{number}"))
    metadata = _row_metadata(row)
    others = [Member("json", _ROW_METADATA, number, len(metadata.encode()))]
    for name in _CAPTION_COLUMNS:
        if isinstance(row.get(name), str):
            others.append(Member("txt", name, number, len(row[name].encode())))
            break
    sample = Sample(key, metadata=metadata if len(metadata) <= _MAX_METADATA_BYTES else None, others=others)
    if not isinstance(content, bytes):
        sample.reason = "no_image"
        return sample
    suffix = posixpath.splitext(path or "")[1].lstrip(".").lower()
    sample.image = Member(suffix if suffix in SUFFIXES else "", column, number, len(content))
    if len(content) > max_file_bytes:
        sample.reason = "file_too_large"
    else:
        sample.content = content
    return sample


def _image_column(schema: pa.Schema) -> str | None:
    """The column with image bytes: a known name first, then any binary column or Hugging Face struct {bytes, path}."""

    def holds_images(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(f.name == "bytes" for f in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    candidates = [f.name for f in schema if holds_images(f.type)]
    return next((name for name in _IMAGE_COLUMNS if name in candidates), candidates[0] if candidates else None)


def _row_metadata(row: dict[str, Any]) -> str:
    scalars = {name: value for name, value in row.items() if isinstance(value, str | int | float | bool)}
    return json.dumps(scalars, ensure_ascii=False)


def _metadata_text(content: bytes) -> str | None:
    """The text of a .json member if it is a UTF-8 object of a sane size, else None."""
    if len(content) > _MAX_METADATA_BYTES:
        return None
    try:
        return content.decode() if isinstance(json.loads(content), dict) else None
    except (ValueError, RecursionError):
        return None


def _split_key(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the last path component."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    if not stem:  # a hidden file: the dot belongs to the name
        stem, suffix = base, ""
    return (f"{folder}/{stem}" if folder else stem), suffix


def _clean(name: str) -> str:
    """Names travel into reports, JSON and Parquet: valid UTF-8 of a bounded length, the rest replaced."""
    name = name.encode("utf-8", "replace").decode("utf-8", "replace")
    return name if len(name) <= _MAX_NAME_CHARACTERS else name[:_MAX_NAME_CHARACTERS] + "…"
