"""What the report shows of a run: a bounded number of examples, chosen by size or by hash, never by chance."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.account.report.map import neighbour_map
from curation.account.report.pictures import Ref
from curation.ops.randomness import hash_sample, hash_shuffle
from curation.stages.balance import read_balanced
from curation.stages.cluster import Clustering
from curation.stages.dedup import Duplicates
from curation.stages.groups import STEPS
from curation.stages.members import unit_rows
from curation.stages.survivors import Survivors
from curation.state import Run

_SEED = 0
_NUM_KEPT = 18
_LARGEST_GROUPS, _OTHER_GROUPS = 6, 10
_LARGEST_MEMBERS, _OTHER_MEMBERS = 8, 4  # shown, beside the representative
_PAIRS_EACH_SIDE = 6
_LEAKS_PER_STEP = 4
_QUERIES, _ANSWERS = 12, 6
_BALANCED_CLUSTERS = 6
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


def choose(run: Run, decisions: pa.Table) -> Choices:
    """Choose the examples of a run from its decisions and its stages' files."""
    status = decisions["status"].to_numpy(zero_copy_only=False)
    above, below = choose_pairs(run)
    return Choices(
        kept=[_pool(gid) for gid in _hash_order(np.flatnonzero(status == "kept"), _NUM_KEPT)],
        groups=choose_groups(run, status),
        above=above,
        below=below,
        leaks=choose_leaks(run),
        draws={name: choose_draws(run, name, max(1, _QUERIES // len(run.inputs.seeds))) for name in run.inputs.seeds},
        balanced=choose_balanced(run),
        rejections=choose_rejections(decisions),
        map=choose_map(run, status),
    )


def choose_groups(run: Run, status: np.ndarray) -> list[Group]:
    """The largest near-duplicate groups, then some of the others by hash, larger ones first."""
    duplicates = Duplicates(run.folder / "dedup")
    component = duplicates.component()
    sizes = np.bincount(component[component >= 0], minlength=1)
    labels = np.flatnonzero(sizes > 1)
    labels = labels[np.lexsort((labels, -sizes[labels]))]
    largest = labels[:_LARGEST_GROUPS].tolist()
    others = hash_sample(_SEED, labels[_LARGEST_GROUPS:], _OTHER_GROUPS)
    others = others[np.lexsort((others, -sizes[others]))].tolist()
    wanted = np.flatnonzero(np.isin(component, np.array(largest + others, np.int64)))
    representative, similarity, step = duplicates.representative(), duplicates.similarity(), duplicates.step()
    return [
        _group(wanted[component[wanted] == label], representative, similarity, step, status, label in largest)
        for label in largest + others
    ]


def _group(
    gids: np.ndarray,
    representative: np.ndarray,
    similarity: np.ndarray,
    step: np.ndarray,
    status: np.ndarray,
    is_largest: bool,
) -> Group:
    head, room = int(representative[gids[0]]), _LARGEST_MEMBERS if is_largest else _OTHER_MEMBERS
    others = gids[gids != head]
    others = others[np.lexsort((others, -np.nan_to_num(similarity[others], nan=-2)))]
    shown = others[np.unique(np.linspace(0, len(others) - 1, min(len(others), room)).round().astype(int))]
    names, counts = np.unique(step[others], return_counts=True)
    return Group(
        size=len(gids),
        representative=_pool(head),
        members=[Member(_pool(gid), float(similarity[gid]), STEPS[step[gid]]) for gid in shown],
        least_similarity=float(np.nanmin(np.append(similarity[others], np.inf))),
        steps={STEPS[name]: int(count) for name, count in zip(names, counts, strict=True)},
        status=str(status[head]),
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


def choose_leaks(run: Run) -> list[Leak]:
    """Some leaks of every step of the cascade, by hash and from the evaluation sets in turn; the surest first."""
    table = Survivors(run.folder / "survivors").all_leaks()
    gid, step = table["gid"].to_numpy(), table["step"].to_numpy(zero_copy_only=False)
    sets = table["evaluation"].to_numpy(zero_copy_only=False)
    leaks = []
    for name in ("exact", "perceptual", "embedding", "component"):
        of_sets = [gid[(sets == s) & (step == name)] for s in run.inputs.evaluations]
        in_turn = zip_longest(*(_hash_order(gids, _LEAKS_PER_STEP) for gids in of_sets))
        chosen = [g for turn in in_turn for g in turn if g is not None][:_LEAKS_PER_STEP]
        found = [_leak(row) for row in table.filter(pa.array(np.isin(gid, np.array(chosen, np.int64)))).to_pylist()]
        leaks += sorted(found, key=lambda leak: (-leak.similarity, leak.image.gid))
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
    matches = (run.folder / f"retrieve/{name}").read_table("matches.parquet")
    if run.inputs.seeds[name][0].rule.mode == "cluster":
        return _draws_by_cluster(run, name, matches, num_rows)
    seed_gid = matches["seed_gid"].to_numpy()
    chosen = hash_sample(_SEED, np.unique(seed_gid), num_rows)
    rows = {gid: Row("", [Ref(f"seed-{name}", gid)], []) for gid in chosen.tolist()}
    for row in matches.filter(pa.array(np.isin(seed_gid, chosen))).sort_by([("rank", "ascending")]).to_pylist():
        if len(rows[row["seed_gid"]].drawn) < _ANSWERS:
            rows[row["seed_gid"]].drawn.append((_pool(row["gid"]), row["similarity"]))
    return list(rows.values())


def _draws_by_cluster(run: Run, name: str, matches: pa.Table, num_rows: int) -> list[Row]:
    seeds = run.images(f"embed/seed-{name}")
    good = np.concatenate([seeds.index(p, ["status"])["status"].to_numpy() == "ok" for p in range(seeds.num_parts)])
    asked = hash_sample(_SEED, np.flatnonzero(good).astype(np.int64), _SEEDS_ASKED)
    rows = unit_rows(seeds.take_embeddings(run.retrieval_encoder, asked))
    cell = Clustering(run.folder / "cluster").finest_of(rows)
    clusters, gids = matches["cluster"].to_numpy(), matches["gid"].to_numpy()
    candidates = np.intersect1d(clusters, cell)
    rows = []
    for cluster in hash_sample(_SEED, candidates, num_rows).tolist():
        hits, drawn = asked[cell == cluster], gids[clusters == cluster]
        label = f"cluster {cluster}: {len(drawn):,} drawn"
        shown = [(_pool(gid), float("nan")) for gid in _hash_order(drawn, _ANSWERS)]
        rows.append(Row(label, [Ref(f"seed-{name}", gid) for gid in _hash_order(hits, 2)], shown))
    return rows


def choose_balanced(run: Run) -> list[Row]:
    """What the balanced branch drew from some clusters, by hash."""
    if not run.config.balance.is_wanted():
        return []
    table = read_balanced(run.folder / "balance")
    gid, cluster = table["gid"].to_numpy(), table["cluster"].to_numpy()
    sizes = Clustering(run.folder / "cluster").sizes()
    rows = []
    for label in hash_sample(_SEED, np.unique(cluster), _BALANCED_CLUSTERS).tolist():
        drawn = gid[cluster == label]
        text = f"cluster {label}: {len(drawn):,} of {sizes[label]:,} drawn"
        rows.append(Row(text, [], [(_pool(g), float("nan")) for g in _hash_order(drawn, _ANSWERS + 1)]))
    return rows


def choose_rejections(decisions: pa.Table) -> list[Rejection]:
    """Every reason with its count, the most frequent first; examples while there is room for them."""
    rejected = decisions.filter(pc.equal(decisions["status"], "rejected"))
    gid, reason = (
        rejected["gid"].to_numpy(),
        rejected["reason"].fill_null("").to_numpy(zero_copy_only=False).astype(str),
    )
    names, counts = np.unique(reason, return_counts=True)
    result, room = [], _REJECTED
    per_reason = max(2, min(_REJECTED_PER_REASON, _REJECTED // max(1, len(names))))
    for at in np.lexsort((names, -counts)):
        examples = _hash_order(gid[reason == names[at]], min(per_reason, room))
        room -= len(examples)
        result.append(Rejection(str(names[at]), int(counts[at]), [_pool(g) for g in examples]))
    return result


def choose_map(run: Run, status: np.ndarray) -> Map | None:
    """A hash sample of the readable pool, and of the seed sets, by neighbourhood; None where there is too little."""
    readable = np.flatnonzero(status != "rejected").astype(np.int64)
    if len(readable) < 3:
        return None
    gids = hash_sample(_SEED, readable, _MAP_POINTS)
    rows, kinds = [unit_rows(run.pool.take_embeddings(run.retrieval_encoder, gids))], [status[gids]]
    for name in run.inputs.seeds:
        seeds = run.images(f"embed/seed-{name}")
        good = np.concatenate([seeds.index(p, ["status"])["status"].to_numpy() == "ok" for p in range(seeds.num_parts)])
        chosen = hash_sample(_SEED, np.flatnonzero(good), _MAP_SEEDS // len(run.inputs.seeds))
        rows.append(unit_rows(seeds.take_embeddings(run.retrieval_encoder, chosen)))
        kinds.append(np.full(len(chosen), "seed", object))
    points = neighbour_map(np.concatenate(rows), _SEED)
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
    return hash_shuffle(_SEED, hash_sample(_SEED, gids, size)).tolist() if size > 0 else []
