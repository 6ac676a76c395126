"""Pairs of near perceptual hashes: all against all for as many images as one core compares in minutes.

Beyond, the hash is a second opinion: on pairs that the join knows, between its floor and the threshold. Where a run
extends another, the pairs of that are taken over, and only new images are compared with all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.exchange import BUCKET, buckets_for, exchange
from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet, column_values
from curation.engine.workers import ExecutionConfig, run_pieces
from curation.ops.hashes import MIN_QUALITY, hash_distances, hash_matches, hash_pairs
from curation.stages.filter import read_range
from curation.stages.groups import EdgeFiles
from curation.stages.heads import is_head, read_heads
from curation.stages.members import unit_rows

_COLUMNS = ["pdq", "pdq_quality", "pdq_mirrored"]
_PAIRS_AT_ONCE = 1 << 16
_TRAVELLER_BYTES = 110  # of a pair with the hashes of its first image


@dataclass(frozen=True)
class PairsBefore:
    """All pairs of near hashes of the run that is extended, and what it compared."""

    folder: Folder
    name: str
    heads: Folder
    ranges: Ranges


def perceptual_pairs(
    folder: Folder,
    name: str,
    filtered: Folder,
    heads: Folder,
    ranges: Ranges,
    pool: ImageSet,
    encoder: str,
    max_distance: int,
    execution: ExecutionConfig,
    before: PairsBefore | None = None,
) -> int:
    """Write a file of pairs of heads within max_distance bits: a, b, similarity (cosine, for the record), distance.

    One task of about 200 bytes a head. Returns the number of pairs.

    Args:
        before: pairs of the same distance, so that only heads which it did not compare need be.
    """
    run_pieces(
        _write_pairs, [None], [name], folder, filtered, heads, ranges, pool, encoder, max_distance, before,
        execution=execution, label="dedup: near hashes", unit="tables",
    )  # fmt: skip
    return folder.num_rows(name)


@dataclass(frozen=True)
class _Work:
    """What every task of a second opinion knows."""

    folder: Folder
    filtered: Folder
    ranges: Ranges
    edges: EdgeFiles
    below: float
    max_distance: int
    cut: Ranges
    """of gids, so fine that the pairs of one piece fit"""

    @property
    def place(self) -> Folder:
        return self.folder / "exchange/opinion"


def second_opinion(
    folder: Folder,
    filtered: Folder,
    ranges: Ranges,
    edges: EdgeFiles,
    below: float,
    num_edges: int,
    max_distance: int,
    execution: ExecutionConfig,
) -> list[str]:
    """Write files of edges below a similarity whose hashes are within max_distance bits: a, b, similarity, distance.

    Each pair travels to the hashes of its first image, and then, with them, to those of its second.
    """
    num_buckets = buckets_for(num_edges * _TRAVELLER_BYTES, execution)
    cut = Ranges(ranges.num_rows, -(-ranges.num_rows // num_buckets))
    work = _Work(folder, filtered, ranges, edges, below, max_distance, cut)
    pieces = [f"piece-{num_buckets}-{number:05d}.parquet" for number in range(len(cut))]
    names = [f"edges/perceptual-{num_buckets}-{number:05d}.parquet" for number in range(len(cut))]
    exchange(
        edges.names, _low_edges, len(cut), _with_hashes, work, pieces, scratch=folder / "exchange/first",
        outputs=(work.place, pieces), sort_by=["a", "b"], execution=execution, label="dedup: hashes of pairs",
        unit="files",
    )  # fmt: skip
    exchange(
        pieces, _to_other_end, len(cut), _compared, work, names, scratch=folder / "exchange/second",
        outputs=(folder, names), sort_by=["a", "b"], execution=execution, label="dedup: near hashes", unit="files",
    )  # fmt: skip
    work.place.clear(["piece-*.parquet"])
    return names


def _low_edges(name: str, work: _Work, _: list[str]) -> Iterator[pa.Table]:
    for table in work.edges.batches(name):
        table = table.select(["a", "b", "similarity"]).filter(pc.less(table["similarity"], np.float32(work.below)))
        yield table.append_column(BUCKET, pa.array(work.cut.of(table["a"].to_numpy()).astype(np.int32)))


def _with_hashes(number: int, table: pa.Table, work: _Work, pieces: list[str]) -> None:
    if table.num_rows:
        table = table.group_by(["a", "b"], use_threads=False).aggregate([("similarity", "max")])
        table = table.rename_columns(["a", "b", "similarity"])
        hashes = _hashes_of(table["a"].to_numpy(), number, work)
        for column in ("pdq", "pdq_mirrored"):
            table = table.append_column(column, hashes[column])
        table = table.filter(pc.greater_equal(hashes["pdq_quality"], MIN_QUALITY))
    work.place.write_table(pieces[number], table)


def _to_other_end(piece: str, work: _Work, _: list[str]) -> Iterator[pa.Table]:
    table = work.place.read_table(piece)
    if table.num_rows:
        yield table.append_column(BUCKET, pa.array(work.cut.of(table["b"].to_numpy()).astype(np.int32)))


def _compared(number: int, table: pa.Table, work: _Work, names: list[str]) -> None:
    pairs = {"a": pa.array([], pa.int64()), "b": pa.array([], pa.int64()), "similarity": pa.array([], pa.float32())}
    distance = np.zeros(0, np.int64)
    if table.num_rows:
        hashes = _hashes_of(table["b"].to_numpy(), number, work)
        own = column_values(hashes["pdq"])
        distance = np.minimum(*(hash_distances(column_values(table[side]), own) for side in ("pdq", "pdq_mirrored")))
        is_near = (distance <= work.max_distance) & (hashes["pdq_quality"].to_numpy() >= MIN_QUALITY)
        near = table.filter(pa.array(is_near))
        pairs, distance = {name: near[name] for name in pairs}, distance[is_near]
    work.folder.write_table(names[number], pa.table({**pairs, "distance": distance}))


def _hashes_of(gids: np.ndarray, number: int, work: _Work) -> pa.Table:
    """Hashes of images of one piece, in their order."""
    start, stop = work.cut.bounds(number)
    tables = []
    for whole in range(start // work.ranges.size, -(-stop // work.ranges.size)):
        first, last = work.ranges.bounds(whole)
        rows = max(start, first) - first, min(stop, last) - first
        tables.append(work.filtered.table_rows(range_file("range", whole), *rows, _COLUMNS))
    return pa.concat_tables(tables).take(pa.array(gids - start)).combine_chunks()


def _write_pairs(
    _: None,
    folder: Folder,
    name: str,
    filtered: Folder,
    heads: Folder,
    ranges: Ranges,
    pool: ImageSet,
    encoder: str,
    max_distance: int,
    before: PairsBefore | None,
) -> None:
    gids, hashes, quality, mirrored = [], [], [], []
    for number in range(len(ranges)):
        start, _stop = ranges.bounds(number)
        head = read_heads(heads, number, ranges)
        own = np.flatnonzero(head == np.arange(start, start + len(head)))
        table = read_range(filtered, number, _COLUMNS).take(pa.array(own))
        gids.append(own + start)
        hashes.append(column_values(table["pdq"]))
        quality.append(table["pdq_quality"].fill_null(0).to_numpy())
        mirrored.append(column_values(table["pdq_mirrored"]))
    gid, words, flipped = np.concatenate(gids), np.concatenate(hashes), np.concatenate(mirrored)
    trusted = np.concatenate(quality)
    if before is None:
        a, b, distance = hash_pairs(words, trusted, max_distance, flipped)
        pairs = _described(pool, encoder, gid[a], gid[b], distance)
    else:
        compared = np.concatenate([np.zeros(0, np.int64), *(_heads(before, n) for n in range(len(before.ranges)))])
        new = np.flatnonzero(~np.isin(gid, compared))
        own = [
            hash_matches(words[new], trusted[new], words, trusted, max_distance, flipped[new]),
            hash_matches(words[new], trusted[new], flipped, trusted, max_distance),
        ]
        asked, other, distance = (np.concatenate(column) for column in zip(*own, strict=True))
        ends = gid[new][asked], gid[other]
        a, b, distance = _once(np.minimum(*ends), np.maximum(*ends), distance)
        known = before.folder.read_table(before.name)
        stay = np.isin(known["a"].to_numpy(), gid) & np.isin(known["b"].to_numpy(), gid)
        pairs = pa.concat_tables([known.filter(pa.array(stay)), _described(pool, encoder, a, b, distance)])
        pairs = pairs.sort_by([("a", "ascending"), ("b", "ascending")])
    folder.write_table(name, pairs)


def _heads(before: PairsBefore, number: int) -> np.ndarray:
    return np.flatnonzero(is_head(number, before.heads, before.ranges)) + before.ranges.bounds(number)[0]


def _once(a: np.ndarray, b: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pair of two different ends once, at its least distance."""
    order = np.lexsort((distance, b, a))
    order = order[a[order] != b[order]]
    a, b, distance = a[order], b[order], distance[order]
    first = np.ones(len(a), bool)
    first[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return a[first], b[first], distance[first]


def _described(pool: ImageSet, encoder: str, a: np.ndarray, b: np.ndarray, distance: np.ndarray) -> pa.Table:
    return pa.table({"a": a, "b": b, "similarity": _similarity(pool, encoder, a, b), "distance": distance})


def _similarity(pool: ImageSet, encoder: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 [P]: cosine of each pair's vectors."""
    similarity = np.zeros(len(a), np.float32)
    ends = np.unique(np.concatenate([a, b]))
    if len(ends):
        rows = unit_rows(pool.take_embeddings(encoder, ends))
        for start in range(0, len(a), _PAIRS_AT_ONCE):
            block = slice(start, start + _PAIRS_AT_ONCE)
            left, right = (rows[np.searchsorted(ends, end[block])] for end in (a, b))
            similarity[block] = np.einsum("nd,nd->n", left, right)
    return similarity
