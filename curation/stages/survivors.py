"""survivors: the leaks of all evaluation sets put together, and who stands for each group of the pool after them.

Matches move to the ranges of their images, images of groups to where their component is decided, and fates back.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.exchange import BUCKET, bucket_of, buckets_for, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import RANGE_ROWS, Ranges, range_file
from curation.engine.workers import ExecutionConfig
from curation.ops.randomness import hash_uint64
from curation.stages.asking import pieces
from curation.stages.decontaminate import MATCHES, strongest
from curation.stages.groups import read_groups

VERSION = 1
LEAKS = pa.schema(
    [
        ("gid", pa.int64()),  # the pool image
        ("evaluation", pa.string()),
        ("evaluation_gid", pa.int64()),  # its row in the evaluation set
        ("similarity", pa.float32()),  # cosine of the copy encoder
        ("step", pa.string()),  # exact, perceptual, embedding; component: through another member of its component
        ("via", pa.int64()),  # the pool image that matched; gid itself unless step is component
    ]
)
_MEMBERS = pa.schema([*LEAKS, ("component", pa.int64()), ("look", pa.int64()), ("representative", pa.int64()),
                      ("closeness", pa.float32())])  # fmt: skip
_FATES = pa.schema([*LEAKS, ("representative", pa.int64())])
_ROW_BYTES = 200  # of an image while its component is decided


@dataclass(frozen=True)
class _Work:
    """What every task knows."""

    folder: Folder
    dedup: Folder
    heads: Folder
    ranges: Ranges
    mode: str
    matches: dict[str, Folder]
    rows_at_once: int

    @property
    def place(self) -> Folder:
        return self.folder / "exchange/fates"


def find_survivors(
    folder: Folder,
    dedup_folder: Folder,
    heads: Folder,
    matches: Mapping[str, tuple[Folder, list[File]]],
    mode: str,
    ranges: Ranges,
    execution: ExecutionConfig,
) -> tuple[list[File], dict[str, int]]:
    """Write what the matches of the evaluation sets (name: folder, files) mean for the pool, by range of gids.

    leaks-RRRRR.parquet: LEAKS, one row an image, its strongest match. representative-RRRRR.npy: int64, as dedup's, -1
    for leaks. elected-RRRRR.npy: int64, who took the place of a representative that leaked, which happens in direct
    mode: the member most similar to it. counts-RRRRR.npy: images that stood for a group before and do after, and those
    that match themselves.
    """
    where = {name: folder for name, (folder, _) in matches.items()}
    work = _Work(folder, dedup_folder, heads, ranges, mode, where, execution.rows_at_once(_ROW_BYTES))
    names = [(set_name, file.path) for set_name, (_, files) in matches.items() for file in files]
    direct = [range_file("piece-direct", number) for number in range(len(ranges))]
    num_buckets = buckets_for(ranges.num_rows / 8 * _ROW_BYTES, execution)
    fates = [f"piece-fates-{num_buckets}-{bucket:05d}.parquet" for bucket in range(num_buckets)]
    outputs = [f"counts-{number:05d}.npy" for number in range(len(ranges))]
    if not set(outputs) <= set(folder.names()):
        exchange(
            names, _matches_by_range, len(ranges), _write_direct, work, scratch=folder / "exchange/direct",
            outputs=(work.place, direct), sort_by=["gid"], execution=execution, label="survivors: matches",
            unit="files",
        )  # fmt: skip
        exchange(
            range(len(ranges)), _members, num_buckets, _write_fates, work, fates, scratch=folder / "exchange/members",
            outputs=(work.place, fates), sort_by=["gid"], execution=execution, label="survivors", unit="images",
            weights=ranges.weights(),
        )  # fmt: skip
        exchange(
            fates, _fates_by_range, len(ranges), _write_range, work, scratch=folder / "exchange/back",
            outputs=(folder, outputs), sort_by=["gid"], execution=execution, label="survivors: ranges", unit="files",
        )  # fmt: skip
    work.place.clear(["piece-*"])
    before, after, matched = sum(folder.read_array(name) for name in outputs).tolist()
    counts = {"images in": before, "images out": after, "leaks, direct": matched, "leaks": 0}
    counts |= {f"leaks of {name}": 0 for name in matches}
    for number in range(len(ranges)):
        for entry in folder.read_table(_leaks(number), ["evaluation"])["evaluation"].value_counts().to_pylist():
            counts[f"leaks of {entry['values']}"] += entry["counts"]
            counts["leaks"] += entry["counts"]
    files = pieces(folder, ("leaks-", "representative-", "elected-", "counts-"), execution, "survivors")
    return files, counts


@dataclass(frozen=True)
class Survivors:
    """Who is left, read back by ranges of gids: survivors are their own representatives."""

    folder: Folder

    def counts(self) -> list[int]:
        """Survivors in each range."""
        names = [name for name in self.folder.names() if name.startswith("counts-")]
        return [int(self.folder.read_array(name)[1]) for name in names]

    @cached_property
    def num_ranges(self) -> int:
        return len(self.counts())

    @cached_property
    def size(self) -> int:
        """gids of a range."""
        return len(self.representative(0)) if self.num_ranges > 1 else RANGE_ROWS

    @cached_property
    def ranges(self) -> Ranges:
        last = self.num_ranges - 1
        return Ranges(last * self.size + len(self.representative(last)), self.size)

    def representative(self, number: int) -> np.ndarray:
        """int64, of a range of gids: as dedup's, but -1 for leaks."""
        return self.folder.read_array(f"representative-{number:05d}.npy")

    def between(self, start: int, stop: int) -> np.ndarray:
        """int64: `representative` of the images start <= gid < stop."""
        numbers = range(start // self.size, -(-stop // self.size))
        found = np.concatenate([np.zeros(0, np.int64), *map(self.representative, numbers)])
        return found[start - numbers.start * self.size :][: stop - start]

    def gids(self, number: int) -> np.ndarray:
        """int64, ascending: the survivors of a range."""
        representative = self.representative(number)
        first = number * self.size
        return np.flatnonzero(representative == np.arange(first, first + len(representative))) + first

    def leaks(self, number: int) -> pa.Table:
        """LEAKS of a range, in the order of gids."""
        return self.folder.read_table(_leaks(number))


def is_clustered(number: int, dedup_folder: Folder, folder: Folder, ranges: Ranges) -> np.ndarray:
    """bool by gid of a range: the images that are clustered: those that stood for a group before leaks went, or do."""
    start, stop = ranges.bounds(number)
    before = read_groups(dedup_folder, number, ["representative"])["representative"].fill_null(-1).to_numpy()
    found = before == np.arange(start, stop)
    found[folder.read_array(f"elected-{number:05d}.npy") - start] = True
    return found


def _leaks(number: int) -> str:
    return range_file("leaks", number)


def _matches_by_range(item: tuple[str, str], work: _Work) -> Iterator[pa.Table]:
    name, path = item
    table = work.matches[name].read_table(path)
    columns = {column: table[column] for column in MATCHES.names}
    columns |= {"evaluation": pa.array([name] * table.num_rows, pa.string()), "via": table["gid"]}
    bucket = work.ranges.of(table["gid"].to_numpy()).astype(np.int32)
    yield pa.table({**{column: columns[column] for column in LEAKS.names}, BUCKET: bucket})


def _write_direct(number: int, table: pa.Table, work: _Work) -> None:
    """The strongest match of each image of a range."""
    table = strongest(table) if table.num_rows else LEAKS.empty_table()
    work.place.write_table(range_file("piece-direct", number), table.cast(LEAKS))


def _members(number: int, work: _Work, fates: list[str]) -> Iterator[pa.Table]:
    """The images of a range that are not alone in their component, with their matches."""
    first, _ = work.ranges.bounds(number)
    start, name = first, range_file("range", number)
    direct = work.place.read_table(range_file("piece-direct", number))
    columns = ["component", "component_size", "representative", "similarity"]
    for groups in work.dedup.table_batches(name, columns, work.rows_at_once):
        head = work.heads.table_rows(name, start - first, start - first + groups.num_rows, ["head"])["head"]
        yield _not_alone(groups, start, head.fill_null(-1).to_numpy(), direct, len(fates))
        start += groups.num_rows


def _not_alone(groups: pa.Table, start: int, head: np.ndarray, direct: pa.Table, num_buckets: int) -> pa.Table:
    here = np.flatnonzero(groups["component_size"].fill_null(0).to_numpy() > 1)
    rows = groups.take(pa.array(here))
    columns: dict[str, pa.ChunkedArray | np.ndarray] = {
        "gid": here + start,
        "component": rows["component"],
        "look": head[here],
        "representative": rows["representative"],
        "closeness": rows["similarity"],
    }
    at = np.searchsorted(direct["gid"].to_numpy(), here + start)
    found = np.isin(here + start, direct["gid"].to_numpy())
    matches = direct.take(pa.array(np.where(found, at, 0), mask=~found)) if len(here) else direct.slice(0, 0)
    columns |= {name: matches[name] for name in LEAKS.names if name != "gid"}
    bucket = bucket_of(hash_uint64(0, rows["component"].to_numpy()), num_buckets)
    return pa.table({name: columns[name] for name in _MEMBERS.names}, schema=_MEMBERS).append_column(
        BUCKET, pa.array(bucket)
    )


def _write_fates(bucket: int, table: pa.Table, work: _Work, fates: list[str]) -> None:
    """_FATES of the images whose components were matched: leaks, and others with their new representative."""
    if not table.num_rows:
        table = _MEMBERS.empty_table()
    gids, component = table["gid"].to_numpy(), table["component"].to_numpy()
    matched = table["evaluation"].is_valid().to_numpy()
    # What shares a fate: the component, or what looks the same, as the join knows the heads alone.
    label = component if work.mode == "component" else table["look"].to_numpy()
    labels, first = np.unique(label[matched], return_index=True)
    leaked = np.isin(label, labels)
    source = np.arange(len(gids))
    indirect = leaked & ~matched
    source[indirect] = np.flatnonzero(matched)[first[np.searchsorted(labels, label[indirect])]]
    representative = table["representative"].to_numpy().copy()
    old = representative.copy()
    representative[leaked] = -1
    _reelect(representative, component, table["closeness"].fill_null(-2.0).to_numpy(), gids, gids[leaked])
    changed = np.flatnonzero(representative != old)
    columns = {name: table[name].take(pa.array(source[changed])) for name in LEAKS.names}
    columns["gid"] = gids[changed]
    columns["representative"] = representative[changed]
    columns["step"] = pc.if_else(pa.array(indirect[changed]), "component", columns["step"])
    work.place.write_table(fates[bucket], pa.table(columns, schema=_FATES))


def _fates_by_range(name: str, work: _Work) -> Iterator[pa.Table]:
    table = work.place.read_table(name)
    yield table.append_column(BUCKET, pa.array(work.ranges.of(table["gid"].to_numpy()).astype(np.int32)))


def _write_range(number: int, table: pa.Table, work: _Work) -> None:
    start, stop = work.ranges.bounds(number)
    groups = read_groups(work.dedup, number, ["component_size", "representative"])
    before = groups["representative"].fill_null(-1).to_numpy()
    alone = groups["component_size"].fill_null(1).to_numpy() == 1
    direct = work.place.read_table(range_file("piece-direct", number))
    own = direct.filter(pa.array(alone[direct["gid"].to_numpy() - start]))
    representative, leaks = before.copy(), own
    if table.num_rows:
        representative[table["gid"].to_numpy() - start] = table["representative"].to_numpy()
        others = table.filter(pc.equal(table["representative"], -1)).select(LEAKS.names)
        leaks = pa.concat_tables([own, others]).sort_by("gid")
    representative[own["gid"].to_numpy() - start] = -1
    gids = np.arange(start, stop)
    kept = representative == gids
    work.folder.write_table(_leaks(number), leaks)
    work.folder.write_array(f"representative-{number:05d}.npy", representative)
    work.folder.write_array(f"elected-{number:05d}.npy", gids[kept & (before != gids)])
    counts = [int((before == gids).sum()), int(kept.sum()), direct.num_rows]
    work.folder.write_array(f"counts-{number:05d}.npy", np.array(counts, np.int64))


def _reelect(
    representative: np.ndarray, component: np.ndarray, closeness: np.ndarray, gids: np.ndarray, leaked: np.ndarray
) -> None:
    """Give each group whose representative leaked the remaining member that was most similar to it, in place."""
    members = np.flatnonzero(np.isin(representative, leaked) & (representative >= 0))
    order = np.lexsort((gids[members], -closeness[members], component[members]))
    labels, first = np.unique(component[members][order], return_index=True)
    chosen = gids[members[order][first]]
    representative[members] = chosen[np.searchsorted(labels, component[members])]
