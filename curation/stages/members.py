"""Which images of a set take part in a stage, and their vectors: a bit an image, in files of a range of gids."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from curation.engine.folder import Folder
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.randomness import hash_uint64

CHUNK_ROWS = 2**16
"""Rows of a set that a task reads, about: whole parts, at least one."""


@dataclass(frozen=True)
class Members:
    """Some images of a set of `ranges.num_rows`; a task reads those of its own gids."""

    folder: Folder
    ranges: Ranges
    counts: tuple[int, ...]
    """members in each range"""

    def __len__(self) -> int:
        return sum(self.counts)

    def between(self, start: int, stop: int) -> np.ndarray:
        """int64, ascending: the members of start <= gid < stop."""
        found, stop = [np.zeros(0, np.int64)], min(stop, self.ranges.num_rows)
        for number in range(start // self.ranges.size, -(-stop // self.ranges.size)):
            first, last = self.ranges.bounds(number)
            bits = np.unpackbits(self.folder.read_array(_name(number)), count=last - first)
            low, high = max(start - first, 0), min(stop, last) - first
            found.append(np.flatnonzero(bits[low:high]) + first + low)
        return np.concatenate(found)

    def numbered(self, start: int, stop: int) -> np.ndarray:
        """int64: start to stop of all members."""
        base = np.concatenate([[0], np.cumsum(self.counts)])
        numbers = range(int(np.searchsorted(base, start, side="right")) - 1, int(np.searchsorted(base, stop)))
        if not numbers:
            return np.zeros(0, np.int64)
        members = self.between(self.ranges.bounds(numbers[0])[0], self.ranges.bounds(numbers[-1])[1])
        return members[start - int(base[numbers[0]]) :][: stop - start]

    def include(self, gids: np.ndarray) -> np.ndarray:
        """bool: which of some images take part, one range of those that have any in memory at a time."""
        found = np.zeros(len(gids), bool)
        number_of = gids // self.ranges.size
        for number in np.unique(number_of[gids < self.ranges.num_rows]).tolist():
            if self.counts[number]:
                own = np.flatnonzero(number_of == number)
                first, last = self.ranges.bounds(number)
                own = own[gids[own] < last]
                bits, at = self.folder.read_array(_name(number)), gids[own] - first
                found[own] = bits[at >> 3] >> (7 - (at & 7)).astype(np.uint8) & 1 > 0
        return found


def write_members(
    folder: Folder, ranges: Ranges, chosen: Callable[[int], np.ndarray], execution: ExecutionConfig, label: str
) -> Members:
    """Keep who takes part in files of `folder`.

    Args:
        chosen: number of a range -> bool by gid; tasks call it.
    """
    numbers = range(len(ranges))
    counts = run_tasks(
        _write_members, numbers, folder, chosen, execution=execution, label=label, unit="images",
        weights=ranges.weights(),
    )  # fmt: skip
    return Members(folder, ranges, tuple(counts))


def _write_members(number: int, folder: Folder, chosen: Callable[[int], np.ndarray]) -> int:
    bits = chosen(number)
    folder.write_array(_name(number), np.packbits(bits))
    return int(bits.sum())


def count_ids(
    ids_of: Callable[[int], np.ndarray], numbers: Sequence[int], num_ids: int, execution: ExecutionConfig, label: str
) -> np.ndarray:
    """int64 [num_ids]: how often each id occurs in `ids_of(number)`, of all numbers of ranges; tasks call it."""
    counts = np.zeros(num_ids, np.int64)

    def add(counted: tuple[np.ndarray, np.ndarray]) -> None:
        ids, some = counted
        counts[ids] += some

    run_tasks(_count, numbers, ids_of, execution=execution, label=label, unit="ranges", take=add)
    return counts


def _count(number: int, ids_of: Callable[[int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    ids, counts = np.unique(ids_of(number), return_counts=True)
    return ids, counts


def assigned_ids(level: Folder, number: int) -> np.ndarray:
    """The cells of those rows of a range that are in one."""
    assignment = level.read_array(f"assignment-{number:05d}.npy")
    return assignment[assignment >= 0]


@dataclass(frozen=True)
class ImageRows:
    """Vectors of the members of a set, read by chunks of its parts; their ids are gids."""

    images: ImageSet
    encoder: str
    members: Members

    def __len__(self) -> int:
        return len(self.members)

    def chunks(self) -> list[tuple[int, int]]:
        """(first part, one after the last) of each piece of work."""
        base = self.images.part_base
        cuts = np.searchsorted(base, np.arange(0, self.images.num_images, CHUNK_ROWS), side="left")
        cuts = np.unique(np.concatenate([[0], cuts, [self.images.num_parts]]))
        return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))

    def bounds(self) -> list[tuple[int, int]]:
        """The gids between which each chunk's images lie: the first, and one after the last."""
        base = self.images.part_base
        return [(int(base[start]), int(base[stop])) for start, stop in self.chunks()]

    def weights(self) -> list[float]:
        """Images of each chunk, for a progress line."""
        return [float(stop - start) for start, stop in self.bounds()]

    def ids(self, chunk: tuple[int, int]) -> np.ndarray:
        """int64, ascending."""
        base = self.images.part_base
        return self.members.between(int(base[chunk[0]]), int(base[chunk[1]]))

    def read(
        self, chunk: tuple[int, int], seed: int = 0, largest: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, float16 rows) part by part; of ids whose hash is at most `largest`, where that is given."""
        base, gids = self.images.part_base, self.ids(chunk)
        if largest is not None:
            gids = gids[hash_uint64(seed, gids) <= np.uint64(largest)]
        for part in range(*chunk):
            own = gids[slice(*np.searchsorted(gids, base[part : part + 2]))]
            if len(own):
                yield own, self.images.embeddings(self.encoder, part)[own - base[part]]


class RowSource(Protocol):
    """Where the rows of a clustering come from: cheap to pickle, read chunk by chunk in tasks."""

    def __len__(self) -> int: ...

    def chunks(self) -> Sequence[Any]: ...

    def weights(self) -> list[float]: ...

    def bounds(self) -> list[tuple[int, int]]: ...

    def ids(self, chunk: Any) -> np.ndarray: ...

    def read(
        self, chunk: Any, seed: int = 0, largest: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...


@dataclass(frozen=True)
class CentroidRows:
    """Centroids as rows to be clustered: float32 files, one a chunk; their ids count through all of them."""

    folder: Folder
    names: tuple[str, ...]
    base: np.ndarray
    """int64 [files + 1]: the id of each file's first row, then the number of rows"""

    def __len__(self) -> int:
        return int(self.base[-1])

    def chunks(self) -> list[int]:
        return list(range(len(self.names)))

    def bounds(self) -> list[tuple[int, int]]:
        return list(zip(self.base[:-1].tolist(), self.base[1:].tolist(), strict=True))

    def weights(self) -> list[float]:
        return np.diff(self.base).astype(float).tolist()

    def ids(self, chunk: int) -> np.ndarray:
        return np.arange(self.base[chunk], self.base[chunk + 1])

    def read(self, chunk: int, seed: int = 0, largest: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        ids, rows = self.ids(chunk), self.folder.read_array(self.names[chunk])
        if largest is not None:
            chosen = hash_uint64(seed, ids) <= np.uint64(largest)
            ids, rows = ids[chosen], rows[chosen]
        yield ids, rows


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of a source as float32 of norm 1: stored vectors are brought to it, centroids have it."""
    return rows if rows.dtype == np.float32 else unit_rows(rows)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """float16 rows as stored -> float32 rows of norm 1; rounding to float16 moved the norm by up to 5e-4."""
    rows = rows.astype(np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _name(number: int) -> str:
    return f"members-{number:05d}.npy"
