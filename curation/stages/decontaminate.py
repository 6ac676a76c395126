"""decontaminate/NAME: what of the pool copies an image of one evaluation set, by the same cascade and the same join.

Every set is a step of its own, so that a new one costs its own comparisons; sets that are not done yet share one pass
over the pool's hashes and one over its vectors. What is dropped for the matches is the next step (stages/survivors.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.ranges import check_ranges
from curation.engine.devices import run_on, task_device
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import column_values
from curation.engine.workers import ExecutionConfig, run_tasks
from curation.ops.cells import Cells
from curation.ops.hashes import hash_matches
from curation.ops.join import pairs_above
from curation.ops.recall import sketch_radius
from curation.stages.asking import Asked, blocks, pieces
from curation.stages.filter import read_batches

VERSION = 2
_SKETCH_LOSS = 1e-4  # evaluation sets are small: all cells are probed, sketches may lose this share at the threshold
_EXACT_ROWS = 2**14
_MOST_SLICES = 1024  # of the pool's vectors: a piece of work, and what an interruption repeats
_SLICE_ROWS = 2**16
_PAIR_BYTES = 64  # of a match while it is sorted; a slice's rows may all be near every query
MODES = ("component", "direct")
STEPS = ("exact", "perceptual", "embedding")

MATCHES = pa.schema(
    [
        ("gid", pa.int64()),  # the pool image
        ("evaluation_gid", pa.int64()),  # its row in the evaluation set
        ("similarity", pa.float32()),  # cosine of the copy encoder; of hashes, 1 less the share of bits that differ
        ("step", pa.string()),  # one of STEPS
    ]
)


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Source: DINOv2, arXiv:2304.07193, appendix A.3: relative deduplication at cosine 0.45, whole components."""

    perceptual_distance: int = 24
    """PDQ bits of 256, 0..31"""
    similarity_threshold: float = 0.45
    """cosine of the copy encoder at or above which a pool image copies an evaluation image"""
    mode: str = "component"
    """component: drop the whole near-duplicate component of a match; direct: the match and what looks the same"""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"decontaminate.mode={self.mode!r} is unknown; choose {' or '.join(MODES)}.")
        check_ranges("decontaminate", self, perceptual_distance="[0, 31]", similarity_threshold="(-1, 1]")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation set, and the folder of its step."""

    folder: Folder
    asked: Asked


def match_sets(
    sets: Sequence[Evaluation],
    filtered: Folder,
    ranges: Ranges,
    cells: Cells,
    mirror: np.ndarray | None,
    config: DecontaminateConfig,
    execution: ExecutionConfig,
) -> None:
    """Compare evaluation sets with the images that passed the filters, each slice of the pool with all of them.

    Each set's folder gets looks-*.parquet, one for each range of gids, and vectors-*.parquet, one for each slice of the
    cells (MATCHES, of each of them and step the strongest match of an image). What is there is not done again.

    Args:
        filtered: the folder of the filter stage.
    """
    there = [set(one.folder.names()) for one in sets]

    def lacking(name: str) -> list[int]:
        return [number for number, names in enumerate(there) if name not in names]

    numbers = [(range_file("looks", number), number) for number in range(len(ranges))]
    todo = [(name, number, wanted) for name, number in numbers if (wanted := lacking(name))]
    run_tasks(
        _match_looks,
        todo,
        [_Looks.of(one) for one in sets] if todo else [],
        filtered,
        ranges,
        config.perceptual_distance,
        execution=execution,
        label="decontaminate: hashes",
        unit="images",
        weights=[ranges.weights()[number] for _, number, _ in todo],
    )
    slices = list(enumerate(cells.slices(_MOST_SLICES, _SLICE_ROWS)))
    jobs = [
        (name, first, stop, wanted)
        for number, (first, stop) in slices
        if (wanted := lacking(name := f"vectors-{number:05d}.parquet"))
    ]
    at_threshold = np.array([config.similarity_threshold])
    device = task_device(execution)
    run_on(
        device,
        _match_vectors,
        jobs,
        sets,
        cells,
        config.similarity_threshold,
        None if cells.num_rows <= _EXACT_ROWS else sketch_radius(at_threshold, _SKETCH_LOSS),
        mirror,
        int(execution.memory_gb * 0.5e9),
        device,
        execution=execution,
        label="decontaminate: vectors",
        unit="images",
        weights=[int(cells.offsets[stop] - cells.offsets[first]) for _, first, stop, _ in jobs],
    )


def written(one: Evaluation, execution: ExecutionConfig) -> tuple[list[File], dict[str, int]]:
    """What `match_sets` wrote for a set, and what it counted: (file, count by step of the cascade)."""
    files = pieces(one.folder, ("looks-", "vectors-"), execution, "decontaminate")
    counts = {"images": len(one.asked.gids)}
    counts |= {f"matches, {step}": 0 for step in STEPS}
    for file in files:
        for entry in one.folder.read_table(file.path, ["step"])["step"].value_counts().to_pylist():
            counts[f"matches, {entry['values']}"] += entry["counts"]
    return files, counts


def strongest(matches: pa.Table) -> pa.Table:
    """One row a pool image: exact before perceptual before embedding, then the larger similarity.

    Equal ones: the set and then the row that come first.
    """
    rank = pc.index_in(matches["step"], value_set=pa.array(STEPS)).to_numpy()  # type: ignore[attr-defined]  # stubs lack index_in
    keys = [matches["evaluation_gid"].to_numpy()]
    if "evaluation" in matches.column_names:
        keys.append(np.array(matches["evaluation"].to_pylist(), str))
    keys += [-matches["similarity"].to_numpy().astype(np.float64), rank, matches["gid"].to_numpy()]
    order = np.lexsort(keys)
    _, first = np.unique(keys[-1][order], return_index=True)
    return matches.take(pa.array(order[first]))


@dataclass(frozen=True)
class _Looks:
    """Digests and perceptual hashes of an evaluation set."""

    folder: Folder
    digests: np.ndarray  # S32, ascending, distinct, of the rows that follow
    rows: np.ndarray
    good: np.ndarray
    hashes: np.ndarray
    mirrored: np.ndarray
    quality: np.ndarray

    @staticmethod
    def of(one: Evaluation) -> "_Looks":
        images, good = one.asked.images, one.asked.gids
        digests, rows = np.unique(_digests(images.column("sha256")), return_index=True)
        known = digests != b""
        columns = (images.column(name)[good] for name in ("pdq", "pdq_mirrored", "pdq_quality"))
        return _Looks(one.folder, digests[known], rows[known], good, *columns)


def _digests(sha256: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(sha256).view("S32").ravel()


def _match_looks(
    job: tuple[str, int, list[int]], sets: list[_Looks], filtered: Folder, ranges: Ranges, perceptual_distance: int
) -> None:
    name, number, wanted = job
    found = {which: [MATCHES.empty_table()] for which in wanted}
    start, _ = ranges.bounds(number)
    for table in read_batches(filtered, number, ["reason", "sha256", "pdq", "pdq_quality"]):
        gids = np.flatnonzero(table["reason"].is_null().to_numpy()) + start
        start += table.num_rows
        table = table.filter(table["reason"].is_null())
        digests, hashes = _digests(column_values(table["sha256"])), column_values(table["pdq"])
        quality = column_values(table["pdq_quality"])
        for which in wanted:
            one = sets[which]
            if len(one.digests) and len(gids):
                place = np.minimum(np.searchsorted(one.digests, digests), len(one.digests) - 1)
                same = np.flatnonzero(one.digests[place] == digests)
                found[which].append(_table(gids[same], one.rows[place[same]], np.ones(len(same)), "exact"))
            query, row, distance = hash_matches(
                one.hashes, one.quality, hashes, quality, perceptual_distance, one.mirrored
            )
            found[which].append(strongest(_table(gids[row], one.good[query], 1 - distance / 256, "perceptual")))
    for which in wanted:
        sets[which].folder.write_table(name, strongest(pa.concat_tables(found[which])))


def _match_vectors(
    job: tuple[str, int, int, list[int]],
    sets: Sequence[Evaluation],
    cells: Cells,
    threshold: float,
    radius: int | None,
    mirror: np.ndarray | None,
    memory_bytes: int,
    device: str | None,
) -> None:
    name, first, stop, wanted = job
    slice_ = cells.between(first, stop)
    # Few rows at a time, and so few queries that every pair of them may match.
    queries_at_once = max(memory_bytes // 2 // (_PAIR_BYTES * _SLICE_ROWS), 64)
    found: dict[int, list[pa.Table]] = {number: [MATCHES.empty_table()] for number in wanted}
    for block in blocks([sets[number].asked for number in wanted], queries_at_once):
        vectors = np.concatenate([piece.vectors() for _, piece in block])
        sets_of = np.concatenate([np.full(len(piece.gids), position) for position, piece in block])
        rows_of = np.concatenate([piece.gids for _, piece in block])
        for low, high in slice_.slices(slice_.num_cells, _SLICE_ROWS):
            run = slice_.between(low, high)
            pairs = pairs_above(
                vectors, run, threshold, run.num_cells, radius, mirror=mirror, max_memory_bytes=memory_bytes // 2,
                num_threads=1, device=device,
            )  # fmt: skip
            for position in np.unique(sets_of[pairs.query]).tolist():
                own = np.flatnonzero(sets_of[pairs.query] == position)
                query = pairs.query[own]
                matches = _table(pairs.gid[own], rows_of[query], pairs.similarity[own], "embedding")
                found[wanted[position]].append(strongest(matches))
    for number in wanted:
        sets[number].folder.write_table(name, strongest(pa.concat_tables(found[number])))


def _table(gids: np.ndarray, rows: np.ndarray, similarity: np.ndarray, step: str) -> pa.Table:
    steps = pa.DictionaryArray.from_arrays(np.zeros(len(gids), np.int32), [step]).cast(pa.string())
    columns = [gids, rows, similarity.astype(np.float32), steps]
    return pa.table(dict(zip(MATCHES.names, columns, strict=True)), schema=MATCHES)
