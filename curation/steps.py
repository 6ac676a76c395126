"""Every step of a run: its settings and inputs, and what it hands to its stage."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from curation.account import decisions
from curation.account.report import step as report
from curation.encoders.load import load_encoder
from curation.engine.folder import Folder
from curation.engine.manifest import Manifest
from curation.engine.ranges import Ranges
from curation.engine.store import NOT_IN_POOL, ImageSet
from curation.reading.filters import Blocklist, Edit, Filter, Pixels
from curation.reading.samples import Part
from curation.stages import balance, cells, cluster, decontaminate, dedup, embed, retrieve, shard
from curation.stages import filter as filter_stage
from curation.state import Run, Written
from curation.writing.plan import KeptSet

STAGES = (
    "embed",
    "filter",
    "cells",
    "dedup",
    "decontaminate",
    "cluster",
    "retrieve",
    "balance",
    "decide",
    "shard",
    "report",
)


@dataclass(frozen=True)
class Step:
    """One folder of the run and how to fill it."""

    name: str
    stage: str
    version: int
    settings: Any
    """what changes the result"""
    inputs: tuple[str, ...]
    work: Callable[[Run, Folder], Written]
    listing: Any = None
    """the source parts, for steps that keep finished parts when others come or go"""
    needs_local: bool = False


def plan_steps(run: Run) -> list[Step]:
    """Every step of this run, in order, with the settings and inputs that its key is made of."""
    c = run.config
    specs = c.embed.encoders()
    fingerprints = {spec: load_encoder(spec, None, c.embed.image_px).fingerprint() for spec in specs}
    pixel_filters = [f for f in run.filters if isinstance(f, Pixels)]
    edits = [f for f in run.filters if isinstance(f, Edit)]
    for named in (*pixel_filters, *edits):
        named.function()  # one that cannot be imported is found now, not after the pool is embedded

    def embedding(name: str, parts: Sequence[Part], encoders: list[str], filters: list[Any]) -> Step:
        settings = {**asdict(c.embed), "encoders": {e: fingerprints[e] for e in encoders}}
        # Encoders are named by their fingerprints; the limit decides whether to go on, not what is written.
        for unused in ("encoder", "copy_encoder", "max_rejected_fraction"):
            settings.pop(unused)
        settings["pixel_filters"] = [f.settings() for f in filters]
        return Step(
            name,
            "embed",
            embed.VERSION,
            settings,
            (),
            lambda run, folder: _embed(run, folder, parts, encoders, filters, name),
            listing=sorted(part.id for part in parts),
        )

    seeds, evaluations = run.inputs.seeds, run.inputs.evaluations
    steps = [embedding("embed/pool", run.inputs.pool, specs, pixel_filters)]
    steps += [embedding(f"embed/seed-{name}", parts, specs[:1], []) for name, (_, parts) in seeds.items()]
    steps += [embedding(f"embed/evaluation-{name}", parts, specs[-1:], []) for name, parts in evaluations.items()]
    steps += [
        Step(
            "filter", "filter", filter_stage.VERSION,
            {"filters": c.filters, "listed": [f.digest() for f in run.filters if isinstance(f, Blocklist)]},
            ("embed/pool",),
            lambda run, folder: (filter_stage.filter_pool(folder, run.pool, run.filters, c.execution), {}, {}),
        ),
        Step(
            "cells", "cells", cells.VERSION, asdict(c.cells), ("embed/pool", "filter"),
            _cells, needs_local=True,
        ),
        Step("dedup", "dedup", dedup.VERSION, asdict(c.dedup), ("embed/pool", "filter", "cells"), _dedup),
        Step(
            "decontaminate", "decontaminate", decontaminate.VERSION, asdict(c.decontaminate),
            ("embed/pool", "filter", "cells", "dedup", *(f"embed/evaluation-{name}" for name in evaluations)),
            _decontaminate,
        ),
        Step(
            "cluster", "cluster", cluster.VERSION, asdict(c.cluster), ("embed/pool", "decontaminate"), _cluster,
            needs_local=True,
        ),
    ]  # fmt: skip
    for name, (seed, _) in seeds.items():
        steps.append(
            Step(
                f"retrieve/{name}",
                "retrieve",
                retrieve.VERSION,
                asdict(seed.rule),
                ("cluster", "decontaminate", f"embed/seed-{name}"),
                lambda run, folder, name=name: _retrieve(run, folder, name),
            )
        )
    if c.balance.is_wanted():
        steps.append(
            Step("balance", "balance", balance.VERSION, asdict(c.balance), ("cluster", "decontaminate"), _balance)
        )
    choices = tuple(step.name for step in steps if step.stage in ("retrieve", "balance"))
    named = tuple(
        f"embed/{kind}" for kind in ("pool", *(f"seed-{n}" for n in seeds), *(f"evaluation-{n}" for n in evaluations))
    )
    decided = (*named, "filter", "dedup", "decontaminate", "cluster", *choices)
    steps.append(Step("decide", "decide", decisions.VERSION, {"range_rows": c.range_rows}, decided, decisions.decide))
    as_is = tuple(f"embed/seed-{name}" for name, (seed, _) in seeds.items() if seed.include_as_is)
    settings = {**asdict(c.shard), "edits": [f.path for f in edits]}
    before = ("embed/pool", "decide", *as_is)
    steps.append(
        Step("shards", "shard", shard.VERSION, settings, before, lambda run, folder: _shard(run, folder, edits))
    )
    everything = tuple(step.name for step in steps)
    steps.append(Step("report", "report", report.VERSION, {}, everything, report.write_report))
    return steps


# --- what each step hands to its stage --------------------------------------------------------------------------------


def _embed(
    run: Run, folder: Folder, parts: Sequence[Part], encoders: list[str], filters: list[Filter], name: str
) -> Written:
    c = run.config
    files, gone = embed.embed_set(folder, parts, encoders, c.embed, filters, c.execution, name.replace("/", " "))
    figures = {"gone": gone} if gone else {}
    written = Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files, figures=figures)
    images = ImageSet.of(folder, written)
    counts, lost, total = embed.count_losses(images, sum(part.size for part in parts))
    reasons = {r.removeprefix("rejected: "): n for r, n in counts.items() if r.startswith("rejected: ")}
    if not counts["images"]:
        raise ValueError(f"{name}: there is no image in {parts[0].url}, nor in any other part: check its URL.")
    if total and lost > c.embed.max_rejected_fraction * total:
        worst = max(reasons, key=lambda r: reasons[r])
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


def _cells(run: Run, folder: Folder) -> Written:
    joined = run.joined()
    if not len(joined):
        reasons = filter_stage.read_reasons(run.folder / "filter").value_counts().to_pylist()
        told = ", ".join(f"{e['counts']:,} {e['values']}" for e in reasons if e["values"] != NOT_IN_POOL)
        raise ValueError(
            f"none of the {run.manifests['embed/pool'].counts['images']:,} images of the pool can be used: {told} (by "
            f"image: {run.folder.url}/filter/reasons.parquet). Loosen `filters`, or check --pool."
        )
    where, c = run.local("cells") / "cells", run.config
    return cells.build_cells(where, run.pool, run.copy_encoder, joined, c.cells, c.execution), {}, {}


def _dedup(run: Run, folder: Folder) -> Written:
    return dedup.deduplicate(
        folder,
        run.pool,
        filter_stage.passed(run.folder / "filter"),
        run.cells("cells"),
        run.copy_encoder,
        load_encoder(run.config.embed.encoders()[-1]).mirror,
        run.config.dedup,
        run.config.execution,
    )


def _decontaminate(run: Run, folder: Folder) -> Written:
    return decontaminate.decontaminate(
        folder,
        run.pool,
        {name: run.images(f"embed/evaluation-{name}") for name in run.inputs.evaluations},
        run.folder / "dedup",
        run.cells("cells"),
        run.copy_encoder,
        load_encoder(run.config.embed.encoders()[-1]).mirror,
        run.config.decontaminate,
        run.config.execution,
    )


def _cluster(run: Run, folder: Folder) -> Written:
    survivors = run.survivors()
    if not len(survivors):
        raise ValueError(
            f"all of the {run.manifests['dedup'].counts['images out']:,} different images of the pool match one of "
            f"--evaluation (decontaminate.similarity_threshold={run.config.decontaminate.similarity_threshold}): is it "
            "the pool itself? If not, raise the threshold."
        )
    files, figures = cluster.cluster_survivors(
        folder, run.local("cluster") / "cells", run.pool, run.retrieval_encoder, survivors, run.config.cluster,
        run.config.execution,
    )  # fmt: skip
    return files, {"images": len(survivors)}, figures


def _retrieve(run: Run, folder: Folder, name: str) -> Written:
    files, figures = retrieve.retrieve_set(
        folder,
        run.images(f"embed/seed-{name}"),
        run.retrieval_encoder,
        run.inputs.seeds[name][0].rule,
        run.cells("cluster"),
        cluster.Clustering(run.folder / "cluster").assignment(),
        run.survivors(),
        run.config.execution,
        name,
    )
    return files, {"images": figures["num_images"]}, figures


def _balance(run: Run, folder: Folder) -> Written:
    files, figures = balance.balance_survivors(
        folder, cluster.Clustering(run.folder / "cluster"), run.survivors(), run.config.balance
    )
    return files, {"images": files[0].rows}, figures


def _shard(run: Run, folder: Folder, edits: list[Edit]) -> Written:
    kept = [KeptSet("pool", run.pool, run.ranges, run.manifests["decide"].counts["kept"], run.folder / "decide")]
    for name, (seed, _) in run.inputs.seeds.items():
        if seed.include_as_is:
            counts = run.manifests[f"embed/seed-{name}"].counts
            good = counts["images"] - sum(n for what, n in counts.items() if what.startswith("rejected: "))
            images = run.images(f"embed/seed-{name}")
            ranges = Ranges(images.num_images, run.ranges.size)
            kept.append(KeptSet(f"seed:{name}", images, ranges, good, seed=name))
    if not sum(k.num_kept for k in kept):
        raise ValueError(
            f"none of the {len(run.survivors()):,} images that are left was drawn, so there is nothing to write: "
            f"{_rules_in_words(run)}. Loosen that, or add a seed set."
        )
    draw_names = [*run.inputs.seeds, *(["balance"] if run.config.balance.is_wanted() else [])]
    limit = run.config.embed.max_rejected_fraction
    files, counts = shard.write_shards(folder, kept, draw_names, run.config.shard, edits, run.config.execution, limit)
    return files, counts, {"bytes": sum(f.bytes for f in files)}


def _rules_in_words(run: Run) -> str:
    """For each seed set, what a pool image must meet to be drawn."""
    told = []
    for name, (seed, _) in run.inputs.seeds.items():
        rule, of = seed.rule, {"sample": ("k", "min_similarity"), "cluster": ("min_hits", "images_per_cluster")}
        settings = ", ".join(f"{setting}={getattr(rule, setting)}" for setting in of.get(rule.mode, ()))
        told.append(f"seed {name!r} draws with retrieve.mode={rule.mode}{f' ({settings})' if settings else ''}")
    return "; ".join(told) or "there is no seed set"
