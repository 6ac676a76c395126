"""Parquet shards: images as Hugging Face's `image` feature, one row a sample, and every image's bytes in one piece.

The column of images is neither compressed nor encoded, so that an image is a range of the file: a reader that knows
its offset, as the trainer does from the shard's index, needs neither its neighbours nor a Parquet library.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.writing.samples import ABOUT, Layout, ShardSample, pack_others
from curation.writing.tars import SUFFIX_OF_FORMAT, Entry

_MAX_GROUP_ROWS, _MAX_GROUP_BYTES = 100, 32 << 20  # what a reader holds at a time
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_PAGE_HEADER_BYTES = 4096  # more than stands before the first image of a row group


def parquet_schema(layout: Layout) -> pa.Schema:
    """image, text, label (where the run has labels), the fields of the tars' .json, others (where it has such)."""
    draws = pa.struct([(name, pa.int64()) for name in layout.draw_names])
    fields = [("image", _IMAGE), ("text", pa.string())]
    fields += [("label", pa.int64())] if layout.has_label else []
    fields += [(name, draws if name == "draws" else _TYPES[type(value)]) for name, value in ABOUT.items()]
    fields += [("others", pa.binary())] if layout.has_others else []
    features = {name: {"_type": "Image"} if name == "image" else _feature(kind) for name, kind in fields}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


class ParquetShardBuilder:
    """Builds one Parquet file in memory. The same samples give the same bytes."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.schema = parquet_schema(layout)
        self.entries: list[Entry] = []
        self._buffer = io.BytesIO()
        leaves = _leaves(self.schema)
        self._writer = pq.ParquetWriter(
            self._buffer,
            self.schema,
            use_dictionary=[name for name in leaves if name not in ("image.bytes", "others")],
            compression={name: "none" if name == "image.bytes" else "zstd" for name in leaves},
            write_statistics=[name for name in leaves if name not in ("image.bytes", "others")],
            data_page_size=1 << 30,  # one page a row group
            write_batch_size=_MAX_GROUP_ROWS,
        )
        self._rows: list[dict[str, Any]] = []
        self._held = 0
        self._names: list[tuple[str, str, int, bytes]] = []

    def add(self, sample: ShardSample) -> None:
        suffix = SUFFIX_OF_FORMAT.get(sample.about["format"], "img")
        row = {"image": {"bytes": sample.image, "path": f"{sample.key}.{suffix}"}, "text": sample.text, **sample.about}
        if self.layout.has_label:
            row["label"] = -1 if sample.label is None else sample.label
        if self.layout.has_others:
            row["others"] = pack_others(sample)
        self._held += len(sample.image) + len(row.get("others", b""))
        self._rows.append(row)
        self._names.append((sample.key, suffix, len(sample.image), hashlib.sha256(sample.image).digest()))
        if len(self._rows) >= _MAX_GROUP_ROWS or self._held >= _MAX_GROUP_BYTES:
            self._flush()

    def finish(self) -> memoryview:
        """The whole file; `entries` then has an entry for each sample's image, checked against the bytes there."""
        self._flush()
        self._writer.close()
        content = self._buffer.getbuffer()
        self.entries = self._find_images(content)
        return content

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self.schema))
        self._rows, self._held = [], 0

    def _find_images(self, content: memoryview) -> list[Entry]:
        """Values of a plain page follow one another, each behind its length in four bytes."""
        metadata = pq.read_metadata(pa.BufferReader(content))
        entries: list[Entry] = []
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(0)
            assert chunk.path_in_schema == "image.bytes"
            start = chunk.data_page_offset
            rows = self._names[len(entries) : len(entries) + metadata.row_group(group).num_rows]
            for position, (key, suffix, size, digest) in enumerate(rows):
                length = size.to_bytes(4, "little")
                # Only a group's first image has a header before it, of a length that the format does not fix.
                for at in range(start, start + (1 if position else _PAGE_HEADER_BYTES)):
                    value = content[at + 4 : at + 4 + size]
                    if content[at : at + 4] == length and hashlib.sha256(value).digest() == digest:
                        break
                else:
                    raise AssertionError(f"image {key} is not where this Parquet library was expected to put it")
                entries.append(Entry(key, suffix, at + 4, size, digest.hex()))
                start = at + 4 + size
        return entries


def _feature(kind: pa.DataType) -> Mapping[str, Any]:
    if pa.types.is_struct(kind):
        return {f.name: _feature(f.type) for f in kind}
    return {"dtype": str(kind).replace("double", "float64"), "_type": "Value"}


def _leaves(schema: pa.Schema) -> Sequence[str]:
    """Paths of the columns as Parquet counts them."""
    return [
        f"{f.name}.{child.name}" if pa.types.is_struct(f.type) else f.name
        for f in schema
        for child in (f.type if pa.types.is_struct(f.type) else [f])
    ]
