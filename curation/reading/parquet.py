"""A Parquet file -> samples, a row each."""

import base64
import binascii
import json
import posixpath
from collections.abc import Iterator, Sequence
from typing import IO, Any
from urllib.parse import unquote_to_bytes

import pyarrow as pa
import pyarrow.parquet as pq

from curation.reading.folders import split_name
from curation.reading.pictures.formats import SUFFIXES, sniff
from curation.reading.places import open_file
from curation.reading.samples import MAX_METADATA_BYTES, Member, Part, Sample, clean

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "data")
_KEY_COLUMNS = ("__key__", "key", "id", "uid", "image_id", "image_path", "file_name", "filename", "path", "url")
_CAPTION_COLUMNS = ("caption", "text", "txt")
_BATCH_ROWS, _BATCH_BYTES = 64, 16 << 20
_PROBED_ROWS, _PROBED_VALUES = 1024, 8  # how far and at how much of a column is looked to tell whether it holds images
_HEAD_BYTES = 256
_DEEPEST = 4  # structs and lists within each other

ROW_METADATA = "*"  # not a column: the row's scalar columns together, but for one that is named behind the star


def read_parquet(part: Part, max_file_bytes: int) -> Iterator[Sample]:
    stem = posixpath.basename(part.url)
    stem = stem[: -len(".parquet")] if stem.lower().endswith(".parquet") else stem
    with open_file(part.url) as file:
        try:
            table = ParquetTable(file)
            column = part.column or table.image_column()
        except Exception:  # a damaged file can raise anything out of the reader
            yield Sample(f"{stem}@0", reason="damaged_shard", unread_bytes=part.size)
            return
        if column is None:
            yield from (Sample(f"{stem}_{number}", reason="no_image_column") for number in range(table.num_rows))
            return
        warning = "columns_left_out" if table.leaves_out(column) else None
        needed = list(dict.fromkeys([_top(column, table.schema.names), *table.scalars]))
        for group in range(table.num_groups):
            number, end = table.group_starts[group : group + 2]
            try:
                for batch in table.batches(group, needed):
                    for row in range(batch.num_rows):
                        sample = _row_sample(cells(batch, row), number, column, table.scalars, stem, max_file_bytes)
                        sample.warning = sample.warning or warning
                        yield sample
                        number += 1
            except Exception:
                pass  # what is missing is told below; the other groups stand for themselves
            if number < end:
                lost_bytes = table.group_bytes(group) * (end - number) // max(end - table.group_starts[group], 1)
                reason = "damaged_shard"
                yield Sample(f"{stem}@{number}", reason=reason, unread_bytes=lost_bytes, unread_images=end - number)


def holds_images(url: str) -> bool:
    """Whether some column's first values look like images. A file that cannot be read counts as one that does."""
    try:
        with open_file(url) as file:
            return ParquetTable(file).image_column(by_name=False) is not None
    except Exception:  # whatever is wrong with it, reading it will say so in a row
        return True


def has_column(url: str, column: str) -> list[str] | bool:
    """True if the file has this column, dotted where nested; else all that it has (none when it cannot be read)."""
    try:
        with open_file(url) as file:
            schema = pq.ParquetFile(file).schema_arrow
    except Exception:
        return []
    paths = [path for f in schema for path in _paths(f.name, f.type)]
    return True if column in paths else paths


class CellReader:
    """Cells of one Parquet file again, by row: for members that read_parquet named. Rows are best asked in order."""

    def __init__(self, file: IO[bytes]) -> None:
        self._table = ParquetTable(file)
        self._columns: list[str] = []
        self._group = -1
        self._batch: pa.RecordBatch | None = None
        self._start = 0  # the row that the batch begins with

    def read(self, member: Member) -> bytes:
        if member.suffix == "json" and member.name.startswith(ROW_METADATA):
            hidden = member.name.removeprefix(ROW_METADATA)
            row = self._row(member.offset, [name for name in self._table.scalars if name != hidden])
            return row_metadata(row, self._table.scalars, hidden).encode()
        top = _top(member.name, self._table.schema.names)
        row = self._row(member.offset, [top])
        if member.suffix == "txt":
            return str(row[top]).encode()
        return image_bytes(_at(row, member.name))[0] or b""

    def _row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        """Read forward to a row; from the start of its group where it lies behind, or where other columns are asked."""
        starts = self._table.group_starts
        group = next(i for i in reversed(range(len(starts))) if starts[i] <= number)
        missing = [name for name in columns if name not in self._columns]
        if missing or group != self._group or number < self._start or self._batch is None:
            self._columns += missing
            self._group, self._start, self._batch = group, starts[group], None
            self._batches = self._table.batches(group, self._columns)
        while self._batch is None or number >= self._start + self._batch.num_rows:
            self._start += self._batch.num_rows if self._batch is not None else 0
            self._batch = next(self._batches)
        return cells(self._batch, number - self._start)


