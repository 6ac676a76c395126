"""A Parquet file -> samples, a row each."""

import json
import posixpath
from collections.abc import Iterator
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from curation.reading.images import SUFFIXES
from curation.reading.samples import MAX_METADATA_BYTES, Member, Part, Sample, clean, split_key

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "content", "data")
_KEY_COLUMNS = ("__key__", "key", "id", "uid", "image_id", "image_path", "file_name", "filename", "path", "url")
_CAPTION_COLUMNS = ("caption", "text", "txt")


ROW_METADATA = "*"  # not a column: the row's scalar columns together


def read_parquet(part: Part, max_file_bytes: int) -> Iterator[Sample]:
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
    key = clean(str(named if named is not None else split_key(path)[0] if path else f"{stem}_{number}"))
    metadata = row_metadata(row)
    others = [Member("json", ROW_METADATA, number, len(metadata.encode()))]
    for name in _CAPTION_COLUMNS:
        if isinstance(row.get(name), str):
            others.append(Member("txt", name, number, len(row[name].encode())))
            break
    sample = Sample(key, metadata=metadata if len(metadata) <= MAX_METADATA_BYTES else None, others=others)
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


def row_metadata(row: dict[str, Any]) -> str:
    scalars = {name: value for name, value in row.items() if isinstance(value, str | int | float | bool)}
    return json.dumps(scalars, ensure_ascii=False)
