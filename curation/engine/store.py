"""Rows and vectors of a finished image set, by gid: what the embed stage wrote, and how everything else reads it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa

from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest
from curation.engine.workers import ExecutionConfig, run_tasks

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


NOT_IN_POOL = "not_in_pool"
"""reason of the rows of a part that the set does not list any more"""
_GONE = {"status": "rejected", "reason": NOT_IN_POOL, "sha256": None, "pdq": None, "pdq_mirrored": None}
_REGISTRY = "registry"
_TAKEN_AT_ONCE = 1000  # files of an earlier set in one task


@dataclass(frozen=True)
class Parts:
    """The parts of a set, in the order of their numbers, small enough for every task."""

    ids: np.ndarray
    """bytes [parts]: Part.id of each"""
    base: np.ndarray
    """int64 [parts + 1]: the gid of each part's first row, then the number of rows"""
    index_bytes: int
    """of all index files"""
    gone: frozenset[int] = frozenset()
    """numbers of those that the set does not list any more: their rows stay, rejected as NOT_IN_POOL"""

    @staticmethod
    def of(manifest: Manifest) -> "Parts":
        index = [file for file in manifest.files if file.path.startswith("index/")]
        ids = np.array([file.path.removeprefix("index/part-").removesuffix(".parquet") for file in index], "S")
        base = np.cumsum([0, *(file.rows for file in index)]).astype(np.int64)
        return Parts(ids, base, sum(file.bytes for file in index), frozenset(manifest.figures.get("gone", ())))


def registered(folder: Folder) -> dict[str, list[File]]:
    """The parts of a set by id, in the order of their numbers, with the files of each."""
    parts: dict[str, list[File]] = {}
    for name in sorted(name for name in folder.names() if name.startswith(f"{_REGISTRY}/")):
        for id_, files in json.loads(folder.read_bytes(name)).items():
            parts[id_] = [File(**file) for file in files]
    return parts


def register(folder: Folder, parts: Mapping[str, list[File]]) -> None:
    """Give numbers to parts that are new, in this order, behind those that have one.

    What is registered stays as it is: a batch of new parts is a file of its own, written at once when all of them are
    whole. So the first batch is in the order of the listing, and a run that is killed before has given no number.
    """
    known = registered(folder)
    if new := {id_: [asdict(file) for file in files] for id_, files in parts.items() if id_ not in known}:
        number = sum(name.startswith(f"{_REGISTRY}/") for name in folder.names())
        folder.write_bytes(f"{_REGISTRY}/parts-{number:05d}.json", json.dumps(new).encode())


def adopt(folder: Folder, earlier: Folder, execution: ExecutionConfig) -> None:
    """Take over the parts of an earlier set of the same settings, with their numbers; what is there already stays."""
    there = set(folder.names())
    if any(name.startswith(f"{_REGISTRY}/") for name in there):
        return
    names = earlier.names()
    files = [file.path for of_part in registered(earlier).values() for file in of_part]
    files += [name for name in names if name.startswith("done/")]
    take_files([name for name in files if name not in there], folder, earlier, execution)
    for name in names:  # last, for who finds numbers takes their parts for whole
        if name.startswith(f"{_REGISTRY}/"):
            folder.take(name, earlier)


def take_files(names: Sequence[str], folder: Folder, earlier: Folder, execution: ExecutionConfig) -> None:
    """Take files over from a folder of an earlier run, in tasks."""
    jobs = [names[i : i + _TAKEN_AT_ONCE] for i in range(0, len(names), _TAKEN_AT_ONCE)]
    run_tasks(_take, jobs, folder, earlier, execution=execution, label="earlier release", unit="files",
              weights=list(map(len, jobs)))  # fmt: skip


def _take(names: Sequence[str], folder: Folder, earlier: Folder) -> None:
    for name in names:
        folder.take(name, earlier)


@dataclass(frozen=True)
class PartRows:
    """Rows [start, stop) of one part: its index file, relative to the set's folder."""

    path: str
    start: int
    stop: int
    is_gone: bool = False


