"""What a join takes over from the run that it extends, so that only new images ask.

An image is new whose vector that run's join did not compare. Pairs of two others are that run's edges: its files are
taken as they are, but for edges of images that are not compared any more. Those are written without them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest
from curation.engine.ranges import Ranges
from curation.engine.workers import ExecutionConfig, run_pieces, run_tasks
from curation.ops.cells import Cells
from curation.ops.components import spanning_forest
from curation.stages.heads import is_head
from curation.stages.members import Members, write_members

_BLOCK_ROWS = 2**22  # of the cells, whose images are looked up together
_PIECES_AT_ONCE = 256


@dataclass(frozen=True)
class JoinedBefore:
    """The join of the run that is extended."""

    folder: Folder
    manifest: Manifest
    heads: Folder
    """what it compared"""
    ranges: Ranges
    """of its images"""

    @property
    def floor(self) -> float:
        return self.manifest.figures["floor"]

    def refusal(self, version: int, highest_floor: float, target_recall: float) -> str | None:
        """Why a join of such settings cannot take over these edges; None where it can.

        Args:
            highest_floor: its edges would do down to there.
        """
        if self.manifest.version != version:
            return "another version of this program wrote its edges"
        if self.floor > highest_floor:
            return f"it has edges down to cosine {self.floor:g} only, and {highest_floor:g} is asked for"
        if (had := self.manifest.settings["target_recall"]) < target_recall:
            return f"its recall is certified for dedup.target_recall={had:g} only"
        return None

    def pieces(self) -> list[tuple[File, File]]:
        """Its files of edges, each with that of their forest."""
        files = {file.path: file for file in self.manifest.files}
        edges = sorted(path for path in files if path.startswith("edges/"))
        return [(files[path], files[path.replace("edges/", "forest/", 1)]) for path in edges]


@dataclass(frozen=True)
class NewRows:
    """The rows of the cells whose images are new: files of row numbers, one for each block of the cells."""

    folder: Folder
    base: np.ndarray
    """int64 [blocks + 1]: how many are new before each block"""

    def __len__(self) -> int:
        return int(self.base[-1])

    def between(self, start: int, stop: int) -> np.ndarray:
        """int64, ascending: those of the rows start to stop."""
        blocks = range(start // _BLOCK_ROWS, min(-(-stop // _BLOCK_ROWS), len(self.base) - 1))
        rows = np.concatenate([np.zeros(0, np.int64), *(self.folder.read_array(_name(b)) for b in blocks)])
        return rows[slice(*np.searchsorted(rows, [start, stop]))]

    def numbered(self, start: int, stop: int) -> np.ndarray:
        """int64: start to stop of all that are new."""
        blocks = range(int(np.searchsorted(self.base, start, side="right")) - 1, int(np.searchsorted(self.base, stop)))
        rows = np.concatenate([np.zeros(0, np.int64), *(self.folder.read_array(_name(b)) for b in blocks)])
        return rows[start - int(self.base[blocks.start]) :][: stop - start]


def find_new_rows(folder: Folder, cells: Cells, before: JoinedBefore, execution: ExecutionConfig) -> NewRows:
    """Write, and name, the rows of the cells that RUN did not compare; what is written already is kept."""
    chosen = partial(is_head, folder=before.heads, ranges=before.ranges)
    compared = write_members(folder / "before", before.ranges, chosen, execution, "join: earlier release")
    starts = range(0, cells.num_rows, _BLOCK_ROWS)
    names = [_name(number) for number in range(len(starts))]
    run_pieces(
        _write_new, list(starts), names, folder / "new", cells, compared, execution=execution, label="join: new images",
        unit="blocks",
    )  # fmt: skip
    sizes = run_tasks(_size, names, folder / "new", execution=execution, label="join: new images", unit="files")
    return NewRows(folder / "new", np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64))


def take_edges(
    folder: Folder, before: JoinedBefore, heads: Folder, ranges: Ranges, execution: ExecutionConfig
) -> list[dict[str, Any]]:
    """Take over all files of edges and forests, each without the images that are compared no more.

    Args:
        heads, ranges: of this run.

    Returns:
        of each piece, what the join writes of its own (`done/`).
    """
    pieces = before.pieces()
    names = [f"done/{_piece(number)}.json" for number in range(len(pieces))]
    there = set((folder / "done").names())
    todo = [number for number, name in enumerate(names) if name.removeprefix("done/") not in there]
    if todo:
        chosen = partial(_lost, before=before, heads=heads, ranges=ranges)
        lost = write_members(folder / "lost", before.ranges, chosen, execution, "join: earlier release")
        jobs = [
            [(number, *pieces[number]) for number in todo[i : i + _PIECES_AT_ONCE]]
            for i in range(0, len(todo), _PIECES_AT_ONCE)
        ]
        run_tasks(
            _take_pieces, jobs, folder, before.folder, lost, execution=execution, label="join: earlier edges",
            unit="files", weights=[float(len(job)) for job in jobs],
        )  # fmt: skip
    return [json.loads(folder.read_bytes(name)) for name in names]


def clear(folder: Folder) -> None:
    """Delete what `find_new_rows` and `take_edges` left in the join's folder for themselves."""
    (folder / "new").clear(("rows-*.npy",))
    for name in ("before", "lost"):
        (folder / name).clear(("members-*.npy",))


def _lost(number: int, before: JoinedBefore, heads: Folder, ranges: Ranges) -> np.ndarray:
    """bool by gid of a range: the images that were compared then, and are not now."""
    was = is_head(number, before.heads, before.ranges)
    return was & ~is_head(number, heads, ranges)[: len(was)]


def _take_pieces(pieces: Sequence[tuple[int, File, File]], folder: Folder, earlier: Folder, lost: Members) -> None:
    for number, edges, forest in pieces:
        own = [edges, forest]
        if not len(lost) or (kept := _without(earlier.read_table(edges.path), lost)) is None:
            for file in own:
                folder.take(file.path, earlier)
        else:
            a, b, similarity = (kept[name].to_numpy() for name in ("a", "b", "similarity"))
            tree = kept.take(pa.array(spanning_forest(a, b, similarity))).select(["a", "b", "similarity"])
            own = [folder.write_table(file.path, table) for file, table in ((edges, kept), (forest, tree))]
        piece = {
            "number": number,
            "files": [asdict(file) for file in own],
            "found": [],  # of the true pairs that are sampled: each has an end that is new
            "capped_ends": [],
            "edges": own[0].rows,
            "forest edges": own[1].rows,
            "capped images": 0,  # counted once for all pieces
        }
        folder.write_bytes(f"done/{_piece(number)}.json", json.dumps(piece).encode())


def _without(edges: pa.Table, lost: Members) -> pa.Table | None:
    """The edges that have no end among the lost; None where none has."""
    gone = lost.include(edges["a"].to_numpy()) | lost.include(edges["b"].to_numpy())
    return edges.filter(pa.array(~gone)) if gone.any() else None


def _piece(number: int) -> str:
    return f"part-{number:06d}"


def _write_new(start: int, folder: Folder, name: str, cells: Cells, compared: Members) -> None:
    gids = cells.read_gids(start, min(start + _BLOCK_ROWS, cells.num_rows))
    folder.write_array(name, np.flatnonzero(~compared.include(gids)) + start)


def _size(name: str, folder: Folder) -> int:
    return len(folder.read_array(name))


def _name(number: int) -> str:
    return f"rows-{number:05d}.npy"
