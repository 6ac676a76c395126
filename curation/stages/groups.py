"""Pairs to groups, at any size: components, one image kept of each, and the fate of each image by gid.

The components themselves are found by one union-find, 4 bytes an image and nothing else. All that follows moves by key:
edges to the label of their component, images there too, and each image's fate back to its gid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.engine.exchange import BUCKET, bucket_of, buckets_for, exchange
from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet, column_values
from curation.engine.workers import ExecutionConfig, free_memory
from curation.ops.components import UnionFind, duplicate_groups
from curation.ops.hashes import hash_distances
from curation.ops.neighbour_kernels import MAX_NEIGHBOURS
from curation.ops.randomness import hash_uint64
from curation.stages.choosing import GroupRules, priorities, similar_to
from curation.stages.filter import read_batches
from curation.stages.heads import read_heads

STEPS = ("", "exact", "perceptual", "embedding", "chain")
SCHEMA = pa.schema(
    [
        ("component", pa.int64()),  # smallest gid of the group; null where the filters left the image out
        ("component_size", pa.int32()),  # images in it
        ("representative", pa.int64()),  # the image kept for this one's group; itself where it is kept
        ("similarity", pa.float32()),  # cosine to the representative; null where they are linked through others only
        ("step", pa.uint8()),  # index into STEPS: what made it a copy of its representative
    ]
)
_FINER = 4  # buckets of components than fit
_LABELS = "piece-labels.i64"
_EDGE_BYTES, _IMAGE_BYTES = 80, 320  # of a row while it is sorted and grouped: twice what travels
_READ_BYTES = 700  # of an image while it is looked for who is not alone
_HASHES = ("sha256", "pdq", "pdq_mirrored")
_IMAGE = np.dtype([("standing", "u1"), ("pixels", "<i8"), ("bytes", "<i8"), *((name, "u1", 32) for name in _HASHES)])
"""what travels of an image, as one value: of an edge there is none"""
_BATCH = 1 << 20


@dataclass(frozen=True)
class EdgeFiles:
    """Files of pairs of gids: columns a, b, similarity (cosine), those at or above `threshold` counting."""

    folder: Folder
    names: list[str]
    threshold: float

    def batches(self, name: str, columns: Sequence[str] = ("a", "b", "similarity")) -> Iterator[pa.Table]:
        for table in self.folder.table_batches(name, list(dict.fromkeys([*columns, "similarity"])), _BATCH):
            yield table.filter(pc.greater_equal(table["similarity"], pa.scalar(self.threshold, pa.float32())))


@dataclass(frozen=True)
class _Work:
    """What every task of a grouping knows."""

    folder: Folder
    filtered: Folder
    heads: Folder
    ranges: Ranges
    pool: ImageSet
    encoder: str
    edges: tuple[EdgeFiles, ...]
    rules: GroupRules
    num_buckets: int
    cut: Ranges
    """of gids, so fine that the edges of one piece fit, even where all of its images have as many as the join keeps"""
    rows_at_once: int
    """of what is read to be moved"""

    @property
    def place(self) -> Folder:
        return self.folder / "exchange/groups"

    def piece(self, kind: str, number: int) -> str:
        return f"piece-{kind}-{self.num_buckets}-{number:05d}.parquet"


def write_groups(
    folder: Folder,
    filtered: Folder,
    heads: Folder,
    ranges: Ranges,
    pool: ImageSet,
    encoder: str,
    edges: Sequence[EdgeFiles],
    links: Sequence[EdgeFiles],
    asked: tuple[np.ndarray, np.ndarray],
    num_edges: int,
    rules: GroupRules,
    execution: ExecutionConfig,
) -> tuple[pa.Table, np.ndarray]:
    """Write range-*.parquet (SCHEMA, one row a gid).

    Args:
        filtered, heads: folders of those stages.
        edges: what links heads; an edge may stand in several files.
        links: of these, so many that they make the same components.
        asked: gids of both ends of some pairs.
        num_edges: about how many there are, to cut the work.

    Returns:
        the components that were split: component (its smallest gid), size, num_groups; and of the pairs that were
        asked about, which have both ends in one component, before any is split: bool [P].
    """
    names = [range_file("range", number) for number in range(len(ranges))]
    fine = -(-ranges.num_rows // buckets_for(num_edges * _EDGE_BYTES, execution))
    most = int(execution.memory_gb * 1e9 / (MAX_NEIGHBOURS * _EDGE_BYTES))
    cut = Ranges(ranges.num_rows, min(fine, most))
    rows_at_once = execution.rows_at_once(_READ_BYTES)
    work = _Work(folder, filtered, heads, ranges, pool, encoder, tuple(edges), rules, 0, cut, rows_at_once)
    # A crowd lies in one bucket whatever their number, so the others there should be few.
    num_bytes = num_edges * _EDGE_BYTES + _write_labels(work, links) * _IMAGE_BYTES
    num_buckets = buckets_for(_FINER * num_bytes, execution)
    work = replace(work, num_buckets=num_buckets)
    ends = [_labels_of(work, gids) for gids in asked]
    together = (ends[0] == ends[1]) & (ends[0] >= 0)
    labelled = [work.piece("edges", number) for number in range(len(work.cut))]
    grouped = [work.piece("groups", number) for number in range(num_buckets)]
    exchange(
        [(i, name) for i, files in enumerate(edges) for name in files.names], _edges_to_gids, len(work.cut),
        _label_edges, work, scratch=folder / "exchange/edges", outputs=(work.place, labelled), sort_by=["a", "b"],
        execution=execution, label="dedup: label pairs", unit="files",
    )  # fmt: skip
    exchange(
        [*labelled, *range(len(ranges))], _to_components, num_buckets, _group, work,
        scratch=folder / "exchange/components", outputs=(work.place, grouped), sort_by=[],
        execution=execution, label="dedup: groups", unit="files",
    )  # fmt: skip
    split = pa.concat_tables([work.place.read_table(work.piece("split", number)) for number in range(num_buckets)])
    exchange(
        grouped, _to_ranges, len(ranges), _write_range, work, scratch=folder / "exchange/ranges",
        outputs=(folder, names), sort_by=["gid"], execution=execution, label="dedup: to their ranges", unit="files",
    )  # fmt: skip
    work.place.clear(["piece-*.parquet", _LABELS])
    return split.sort_by("component"), together


def read_groups(folder: Folder, number: int, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one range of gids (SCHEMA)."""
    return folder.read_table(range_file("range", number), list(columns) if columns is not None else None)