@dataclass(frozen=True)
class ImageSet:
    """The pool, a seed set or an evaluation set after the embed stage.

    Row numbers are gids: dense, in the order of the parts' numbers, which a part gets when it is first seen and keeps.
    """

    folder: Folder
    parts: Parts

    @staticmethod
    def of(folder: Folder, manifest: Manifest) -> "ImageSet":
        """A finished set: its folder, and the manifest of the step that wrote it."""
        return ImageSet(folder, Parts.of(manifest))

    @property
    def part_base(self) -> np.ndarray:
        """int64 [parts + 1]: the gid of each part's first row, then the number of rows."""
        return self.parts.base

    @property
    def num_images(self) -> int:
        return int(self.parts.base[-1])

    @property
    def num_parts(self) -> int:
        return len(self.parts.ids)

    def only(self, parts: range) -> "ImageSet":
        """Consecutive parts alone, rows counted from the first of them."""
        base = self.parts.base[parts.start : parts.stop + 1]
        gone = frozenset(part - parts.start for part in self.parts.gone if part in parts)
        return ImageSet(
            self.folder,
            replace(self.parts, ids=self.parts.ids[parts.start : parts.stop], base=base - base[0], gone=gone),
        )

    def _name(self, part: int) -> str:
        return f"part-{self.parts.ids[part].decode()}"

    def index(self, part: int, columns: Sequence[str] | None = None) -> pa.Table:
        wanted = list(columns) if columns is not None else None
        table = self.folder.read_table(f"index/{self._name(part)}.parquet", wanted)
        return _of_gone(table) if part in self.parts.gone else table

    def rows_between(self, start: int, stop: int) -> list[PartRows]:
        """What holds the gids [start, stop), in their order: all that a task on a range needs to know of the set."""
        base = self.parts.base
        parts = range(max(0, int(np.searchsorted(base, start, side="right")) - 1), int(np.searchsorted(base, stop)))
        found = [
            PartRows(
                f"index/{self._name(part)}.parquet",
                max(start - int(base[part]), 0),
                min(stop, int(base[part + 1])) - int(base[part]),
                part in self.parts.gone,
            )
            for part in parts
        ]
        return [rows for rows in found if rows.stop > rows.start]

    def whole_parts(self, start: int, stop: int) -> list[tuple[PartRows, int]]:
        """Every part that has rows among the gids [start, stop), whole, and the gid of its first row."""
        base = self.parts.base
        parts = range(max(0, int(np.searchsorted(base, start, side="right")) - 1), int(np.searchsorted(base, stop)))
        return [
            (self.rows_between(int(base[part]), int(base[part + 1]))[0], int(base[part]))
            for part in parts
            if base[part] < base[part + 1]
        ]

    def rows(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Index rows of the gids [start, stop)."""
        tables = [read_rows(self.folder, rows, columns) for rows in self.rows_between(start, stop)]
        return pa.concat_tables([INDEX_SCHEMA.empty_table().select(columns), *tables])

    def column(self, name: str) -> np.ndarray:
        """One column over all gids: numbers as they are (0 for null), fixed-size binary as uint8 [N, width]."""
        return np.concatenate([column_values(self.index(part, [name])[name]) for part in range(self.num_parts)])

    def embeddings(self, encoder: str, part: int) -> np.ndarray:
        """float16 [rows of the part, D]; rows of images that were not decoded are zero."""
        return self.folder.read_array(f"{encoder}/{self._name(part)}.npy")

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


def read_rows(folder: Folder, rows: PartRows, columns: Sequence[str]) -> pa.Table:
    """Index rows of one part, columns in the order asked."""
    table = folder.table_rows(rows.path, rows.start, rows.stop, columns).select(list(columns))
    return _of_gone(table) if rows.is_gone else table


def _of_gone(table: pa.Table) -> pa.Table:
    """Index rows of a part that has gone: rejected, and without what could be compared with anything."""
    for name in set(_GONE) & set(table.column_names):
        at = table.schema.get_field_index(name)
        values = pa.array([_GONE[name]] * table.num_rows, table.field(at).type)
        table = table.set_column(at, table.field(at), values)
    return table


def encoder_folder(spec: str) -> str:
    """A folder name for an encoder: its spec with what a path cannot hold replaced."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in spec)[-80:]


def column_values(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        filled = column.fill_null(b"\0" * width).combine_chunks()
        return np.frombuffer(filled.buffers()[1], np.uint8).reshape(-1, width)[filled.offset :][: len(filled)]
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        column = column.fill_null(0)
    return column.to_numpy()
