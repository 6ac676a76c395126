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
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.cells import Cells
from curation.ops.components import spanning_forest
from curation.stages.cells_before import write_rows
from curation.stages.heads import is_head
from curation.stages.members import Members, write_members

_EDGES_AT_ONCE = 2**22


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


def find_new_rows(folder: Folder, cells: Cells, before: JoinedBefore, execution: ExecutionConfig) -> Members:
    """The rows of the cells whose images RUN did not compare."""
    chosen = partial(is_head, folder=before.heads, ranges=before.ranges)
    compared = write_members(folder / "before", before.ranges, chosen, execution, "join: earlier release")
    return write_rows(folder / "new", cells, compared, False, execution, "join: new images")


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
        # Images are looked up for many edges at once: each look reads what is known of the pool.
        cuts = np.cumsum([pieces[number][0].rows for number in todo]) // _EDGES_AT_ONCE
        jobs = [
            [(number, *pieces[number]) for number in np.array(todo)[cuts == cut].tolist()] for cut in np.unique(cuts)
        ]
        run_tasks(
            _take_pieces, jobs, folder, before.folder, lost, execution=execution, label="join: earlier edges",
            unit="files", weights=[float(len(job)) for job in jobs],
        )  # fmt: skip
    return [json.loads(folder.read_bytes(name)) for name in names]


def clear(folder: Folder) -> None:
    """Delete what `find_new_rows` and `take_edges` left in the join's folder for themselves."""
    for name in ("before", "lost", "new"):
        (folder / name).clear(("members-*.npy",))


def _lost(number: int, before: JoinedBefore, heads: Folder, ranges: Ranges) -> np.ndarray:
    """bool by gid of a range: the images that were compared then, and are not now."""
    was = is_head(number, before.heads, before.ranges)
    return was & ~is_head(number, heads, ranges)[: len(was)]


def _take_pieces(pieces: Sequence[tuple[int, File, File]], folder: Folder, earlier: Folder, lost: Members) -> None:
    gone = _gone([earlier.read_table(edges.path, ["a", "b"]) for _, edges, _ in pieces], lost) if len(lost) else None
    for place, (number, edges, forest) in enumerate(pieces):
        own = [edges, forest]
        if gone is None or not gone[place].any():
            for file in own:
                folder.take(file.path, earlier)
        else:
            kept = earlier.read_table(edges.path).filter(pa.array(~gone[place]))
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


def _gone(tables: Sequence[pa.Table], lost: Members) -> list[np.ndarray]:
    """bool for each edge of each table: it has an end among the lost."""
    a, b = (np.concatenate([table[end].to_numpy() for table in tables]) for end in ("a", "b"))
    among = lost.include(np.concatenate([a, b]))
    return np.split(among[: len(a)] | among[len(a) :], np.cumsum([table.num_rows for table in tables])[:-1])


def _piece(number: int) -> str:
    return f"part-{number:06d}"