class ParquetTable:
    """One open Parquet file, read in batches that are bounded by bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = pq.ParquetFile(file, buffer_size=1 << 20)
        metadata = self.file.metadata
        self.schema: pa.Schema = self.file.schema_arrow
        self.num_groups, self.num_rows = metadata.num_row_groups, metadata.num_rows
        self.group_starts = [0]
        for group in range(self.num_groups):
            self.group_starts.append(self.group_starts[-1] + metadata.row_group(group).num_rows)

    def group_bytes(self, group: int) -> int:
        """Bytes of a row group in the file."""
        about = self.file.metadata.row_group(group)
        return sum(about.column(i).total_compressed_size for i in range(about.num_columns))

    def column_bytes(self, group: int, path: str) -> int | None:
        """Bytes of a (dotted) column in one row group; None where it has nothing but nulls."""
        about = self.file.metadata.row_group(group)
        top = _top(path, self.schema.names)
        chunks = [about.column(i) for i in range(about.num_columns)]
        chunks = [
            chunk for chunk in chunks if chunk.path_in_schema == top or chunk.path_in_schema.startswith(f"{top}.")
        ]
        held = [c for c in chunks if not c.path_in_schema.endswith(".path")]  # a name beside the bytes is no image
        if all(c.statistics is not None and c.statistics.null_count == c.num_values for c in held):
            return None
        return sum(chunk.total_compressed_size for chunk in chunks)

    def batches(self, group: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        about = self.file.metadata.row_group(group)
        row_bytes = max(about.total_byte_size // max(about.num_rows, 1), 1)
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
        return self.file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)

    @property
    def scalars(self) -> list[str]:
        """The columns of single values, which are a row's metadata."""
        return [f.name for f in self.schema if not _may_hold_bytes(f.type) and not _is_nested(f.type)]

    def leaves_out(self, column: str) -> bool:
        """Whether a row has columns that are neither its image nor its metadata: no shard will hold them."""
        top = _top(column, self.schema.names)
        kinds = (pa.types.is_temporal, pa.types.is_decimal)
        kept = {f.name for f in self.schema if f.name in self.scalars and not any(is_kind(f.type) for is_kind in kinds)}
        return any(name != top and name not in kept for name in self.schema.names)

    def image_column(self, by_name: bool = True) -> str | None:
        """The column with image bytes, by its first values; where none of them is an image and by_name, by its name.

        A dotted path where it is nested. Of several, that with the larger share of images among its values, then a
        known name, then the first.
        """
        candidates = [path for f in self.schema for path in _candidates(f.name, f.type)]
        if not candidates:
            return None
        values = self._first_values(candidates)
        share = {path: _share(found) for path, found in values.items()}
        best = max(share.values())
        named = sorted(candidates, key=_name_rank)
        if best > 0:
            return next(path for path in named if share[path] == best)
        binary = [path for path in named if _is_binary(self.schema, path)]
        if not by_name or not binary:
            return None
        if _name_rank(binary[0]) < len(_IMAGE_COLUMNS):
            return binary[0]
        return max(binary, key=lambda path: max((len(v) for v in values[path] if isinstance(v, bytes)), default=0))

    def _first_values(self, candidates: list[str]) -> dict[str, list[Any]]:
        """The first values of each candidate that are not null, from the beginning of each of the first groups."""
        found: dict[str, list[Any]] = {path: [] for path in candidates}
        tops = list(dict.fromkeys(_top(path, self.schema.names) for path in candidates))
        rows = 0
        for group in range(self.num_groups):
            try:
                for batch in self.batches(group, tops):
                    for row in range(batch.num_rows):
                        values = cells(batch, row)
                        for path, held in found.items():
                            value = _at(values, path)
                            if len(held) < _PROBED_VALUES and image_bytes(value, _HEAD_BYTES)[0] is not None:
                                held.append(value)
                    rows += batch.num_rows
                    full = [held for held in found.values() if len(held) >= _PROBED_VALUES]
                    if rows >= _PROBED_ROWS or len(full) == len(found) or any(map(_share, full)):
                        return found
            except Exception:
                continue  # a damaged group says nothing about the next
        return found


