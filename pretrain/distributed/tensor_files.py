"""Named tensors in safetensors files, one per rank, that any number of ranks can read: each reads the rows it holds.

A rank writes its rows of sharded tensors, and its share of those that all ranks hold. In the header's metadata stand,
for each tensor, the whole shape, the first row and a SHA-256 of the bytes. Nothing is pickled, so a file is only data,
and no rank needs another one to write or to read, so it works without a process group.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a tensor."""

    name: str
    shape: tuple[int, ...]
    """of the whole tensor"""
    start: int
    """first row"""
    tensor: Tensor
    """the rows, on any device"""


def local_rows(x: Tensor) -> tuple[int, Tensor]:
    """First row and rows of a tensor that this rank holds, sharing memory; all rows of one that is not sharded.

    Rows are split as by torch.chunk, which is what FSDP2 does; a rank may hold none.
    """
    if not isinstance(x, DTensor):
        return 0, x
    *copies, rows_of = x.placements
    assert [rows_of, *copies] == [Shard(0), *[Replicate()] * len(copies)], f"sharded over rows, found {x.placements}"
    mesh_dim = x.device_mesh.ndim - 1
    rows = -(-x.shape[0] // x.device_mesh.size(mesh_dim))
    local = x.to_local()
    start = min(x.device_mesh.get_local_rank(mesh_dim) * rows, x.shape[0])
    assert len(local) == min(rows, x.shape[0] - start)
    return start, local


def _replica(x: DTensor) -> tuple[int, int]:
    """Which copy of a sharded tensor this rank holds a part of, and how many there are."""
    mesh = x.device_mesh
    return (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim > 1 else (0, 1)


def pieces_of_rank(tensors: Mapping[str, Tensor], rank: int, num_ranks: int) -> list[Piece]:
    """What one rank writes: its rows of sharded tensors, and of the others those that fall to it, by size.

    Where a tensor is held in several copies, one of them is written; which one, goes by size too.
    """
    pieces = []
    loads: dict[bool, list[int]] = {}
    for name, tensor in tensors.items():
        start, local = local_rows(tensor)
        sharded = isinstance(tensor, DTensor)
        mine, num_copies = _replica(tensor) if sharded else (rank, num_ranks)
        load = loads.setdefault(sharded, [0] * num_copies)
        owner = load.index(min(load))
        load[owner] += tensor.numel() * tensor.dtype.itemsize
        if owner == mine and (len(local) if sharded else True):
            pieces.append(Piece(name, tuple(tensor.shape), start, local))
    return pieces


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file, read when asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]
    """its rows start..stop, on the processor; of a tensor without dimensions (0, 1), and itself"""

    def read(self) -> Tensor:
        return self.rows(0, self.shape[0] if self.shape else 1)

    @staticmethod
    def of(tensor: Tensor) -> "Stored":
        """One that is in memory, or mapped into it."""
        tensor = tensor.detach()
        return Stored(tuple(tensor.shape), tensor.dtype, lambda a, b: tensor[a:b] if tensor.ndim else tensor)


def save_tensors(tensors: Mapping[str, Tensor | Stored], path: Path) -> None:
    """Whole tensors as one safetensors file, on the disk when this returns; one at a time is in memory."""
    # Wide numbers first, so that each tensor begins where its dtype may: the order of the safetensors library.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header = _header([(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order], {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            tensor = tensors[name]
            whole = tensor.read() if isinstance(tensor, Stored) else tensor.detach()
            file.write(_bytes_of(whole.cpu().contiguous()))
        file.flush()
        os.fsync(file.fileno())


def _header(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file of these tensors begins with, its length first."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write_pieces(path: Path, pieces: Sequence[Piece]) -> None:
    """One safetensors file of pieces on the CPU, on the disk when this returns."""
    details = {
        piece.name: [list(piece.shape), piece.start, hashlib.sha256(_bytes_of(piece.tensor)).hexdigest()]
        for piece in pieces
    }
    held = [(piece.name, piece.tensor.dtype, tuple(piece.tensor.shape)) for piece in pieces]
    with path.open("wb") as file:
        file.write(_header(held, {"pieces": json.dumps(details)}))
        for piece in pieces:
            file.write(_bytes_of(piece.tensor))
        file.flush()
        os.fsync(file.fileno())


def header_hash(path: Path) -> str:
    """SHA-256 of a file's header; with the hashes in it, it stands for the whole file."""
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


@dataclass(frozen=True)
class _Place:
    """A piece inside a file."""

    path: Path
    offset: int
    start: int
    rows_shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: torch.dtype
    places: list[_Place]


class DamagedFile(ValueError):
    """What was written is not what is there."""


class TensorFiles:
    """The tensors that lie in pieces in several files; headers are read now, tensors when asked for.

    Raises:
        ValueError: a file that is no such file, or damaged.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for path in paths:
            try:
                self._read_header(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DamagedFile(f"{path} is damaged: its header is not readable ({error!r}).") from error

    def _read_header(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"a header of {length} bytes in {size}")
            header = json.loads(file.read(length))
        details = json.loads(header.pop("__metadata__")["pieces"])
        for name, found in header.items():
            begin, end = found["data_offsets"]
            dtype, rows_shape = DTYPES[found["dtype"]], tuple(found["shape"])
            shape, start, sha256 = details[name]
            num_bytes = torch.Size(rows_shape).numel() * dtype.itemsize
            if begin < 0 or end - begin != num_bytes or 8 + length + end > size or len(shape) != len(rows_shape):
                raise ValueError(f"{name} does not fit")
            entry = self._entries.setdefault(name, _Entry(tuple(shape), dtype, []))
            entry.places.append(_Place(path, 8 + length + begin, start, rows_shape, sha256))

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name].dtype

    def stored(self, name: str) -> Stored:
        return Stored(self.shape(name), self.dtype(name), lambda start, stop: self.read(name, start, stop))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of a tensor (all of it by default), on the CPU.

        Raises:
            ValueError: rows that are in no file, or whose bytes are not those that were written.
        """
        entry = self._entries[name]
        if not entry.shape:
            return self._read_place(name, entry, entry.places[0])
        stop = entry.shape[0] if stop is None else stop
        result = torch.empty(stop - start, *entry.shape[1:], dtype=entry.dtype)
        filled = 0
        for place in entry.places:
            first, last = max(start, place.start), min(stop, place.start + place.rows_shape[0])
            if first < last:
                rows = self._read_place(name, entry, place)
                result[first - start : last - start] = rows[first - place.start : last - place.start]
                filled += last - first
        if filled != stop - start:
            raise DamagedFile(f"{name} is incomplete: {filled} of the rows {start} to {stop} are there.")
        return result

    def _read_place(self, name: str, entry: _Entry, place: _Place) -> Tensor:
        tensor = torch.empty(place.rows_shape, dtype=entry.dtype)
        content = _bytes_of(tensor)
        with place.path.open("rb") as file:
            file.seek(place.offset)
            got = file.readinto(content)  # type: ignore[attr-defined]  # a buffered reader has it
        if got != len(content) or hashlib.sha256(content).hexdigest() != place.sha256:
            raise DamagedFile(f"{place.path} is damaged: the bytes of {name} are not those that were written.")
        return tensor


def _bytes_of(x: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(x.reshape(-1).view(torch.uint8).numpy())
