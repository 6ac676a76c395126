"""The stages in order. Each is a folder closed by a manifest; one whose manifest matches is skipped."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.config import CurationConfig
from curation.decisions import decide, kept_with_provenance
from curation.encoders import load_encoder
from curation.filters import Blocklist, Edit, Filter, Pixels, build_filters
from curation.folder import Folder
from curation.manifest import MANIFEST_NAME, File, Manifest, stage_key
from curation.ops.cells import Cells, open_cells
from curation.ownership import STARTED, TIMING, claim_scratch_folder, clear_stage_folder, scratch_folder
from curation.progress import duration
from curation.reading.again import LOST_REASONS
from curation.reading.listing import Listing
from curation.reading.samples import Part
from curation.seeds import SeedSet
from curation.stages import balance, cells, cluster, decontaminate, dedup, embed, report, retrieve, shard
from curation.stages import filter as filter_stage
from curation.store import ImageSet, encoder_folder
from curation.workers import start_ray

STAGES = (
    "embed",
    "filter",
    "cells",
    "dedup",
    "decontaminate",
    "cluster",
    "retrieve",
    "balance",
    "shard",
    "report",
)
logger = logging.getLogger(__name__)

Written = tuple[list[File], dict[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """What a run reads, located and listed."""

    pool: Listing
    seeds: dict[str, tuple[SeedSet, Listing]]
    evaluations: dict[str, Listing]

    def listings(self) -> dict[str, Listing]:
        """Every set by the step that reads it."""
        return {
            "embed/pool": self.pool,
            **{f"embed/seed-{name}": listing for name, (_, listing) in self.seeds.items()},
            **{f"embed/evaluation-{name}": listing for name, listing in self.evaluations.items()},
        }


def set_label(step: str) -> str:
    """What people call the set that a step reads: `pool`, `seed NAME`, `evaluation NAME`."""
    return step.removeprefix("embed/").replace("-", " ", 1)


@dataclass
class Run:
    """One run: its folder, its config, what it reads, and the manifests of the steps that are done."""

    folder: Folder
    config: CurationConfig
    inputs: Inputs
    manifests: dict[str, Manifest] = field(default_factory=dict)

    @property
    def filters(self) -> list[Filter]:
        return build_filters(self.config.filters)

    @property
    def retrieval_encoder(self) -> str:
        return encoder_folder(self.config.embed.encoders()[0])

    @property
    def copy_encoder(self) -> str:
        return encoder_folder(self.config.embed.encoders()[-1])

    def images(self, step: str) -> ImageSet:
        return ImageSet(self.folder / step, self.manifests[step])

    @property
    def pool(self) -> ImageSet:
        return self.images("embed/pool")

    def local(self, step: str) -> Path:
        """Where a step's random-access files lie: in the run folder, or, where that is remote, in a scratch folder."""
        if self.folder.is_local:
            return Path(self.folder.path(step))
        return scratch_folder(self.folder) / step

    def cells(self, step: str) -> Cells:
        return open_cells(self.local(step) / "cells")

    def joined(self) -> np.ndarray:
        """int64, ascending: of the images that passed the filters, those that the join compares (dedup.heads)."""
        passed = filter_stage.passed(self.folder / "filter")
        return passed[dedup.heads(self.pool, passed) == passed]

    def survivors(self) -> np.ndarray:
        """int64, ascending: representatives that are no leaks."""
        return np.flatnonzero(decontaminate.read_survivors(self.folder / "decontaminate")).astype(np.int64)


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


