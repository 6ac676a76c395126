"""Rows and vectors of a finished image set, by gid: what the embed stage wrote, and how everything else reads it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest

_MEMBER = pa.struct([("suffix", pa.string()), ("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),  # URL of the tar, the Parquet file or the folder
        ("source_kind", pa.string()),  # tar, parquet or folder
        ("image", _MEMBER),  # where the image's bytes lie; null when there are none
        ("others", pa.list_(_MEMBER)),  # captions, .json: carried along untouched
        ("metadata", pa.string()),  # JSON object as text, when the sample has one
        ("sha256", pa.binary(32)),  # of the original bytes; null when they were not read
        ("pdq", pa.binary(32)),  # perceptual hash, null unless decoded
        ("pdq_mirrored", pa.binary(32)),
        ("pdq_quality", pa.int32()),  # 0..100; below 50 the hash says little
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("luma_deviation", pa.float32()),
        ("status", pa.string()),  # ok or rejected
        ("reason", pa.string()),
        ("warning", pa.string()),
        # of a row that stands for damage: bytes of the shard that could not be read, and how many images those are (the
        # row itself is one of them; null: nobody can tell)
        ("unread_bytes", pa.int64()),
        ("unread_images", pa.int64()),
    ]
)


@dataclass(frozen=True)
class PartRows:
    """Rows [start, stop) of one part: its index file, relative to the set's folder."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class ImageSet:
    """The pool, a seed set or an evaluation set after the embed stage. Row numbers are gids: dense, in part order."""

    folder: Folder
    manifest: Manifest

    @cached_property
    def index_files(self) -> list[File]:
        return [file for file in self.manifest.files if file.path.startswith("index/")]

    @cached_property
    def part_base(self) -> np.ndarray:
        """int64 [parts + 1]: the gid of each part's first row, then the number of rows."""
        return np.concatenate([[0], np.cumsum([file.rows for file in self.index_files])]).astype(np.int64)

    @property
    def num_images(self) -> int:
        return int(self.part_base[-1])

    @property
    def num_parts(self) -> int:
        return len(self.index_files)

    def rows_between(self, start: int, stop: int) -> list[PartRows]:
        """What holds the gids [start, stop), in their order: all that a task on a range needs to know of the set."""
        base = self.part_base
        parts = range(int(np.searchsorted(base, start, side="right")) - 1, int(np.searchsorted(base, stop)))
        found = [
            PartRows(self.index_files[p].path, max(start - int(base[p]), 0), min(stop, int(base[p + 1])) - int(base[p]))
            for p in parts
        ]
        return [rows for rows in found if rows.stop > rows.start]

    def index(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        return self.folder.read_table(self.index_files[part].path, list(columns) if columns is not None else None)

    def column(self, name: str) -> np.ndarray:
        """One column over all gids: numbers as they are (0 for null), fixed-size binary as uint8 [N, width]."""
        return np.concatenate([column_values(self.index(part, [name])[name]) for part in range(self.num_parts)])

    def arrow(self, name: str) -> pa.ChunkedArray:
        """One column over all gids, as it is."""
        tables = [self.index(part, [name]) for part in range(self.num_parts)]
        return pa.concat_tables(tables).column(name)

    def embeddings(self, encoder: str, part: int) -> np.ndarray:
        """float16 [rows of the part, D]; rows of images that were not decoded are zero."""
        name = self.index_files[part].path.removeprefix("index/").removesuffix(".parquet")
        return self.folder.read_array(f"{encoder}/{name}.npy")

    def take_embeddings(self, encoder: str, gids: np.ndarray) -> np.ndarray:
        """float16 [len(gids), D] in the order of gids, one part in memory at a time."""
        gids = np.asarray(gids)
        result: np.ndarray | None = None
        for part, where, rows in self._by_part(gids):
            values = self.embeddings(encoder, part)[rows]
            if result is None:
                result = np.zeros((len(gids), values.shape[1]), np.float16)
            result[where] = values
        if result is None:
            raise ValueError("no rows were asked for")
        return result

    def take(self, gids: np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Index rows in the order of gids."""
        gids = np.asarray(gids)
        tables, wheres = [], []
        for part, where, rows in self._by_part(gids):
            tables.append(self.index(part, columns).take(pa.array(rows)))
            wheres.append(where)
        if not tables:
            return self.index(0, columns).slice(0, 0) if self.num_parts else INDEX_SCHEMA.empty_table().select(columns)
        order = np.empty(len(gids), np.int64)
        order[np.concatenate(wheres)] = np.arange(len(gids))
        return pa.concat_tables(tables).take(pa.array(order))

    def _by_part(self, gids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        part_of = np.searchsorted(self.part_base, gids, side="right") - 1
        for part in np.unique(part_of):
            where = np.flatnonzero(part_of == part)
            yield int(part), where, gids[where] - self.part_base[part]


def encoder_folder(spec: str) -> str:
    """A folder name for an encoder: its spec with what a path cannot hold replaced."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in spec)[-80:]


def read_rows(folder: Folder, rows: PartRows, columns: Sequence[str]) -> pa.Table:
    """Index rows of one part, columns in the order asked."""
    return folder.read_table(rows.path, list(columns)).slice(rows.start, rows.stop - rows.start)


def column_values(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        filled = column.fill_null(b"\0" * width).combine_chunks()
        return np.frombuffer(filled.buffers()[1], np.uint8).reshape(-1, width)[filled.offset :][: len(filled)]
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        column = column.fill_null(0)
    return column.to_numpy()