def _write_labels(work: _Work, links: Sequence[EdgeFiles]) -> int:
    """The smallest gid of each image's component, of those that are not alone; -1 for all others: int64, by gid.

    Returns the number of images that are not alone.
    """
    ranges = work.ranges
    kind = np.uint32 if ranges.num_rows < np.iinfo(np.uint32).max else np.int64
    sets = UnionFind(np.empty(ranges.num_rows, kind))
    for number in range(len(ranges)):
        start, _ = ranges.bounds(number)
        head = read_heads(work.heads, number, ranges)
        followers = np.flatnonzero((head >= 0) & (head != np.arange(start, start + len(head))))
        sets.union(followers + start, head[followers])
    for files in links:
        for name in files.names:
            for table in files.batches(name, ["a", "b"]):
                sets.union(table["a"].to_numpy(), table["b"].to_numpy())
    labels, shared = sets.labels(), np.zeros(ranges.num_rows, bool)
    blocks = [(start, min(start + _BATCH, len(labels))) for start in range(0, len(labels), _BATCH)]
    for start, stop in blocks:
        shared[labels[start:stop][labels[start:stop] != np.arange(start, stop)]] = True
    number = 0
    with work.place.writing(_LABELS) as file:
        for start, stop in blocks:
            block = labels[start:stop].astype("<i8")
            is_shared = shared[block]
            number += int(is_shared.sum())
            file.write(np.where(is_shared, block, -1).tobytes())
    return number


def _labels(work: _Work, start: int, stop: int) -> np.ndarray:
    return np.frombuffer(work.place.read_range(_LABELS, 8 * start, 8 * stop), "<i8")


