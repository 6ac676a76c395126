"""What the stages say of the images of a span of gids: the one place where their files are read for the account."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.engine.earlier import Earlier
from curation.engine.folder import Folder
from curation.engine.ranges import Ranges, range_file
from curation.engine.store import ImageSet
from curation.stages import groups
from curation.stages.groups import STEPS
from curation.state import Run

STATUSES = ("kept", "rejected", "duplicate", "leak", "not_retrieved")
_KEPT, _REJECTED, _DUPLICATE, _LEAK, _NOT_RETRIEVED = range(len(STATUSES))
_REASONS = ("", "balanced", "retrieved", "retrieved and balanced", *STEPS[1:], "component")
_BLOCK_ROWS = 1 << 20


@dataclass(frozen=True)
class Sources:
    """Where a run's stages keep what the account needs, and which sets it had."""

    folder: Folder
    ranges: Ranges
    pool: ImageSet
    seeds: dict[str, ImageSet]
    evaluations: dict[str, ImageSet]
    is_balanced: bool
    release: int = 1
    earlier: Earlier | None = None

    @staticmethod
    def of(run: Run) -> "Sources":
        return Sources(
            run.folder,
            run.ranges,
            run.pool,
            {name: run.images(f"embed/seed-{name}") for name in run.inputs.seeds},
            {name: run.images(f"embed/evaluation-{name}") for name in run.inputs.evaluations},
            run.config.balance.is_wanted(),
            run.release,
            run.earlier.decided() if run.earlier is not None else None,
        )

    def spans(self, number: int) -> list[tuple[int, int]]:
        """The gids of a range in spans of a bounded number of rows: [start, stop) each."""
        first, end = self.ranges.bounds(number)
        return [(start, min(start + _BLOCK_ROWS, end)) for start in range(first, end, _BLOCK_ROWS)]

    @property
    def draw_names(self) -> list[str]:
        """What can have drawn an image."""
        return [*self.seeds, *(["balance"] if self.is_balanced else [])]

    @cached_property
    def sets(self) -> list[ImageSet]:
        """Every set; an image of any goes by its place in them all, put one behind the other."""
        return [self.pool, *self.seeds.values(), *self.evaluations.values()]

    @cached_property
    def set_base(self) -> np.ndarray:
        """int64 [sets + 1]: the place of each set's first image, then the number of all."""
        return np.cumsum([0, *(images.num_images for images in self.sets)]).astype(np.int64)

    def keys(self, start: int, stop: int) -> pa.ChunkedArray:
        """Keys of the images at places [start, stop)."""
        tables = []
        for images, base, end in zip(self.sets, self.set_base[:-1].tolist(), self.set_base[1:].tolist(), strict=True):
            if base < stop and start < end:
                tables.append(images.rows(max(start, base) - base, min(stop, end) - base, ["key"]))
        return pa.concat_tables(tables)["key"].cast(pa.large_string())


class Duplicates(NamedTuple):
    """What deduplication says of a span, by array."""

    component: np.ndarray
    """int64: smallest gid of the group; -1 where a filter dropped the image"""
    size: np.ndarray
    """int32: images in that group"""
    representative: np.ndarray
    """int64; -1 where a filter dropped the image"""
    similarity: np.ndarray
    """float32: cosine to the representative; NaN where they are linked through others"""
    step: np.ndarray
    """uint8: index into STEPS"""


def duplicates_of(folder: Folder, ranges: Ranges, start: int, stop: int) -> Duplicates:
    """Of a run's folder, for the gids [start, stop), all of one range."""
    table = _range_rows(folder / "dedup", ranges, start, stop, groups.SCHEMA.names)
    missing = {"component": -1, "component_size": 0, "representative": -1, "similarity": np.nan, "step": 0}
    return Duplicates(*(table[name].fill_null(missing[name]).to_numpy() for name in missing))