def cells(batch: pa.RecordBatch, row: int) -> dict[str, Any]:
    """One row as Python values; a cell that has none (no UTF-8, a date out of range) is None."""
    values: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values.setdefault(name, column[row].as_py())
        except Exception:  # whatever a hostile value raises
            values.setdefault(name, None)
    return values


def image_bytes(value: Any, head_bytes: int | None = None) -> tuple[bytes | None, int]:
    """The bytes of the image in a cell (None: there are none) and how many images it holds.

    Bytes as they are; text, and bytes that are text, from base64 or a data: URL; a Hugging Face struct {bytes, path};
    of a list the first image. With head_bytes, the first bytes are enough.
    """
    if isinstance(value, dict):
        return image_bytes(value.get("bytes"), head_bytes)
    if isinstance(value, list):
        found = [content for item in value if (content := image_bytes(item, head_bytes)[0]) is not None]
        return (found[0] if found else None), len(found)
    if isinstance(value, str):
        return _decoded(value, head_bytes), 1
    if not isinstance(value, bytes):
        return None, 0
    if not sniff(value[:_HEAD_BYTES]) and value[:1].isascii():
        content = _decoded(value[: 4 * _HEAD_BYTES + 1].decode("ascii", "replace"), _HEAD_BYTES)
        if content is not None and sniff(content):
            return _decoded(value.decode("ascii", "replace"), head_bytes), 1
    return (value if head_bytes is None else value[:head_bytes]), 1


def row_metadata(row: dict[str, Any], scalars: Sequence[str], hidden: str = "") -> str:
    """The row's single values as a JSON object, but for the column `hidden`."""
    values = {name: row[name] for name in scalars if name != hidden and isinstance(row[name], str | int | float | bool)}
    return json.dumps(values, ensure_ascii=False)


def _row_sample(
    row: dict[str, Any], number: int, column: str, scalars: Sequence[str], stem: str, max_file_bytes: int
) -> Sample:
    top = _top(column, list(row))
    value = _at(row, column)
    path = _path_beside(value)
    named = next((row[n] for n in _KEY_COLUMNS if n != top and isinstance(row.get(n), str | int)), None)
    key = clean(str(named if named is not None else split_name(path)[0] if path else f"{stem}_{number}"))
    hidden = top if isinstance(row[top], str) else ""  # base64 is no metadata
    metadata = row_metadata(row, scalars, hidden)
    others = [Member("json", ROW_METADATA + hidden, number, len(metadata.encode()))]
    for name in _CAPTION_COLUMNS:
        if isinstance(row.get(name), str) and name != top:
            others.append(Member("txt", name, number, len(row[name].encode())))
            break
    sample = Sample(key, metadata=metadata if len(metadata) <= MAX_METADATA_BYTES else None, others=others)
    content, count = image_bytes(value)
    if content is None:
        sample.reason = "no_image"
        return sample
    if count > 1:
        sample.warning = "several_images"
    suffix = split_name(path)[1].lower() if path else ""
    sample.image = Member(suffix if suffix in SUFFIXES else "", column, number, len(content))
    if len(content) > max_file_bytes:
        sample.reason = "file_too_large"
    else:
        sample.content = content
    return sample