def run_pipeline(run: Run, until: str = "report") -> list[tuple[str, float | None]]:
    """Run what is not done yet, up to and including the stage `until`.

    Returns:
        (step, seconds) for each, None for those that were skipped because their manifest matched.

    Raises:
        ValueError: settings or images that leave nothing to go on with; files of others where ours would go.
    """
    times: list[tuple[str, float | None]] = []
    if not run.folder.is_local:
        claim_scratch_folder(run.folder)
    for step in plan_steps(run):
        if STAGES.index(step.stage) > STAGES.index(until):
            break
        times.append((step.name, _execute(run, step)))
    return times


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
        settings["pixel_filters"] = [f.path for f in filters]
        return Step(
            name,
            "embed",
            embed.VERSION,
            settings,
            (),
            lambda run, folder: _embed(run, folder, parts, encoders, filters, name),
            listing=[part.id for part in parts],
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
    as_is = tuple(f"embed/seed-{name}" for name, (seed, _) in seeds.items() if seed.include_as_is)
    settings = {**asdict(c.shard), "edits": [f.path for f in edits]}
    before = ("embed/pool", "dedup", "decontaminate", *choices, *as_is)
    steps.append(
        Step("shards", "shard", shard.VERSION, settings, before, lambda run, folder: _shard(run, folder, edits))
    )
    everything = tuple(step.name for step in steps)
    steps.append(Step("report", "report", report.VERSION, {}, everything, report.write_report))
    return steps


def _execute(run: Run, step: Step) -> float | None:
    folder = run.folder / step.name
    manifest = finished(run, step, run.manifests)
    if manifest is not None:
        run.manifests[step.name] = manifest
        return None
    settings, inputs, work_key, key = _keys(step, run.manifests)
    start_ray(run.config.execution)
    # Finished parts of the same work are kept; those of other settings would be taken for ours, and a step that was
    # whole and no longer is cannot be trusted in parts.
    was_whole = folder.exists(MANIFEST_NAME) and step.listing is None
    if was_whole or not folder.exists(STARTED) or json.loads(folder.read_bytes(STARTED)) != work_key:
        clear_stage_folder(folder, step.stage)
        folder.write_bytes(STARTED, json.dumps(work_key).encode())
    start = time.monotonic()
    files, counts, figures = step.work(run, folder)
    seconds = time.monotonic() - start
    manifest = Manifest(
        stage=step.stage,
        version=step.version,
        key=key,
        settings=settings,
        inputs=inputs,
        files=files,
        counts=counts,
        figures=figures,
    )
    folder.write_bytes(TIMING, json.dumps({"seconds": seconds}).encode())
    folder.write_bytes(MANIFEST_NAME, manifest.to_json().encode())
    run.manifests[step.name] = manifest
    logger.info("%s done in %s", step.name, duration(seconds))
    return seconds


def finished(run: Run, step: Step, manifests: dict[str, Manifest]) -> Manifest | None:
    """The step's manifest, if it is of this very work, on these input manifests, and its files are still there."""
    folder = run.folder / step.name
    try:
        manifest = Manifest.from_json(folder.read_bytes(MANIFEST_NAME).decode())
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        logger.warning("%s/%s is not readable; the stage runs again.", folder.url, MANIFEST_NAME)
        return None
    if manifest.key != _keys(step, manifests)[-1]:
        return None
    present = set(folder.names())
    root = run.folder if step.stage == "report" else folder
    missing = [f.path for f in manifest.files if not (f.path in present or root.exists(f.path))]
    if step.needs_local and not (run.local(step.name) / "cells" / "cells.json").exists():
        missing.append("cells")
    if missing:
        logger.warning("%s: %d of its files are gone (%s); the stage runs again.", step.name, len(missing), missing[0])
        return None
    return manifest


def _keys(step: Step, manifests: dict[str, Manifest]) -> tuple[Any, dict[str, str], str, str]:
    """Settings as JSON, input hashes, the key of the work (which parts may be kept), and the key of the whole step."""
    settings = json.loads(json.dumps(step.settings))
    inputs = {name: manifests[name].hash() for name in step.inputs}
    work_key = stage_key(step.stage, step.version, settings, inputs)
    if step.listing is None:
        return settings, inputs, work_key, work_key
    listed = {"settings": settings, "parts": step.listing}
    return settings, inputs, work_key, stage_key(step.stage, step.version, listed, inputs)


def step_seconds(run: Run, step: str) -> float:
    """How long a step took when it ran."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        return float(json.loads((run.folder / step).read_bytes(TIMING))["seconds"])
    return 0.0


# --- what each step hands to its stage --------------------------------------------------------------------------------


def _embed(
    run: Run, folder: Folder, parts: Sequence[Part], encoders: list[str], filters: list[Filter], name: str
) -> Written:
    c = run.config
    files = embed.embed_set(folder, parts, encoders, c.embed, filters, c.execution, name.replace("/", " "))
    images = ImageSet(folder, Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=files))
    counts, lost, total = embed.count_losses(images, sum(part.size for part in parts))
    reasons = {r.removeprefix("rejected: "): n for r, n in counts.items() if r.startswith("rejected: ")}
    if not images.num_images:
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
    if sum(reasons.values()) == images.num_images and name != "embed/pool":
        raise ValueError(
            f"{name}: none of its {images.num_images:,} images can be read, so it does nothing: check its URL, "
            "or leave it out."
        )
    return files, counts, {}


def _cells(run: Run, folder: Folder) -> Written:
    joined = run.joined()
    if not len(joined):
        reasons = filter_stage.read_reasons(run.folder / "filter").value_counts().to_pylist()
        told = ", ".join(f"{entry['counts']:,} {entry['values']}" for entry in reasons)
        raise ValueError(
            f"none of the {run.pool.num_images:,} images of the pool can be used: {told} (by image: "
            f"{run.folder.url}/filter/reasons.parquet). Loosen `filters`, or check --pool."
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
    kept = [shard.KeptSet("pool", run.pool, *kept_with_provenance(run, decide(run)))]
    for name, (seed, _) in run.inputs.seeds.items():
        if seed.include_as_is:
            images = run.images(f"embed/seed-{name}")
            good = [images.index(p, ["status"])["status"].to_numpy() == "ok" for p in range(images.num_parts)]
            gids = np.flatnonzero(np.concatenate(good)).astype(np.int64)
            kept.append(shard.KeptSet(f"seed:{name}", images, gids, pa.table({"seed": [name] * len(gids)})))
    if not sum(len(k.gids) for k in kept):
        raise ValueError(
            f"none of the {len(run.survivors()):,} images that are left was drawn, so there is nothing to write: "
            f"{_rules_in_words(run)}. Loosen that, or add a seed set."
        )
    draw_names = [*run.inputs.seeds, *(["balance"] if run.config.balance.is_wanted() else [])]
    limit = run.config.embed.max_rejected_fraction
    files, lost = shard.write_shards(folder, kept, draw_names, run.config.shard, edits, run.config.execution, limit)
    sets, reasons = (lost[name].to_numpy(zero_copy_only=False) for name in ("set", "reason"))
    counts = {k.name: len(k.gids) - int((sets == k.name).sum()) for k in kept}
    counts |= {reason: int((reasons == reason).sum()) for reason in LOST_REASONS if reason in reasons}
    return files, counts, {"bytes": sum(f.bytes for f in files)}


def _rules_in_words(run: Run) -> str:
    """For each seed set, what a pool image must meet to be drawn."""
    told = []
    for name, (seed, _) in run.inputs.seeds.items():
        rule, of = seed.rule, {"sample": ("k", "min_similarity"), "cluster": ("min_hits", "images_per_cluster")}
        settings = ", ".join(f"{setting}={getattr(rule, setting)}" for setting in of.get(rule.mode, ()))
        told.append(f"seed {name!r} draws with retrieve.mode={rule.mode}{f' ({settings})' if settings else ''}")
    return "; ".join(told) or "there is no seed set"
