"""What each step of a run hands to its stage, and what it makes of the counts."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from curation.account import decisions
from curation.encoders.load import load_encoder
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import Ranges
from curation.engine.store import NOT_IN_POOL, Parts, adopt
from curation.reading.filters import Edit, Filter
from curation.reading.samples import Part
from curation.stages import (
    balance,
    cells,
    cluster,
    decontaminate,
    dedup,
    embed,
    join,
    retrieve,
    seed_neighbours,
    shard,
    survivors,
)
from curation.stages import heads as heads_stage
from curation.stages.asking import asked_of
from curation.stages.cells_before import CellsBefore
from curation.stages.cluster_before import was_clustered
from curation.stages.joined_before import JoinedBefore
from curation.stages.seed_neighbours import SeedQueries
from curation.state import Run, Written
from curation.writing.plan import KeptSet

logger = logging.getLogger(__name__)


def embed_images(
    run: Run, folder: Folder, parts: Sequence[Part], encoders: list[str], filters: list[Filter], name: str
) -> Written:
    c = run.config
    if run.earlier is not None and name in run.earlier.manifests:
        adopt(folder, run.earlier.folder / name, c.execution)
    files, tallies, gone = embed.embed_set(
        folder, parts, encoders, c.embed, filters, c.execution, name.replace("/", " ")
    )
    counts, lost, total, worst = embed.count_losses(parts, tallies)
    figures = {"gone": gone} if gone else {}
    if gone:
        counts[NOT_IN_POOL] = sum(file.rows for file in files if file.path.startswith("index/")) - counts["images"]
    reasons = {r.removeprefix("rejected: "): n for r, n in counts.items() if r.startswith("rejected: ")}
    if not counts["images"]:
        raise ValueError(f"{name}: there is no image in {parts[0].url}, nor in any other part: check its URL.")
    if total and lost > c.embed.max_rejected_fraction * total:
        unread = ""
        if counts.get("unread bytes"):
            unread = (
                f" ({counts['damaged shards']:,} damaged shards, in which {counts['unread bytes']:,} bytes cannot be "
                f"read, about {counts['unread images']:,} images)"
            )
        raise ValueError(
            f"{name}: {lost:,} of {total:,} images cannot be read{unread}, most with {worst!r}; that is more "
            f"than embed.max_rejected_fraction={c.embed.max_rejected_fraction}. Check that the URLs hold images, or "
            "raise the limit."
        )
    if sum(reasons.values()) == counts["images"] and name != "embed/pool":
        raise ValueError(
            f"{name}: none of its {counts['images']:,} images can be read, so it does nothing: check its URL, "
            "or leave it out."
        )
    return files, counts, figures


def find_heads(run: Run, folder: Folder) -> Written:
    filtered = run.manifests["filter"].counts
    if not filtered["images out"]:
        reasons = {reason: number for reason, number in filtered.items() if reason not in ("images out", NOT_IN_POOL)}
        told = ", ".join(f"{number:,} {reason}" for reason, number in reasons.items())
        raise ValueError(
            f"none of the {run.manifests['embed/pool'].counts['images']:,} images of the pool can be used: {told} (by "
            f"image: {run.folder.url}/filter). Loosen `filters`, or check --pool."
        )
    return *heads_stage.find_heads(folder, run.folder / "filter", run.ranges, run.config.execution), {}


def _step_before(run: Run, step: str, version: int, config: Any) -> Folder | None:
    """The folder of a step of the run that is extended, where it was made in the same way."""
    if run.earlier is None:
        return None
    manifest, wanted = run.earlier.manifests[step], json.loads(json.dumps(asdict(config)))
    had = {name: value for name, value in manifest.settings.items() if name != "extends"}
    if (manifest.version, had) == (version, wanted):
        return run.earlier.folder / step
    logger.info("%s: made anew, since %s was made in another way.", step, run.earlier.folder.url)
    return None


def _ranges_before(run: Run) -> Ranges:
    assert run.earlier is not None
    return Ranges(run.earlier.num_images, run.config.range_rows)


def build_cells(run: Run, folder: Folder) -> Written:
    chosen = partial(heads_stage.is_head, folder=run.folder / "heads", ranges=run.ranges)
    c, before = run.config, None
    if run.earlier is not None and (was := _step_before(run, "cells", cells.VERSION, c.cells)) is not None:
        had = partial(heads_stage.is_head, folder=run.earlier.folder / "heads", ranges=_ranges_before(run))
        before = CellsBefore(was, had, _ranges_before(run))
    files = cells.build_cells(folder, run.pool, run.copy_encoder, run.ranges, chosen, c.cells, c.execution, before)
    return files, {}, {}


def _joined_before(run: Run) -> tuple[JoinedBefore | None, str | None]:
    """The join of the run that is extended, where its edges can be taken over, or why they cannot."""
    if run.earlier is None:
        return None, None
    was = run.earlier.folder
    before = JoinedBefore(was / "join", run.earlier.manifests["join"], was / "heads", _ranges_before(run))
    dedup = run.config.dedup
    why = before.refusal(join.VERSION, dedup.highest_floor, dedup.target_recall)
    return (None, why) if why else (before, None)


def join_settings(run: Run) -> dict[str, Any]:
    before, _ = _joined_before(run)
    if before is None:
        return asdict(run.config.dedup.join())
    return {**asdict(run.config.dedup.join(before.floor)), "extends": before.manifest.hash()}


def join_cells(run: Run, folder: Folder) -> Written:
    mirror, execution = load_encoder(run.config.embed.encoders()[-1]).mirror, run.config.execution
    before, why = _joined_before(run)
    if before is None:
        if run.earlier is not None:
            logger.info("join: nothing is taken over from %s: %s", run.earlier.folder.url, why)
        return join.join_pool(folder, run.cells("cells"), mirror, run.config.dedup.join(), execution)
    extension = join.Extension(before, run.folder / "heads", run.ranges)
    settings = run.config.dedup.join(before.floor)
    return join.join_pool(folder, run.cells("cells"), mirror, settings, execution, extension)


def deduplicate(run: Run, folder: Folder) -> Written:
    before = None
    if run.earlier is not None:
        was, settings = run.earlier.folder, run.earlier.manifests["dedup"].settings
        before = dedup.pairs_before(was / "dedup", settings, was / "heads", _ranges_before(run), run.config.dedup)
    return dedup.deduplicate(
        folder,
        run.pool,
        run.folder / "filter",
        run.folder / "heads",
        run.ranges,
        join.Joined(run.folder / "join"),
        run.copy_encoder,
        load_encoder(run.config.embed.encoders()[-1]).mirror,
        run.config.dedup,
        run.config.execution,
        before,
    )


def evaluation(run: Run, step: str) -> decontaminate.Evaluation:
    name = step.removeprefix("decontaminate/")
    images = run.images(f"embed/evaluation-{name}")
    return decontaminate.Evaluation(run.folder / f"decontaminate/{name}", asked_of(images, run.copy_encoder))


def match_evaluations(run: Run, steps: Sequence[str]) -> None:
    decontaminate.match_sets(
        [evaluation(run, step) for step in steps],
        run.folder / "filter",
        run.ranges,
        run.cells("cells"),
        load_encoder(run.config.embed.encoders()[-1]).mirror,
        run.config.decontaminate,
        run.config.execution,
    )


def find_survivors(run: Run, folder: Folder) -> Written:
    steps = {name: f"decontaminate/{name}" for name in run.inputs.evaluations}
    matches = {name: (run.folder / step, run.manifests[step].files) for name, step in steps.items()}
    files, counts = survivors.find_survivors(
        folder, run.folder / "dedup", run.folder / "heads", matches, run.config.decontaminate.mode, run.ranges,
        run.config.execution,
    )  # fmt: skip
    if not counts["images out"]:
        raise ValueError(
            f"all of the {counts['images in']:,} different images of the pool match one of --evaluation "
            f"(decontaminate.similarity_threshold={run.config.decontaminate.similarity_threshold}): is it the pool "
            "itself? If not, raise the threshold."
        )
    return files, counts, {}


def cluster_images(run: Run, folder: Folder) -> Written:
    chosen = partial(
        survivors.is_clustered, dedup_folder=run.folder / "dedup", folder=run.folder / "survivors", ranges=run.ranges
    )
    c, before = run.config, None
    if (was := _step_before(run, "cluster", cluster.VERSION, c.cluster)) is not None:
        before = CellsBefore(was, partial(was_clustered, folder=was), _ranges_before(run))
    files, figures = cluster.cluster_images(
        folder, run.pool, run.retrieval_encoder, run.ranges, chosen, c.cluster, c.execution, before
    )
    sizes = cluster.Clustering(folder).sizes()
    return files, {"images": int(sizes.sum())}, figures


def _seed_queries(run: Run, name: str) -> SeedQueries:
    asked = asked_of(run.images(f"embed/seed-{name}"), run.retrieval_encoder)
    if not len(asked.gids):
        raise ValueError(f"seed {name!r} has no readable image among its {asked.images.num_images}.")
    return SeedQueries(run.folder / f"retrieve/{name}", asked, run.inputs.seeds[name][0].rule)


def find_neighbours(run: Run, steps: Sequence[str]) -> None:
    sets = [_seed_queries(run, step.removeprefix("retrieve/")) for step in steps]
    sampled = [one for one in sets if one.rule.mode == "sample"]
    seed_neighbours.find_neighbours(sampled, run.cells("cluster"), run.config.execution)


def retrieve_set(run: Run, folder: Folder, name: str) -> Written:
    files, figures = retrieve.retrieve_set(
        folder,
        _seed_queries(run, name),
        run.cells("cluster"),
        cluster.Clustering(run.folder / "cluster"),
        survivors.Survivors(run.folder / "survivors"),
        run.config.execution,
        name,
    )
    return files, {"images": figures["num_images"]}, figures


def balance_draws(run: Run, folder: Folder) -> Written:
    files, figures = balance.balance_survivors(
        folder,
        cluster.Clustering(run.folder / "cluster"),
        survivors.Survivors(run.folder / "survivors"),
        run.config.balance,
        run.config.execution,
    )
    return files, {"images": sum(file.rows for file in files)}, figures


def write_shards(run: Run, folder: Folder, edits: list[Edit]) -> Written:
    kept = [
        KeptSet(
            "pool",
            run.pool,
            run.ranges,
            run.manifests["decide"].counts["kept"],
            run.folder / "decide",
            release=run.release,
        )
    ]
    before = run.earlier.manifests if run.earlier is not None else {}
    written = before["shards"].counts if before else {}
    for name, (seed, _) in run.inputs.seeds.items():
        if seed.include_as_is:
            counts = run.manifests[f"embed/seed-{name}"].counts
            good = counts["images"] - sum(n for what, n in counts.items() if what.startswith("rejected: "))
            images = run.images(f"embed/seed-{name}")
            ranges = Ranges(images.num_images, run.ranges.size)
            has = f"seed:{name}" in written  # what the earlier release has as it is, it has in its shards
            first = int(Parts.of(before[f"embed/seed-{name}"]).base[-1]) if has else 0
            new = max(0, good - written.get(f"seed:{name}", 0))
            kept.append(KeptSet(f"seed:{name}", images, ranges, new, seed=name, first=first))
    if not sum(k.num_kept for k in kept) and run.earlier is None:
        raise ValueError(
            f"none of the {run.manifests['survivors'].counts['images out']:,} images that are left was drawn, so there "
            f"is nothing to write: {_rules_in_words(run)}. Loosen that, or add a seed set."
        )
    draw_names = [*run.inputs.seeds, *(["balance"] if run.config.balance.is_wanted() else [])]
    limit = run.config.embed.max_rejected_fraction
    earlier: list[File] = []
    if run.earlier is not None:
        earlier = before["shards"].files
        decisions.write_dropped(run, folder)
        shard.take_earlier(folder, run.earlier.folder / "shards", earlier, run.config.execution)
    files, counts = shard.write_shards(
        folder, kept, draw_names, run.config.shard, edits, run.config.execution, limit, len(earlier)
    )
    files = [*earlier, *files]
    return files, counts, {"bytes": sum(f.bytes for f in files)}


def _rules_in_words(run: Run) -> str:
    """For each seed set, what a pool image must meet to be drawn."""
    told = []
    for name, (seed, _) in run.inputs.seeds.items():
        rule, of = seed.rule, {"sample": ("k", "min_similarity"), "cluster": ("min_hits", "images_per_cluster")}
        settings = ", ".join(f"{setting}={getattr(rule, setting)}" for setting in of.get(rule.mode, ()))
        told.append(f"seed {name!r} draws with retrieve.mode={rule.mode}{f' ({settings})' if settings else ''}")
    return "; ".join(told) or "there is no seed set"