def _decoded(text: str, head_bytes: int | None) -> bytes | None:
    """Bytes of base64 text (either alphabet, with or without padding and line ends) or of a data: URL; else None."""
    if text[:5].lower() == "data:":
        about, comma, text = text.partition(",")
        if not comma:
            return None
        if not about.lower().rstrip().endswith(";base64"):
            return unquote_to_bytes(text if head_bytes is None else text[: 3 * head_bytes])
    is_cut = head_bytes is not None and len(text) > 4 * head_bytes
    text = "".join(text[: 4 * head_bytes if head_bytes is not None else None].split())
    text = text[: len(text) // 4 * 4] if is_cut else text
    text = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True) or None
    except (binascii.Error, ValueError):
        return None


def _share(values: Sequence[Any]) -> float:
    """The share of these cells that begin like an image."""
    return sum(sniff(image_bytes(value, _HEAD_BYTES)[0] or b"") for value in values) / max(len(values), 1)


def _path_beside(value: Any) -> str | None:
    if isinstance(value, list):
        value = next((item for item in value if image_bytes(item, _HEAD_BYTES)[0] is not None), None)
    path = value.get("path") if isinstance(value, dict) else None
    return path if isinstance(path, str) and path else None


def _storage(kind: pa.DataType) -> pa.DataType:
    """A type without what only wraps it: extension types and dictionaries."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        or types.is_list_view(kind) or types.is_large_list_view(kind)
    )  # fmt: skip


def _is_nested(kind: pa.DataType) -> bool:
    return pa.types.is_nested(_storage(kind))


def _may_hold_bytes(kind: pa.DataType) -> bool:
    kind, types = _storage(kind), pa.types
    return (
        types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )  # fmt: skip


def _may_hold_text(kind: pa.DataType) -> bool:
    kind, types = _storage(kind), pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _paths(path: str, kind: pa.DataType, depth: int = 0) -> list[str]:
    """A column and every field of the structs in it, dotted; lists are looked through."""
    kind = _storage(kind)
    while _is_list(kind):
        kind = _storage(kind.value_type)
    if not pa.types.is_struct(kind) or depth >= _DEEPEST:
        return [path]
    return [path, *(found for f in kind for found in _paths(f"{path}.{f.name}", f.type, depth + 1))]


def _candidates(path: str, kind: pa.DataType, depth: int = 0) -> list[str]:
    """Where in a column images may lie. A struct with `bytes` is an image itself, its path beside them."""
    kind = _storage(kind)
    while _is_list(kind):
        kind = _storage(kind.value_type)
    if not pa.types.is_struct(kind):
        return [path] if _may_hold_bytes(kind) or _may_hold_text(kind) else []
    if depth >= _DEEPEST:
        return []
    own = [path] if any(f.name == "bytes" for f in kind) else []
    fields = [f for f in kind if not (own and f.name in ("bytes", "path"))]
    return own + [found for f in fields for found in _candidates(f"{path}.{f.name}", f.type, depth + 1)]


def _is_binary(schema: pa.Schema, path: str) -> bool:
    """Whether a candidate is made to hold bytes, and not text that may be base64."""
    top = _top(path, schema.names)
    kind, rest = schema.field(top).type, path[len(top) + 1 :]
    while True:
        kind = _storage(kind)
        if _is_list(kind):
            kind = kind.value_type
        elif pa.types.is_struct(kind):
            name = next((f.name for f in kind if rest == f.name or rest.startswith(f.name + ".")), "bytes")
            kind, rest = kind.field(name).type, rest[len(name) + 1 :]
        else:
            return _may_hold_bytes(kind)


def _top(path: str, columns: list[str]) -> str:
    """The column that a dotted path begins with; column names may have dots themselves."""
    return max((name for name in columns if path == name or path.startswith(name + ".")), key=len)


def _at(row: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; of a list on the way, that of every item."""
    top = _top(path, list(row))
    return _below(row[top], path[len(top) + 1 :])


def _below(value: Any, path: str) -> Any:
    if not path:
        return value
    if isinstance(value, list):
        return [_below(item, path) for item in value]
    if not isinstance(value, dict):
        return None
    name = max((n for n in value if path == n or path.startswith(n + ".")), key=len, default=None)
    return None if name is None else _below(value[name], path[len(name) + 1 :])


def _name_rank(path: str) -> int:
    name = path.rpartition(".")[2].lower()
    return _IMAGE_COLUMNS.index(name) if name in _IMAGE_COLUMNS else len(_IMAGE_COLUMNS)
