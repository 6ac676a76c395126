"""join: the edges of the pool. Every pair of near embeddings down to a floor, with its similarity, and its certificate.

Edges serve every threshold at or above the floor: another one is a filter (Joined), and no new join. A run that extends
another takes over the edges of that, and only new images ask (stages/joined_before.py).
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.devices import num_at_once, run_on, task_device
from curation.engine.folder import Folder
from curation.engine.manifest import MANIFEST_NAME, File, Manifest
from curation.engine.ranges import Ranges
from curation.engine.workers import ExecutionConfig
from curation.ops.cells import Cells
from curation.ops.components import spanning_forest
from curation.ops.neighbours import PIECE_ROWS, near_rows, run_rows
from curation.ops.recall import AllRows, Certificate, are_among, certify, found_by
from curation.ops.true_pairs import Hits, Question, TruePairs, hits_in_range
from curation.stages import joined_before
from curation.stages.joined_before import JoinedBefore
from curation.stages.members import Members

logger = logging.getLogger(__name__)

VERSION = 1
_MEMORY_SHARE = (
    0.5  # of execution.memory_gb, for a run's rows and tiles: Python, Arrow and a piece being written come on top
)
_CERTIFIED_TOGETHER = 2**20  # rows that a task compares with the sample
_EDGE_MARGIN = 0.05
_OF_EXTENSION = ("new_images", "earlier_edges", "earlier_lower_bound")


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """What decides the edges; of DedupConfig."""

    floor: float
    """cosine at or above which a pair is an edge"""
    target_recall: float
    seed: int


@dataclass(frozen=True)
class Joined:
    """What the join stage wrote: a file for each 65,536 rows that asked, by name. Pairs (a, b) are gids, a < b.

    A pair stands once in a file, and may stand in two.
    """

    folder: Folder

    def pieces(self) -> list[str]:
        return [name.removeprefix("edges/") for name in (self.folder / "edges").names()]

    def counts(self) -> dict[str, int]:
        """images (that were compared), edges, forest edges, and capped images: those that may have more pairs."""
        return Manifest.from_json(self.folder.read_bytes(MANIFEST_NAME).decode()).counts

    def covered(self) -> dict[str, Any]:
        """Of a join that takes over that of an earlier run, what it says of itself: see `join_pool`."""
        figures = Manifest.from_json(self.folder.read_bytes(MANIFEST_NAME).decode()).figures
        return {name: figures[name] for name in _OF_EXTENSION if name in figures}

    def edges(self, piece: str, threshold: float) -> pa.Table:
        """a, b, similarity, mirrored of the pairs at or above the threshold."""
        return _at_least(self.folder.read_table(f"edges/{piece}"), threshold)

    def forest(self, piece: str, threshold: float) -> pa.Table:
        """a, b, similarity of edges that join what the piece's edges at or above the threshold join."""
        return _at_least(self.folder.read_table(f"forest/{piece}"), threshold)

    def certificate(self) -> Certificate:
        return Certificate(**json.loads(self.folder.read_bytes("certificate.json")))

    def truth(self, threshold: float) -> tuple[TruePairs, np.ndarray]:
        """The sampled true pairs at or above the threshold, and which the join found, bool [P].

        Found: among the edges, or, where an end is capped, met before its edges were cut.
        """
        table = _at_least(self.folder.read_table("found.parquet"), threshold)
        return _read_truth(table), table["is_found"].to_numpy(zero_copy_only=False)


def default_floor(similarity_threshold: float) -> float:
    """Pairs somewhat below the threshold show people what it parts."""
    return round(max(similarity_threshold - _EDGE_MARGIN, -1.0), 6)


@dataclass(frozen=True)
class Extension:
    """A join that takes over another's edges."""

    before: JoinedBefore
    heads: Folder
    """what this one compares"""
    ranges: Ranges


