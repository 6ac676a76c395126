"""report: the account of a run, as decisions.parquet, report.json for programs and report.html for people."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.account.decisions import SCHEMA, range_name
from curation.account.fates import STATUSES, Sources
from curation.account.report.choices import Found
from curation.account.report.page import report_page
from curation.account.report.tally import (
    Tally,
    balanced,
    cluster_counts,
    cluster_sizes,
    look_up,
    merged,
    other_groups,
    tally,
    total,
)
from curation.engine.exchange import buckets_for, exchange
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.engine.ranges import range_file
from curation.engine.workers import finished_pieces, run_pieces, run_tasks
from curation.reading.again import LOST_REASONS
from curation.state import Run, Written, step_seconds
from curation.writing.placed import read_placed

VERSION = 3
_OTHER_GROUPS, _BALANCED_CLUSTERS = 10, 6
_NAME = "decisions.parquet"


def write_report(run: Run, folder: Folder) -> Written:
    """Write decisions.parquet, report.json and report.html at the top of the run folder.

    decisions.parquet is one file where one range holds the pool, since a file can be sent, copied and opened by
    anything; beyond, it is a folder of part-*.parquet, one a range, which every reader of Parquet takes for one table.
    """
    sources, execution = Sources.of(run), run.config.execution
    names = decision_files(len(run.ranges))
    tallies = [f"tally-{number:05d}.json" for number in range(len(names))]
    if not finished_pieces(folder, tallies):
        _make_room(run.folder, names)
    run_pieces(
        _finish, list(enumerate(names)), tallies, folder, sources, execution=execution, label="report: decisions",
        unit="images", weights=run.ranges.weights(),
    )  # fmt: skip
    done = [json.loads(folder.read_bytes(name)) for name in tallies]
    files = [File(**one["file"]) for one in done]
    found = _found(run, sources, total(Tally.from_json(one["tally"]) for one in done))
    figures = collect_figures(run, found, _cluster_sizes(run, files))

    def status_of(gid: int) -> str:
        number, row = divmod(gid, run.ranges.size)
        return run.folder.table_rows(names[number], row, row + 1, ["status"])["status"][0].as_py()

    run.folder.write_bytes("report.json", json.dumps(figures, indent=1).encode())
    run.folder.write_bytes("report.html", report_page(run, found, status_of, figures).encode())
    counts = {"images": run.ranges.num_rows, **figures["funnel"]["status"]}
    return files, counts, {}  # the manifest leaves out the two that hold times: a second run would differ


def decision_files(num_ranges: int) -> list[str]:
    """Where decisions.parquet keeps each range, in the run folder."""
    return [_NAME] if num_ranges == 1 else [f"{_NAME}/{range_file('part', number)}" for number in range(num_ranges)]


def _make_room(folder: Folder, names: list[str]) -> None:
    """Delete the decisions of a former run that had another number of ranges."""
    if _NAME in folder.folders():
        (folder / _NAME).clear(("part-*.parquet",))
        if folder.is_local and names == [_NAME]:
            os.rmdir(folder.path(_NAME))
    elif names != [_NAME]:
        folder.delete(_NAME)


def _finish(job: tuple[int, str], folder: Folder, piece: str, sources: Sources) -> None:
    """Write the decisions of a range, with what became of the images that were chosen, and then their sum."""
    number, name = job
    first, end = sources.ranges.bounds(number)
    placed = read_placed(sources.folder / "shards", number)
    found = Tally()
    with sources.folder.writing(name) as file, pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for start, stop in sources.spans(number):
            rows = (sources.folder / "decide").table_rows(range_name(number), start - first, stop - first)
            was_balanced = balanced(rows["draws"])
            rows = _with_shards(rows, placed, start, stop)
            if sources.earlier is not None:
                rows = _with_earlier_shards(rows, sources.earlier.decisions(start, stop, ["shard"])["shard"])
            writer.write_table(rows)
            found += tally(rows, was_balanced, sources.release)
    told = {"file": asdict(sources.folder.described(name, end - first)), "tally": found.to_json()}
    folder.write_bytes(piece, json.dumps(told).encode())


def _with_shards(rows: pa.Table, placed: pa.Table, start: int, stop: int) -> pa.Table:
    """Decisions of SCHEMA: with the shard of what was written; what was chosen and not written is rejected."""
    gids = placed["gid"].to_numpy()
    first, end = np.searchsorted(gids, [start, stop]).tolist()
    at = np.full(stop - start, -1, np.int64)
    at[gids[first:end] - start] = np.arange(first, end)
    take = pa.array(at, mask=at < 0)
    why = placed["reason"].take(take)
    assert pc.all(pc.or_(pc.equal(rows["status"], "kept"), pa.array(at < 0))).as_py()
    columns = {name: rows[name] for name in rows.column_names}
    columns["status"] = pc.if_else(pc.is_valid(why), "rejected", rows["status"])
    columns["reason"] = pc.coalesce(why, rows["reason"])
    columns["release"] = pc.if_else(pc.is_valid(why), pa.scalar(None, pa.int32()), rows["release"])
    columns["shard"] = placed["shard"].take(take)
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _with_earlier_shards(rows: pa.Table, before: pa.ChunkedArray) -> pa.Table:
    """Decisions with the shard, too, of what an earlier release wrote and this one keeps."""
    before = pa.chunked_array([*before.chunks, pa.nulls(rows.num_rows - len(before), pa.string())], pa.string())
    is_kept = pc.equal(rows["status"], "kept")
    shard = pc.coalesce(rows["shard"], pc.if_else(is_kept, before, pa.scalar(None, pa.string())))
    return rows.set_column(rows.schema.get_field_index("shard"), SCHEMA.field("shard"), shard)


def _found(run: Run, sources: Sources, found: Tally) -> Found:
    """The groups and clusters that are shown, gathered from all ranges."""
    largest = found.largest()
    others = other_groups(found.groups, largest[:, 0], _OTHER_GROUPS)
    clusters = found.of_kind("balanced").get((), np.zeros(0, np.int64))[:_BALANCED_CLUSTERS]
    numbers = range(len(run.ranges))
    parts = run_tasks(
        _look_up,
        numbers,
        sources,
        np.concatenate([largest[:, 0], others]),
        clusters,
        execution=run.config.execution,
        label="report: examples",
        unit="images",
        weights=run.ranges.weights(),
    )
    members, drawn = merged(part[0] for part in parts), merged(part[1] for part in parts)
    sizes = dict(found.groups.tolist())
    return Found(found, largest, others, sizes, members, drawn)


def _look_up(number: int, sources: Sources, components: np.ndarray, clusters: np.ndarray) -> Any:
    return look_up(number, sources, components, clusters, range_name(number))


def _cluster_sizes(run: Run, files: Sequence[File]) -> dict[str, np.ndarray]:
    """Before and after selection: int64 [sizes, 2], a size, ascending, and how many clusters have it."""
    execution, num_clusters = run.config.execution, int(run.manifests["cluster"].figures["levels"][0])
    num_buckets = min(num_clusters, buckets_for(64.0 * num_clusters, execution))
    scratch = run.folder / "report/exchange"
    names = [f"piece-{bucket:05d}.parquet" for bucket in range(num_buckets)]
    (scratch / "sizes").clear(("piece-*.parquet",))
    exchange(
        [(file.path, file.rows) for file in files],
        cluster_counts,
        num_buckets,
        cluster_sizes,
        run.folder,
        num_clusters,
        num_buckets,
        scratch=scratch / "counts",
        outputs=(scratch / "sizes", names),
        sort_by=["cluster"],
        execution=execution,
        label="report: clusters",
        unit="parts",
    )
    table = pa.concat_tables((scratch / "sizes").read_table(name) for name in names)
    (scratch / "sizes").clear(("piece-*.parquet",))
    result = {}
    for when in ("before", "after"):
        rows = table.filter(pc.equal(table["when"], when))
        sizes, inverse = np.unique(rows["size"].to_numpy(), return_inverse=True)
        clusters = np.bincount(inverse, rows["clusters"].to_numpy()).astype(np.int64)
        result[when] = np.stack([sizes, clusters], axis=1)
    return result


def collect_figures(run: Run, found: Found, sizes: dict[str, np.ndarray]) -> dict[str, Any]:
    """Every figure of the report, as plain JSON."""
    reasons = {name: {why: n for (state, why), n in found.tally.counts.items() if state == name} for name in STATUSES}
    counts = {name: sum(reasons[name].values()) for name in STATUSES}
    lost = sum(reasons["rejected"].get(reason, 0) for reason in LOST_REASONS)  # those had passed every stage
    num_images = sum(counts.values())
    funnel = {
        "images": num_images,
        "status": counts,
        "reasons": reasons,
        "unread": {
            name: run.manifests["embed/pool"].counts.get(name, 0)
            for name in ("damaged shards", "unread bytes", "unread images")
        },
        "stages": [
            ["in the pool", num_images],
            ["readable and past the filters", num_images - counts["rejected"] + lost],
            ["distinct", run.manifests["dedup"].counts["images out"]],
            ["not in an evaluation set", run.manifests["survivors"].counts["images out"]],
            ["kept", counts["kept"]],
        ],
    }
    shards = run.manifests["shards"]
    balanced = {"balance": run.manifests["balance"].counts} if "balance" in run.manifests else {}
    return {
        "funnel": funnel,
        "dedup": {
            **run.manifests["dedup"].counts,
            **run.manifests["dedup"].figures,
            "largest groups": [_group(found, *row) for row in found.largest.tolist()],
        },
        "decontaminate": run.manifests["survivors"].counts,
        "retrieve": {name: run.manifests[f"retrieve/{name}"].figures for name in run.inputs.seeds},
        **balanced,
        "clusters": {
            "levels": run.manifests["cluster"].figures["levels"],
            **{when: balance_figures(s) for when, s in sizes.items()},
            "sizes": {when: s[::-1].tolist() for when, s in sizes.items()},
        },
        "shards": {"files": len(shards.files), "images": sum(f.rows for f in shards.files), **shards.figures},
        "release": {
            "number": run.release,
            "extends": run.earlier.folder.url if run.earlier is not None else None,
            "added": found.tally.changes["added"],
            "stay": found.tally.changes["stay"],
            "dropped": {
                what.removeprefix("dropped "): number
                for what, number in sorted(found.tally.changes.items())
                if what.startswith("dropped ")
            },
        },
        "seconds": {name: step_seconds(run, name) for name in run.manifests if name != "report"},
        "config": asdict(run.config),
        "inputs": {
            "pool": [part.url for part in run.inputs.pool],
            "seeds": {name: asdict(seed) for name, (seed, _) in run.inputs.seeds.items()},
            "evaluations": {name: [p.url for p in parts] for name, parts in run.inputs.evaluations.items()},
        },
    }


def _group(found: Found, component: int, size: int) -> dict[str, Any]:
    """A near-duplicate group: component, size, least cosine to the representative (null: none is known)."""
    least = found.members[component].least_similarity
    return {"component": component, "size": size, "least similarity": least if np.isfinite(least) else None}


def balance_figures(sizes: np.ndarray) -> dict[str, float]:
    """curation.ops.kmeans.Balance, and exp(entropy in nats): as many equally large clusters would have that entropy.

    Args:
        sizes: int64 [sizes, 2]: a size, ascending, and how many clusters have it.
    """
    size, clusters = sizes[:, 0], sizes[:, 1]
    k, images = int(clusters.sum()), float((size * clusters).sum())
    if not images:
        names = ("entropy", "gini", "imbalance_factor", "num_empty", "largest", "effective_number")
        return {**dict.fromkeys(names, 0.0), "num_empty": k}
    share, before = size / images, np.cumsum(clusters) - clusters
    has_any = size > 0
    nats = -float(np.sum(clusters[has_any] * share[has_any] * np.log(share[has_any])))
    return {
        "entropy": nats / math.log(k) if k > 1 else 1.0,
        # Of the clusters by size, 1 to k, the sum of (2 i - k - 1) share: over those of one size in closed form.
        "gini": float(np.sum(clusters * (2.0 * before + clusters - k) * share)) / k,
        "imbalance_factor": float(k * np.sum(clusters * share**2)),
        "num_empty": float(clusters[~has_any].sum()),
        "largest": float(size.max()),
        "effective_number": math.exp(nats),
    }
