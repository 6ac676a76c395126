"""What the report shows of a run: a bounded number of examples, chosen by size or by hash, never by chance."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.account.fates import leaks_of
from curation.account.report.map import neighbour_map
from curation.account.report.pictures import Ref
from curation.account.report.tally import SEED, Drawn, Members, Tally
from curation.engine.folder import Folder
from curation.ops.randomness import hash_sample, hash_shuffle
from curation.stages.cluster import Clustering
from curation.stages.groups import STEPS
from curation.stages.members import unit_rows
from curation.state import Run

_NUM_KEPT = 18
_LARGEST_GROUPS, _OTHER_GROUPS = 6, 10
_LARGEST_MEMBERS, _OTHER_MEMBERS = 8, 4  # shown, beside the representative
_PAIRS_EACH_SIDE = 6
_LEAKS_PER_STEP = 4
_QUERIES, _ANSWERS = 12, 6
_REJECTED, _REJECTED_PER_REASON = 48, 6
_MAP_POINTS, _MAP_SEEDS, _MAP_PICTURES = 2400, 240, (7, 4)
_SEEDS_ASKED = 4096  # seed images whose clusters are looked up again to show which ones hit a cluster


@dataclass(frozen=True)
class Member:
    """An image of a duplicate group: cosine to the representative (NaN: linked through others), and by which step."""

    ref: Ref
    similarity: float
    step: str


@dataclass(frozen=True)
class Group:
    """A near-duplicate component, its representative, and a few other members, the most similar first."""

    size: int
    representative: Ref
    members: list[Member]
    least_similarity: float
    steps: dict[str, int]
    status: str
    """of the representative"""
    is_largest: bool


@dataclass(frozen=True)
class Pair:
    a: Ref
    b: Ref
    similarity: float
    mirrored: bool


@dataclass(frozen=True)
class Leak:
    image: Ref
    match: Ref
    via: Ref | None
    """the member of its component that matched, where it was not the image itself"""
    similarity: float
    step: str


@dataclass(frozen=True)
class Row:
    """What was asked (seed images, or none) and what was drawn for it."""

    label: str
    asked: list[Ref]
    drawn: list[tuple[Ref, float]]


@dataclass(frozen=True)
class Rejection:
    reason: str
    count: int
    examples: list[Ref]


@dataclass(frozen=True)
class Map:
    """Points in the plane; status is that of decisions.parquet, or `seed`. Pictures: (number of the point, image)."""

    points: np.ndarray
    status: np.ndarray
    pictures: list[tuple[int, Ref]]


@dataclass(frozen=True)
class Choices:
    """Every example on the page."""

    kept: list[Ref]
    groups: list[Group]
    above: list[Pair]
    below: list[Pair]
    leaks: list[Leak]
    draws: dict[str, list[Row]]
    balanced: list[Row]
    rejections: list[Rejection]
    map: Map | None = field(repr=False)

    def pictures(self) -> Iterator[Ref]:
        """The thumbnails that the page needs, the map's apart (they are smaller)."""
        yield from self.kept
        for group in self.groups:
            yield group.representative
            yield from (member.ref for member in group.members)
        for pair in self.above + self.below:
            yield from (pair.a, pair.b)
        for leak in self.leaks:
            yield from (leak.image, leak.match)
            if leak.via is not None:
                yield leak.via
        for row in [row for rows in self.draws.values() for row in rows] + self.balanced:
            yield from row.asked
            yield from (ref for ref, _ in row.drawn)
        for rejection in self.rejections:
            yield from rejection.examples


@dataclass(frozen=True)
class Found:
    """What was gathered from all ranges for the page."""

    tally: Tally
    largest: np.ndarray
    """int64 [groups, 2]: component and size, the largest first"""
    others: np.ndarray
    """components of some other groups"""
    sizes: dict[int, int]
    """images of each of these groups"""
    members: dict[int, Members]
    drawn: dict[int, Drawn]
    """clusters that the balanced branch drew from"""


