"""Figures and examples of a run from its decisions, range by range: counts, and of each kind the images of least hash.

What a task hands back is bounded, whatever its range holds, and does not depend on how gids are cut into ranges.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.account.fates import STATUSES, Duplicates, Sources, duplicates_of
from curation.engine.exchange import BUCKET
from curation.engine.folder import Folder
from curation.ops.randomness import hash_sample
from curation.stages.groups import STEPS

SEED = 0
LARGEST_GROUPS = 20
_OTHER_GROUPS = 32
_EXAMPLES = {"kept": 24, "rejected": 8, "leak": 8, "readable": 2400, "balanced": 8}  # kind -> images of each name
_MEMBERS = 512  # of a group, among which the report chooses


@dataclass
class Tally:
    """What a part of the pool adds to the report."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """images by status and reason (`None`: without one)"""
    changes: Counter[str] = field(default_factory=Counter)
    """of what is kept, `added` by this release and those that `stay` from an earlier one; `dropped STATUS: REASON`"""
    examples: dict[tuple[Hashable, ...], np.ndarray] = field(default_factory=dict)
    """of each kind and name the gids (for `balanced`, the clusters) of least hash, ascending"""
    groups: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(component, size) of the largest near-duplicate groups and of some others by hash"""

    def __add__(self, other: "Tally") -> "Tally":
        examples = dict(self.examples)
        for name, ids in other.examples.items():
            both = np.union1d(examples.get(name, ids), ids)
            examples[name] = hash_sample(SEED, both, _EXAMPLES[str(name[0])])
        return Tally(
            self.counts + other.counts,
            self.changes + other.changes,
            examples,
            _few(np.concatenate([self.groups, other.groups])),
        )

    def to_json(self) -> dict[str, Any]:
        """What `from_json` takes back."""
        return {
            "counts": [[*name, number] for name, number in self.counts.items()],
            "changes": dict(self.changes),
            "examples": [[list(name), ids.tolist()] for name, ids in self.examples.items()],
            "groups": self.groups.tolist(),
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Tally":
        return Tally(
            Counter({(status, reason): number for status, reason, number in content["counts"]}),
            Counter(content["changes"]),
            {tuple(name): np.array(ids, np.int64) for name, ids in content["examples"]},
            np.array(content["groups"], np.int64).reshape(-1, 2),
        )

    def of_kind(self, kind: str) -> dict[tuple[Hashable, ...], np.ndarray]:
        """Examples by the rest of their name."""
        return {name[1:]: ids for name, ids in self.examples.items() if name[0] == kind}

    def largest(self) -> np.ndarray:
        """int64 [<= LARGEST_GROUPS, 2]: component and size, the largest first."""
        return self.groups[_by_size(self.groups)][:LARGEST_GROUPS]


def tally(rows: pa.Table, was_balanced: np.ndarray, release: int = 1) -> Tally:
    """Of some decisions.

    Args:
        rows: as decisions.parquet has them.
        was_balanced: bool: drawn by the balanced branch, written or not.
        release: of the run.
    """
    gid, status = rows["gid"].to_numpy(), rows["status"]
    reason = rows["reason"]
    by = ["status", "reason", "release"]
    counts, changes = Counter[tuple[str, str]](), Counter[str]()
    for row in rows.select(by).group_by(by).aggregate([([], "count_all")]).to_pylist():
        counts[row["status"], str(row["reason"])] += row["count_all"]
        if row["status"] == "kept":
            changes["added" if row["release"] == release else "stay"] += row["count_all"]
        elif row["release"] is not None:
            changes[f"dropped {row['status']}: {row['reason']}"] += row["count_all"]
    names: dict[tuple[Hashable, ...], np.ndarray] = {}
    for state, why in counts:
        is_state = pc.equal(status, state)
        where = is_state if why == "None" else pc.and_(is_state, pc.fill_null(pc.equal(reason, why), False))
        found = gid[_mask(where)]
        if state == "leak":
            sets = rows["evaluation"].filter(where).to_numpy(zero_copy_only=False)
            names |= {("leak", name, why): found[sets == name] for name in sorted(set(sets))}
        elif state == "rejected":
            names["rejected", why] = found
    names["kept",] = gid[_mask(pc.equal(status, "kept"))]
    for state in STATUSES:
        if state != "rejected":
            names["readable", state] = gid[_mask(pc.equal(status, state))]
    names["balanced",] = np.unique(rows["cluster"].fill_null(-1).to_numpy()[was_balanced])
    examples = {name: hash_sample(SEED, ids, _EXAMPLES[str(name[0])]) for name, ids in names.items() if len(ids)}
    first = _mask(pc.fill_null(pc.equal(rows["component"], rows["gid"]), False))
    groups = np.stack([gid[first], rows["component_size"].to_numpy()[first].astype(np.int64)], axis=1)
    return Tally(counts, changes, examples, _few(groups))


def total(tallies: Iterable[Tally]) -> Tally:
    return reduce(Tally.__add__, tallies, Tally())


def other_groups(groups: np.ndarray, largest: np.ndarray, size: int) -> np.ndarray:
    """Some components besides the largest, by hash, ascending."""
    return hash_sample(SEED, np.setdiff1d(groups[:, 0], largest), size)


def _few(groups: np.ndarray) -> np.ndarray:
    largest = groups[_by_size(groups)][:LARGEST_GROUPS]
    some = hash_sample(SEED, groups[:, 0], _OTHER_GROUPS)
    wanted = np.isin(groups[:, 0], np.union1d(largest[:, 0], some))
    return groups[wanted]


def _by_size(groups: np.ndarray) -> np.ndarray:
    return np.lexsort((groups[:, 0], -groups[:, 1]))


def _mask(condition: pa.ChunkedArray) -> np.ndarray:
    return condition.to_numpy(zero_copy_only=False).astype(bool)


# --- groups and clusters that are shown -------------------------------------------------------------------------------


@dataclass
class Members:
    """What the report shows of one near-duplicate group, apart from its representative."""

    representative: int = -1
    steps: Counter[str] = field(default_factory=Counter)
    least_similarity: float = np.inf
    """cosine to the representative; inf where none is known"""
    some: np.ndarray = field(default_factory=lambda: np.zeros(0, [("gid", "i8"), ("similarity", "f4"), ("step", "u1")]))
    """those of least hash"""

    def __add__(self, other: "Members") -> "Members":
        both = np.concatenate([self.some, other.some])
        few = both[np.isin(both["gid"], hash_sample(SEED, both["gid"], _MEMBERS))]
        return Members(
            max(self.representative, other.representative),
            self.steps + other.steps,
            min(self.least_similarity, other.least_similarity),
            few,
        )


@dataclass
class Drawn:
    """What the report shows of one cluster that the balanced branch drew from."""

    survivors: int = 0
    drawn: int = 0
    some: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __add__(self, other: "Drawn") -> "Drawn":
        some = hash_sample(SEED, np.concatenate([self.some, other.some]), _EXAMPLES["balanced"])
        return Drawn(self.survivors + other.survivors, self.drawn + other.drawn, some)


def look_up(
    number: int, sources: Sources, components: np.ndarray, clusters: np.ndarray, decided: str
) -> tuple[dict[int, Members], dict[int, Drawn]]:
    """What a range holds of some near-duplicate groups and of some clusters.

    Args:
        decided: the range's file in the folder `decide`.
    """
    members: dict[int, Members] = {}
    drawn: dict[int, Drawn] = {}
    first = sources.ranges.bounds(number)[0]
    for start, stop in sources.spans(number):
        group = duplicates_of(sources.folder, sources.ranges, start, stop)
        for at in _runs(group.component, components):
            found = _members(start, at, group)
            label = int(group.component[at[0]])
            members[label] = members.get(label, Members()) + found
        if len(clusters):
            rows = (sources.folder / "decide").table_rows(decided, start - first, stop - first, ["cluster", "draws"])
            cluster, is_balanced = rows["cluster"].fill_null(-1).to_numpy(), balanced(rows["draws"])
            for at in _runs(cluster, clusters):
                ours = start + at[is_balanced[at]]
                label = int(cluster[at[0]])
                few = hash_sample(SEED, ours, _EXAMPLES["balanced"])
                drawn[label] = drawn.get(label, Drawn()) + Drawn(len(at), len(ours), few)
    return members, drawn


def balanced(draws: pa.ChunkedArray) -> np.ndarray:
    """bool: whether the balanced branch drew each image."""
    if draws.type.get_field_index("balance") < 0:
        return np.zeros(len(draws), bool)
    return pc.is_valid(pc.struct_field(draws, "balance")).to_numpy(zero_copy_only=False)


def merged(parts: Iterable[Mapping[int, Any]]) -> dict[int, Any]:
    """What ranges hold of the same group or cluster, added up."""
    result: dict[int, Any] = {}
    for part in parts:
        for label, found in part.items():
            result[label] = result[label] + found if label in result else found
    return result


def _runs(labels: np.ndarray, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Positions of each wanted label that occurs, ascending."""
    at = np.flatnonzero(np.isin(labels, wanted))
    order = at[np.argsort(labels[at], kind="stable")]
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _members(start: int, at: np.ndarray, group: Duplicates) -> Members:
    head = int(group.representative[at[0]])
    others = at[start + at != head]
    names, counts = np.unique(group.step[others], return_counts=True)
    known = group.similarity[others][~np.isnan(group.similarity[others])]
    few = others[np.isin(others, hash_sample(SEED, start + others, _MEMBERS) - start)]
    some = np.zeros(len(few), Members().some.dtype)
    some["gid"], some["similarity"], some["step"] = start + few, group.similarity[few], group.step[few]
    steps = Counter({STEPS[name]: int(count) for name, count in zip(names, counts, strict=True)})
    return Members(head, steps, float(known.min()) if len(known) else np.inf, some)


# --- sizes of clusters ------------------------------------------------------------------------------------------------


def cluster_counts(part: tuple[str, int], folder: Folder, num_clusters: int, num_buckets: int) -> Iterator[pa.Table]:
    """Of one part of decisions.parquet: images by cluster, and those of them that are kept; by bucket of clusters."""
    name, rows = part
    per_bucket = -(-num_clusters // num_buckets)
    for start in range(0, rows, 1 << 22):
        table = folder.table_rows(name, start, min(start + (1 << 22), rows), ["cluster", "status"])
        table = table.filter(pc.is_valid(table["cluster"]))
        cluster = table["cluster"].to_numpy()
        is_kept = _mask(pc.equal(table["status"], "kept"))
        labels, inverse = np.unique(cluster, return_inverse=True)
        before, after = np.bincount(inverse), np.bincount(inverse, is_kept).astype(np.int64)
        bucket = (labels // per_bucket).astype(np.int32)
        yield pa.table({"cluster": labels, "before": before, "after": after, BUCKET: bucket})


def cluster_sizes(bucket: int, counts: pa.Table, folder: Folder, num_clusters: int, num_buckets: int) -> None:
    """Write how many of a bucket's clusters have each size, before and after selection."""
    per_bucket = -(-num_clusters // num_buckets)
    first, stop = min(bucket * per_bucket, num_clusters), min((bucket + 1) * per_bucket, num_clusters)
    tables = []
    for when in ("before", "after"):
        sizes = np.zeros(stop - first, np.int64)
        if counts.num_columns:
            np.add.at(sizes, counts["cluster"].to_numpy() - first, counts[when].to_numpy())
        size, clusters = np.unique(sizes, return_counts=True)
        tables.append(pa.table({"when": [when] * len(size), "size": size, "clusters": clusters}, schema=SIZES))
    (folder / "report/exchange/sizes").write_table(f"piece-{bucket:05d}.parquet", pa.concat_tables(tables))


SIZES = pa.schema([("when", pa.string()), ("size", pa.int64()), ("clusters", pa.int64())])