def _labels_of(work: _Work, gids: np.ndarray) -> np.ndarray:
    """Of any gids, reading a block where there are some."""
    out = np.empty(len(gids), np.int64)
    for block in np.unique(gids // _BATCH).tolist():
        start, here = block * _BATCH, gids // _BATCH == block
        out[here] = _labels(work, start, min(start + _BATCH, work.ranges.num_rows))[gids[here] - start]
    return out


def _edges_to_gids(item: tuple[int, str], work: _Work) -> Iterator[pa.Table]:
    which, name = item
    for table in work.edges[which].batches(name):
        table = table.select(["a", "b", "similarity"])
        yield table.append_column(BUCKET, pa.array(work.cut.of(table["a"].to_numpy()).astype(np.int32)))


def _label_edges(number: int, table: pa.Table, work: _Work) -> None:
    """Every pair once, with its component."""
    start, stop = work.cut.bounds(number)
    if table.num_rows:
        a, b = table["a"].to_numpy(), table["b"].to_numpy()
        first = np.flatnonzero(np.r_[True, (a[1:] != a[:-1]) | (b[1:] != b[:-1])])
        similarity = np.maximum.reduceat(table["similarity"].to_numpy(), first)
        a, b = a[first], b[first]
        table = pa.table({"a": a, "b": b, "similarity": similarity, "label": _labels(work, start, stop)[a - start]})
    work.place.write_table(work.piece("edges", number), table)


_MET = pa.schema(
    [
        ("label", pa.int64()),
        ("a", pa.int64()),  # of an edge; of an image: its gid
        ("b", pa.int64()),  # of an edge; of an image: its head, minus one, negated: below 0
        ("similarity", pa.float32()),
        ("image", pa.binary()),  # _IMAGE; null of an edge
    ]
)


def _to_components(item: str | int, work: _Work) -> Iterator[pa.Table]:
    """Labelled edges of a piece, or the images of a range that are not alone."""
    for table in _labelled_edges(item, work) if isinstance(item, str) else _images_in_groups(item, work):
        buckets = bucket_of(hash_uint64(0, table["label"].to_numpy()), work.num_buckets)
        yield table.append_column(BUCKET, pa.array(buckets))


def _labelled_edges(piece: str, work: _Work) -> Iterator[pa.Table]:
    if work.place.num_rows(piece):
        for table in work.place.table_batches(piece, _MET.names[:-1], work.rows_at_once):
            yield table.append_column("image", pa.nulls(len(table), pa.binary()))


def _images_in_groups(number: int, work: _Work) -> Iterator[pa.Table]:
    first, _ = work.ranges.bounds(number)
    start = first
    for table in read_batches(work.filtered, number, _IMAGE.names or (), work.rows_at_once):
        head = work.heads.table_rows(range_file("range", number), start - first, start - first + len(table), ["head"])
        yield _not_alone(table, start, head["head"].fill_null(-1).to_numpy(), work)
        start += table.num_rows


def _not_alone(table: pa.Table, start: int, head: np.ndarray, work: _Work) -> pa.Table:
    label = _labels(work, start, start + table.num_rows)
    here = np.flatnonzero(label >= 0)
    rows = table.take(pa.array(here))
    images = np.empty(len(here), _IMAGE)
    for name in _IMAGE.names or ():
        images[name] = column_values(rows[name])
    content = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(_IMAGE.itemsize), len(images), [None, pa.py_buffer(images.view(np.uint8))]
    )
    columns = [label[here], here + start, -1 - head[here], pa.nulls(len(here), pa.float32()), content.cast(pa.binary())]
    return pa.table(columns, schema=_MET)


def _group(bucket: int, table: pa.Table, work: _Work) -> None:
    """The groups of all components of a bucket; images that look the same share their head's fate and similarity."""
    rules = work.rules
    if not table.num_rows:
        table = _MET.empty_table()
    is_image = pc.less(table["b"], 0)
    rows = table.filter(is_image).sort_by("a")
    gid, head, label = rows["a"].to_numpy(), -1 - rows["b"].to_numpy(), rows["label"].to_numpy()
    images = np.frombuffer(rows["image"].cast(pa.binary(_IMAGE.itemsize)).combine_chunks().buffers()[1], _IMAGE)
    is_head = head == gid
    node = gid[is_head]
    edges = _edges_of(table, node)
    del table, rows, is_image
    free_memory()  # a crowd's edges are as large as all that follows
    keys = priorities(work.pool, work.encoder, rules, images[is_head], label[is_head], node)
    degree = sum((np.bincount(end, minlength=len(node)) for *ends, _ in edges for end in ends), np.zeros(len(node)))
    capped = degree >= MAX_NEIGHBOURS  # the join may have kept no more of them
    groups = duplicate_groups(
        len(node),
        edges,
        keys,
        max_component_size=rules.max_component_size,
        min_similarity=rules.min_similarity,
        capped=capped,
        similar=similar_to(work.pool, work.encoder, rules, node, capped),
    )
    at = np.searchsorted(node, head)
    representative, similarity = node[groups.representatives[at]], groups.similarity[at]
    # What an earlier release kept stays, though a new image may have joined two of its groups.
    representative = np.where(images["standing"] == 2, gid, representative)
    _, smallest, of_label, size = np.unique(
        groups.labels[at], return_index=True, return_inverse=True, return_counts=True
    )
    component = gid[smallest[of_label]]
    of_split = component[np.searchsorted(gid, node[groups.split.label])]
    split = {"component": of_split, "size": groups.split.size, "num_groups": groups.split.num_groups}
    work.place.write_table(work.piece("split", bucket), pa.table(split))
    out = {
        "gid": gid,
        "component": component,
        "component_size": size[of_label].astype(np.int32),
        "representative": representative,
        "similarity": pa.array(similarity, mask=np.isnan(similarity)),
        "step": _steps(images, gid, representative, similarity, rules.perceptual_distance),
    }
    work.place.write_table(work.piece("groups", bucket), pa.table(out))


