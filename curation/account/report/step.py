"""report: the account of a run, as decisions.parquet, report.json for programs and report.html for people."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from curation.account.decisions import SCHEMA, STATUSES, decide, without_lost
from curation.account.report.page import report_page
from curation.engine.folder import Folder
from curation.engine.manifest import File
from curation.ops.kmeans import balance
from curation.reading.again import LOST_REASONS
from curation.stages.cluster import Clustering
from curation.stages.dedup import Duplicates
from curation.stages.shard import read_lost, read_shard_of
from curation.state import Run, step_seconds

VERSION = 2
_LARGEST_GROUPS = 20


def write_report(run: Run, folder: Folder) -> tuple[list[File], dict[str, int], dict[str, Any]]:
    """Write decisions.parquet, report.json and report.html at the top of the run folder."""
    decisions = decisions_with_shards(run)
    files = [run.folder.write_table("decisions.parquet", decisions)]
    figures = collect_figures(run, decisions)
    run.folder.write_bytes("report.json", json.dumps(figures, indent=1).encode())
    run.folder.write_bytes("report.html", report_page(run, decisions, figures).encode())
    counts = {"images": decisions.num_rows, **figures["funnel"]["status"]}
    return files, counts, {}  # the manifest leaves out the two that hold times: a second run would differ


def decisions_with_shards(run: Run) -> pa.Table:
    lost = read_lost(run.folder / "shards", "pool")
    decisions = without_lost(decide(run), lost["gid"].to_numpy(), lost["reason"].to_numpy(zero_copy_only=False))
    shard = read_shard_of(run.folder / "shards", run.manifests["shards"].files, "pool", decisions.num_rows)
    return decisions.append_column(SCHEMA.field("shard"), pa.array(shard, pa.string()))


def collect_figures(run: Run, decisions: pa.Table) -> dict[str, Any]:
    """Every figure of the report, as plain JSON."""
    status = decisions["status"].to_numpy(zero_copy_only=False)
    counts = {name: int((status == name).sum()) for name in STATUSES}
    reasons = {
        name: {
            str(entry["values"]): entry["counts"]
            for entry in decisions.filter(pa.array(status == name))["reason"].value_counts().to_pylist()
        }
        for name in STATUSES
    }
    lost = sum(reasons["rejected"].get(reason, 0) for reason in LOST_REASONS)  # those had passed every stage
    funnel = {
        "images": decisions.num_rows,
        "status": counts,
        "reasons": reasons,
        "unread": {
            name: run.manifests["embed/pool"].counts.get(name, 0)
            for name in ("damaged shards", "unread bytes", "unread images")
        },
        "stages": [
            ["in the pool", decisions.num_rows],
            ["readable and past the filters", decisions.num_rows - counts["rejected"] + lost],
            ["distinct", run.manifests["dedup"].counts["images out"]],
            ["not in an evaluation set", run.manifests["survivors"].counts["images out"]],
            ["kept", counts["kept"]],
        ],
    }
    cluster = decisions["cluster"].fill_null(-1).to_numpy()
    num_clusters = len(Clustering(run.folder / "cluster").sizes())
    sizes = {
        "before": np.bincount(cluster[cluster >= 0], minlength=num_clusters),
        "after": np.bincount(cluster[(cluster >= 0) & (status == "kept")], minlength=num_clusters),
    }
    shards = run.manifests["shards"]
    balanced = {"balance": run.manifests["balance"].counts} if "balance" in run.manifests else {}
    return {
        "funnel": funnel,
        "dedup": {
            **run.manifests["dedup"].counts,
            **run.manifests["dedup"].figures,
            "largest groups": largest_groups(Duplicates(run.folder / "dedup")),
        },
        "decontaminate": run.manifests["survivors"].counts,
        "retrieve": {name: run.manifests[f"retrieve/{name}"].figures for name in run.inputs.seeds},
        **balanced,
        "clusters": {
            "levels": run.manifests["cluster"].figures["levels"],
            **{when: balance_figures(s) for when, s in sizes.items()},
            "sizes": {when: sorted(s.tolist(), reverse=True) for when, s in sizes.items()},
        },
        "shards": {"files": len(shards.files), "images": sum(f.rows for f in shards.files), **shards.figures},
        "seconds": {name: step_seconds(run, name) for name in run.manifests if name != "report"},
        "config": asdict(run.config),
        "inputs": {
            "pool": [part.url for part in run.inputs.pool],
            "seeds": {name: asdict(seed) for name, (seed, _) in run.inputs.seeds.items()},
            "evaluations": {name: [p.url for p in parts] for name, parts in run.inputs.evaluations.items()},
        },
    }


def balance_figures(sizes: np.ndarray) -> dict[str, float]:
    """curation.ops.kmeans.Balance, and exp(entropy in nats): as many equally large clusters would have that entropy."""
    if not sizes.sum():
        return {
            "entropy": 0.0,
            "gini": 0.0,
            "imbalance_factor": 0.0,
            "num_empty": len(sizes),
            "largest": 0,
            "effective_number": 0.0,
        }
    figures = {name: float(value) for name, value in balance(sizes)._asdict().items()}
    return {**figures, "effective_number": float(len(sizes) ** figures["entropy"])}


def largest_groups(duplicates: Duplicates) -> list[dict[str, Any]]:
    """The largest near-duplicate groups: component, size, least cosine to the representative (null: none is known)."""
    component, similarity = duplicates.component(), duplicates.similarity()
    sizes = np.bincount(component[component >= 0], minlength=1)
    labels = np.flatnonzero(sizes > 1)
    result = []
    for label in labels[np.lexsort((labels, -sizes[labels]))][:_LARGEST_GROUPS].tolist():
        values = similarity[(component == label) & ~np.isnan(similarity)]
        least = float(values.min()) if len(values) else None
        result.append({"component": label, "size": int(sizes[label]), "least similarity": least})
    return result