def join_pool(
    folder: Folder,
    cells: Cells,
    mirror: np.ndarray | None,
    settings: JoinSettings,
    execution: ExecutionConfig,
    extension: Extension | None = None,
) -> tuple[list[File], dict[str, int], dict[str, Any]]:
    """Certify, then find every row's neighbours; see Joined for what is written.

    Args:
        cells: the copy encoder's vectors of the images that are compared.
        mirror: signs that turn a vector into that of the flipped image, or None.
        extension: whose edges to take over, down to the same floor; the certificate is then of pairs with an image that
            is new, found from it. Figures say how many are new (new_images), how many edges are not of them
            (earlier_edges), and what is certified of those (earlier_lower_bound).
    """
    asking: AllRows | Members = AllRows(cells.num_rows)
    done: list[dict[str, Any]] = []
    if extension is not None:
        before = extension.before
        asking = joined_before.find_new_rows(folder, cells, before, execution)
        done = joined_before.take_edges(folder, before, extension.heads, extension.ranges, execution)
    base, figures = len(done), {}
    if not folder.exists("certificate.json"):
        _certify(folder, cells, mirror, settings, execution, asking)
    certificate, truth = Joined(folder).certificate(), _read_truth(folder.read_table("truth.parquet"))
    names = [f"part-{base + number:06d}" for number in range(-(-len(asking) // PIECE_ROWS))]
    there = set((folder / "done").names())
    if extension is not None:
        figures["new_images"] = len(asking)
        figures["earlier_edges"] = sum(piece["edges"] for piece in done)
        bounds = [extension.before.manifest.figures[name] for name in ("lower_bound", "earlier_lower_bound")
                  if name in extension.before.manifest.figures]  # fmt: skip
        figures["earlier_lower_bound"] = min(bounds)
    done += [json.loads(folder.read_bytes(f"done/{name}.json")) for name in names if f"{name}.json" in there]
    missing = [number for number, name in enumerate(names) if f"{name}.json" not in there]
    memory = int(execution.memory_gb * 1e9 * _MEMORY_SHARE)
    device = task_device(execution)
    fair = -(-len(asking) // (2 * num_at_once(device, execution)))  # or a pool of few runs would leave workers idle
    rows = min(run_rows(cells, certificate.nprobe, mirror is not None, memory), -(-fair // PIECE_ROWS) * PIECE_ROWS)
    jobs = [
        (run[0] * PIECE_ROWS, min((run[-1] + 1) * PIECE_ROWS, len(asking)))
        for run in _consecutive(missing, max(rows // PIECE_ROWS, 1))
    ]
    bytes_read = 0
    for pieces, run_bytes in run_on(
        device,
        _join_run,
        jobs,
        folder,
        cells,
        asking,
        base,
        mirror,
        settings.floor,
        certificate,
        truth,
        memory,
        device,
        execution=execution,
        label="join",
        unit="images",
        weights=[float(stop - start) for start, stop in jobs],
    ):
        done += pieces
        bytes_read += run_bytes
    logger.info("join: %d runs of up to %d images read %.1f GB of cells", len(jobs), rows, bytes_read / 1e9)
    among, capped = (np.zeros(len(truth.gid), bool) for _ in range(2))
    for piece in done:
        among[piece["found"]] = capped[piece["capped_ends"]] = True
    found = among | (capped & found_by(truth, certificate.nprobe, certificate.sketch_radius))
    files = [File(**file) for piece in sorted(done, key=lambda piece: piece["number"]) for file in piece["files"]]
    files += [_write_truth(folder, "found.parquet", truth, found)]
    totals = ("edges", "forest edges", "capped images")
    counts = {"images": cells.num_rows, **{name: sum(piece[name] for piece in done) for name in totals}}
    if extension is not None:
        counts["capped images"] += extension.before.manifest.counts["capped images"]
        joined_before.clear(folder)
    return files, counts, {**asdict(certificate), "floor": settings.floor, **figures}


def _certify(
    folder: Folder,
    cells: Cells,
    mirror: np.ndarray | None,
    settings: JoinSettings,
    execution: ExecutionConfig,
    asking: AllRows | Members,
) -> None:
    """Write truth.parquet and then certificate.json, so that a join that goes on goes on with the same."""
    memory = int(execution.memory_gb * 1e9 * _MEMORY_SHARE)
    starts = range(0, cells.num_rows, _CERTIFIED_TOGETHER)
    ranges = [(start, min(start + _CERTIFIED_TOGETHER, cells.num_rows)) for start in starts]
    device = task_device(execution)

    def compare(question: Question) -> list[Hits]:
        return run_on(
            device,
            _compare_range,
            ranges,
            cells,
            question,
            memory,
            device,
            execution=execution,
            label="join: certify",
            unit="images",
            weights=[float(stop - start) for start, stop in ranges],
        )

    certificate, truth = certify(
        cells, settings.floor, settings.target_recall, seed=settings.seed, mirror=mirror, compare=compare, asking=asking
    )
    _write_truth(folder, "truth.parquet", truth, None)
    folder.write_bytes("certificate.json", json.dumps(asdict(certificate)).encode())


def _compare_range(
    job: tuple[int, int], cells: Cells, question: Question, memory_bytes: int, device: str | None
) -> Hits:
    return hits_in_range(cells, *job, question, max_memory_bytes=memory_bytes, device=device)


def _join_run(
    job: tuple[int, int],
    folder: Folder,
    cells: Cells,
    asking: AllRows | Members,
    base: int,
    mirror: np.ndarray | None,
    floor: float,
    certificate: Certificate,
    truth: TruePairs,
    memory_bytes: int,
    device: str | None,
) -> tuple[list[dict[str, Any]], int]:
    """Join the asking rows [start, stop), and write the files of their pieces; done/ last, with what the stage needs.

    Args:
        base: the number of the first piece of all.

    Returns:
        the contents of done/, and the bytes read, which depend on the memory and so are no part of the result.
    """
    run = near_rows(
        cells, asking.numbered(*job), floor, certificate.nprobe, certificate.sketch_radius, start=job[0], mirror=mirror,
        max_memory_bytes=memory_bytes, device=device,
    )  # fmt: skip
    done = []
    for number, edges, capped in run.pieces():
        name = f"part-{base + number:06d}"
        tree = spanning_forest(edges.a, edges.b, edges.similarity)
        forest = {column: getattr(edges, column)[tree] for column in ("a", "b", "similarity")}
        tables = {"edges": pa.table(edges._asdict()), "forest": pa.table(forest)}
        files = [folder.write_table(f"{kind}/{name}.parquet", table) for kind, table in tables.items()]
        ends = np.isin(truth.query, capped) | np.isin(truth.gid, capped)
        piece = {
            "number": base + number,
            "files": [asdict(file) for file in files],
            "found": np.flatnonzero(are_among(edges, truth)).tolist(),
            "capped_ends": np.flatnonzero(ends).tolist(),
            "edges": len(edges.a),
            "forest edges": len(tree),
            "capped images": len(capped),
        }
        folder.write_bytes(f"done/{name}.json", json.dumps(piece).encode())
        done.append(piece)
    return done, run.bytes_read


def _consecutive(numbers: list[int], most: int) -> Iterator[list[int]]:
    """The numbers, ascending, in runs without gaps of at most so many."""
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _write_truth(folder: Folder, name: str, truth: TruePairs, found: np.ndarray | None) -> File:
    columns = {"query": truth.query, "gid": truth.gid, "similarity": truth.similarity}
    for end, side in enumerate(("query", "gid")):
        columns |= {f"rank_from_{side}": truth.rank[:, end], f"distance_from_{side}": truth.distance[:, end]}
    return folder.write_table(name, pa.table(columns if found is None else {**columns, "is_found": found}))


def _read_truth(table: pa.Table) -> TruePairs:
    columns = {name: table[name].to_numpy() for name in table.column_names}
    rank, distance = (
        np.stack([columns[f"{what}_from_query"], columns[f"{what}_from_gid"]], axis=1) for what in ("rank", "distance")
    )
    return TruePairs(columns["query"], columns["gid"], columns["similarity"], rank, distance)


def _at_least(table: pa.Table, threshold: float) -> pa.Table:
    return table.filter(pc.greater_equal(table["similarity"], pa.scalar(threshold, pa.float32())))