def _edges_of(table: pa.Table, node: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Edges among places in `node` (gids, ascending), some rows at a time: 12 bytes each."""
    edges = []
    for batch in table.select(["a", "b", "similarity"]).to_batches(_BATCH):
        batch = batch.filter(pc.greater_equal(batch["b"], 0))
        ends = (np.searchsorted(node, batch[name].to_numpy()).astype(np.int32) for name in ("a", "b"))
        edges.append((*ends, batch["similarity"].to_numpy().copy()))
    return edges


def _steps(
    images: np.ndarray, gid: np.ndarray, representative: np.ndarray, similarity: np.ndarray, perceptual_distance: int
) -> np.ndarray:
    own = np.searchsorted(gid, representative)
    digests, hashes, mirrored = (np.ascontiguousarray(images[name]) for name in _HASHES)
    is_exact = (digests == digests[own]).all(axis=1)
    distance = np.minimum(hash_distances(hashes, hashes[own]), hash_distances(hashes, mirrored[own]))
    return np.select(
        [representative == gid, is_exact, distance <= perceptual_distance, ~np.isnan(similarity)],
        [STEPS.index(name) for name in ("", "exact", "perceptual", "embedding")],
        STEPS.index("chain"),
    ).astype(np.uint8)


def _to_ranges(name: str, work: _Work) -> Iterator[pa.Table]:
    table = work.place.read_table(name)
    yield table.append_column(BUCKET, pa.array(work.ranges.of(table["gid"].to_numpy()).astype(np.int32)))


def _write_range(number: int, table: pa.Table, work: _Work) -> None:
    """Images that are alone stand for themselves."""
    first, end = work.ranges.bounds(number)
    gid = table["gid"].to_numpy() if table.num_rows else np.zeros(0, np.int64)
    name = range_file("range", number)
    with work.folder.writing(name) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for start in range(first, end, _BATCH):
            stop = min(start + _BATCH, end)
            met = table.slice(*_from_to(gid, start, stop)) if table.num_rows else table
            head = work.heads.table_rows(name, start - first, stop - first, ["head"])["head"]
            writer.write_table(_rows(start, stop, met, head.is_null().to_numpy()))


def _from_to(gid: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """Where the ascending gids in [start, stop) begin, and how many there are."""
    low, high = np.searchsorted(gid, [start, stop]).tolist()
    return low, high - low


def _rows(start: int, stop: int, met: pa.Table, out: np.ndarray) -> pa.Table:
    """SCHEMA of the gids [start, stop): those that are in a group, those that are alone, and nulls for those `out`."""
    own = np.arange(start, stop)
    columns = {"component": own, "component_size": np.ones(len(own), np.int32), "representative": own.copy()}
    columns |= {"similarity": np.ones(len(own), np.float32), "step": np.zeros(len(own), np.uint8)}
    if met.num_rows:
        at = met["gid"].to_numpy() - start
        for name, values in columns.items():
            filled = met[name].fill_null(np.nan) if name == "similarity" else met[name]
            values[at] = filled.to_numpy()
    arrays = [
        pa.array(values, mask=out | np.isnan(values) if name == "similarity" else out)
        for name, values in columns.items()
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