def _range_rows(folder: Folder, ranges: Ranges, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
    """The gids [start, stop), all of one range, of a stage that writes a file a range."""
    number, first = start // ranges.size, start // ranges.size * ranges.size
    return folder.table_rows(range_file("range", number), start - first, stop - first, columns)


def representatives_of(folder: Folder, ranges: Ranges, start: int, stop: int) -> np.ndarray:
    """int64: who stands for each image after decontamination, which may have elected others; -1 for leaks as well."""
    number, first = start // ranges.size, start // ranges.size * ranges.size
    return (folder / "survivors").array_rows(f"representative-{number:05d}.npy", start - first, stop - first)


def leaks_of(folder: Folder, ranges: Ranges, start: int, stop: int) -> pa.Table:
    """gid, evaluation, evaluation_gid, similarity, step, via of the leaks among the gids [start, stop), all of one
    range."""
    return (folder / "survivors").table_where(range_file("leaks", start // ranges.size), _between(start, stop))


def _reasons_of(folder: Folder, ranges: Ranges, start: int, stop: int) -> pa.DictionaryArray:
    """Why a filter dropped each image; null for those that went on."""
    return _encoded(_range_rows(folder / "filter", ranges, start, stop, ["reason"])["reason"])


def _clusters_of(folder: Folder, ranges: Ranges, start: int, stop: int) -> np.ndarray:
    """int64: the finest cluster; -1 for images that stand for no group. Leaks are clustered, too."""
    number, first = start // ranges.size, start // ranges.size * ranges.size
    name = f"level-1/assignment-{number:05d}.npy"
    return (folder / "cluster").array_rows(name, start - first, stop - first).astype(np.int64)


class _Draws(NamedTuple):
    """What drew the images of a span."""

    by_name: list[np.ndarray]
    """int32 [rows] for each of `draw_names`: how often it drew the image"""
    seed: np.ndarray
    """int16: which seed set's draw was the strongest; -1 where none drew it"""
    seed_gid: np.ndarray
    """int64: by which of its images; -1 where its cluster was hit, or none drew it"""
    similarity: np.ndarray
    """float32: to that image; NaN where there is none"""


def _draws_of(sources: Sources, start: int, stop: int) -> _Draws:
    rows = stop - start
    tables, by_name = [], []
    for number, name in enumerate(sources.seeds):
        table = (sources.folder / f"retrieve/{name}").table_where(
            "matches.parquet", _between(start, stop), ["gid", "seed_gid", "similarity"]
        )
        gid = table["gid"].to_numpy() - start
        by_name.append(np.bincount(gid, minlength=rows).astype(np.int32))
        value = table["similarity"].fill_null(-2).to_numpy()
        tables.append((gid, np.full(len(gid), number, np.int16), table["seed_gid"].to_numpy(), value))
    if sources.is_balanced:
        drawn = range_file("balanced", start // sources.ranges.size)
        table = (sources.folder / "balance").table_where(drawn, _between(start, stop), ["gid"])
        by_name.append(np.bincount(table["gid"].to_numpy() - start, minlength=rows).astype(np.int32))
    seed, seed_gid = np.full(rows, -1, np.int16), np.full(rows, -1, np.int64)
    similarity = np.full(rows, np.nan, np.float32)
    if tables:
        gid, number, of, value = (np.concatenate(columns) for columns in zip(*tables, strict=True))
        order = np.lexsort((of, number, -value, gid))
        at, first = np.unique(gid[order], return_index=True)
        best = order[first]
        seed[at], seed_gid[at] = number[best], of[best]
        similarity[at] = np.where(value[best] >= -1, value[best], np.nan)
    return _Draws(by_name, seed, seed_gid, similarity)


class Fates(NamedTuple):
    """What becomes of the images of a span, and the images that say why."""

    columns: dict[str, pa.Array]
    """of decisions.SCHEMA, those that need no name from another part or set; `draws` beside them, and `seed_match`
    where an earlier release has said it"""
    place: np.ndarray
    """int64: of the image that explains this one's fate (Sources.sets): the representative of a duplicate, what a leak
    matched, the seed image whose draw was the strongest; -1 where there is none"""


def fates(sources: Sources, start: int, stop: int) -> Fates:
    """What becomes of the pool images with the gids [start, stop)."""
    here = np.arange(start, stop)
    dropped = _reasons_of(sources.folder, sources.ranges, start, stop)
    group = duplicates_of(sources.folder, sources.ranges, start, stop)
    final = representatives_of(sources.folder, sources.ranges, start, stop)
    leaks = leaks_of(sources.folder, sources.ranges, start, stop)
    cluster = np.where(final == here, _clusters_of(sources.folder, sources.ranges, start, stop), -1)
    draws = _draws_of(sources, start, stop)

    leak = leaks["gid"].to_numpy() - start
    was_drawn, is_balanced = (
        draws.seed >= 0,
        draws.by_name[-1] > 0 if sources.is_balanced else np.zeros(len(here), bool),
    )
    status = np.full(len(here), _NOT_RETRIEVED, np.int8)
    status[was_drawn | is_balanced] = _KEPT
    status[final != here] = _DUPLICATE
    status[leak] = _LEAK
    status[group.component < 0] = _REJECTED
    is_kept, is_duplicate = status == _KEPT, status == _DUPLICATE
    is_direct = is_duplicate & (final == group.representative)

    reason = np.zeros(len(here), np.int32)
    reason[is_kept] = (2 * was_drawn + is_balanced)[is_kept]
    steps = np.array([_REASONS.index(step) for step in STEPS], np.int32)
    reason[is_duplicate] = steps[STEPS.index("chain")]  # unless it still has the representative that it matched:
    reason[is_direct] = steps[group.step[is_direct]]
    reason[leak] = _codes(leaks["step"], _REASONS)
    rejected = status == _REJECTED
    reason[rejected] = len(_REASONS) + dropped.indices.fill_null(0).to_numpy()[rejected]

    similarity = np.where(is_kept, draws.similarity, np.float32(np.nan))
    similarity[is_direct] = group.similarity[is_direct]
    similarity[leak] = leaks["similarity"].to_numpy()

    evaluation = np.full(len(here), -1, np.int32)
    evaluation[leak] = _codes(leaks["evaluation"], list(sources.evaluations))
    evaluation_gid = np.zeros(len(here), np.int64)
    evaluation_gid[leak] = leaks["evaluation_gid"].to_numpy()
    place = np.full(len(here), -1, np.int64)
    place[is_duplicate] = final[is_duplicate]
    of_seed = is_kept & (draws.seed_gid >= 0)
    place[of_seed] = sources.set_base[1 + draws.seed[of_seed]] + draws.seed_gid[of_seed]
    is_leak = status == _LEAK
    place[is_leak] = sources.set_base[1 + len(sources.seeds) + evaluation[is_leak]] + evaluation_gid[is_leak]

    alone = group.size <= 1
    draw_columns = [pa.array(counts.astype(np.int64), mask=counts == 0) for counts in draws.by_name]
    columns = {
        "gid": pa.array(here),
        "status": _named(status, STATUSES),
        "reason": _named(np.where(reason == 0, -1, reason), [*_REASONS, *dropped.dictionary.to_pylist()]),
        "duplicate_of_gid": pa.array(final, mask=~is_duplicate),
        "component": pa.array(group.component, mask=alone),
        "component_size": pa.array(np.where(alone, 1, group.size).astype(np.int32)),
        "evaluation": _named(evaluation, list(sources.evaluations)),
        "seed": _named(np.where(is_kept, draws.seed, -1), list(sources.seeds)),
        "similarity": pa.array(similarity, mask=np.isnan(similarity)),
        "cluster": pa.array(cluster, mask=cluster < 0),
        "draws": pa.StructArray.from_arrays(draw_columns, sources.draw_names, mask=pa.array(~is_kept)),
        "release": pa.array(np.full(len(here), sources.release, np.int32), mask=~is_kept),
        "seed_match": pa.nulls(len(here), pa.string()),
    }
    if sources.earlier is not None:
        stays = _keep_places(columns, sources.earlier.decisions(start, stop, _EARLIER))
        place[stays] = -1
    return Fates(columns, place)


_EARLIER = ("status", "reason", "seed", "seed_match", "similarity", "release")


def _keep_places(columns: dict[str, pa.Array], before: pa.Table) -> np.ndarray:
    """Images that an earlier release kept, and that no filter, leak or group removes, stay as it kept them, whether or
    not anything draws them now; those that something removes keep the release's number. Changes `columns`.

    Returns:
        bool [rows]: those that stay.
    """
    rows = len(columns["gid"])

    def padded(name: str) -> pa.Array:
        column = before[name].combine_chunks()
        return pa.concat_arrays([column, pa.nulls(rows - len(column), column.type)])

    was_kept = pc.fill_null(pc.equal(padded("status"), "kept"), False)
    may_stay = pc.is_in(columns["status"], pa.array(["kept", "not_retrieved"]))
    stays = pc.and_(was_kept, may_stay)
    for name in ("reason", "seed", "seed_match", "similarity"):
        columns[name] = pc.if_else(stays, padded(name), columns[name])
    columns["status"] = pc.if_else(stays, "kept", columns["status"])
    columns["release"] = pc.if_else(was_kept, padded("release"), columns["release"])
    return stays.to_numpy(zero_copy_only=False)


def _between(start: int, stop: int) -> pc.Expression:
    return (pc.field("gid") >= start) & (pc.field("gid") < stop)


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded


def _codes(column: pa.ChunkedArray, names: list[str] | tuple[str, ...]) -> np.ndarray:
    """int32: position of each value in `names`."""
    return pc.index_in(column, pa.array(list(names), pa.string())).to_numpy().astype(np.int32)


def _named(codes: np.ndarray, names: list[str] | tuple[str, ...]) -> pa.Array:
    """Strings by code, null for -1."""
    indices = pa.array(codes.astype(np.int32), mask=codes < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names), pa.string())).cast(pa.string())
