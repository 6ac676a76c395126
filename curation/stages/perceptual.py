"""Pairs of near perceptual hashes, all against all: for as many images as one core compares in minutes."""

import numpy as np
import pyarrow as pa

from curation.engine.folder import Folder
from curation.engine.ranges import Ranges
from curation.engine.store import ImageSet, column_values
from curation.engine.workers import ExecutionConfig, run_pieces
from curation.ops.hashes import hash_pairs
from curation.stages.filter import read_range
from curation.stages.heads import read_heads
from curation.stages.members import unit_rows

_COLUMNS = ["pdq", "pdq_quality", "pdq_mirrored"]
_PAIRS_AT_ONCE = 1 << 16


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
) -> int:
    """Write a file of pairs of heads within max_distance bits: a, b, similarity (cosine, for the record), distance.

    One task of about 200 bytes a head. Returns the number of pairs.
    """
    run_pieces(
        _write_pairs, [None], [name], folder, filtered, heads, ranges, pool, encoder, max_distance,
        execution=execution, label="dedup: near hashes", unit="tables",
    )  # fmt: skip
    return folder.num_rows(name)


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
    gid = np.concatenate(gids)
    a, b, distance = hash_pairs(np.concatenate(hashes), np.concatenate(quality), max_distance, np.concatenate(mirrored))
    similarity = _similarity(pool, encoder, gid[a], gid[b])
    folder.write_table(name, pa.table({"a": gid[a], "b": gid[b], "similarity": similarity, "distance": distance}))


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