def choose(run: Run, found: Found, status_of: Callable[[int], str]) -> Choices:
    """Choose the examples of a run from what its ranges gave and its stages' files.

    Args:
        status_of: of an image of the pool, by gid.
    """
    above, below = choose_pairs(run)
    kept = found.tally.of_kind("kept").get((), np.zeros(0, np.int64))
    return Choices(
        kept=[_pool(gid) for gid in _hash_order(kept, _NUM_KEPT)],
        groups=choose_groups(found, status_of),
        above=above,
        below=below,
        leaks=choose_leaks(run, found.tally),
        draws={name: choose_draws(run, name, max(1, _QUERIES // len(run.inputs.seeds))) for name in run.inputs.seeds},
        balanced=choose_balanced(found),
        rejections=choose_rejections(found.tally),
        map=choose_map(run, found.tally),
    )


def choose_groups(found: Found, status_of: Callable[[int], str]) -> list[Group]:
    """The largest near-duplicate groups, then some of the others by hash, larger ones first."""
    largest = found.largest[:_LARGEST_GROUPS, 0].tolist()
    rest = np.union1d(found.largest[_LARGEST_GROUPS:, 0], found.others)
    others = sorted(hash_sample(SEED, rest, _OTHER_GROUPS).tolist(), key=lambda label: (-found.sizes[label], label))
    return [_group(found, label, status_of, label in largest) for label in largest + others]


def _group(found: Found, label: int, status_of: Callable[[int], str], is_largest: bool) -> Group:
    members, room = found.members[label], _LARGEST_MEMBERS if is_largest else _OTHER_MEMBERS
    others = members.some[np.lexsort((members.some["gid"], -np.nan_to_num(members.some["similarity"], nan=-2)))]
    shown = others[np.unique(np.linspace(0, len(others) - 1, min(len(others), room)).round().astype(int))]
    return Group(
        size=found.sizes[label],
        representative=_pool(members.representative),
        members=[Member(_pool(gid), float(similarity), STEPS[step]) for gid, similarity, step in shown.tolist()],
        least_similarity=members.least_similarity,
        steps=dict(members.steps),
        status=status_of(members.representative),
        is_largest=is_largest,
    )


def choose_pairs(run: Run) -> tuple[list[Pair], list[Pair]]:
    """The pairs nearest to the threshold on its upper and on its lower side, no image twice while others are there."""
    table = (run.folder / "dedup").read_table("near.parquet").to_pylist()
    threshold = run.config.dedup.similarity_threshold
    sides = []
    for is_above in (True, False):
        rows = [row for row in table if (row["similarity"] >= threshold) == is_above]
        seen: set[int] = set()
        fresh, repeated = [], []
        for row in rows:
            (repeated if seen & {row["a"], row["b"]} else fresh).append(row)
            seen |= {row["a"], row["b"]}
        chosen = (fresh + repeated)[:_PAIRS_EACH_SIDE]
        sides.append([Pair(_pool(r["a"]), _pool(r["b"]), r["similarity"], r["mirrored"]) for r in chosen])
    return sides[0], sides[1]


def choose_leaks(run: Run, found: Tally) -> list[Leak]:
    """Some leaks of every step of the cascade, by hash and from the evaluation sets in turn; the surest first."""
    by_set = found.of_kind("leak")
    leaks = []
    for name in ("exact", "perceptual", "embedding", "component"):
        of_sets = [by_set.get((s, name), np.zeros(0, np.int64)) for s in run.inputs.evaluations]
        in_turn = zip_longest(*(_hash_order(gids, _LEAKS_PER_STEP) for gids in of_sets))
        chosen = [g for turn in in_turn for g in turn if g is not None][:_LEAKS_PER_STEP]
        rows = [leaks_of(run.folder, run.ranges, gid, gid + 1).to_pylist()[0] for gid in chosen]
        leaks += sorted(map(_leak, rows), key=lambda leak: (-leak.similarity, leak.image.gid))
    return leaks


def _leak(row: dict[str, Any]) -> Leak:
    return Leak(
        image=_pool(row["gid"]),
        match=Ref(f"evaluation-{row['evaluation']}", row["evaluation_gid"]),
        via=_pool(row["via"]) if row["via"] != row["gid"] else None,
        similarity=row["similarity"],
        step=row["step"],
    )


def choose_draws(run: Run, name: str, num_rows: int) -> list[Row]:
    """What some of a seed set's images drew, by hash; in cluster mode, some clusters that were hit."""
    folder, mode = run.folder / f"retrieve/{name}", run.inputs.seeds[name][0].rule.mode
    asked = _asked(run, name)
    if mode == "cluster":
        return _draws_by_cluster(run, name, folder, asked, num_rows)
    matches = folder.table_where("matches.parquet", pc.field("seed_gid").isin(pa.array(asked)))
    seed_gid = matches["seed_gid"].to_numpy()
    chosen = hash_sample(SEED, np.unique(seed_gid), num_rows)
    rows = {gid: Row("", [Ref(f"seed-{name}", gid)], []) for gid in chosen.tolist()}
    for row in matches.filter(pa.array(np.isin(seed_gid, chosen))).sort_by([("rank", "ascending")]).to_pylist():
        if len(rows[row["seed_gid"]].drawn) < _ANSWERS:
            rows[row["seed_gid"]].drawn.append((_pool(row["gid"]), row["similarity"]))
    return list(rows.values())


def _asked(run: Run, name: str) -> np.ndarray:
    """Readable images of a seed set, by hash, ascending: among them the page looks for those that it shows."""
    seeds = run.images(f"embed/seed-{name}")
    good = np.concatenate([seeds.index(p, ["status"])["status"].to_numpy() == "ok" for p in range(seeds.num_parts)])
    return hash_sample(SEED, np.flatnonzero(good).astype(np.int64), _SEEDS_ASKED)


def _draws_by_cluster(run: Run, name: str, folder: Folder, asked: np.ndarray, num_rows: int) -> list[Row]:
    seeds = run.images(f"embed/seed-{name}")
    cell = Clustering(run.folder / "cluster").finest_of(unit_rows(seeds.take_embeddings(run.retrieval_encoder, asked)))
    hit = pc.field("cluster").isin(pa.array(np.unique(cell).astype(np.int64)))
    matches = folder.table_where("matches.parquet", hit, ["gid", "cluster"])
    clusters, gids = matches["cluster"].to_numpy(), matches["gid"].to_numpy()
    candidates = np.unique(clusters)
    rows = []
    for cluster in hash_sample(SEED, candidates, num_rows).tolist():
        hits, drawn = asked[cell == cluster], gids[clusters == cluster]
        label = f"cluster {cluster}: {len(drawn):,} drawn"
        shown = [(_pool(gid), float("nan")) for gid in _hash_order(drawn, _ANSWERS)]
        rows.append(Row(label, [Ref(f"seed-{name}", gid) for gid in _hash_order(hits, 2)], shown))
    return rows


def choose_balanced(found: Found) -> list[Row]:
    """What the balanced branch drew from some clusters, by hash."""
    rows = []
    for label, of in sorted(found.drawn.items()):
        text = f"cluster {label}: {of.drawn:,} of {of.survivors:,} drawn"
        rows.append(Row(text, [], [(_pool(g), float("nan")) for g in _hash_order(of.some, _ANSWERS + 1)]))
    return rows


def choose_rejections(found: Tally) -> list[Rejection]:
    """Every reason with its count, the most frequent first; examples while there is room for them."""
    counts = {why: count for (state, why), count in found.counts.items() if state == "rejected"}
    examples = found.of_kind("rejected")
    result, room = [], _REJECTED
    per_reason = max(2, min(_REJECTED_PER_REASON, _REJECTED // max(1, len(counts))))
    for name in sorted(counts, key=lambda name: (-counts[name], name)):
        shown = _hash_order(examples[name,], min(per_reason, room))
        room -= len(shown)
        result.append(Rejection(name, counts[name], [_pool(g) for g in shown]))
    return result


def choose_map(run: Run, found: Tally) -> Map | None:
    """A hash sample of the readable pool, and of the seed sets, by neighbourhood; None where there is too little."""
    readable = found.of_kind("readable")
    if sum(map(len, readable.values())) < 3:
        return None
    gids = hash_sample(SEED, np.concatenate(list(readable.values())), _MAP_POINTS)
    status = np.full(len(gids), "", object)
    for (state,), of_state in readable.items():
        status[np.isin(gids, of_state)] = state
    rows, kinds = [unit_rows(run.pool.take_embeddings(run.retrieval_encoder, gids))], [status]
    for name in run.inputs.seeds:
        seeds = run.images(f"embed/seed-{name}")
        chosen = hash_sample(SEED, _asked(run, name), _MAP_SEEDS // len(run.inputs.seeds))
        rows.append(unit_rows(seeds.take_embeddings(run.retrieval_encoder, chosen)))
        kinds.append(np.full(len(chosen), "seed", object))
    points = neighbour_map(np.concatenate(rows), SEED)
    points = _unit_square(points)
    return Map(points, np.concatenate(kinds), _map_pictures(points[: len(gids)], gids))


def _unit_square(points: np.ndarray) -> np.ndarray:
    """Points scaled into the unit square; a few strays move closer, so that they do not shrink the rest."""
    low, high = np.percentile(points, [1, 99], axis=0)
    wide = (points - (low + high) / 2) / np.maximum((high - low) / 2, 1e-12)
    beyond = np.maximum(np.abs(wide) - 1, 0)
    wide = np.clip(wide, -1, 1) + np.sign(wide) * 0.12 * np.tanh(beyond)
    return wide / 2.24 + 0.5


def _map_pictures(points: np.ndarray, gids: np.ndarray) -> list[tuple[int, Ref]]:
    """The point nearest to the middle of each field of a grid, where it lies well inside."""
    columns, rows = _MAP_PICTURES
    chosen = []
    for field_ in range(columns * rows):
        middle = np.array([(field_ % columns + 0.5) / columns, (field_ // columns + 0.5) / rows])
        gap = np.abs((points - middle) * [columns, rows]).max(axis=1)
        nearest = int(gap.argmin())
        if gap[nearest] < 0.3:
            chosen.append((nearest, _pool(gids[nearest])))
    return chosen


def _pool(gid: int) -> Ref:
    return Ref("pool", int(gid))


def _hash_order(gids: np.ndarray, size: int) -> list[int]:
    """Up to `size` of the gids, chosen and ordered by hash."""
    return hash_shuffle(SEED, hash_sample(SEED, gids, size)).tolist() if size > 0 else []
