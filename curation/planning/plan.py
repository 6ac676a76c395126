"""--dry-run: what a run would read, do and write, and what it would cost. Nothing is started, written or downloaded."""

import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from curation.encoders.load import View, encoder_view, parse_spec
from curation.engine.folder import Folder
from curation.engine.manifest import MANIFEST_NAME
from curation.engine.progress import duration
from curation.ops.neighbours import PIECE_ROWS
from curation.pipeline import finished
from curation.planning import costs
from curation.planning.costs import EncoderCost, Work
from curation.planning.estimates import SetEstimate, estimate_set
from curation.reading.seeds import RetrievalRule
from curation.stages.cluster import LevelShape
from curation.state import Run, set_label
from curation.steps import Step, plan_steps

_WIDTH = 120


@dataclass(frozen=True)
class PlannedStep:
    """One line of the plan: what a step does, what it writes (files, bytes), what that takes."""

    name: str
    what: str
    files: str
    bytes: float
    work: Work
    images: int


def describe(run: Run) -> str:
    """The plan as text, 120 columns wide.

    Counts are those of the pool as if every image passed every filter, so they are upper bounds. Time is reckoned
    with the rates of curation/planning/costs.py.

    Raises:
        ValueError: an encoder's name is unknown.
        OSError: a part cannot be opened.
    """
    plan = Plan(run)
    steps = plan.steps()
    states, notes = _states(run, [step.name for step in steps])
    todo = [step for step in steps if states[step.name] != "done"]
    lines = io.StringIO()
    console = Console(file=lines, width=_WIDTH, no_color=True, highlight=False)
    console.print(_reads(plan), _does(steps, states))
    console.print(_takes(todo, plan) if todo else "Everything is done: the run would read the manifests and stop.\n")
    for line in [*_left_out(run), *_totals(run, plan, todo), *plan.notes(), *notes]:
        console.print(line, soft_wrap=True)
    return lines.getvalue().rstrip()


class Plan:
    """The numbers behind the plan of one run."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        limit = run.config.embed.max_file_bytes
        self.pool = estimate_set(run.inputs.pool, limit)
        self.seeds = {name: estimate_set(parts, limit) for name, (_, parts) in run.inputs.seeds.items()}
        self.evaluations = {name: estimate_set(parts, limit) for name, parts in run.inputs.evaluations.items()}
        specs = run.config.embed.encoders()
        self.views: dict[str, View] = {spec: encoder_view(spec, run.config.embed.image_px) for spec in specs}
        self.workers = run.config.execution.workers or os.cpu_count() or 1

    @cached_property
    def encoder_costs(self) -> dict[str, EncoderCost]:
        return {spec: costs.encoder_cost(spec, view) for spec, view in self.views.items()}

    @cached_property
    def levels(self) -> list[LevelShape]:
        """The levels, finest first, as the cluster stage will make them."""
        return self.config.cluster.shapes_for(self.pool.images)

    @property
    def num_kept(self) -> int:
        """Images of the pool that are kept, at most."""
        rules = ((seed.rule, self.seeds[name].images) for name, (seed, _) in self.run.inputs.seeds.items())
        drawn = sum(_most_drawn(rule, images) for rule, images in rules)
        return min(self.pool.images, drawn + self.config.balance.target(self.pool.images))

    @property
    def _retrieval_cells(self) -> int:
        """What seed images look into: the finest clusters, or the groups that those are made in."""
        finest = self.levels[0]
        return finest.num_clusters if finest.num_groups == 1 else finest.num_groups

    def steps(self) -> list[PlannedStep]:
        c, n = self.config, self.pool.images
        retrieval, copy = c.embed.encoders()[0], c.embed.encoders()[-1]
        width, copy_width = self.encoder_costs[retrieval].dim, self.encoder_costs[copy].dim
        both_ways = self.encoder_costs[copy].has_mirror
        seeds, evaluations = self.seeds, self.evaluations
        cells = c.cells.num_cells(n)
        rows = 2 * copy_width + costs.SKETCH_AND_GID_BYTES
        steps = [self._embedding("embed/pool", self.pool, c.embed.encoders())]
        steps += [self._embedding(f"embed/seed-{name}", s, [retrieval]) for name, s in seeds.items()]
        steps += [self._embedding(f"embed/evaluation-{name}", s, [copy]) for name, s in evaluations.items()]
        k = c.cells.kmeans
        steps += [
            PlannedStep("filter", _filters(c.filters), "1 table", n / 10, Work(), n),
            PlannedStep(
                "cells",
                f"{cells:,} cells of the copy-detection vectors, about {n / cells:,.0f} images each",
                "vectors, sketches",
                n * rows,
                costs.kmeans_work(min(n, k.points_per_cluster * cells), cells, copy_width, k.num_iterations)
                + costs.product_work(n, cells, copy_width),
                n,
            ),
            PlannedStep(
                "join",
                f"pairs of cosine >= {c.dedup.join().floor:g} at recall >= {c.dedup.target_recall:g}",
                f"{2 * -(-n // PIECE_ROWS) + 2:,} tables",
                n * costs.EDGE_BYTES,
                costs.join_work(n, n, cells, copy_width, both_ways) + costs.certify_work(n, copy_width),
                n,
            ),
            PlannedStep(
                "dedup",
                f"same bytes; PDQ within {c.dedup.perceptual_distance} of 256 bits; cosine >= "
                f"{c.dedup.similarity_threshold:g}; components over {c.dedup.max_component_size:,} re-split; kept by "
                f"{', '.join(c.dedup.representative)}",
                "7 tables",
                n * costs.DEDUP_BYTES,
                Work(),
                n,
            ),
            *self._decontamination(cells, copy_width, both_ways),
            self._clustering(width),
        ]
        for name, (seed, _) in self.run.inputs.seeds.items():
            drawn = min(n, _most_drawn(seed.rule, seeds[name].images))
            work = Work()
            if seed.rule.mode == "sample":
                work = costs.retrieve_work(seeds[name].images, n, self._retrieval_cells, width)
            elif seed.rule.mode == "cluster":
                work = costs.product_work(seeds[name].images, self.levels[0].num_clusters, width)
            steps.append(
                PlannedStep(
                    f"retrieve/{name}", _rule(seed.rule, drawn), "1 table", 36.0 * drawn, work, seeds[name].images
                )
            )
        if c.balance.is_wanted():
            drawn = c.balance.target(n)
            what = f"{drawn:,} images, evenly over {self.levels[-1].num_clusters:,} concepts and all below them"
            steps.append(PlannedStep("balance", what, "1 table", 16.0 * drawn, Work(), n))
        ranges = -(-n // c.range_rows)
        what = f"one row for each image, in {ranges:,} {'range' if ranges == 1 else 'ranges'}"
        steps.append(PlannedStep("decide", what, f"{ranges:,} tables", n * costs.DECISION_BYTES, Work(), n))
        steps.append(self._shards())
        report = "report.html, report.json, decisions.parquet"
        steps.append(PlannedStep("report", report, "3 files", n * costs.DECISION_BYTES, Work(), n))
        return steps

    def notes(self) -> list[str]:
        """What differs from what was asked for."""
        asked = [max(1, round(level * self.config.cluster.scale)) for level in self.config.cluster.levels]
        made = [shape.num_clusters for shape in self.levels]
        if len(asked) == len(made) and all(abs(a - b) <= 0.01 * a for a, b in zip(asked, made, strict=True)):
            return []
        cause = f"the pool has {self.pool.images:,} images"
        return [f"cluster: {_numbers(asked)} clusters were asked for, {_numbers(made)} will be made: {cause}."]

    def _embedding(self, name: str, images: SetEstimate, specs: Sequence[str]) -> PlannedStep:
        work = costs.decode_work(images.images, images.megapixels, [self.views[spec] for spec in specs])
        for spec in specs:
            work += costs.encode_work(images.images, self.encoder_costs[spec])
        vectors = sum(2 * self.encoder_costs[spec].dim for spec in specs)
        what = "decode once; " + "; ".join(_encoder(spec, self.views[spec], self.encoder_costs[spec]) for spec in specs)
        size = images.images * (costs.INDEX_BYTES + vectors)
        return PlannedStep(name, what, f"{len(images.parts) * (2 + len(specs)):,} files", size, work, images.images)

    def _decontamination(self, cells: int, dim: int, both_ways: bool) -> list[PlannedStep]:
        c, n = self.config.decontaminate, self.pool.images
        steps = []
        for name, images in self.evaluations.items():
            what = (
                f"against {images.images:,} images: PDQ within {c.perceptual_distance} bits; cosine >= "
                f"{c.similarity_threshold:g}"
            )
            # Few queries: every cell is probed, so a cell is as good as all of them.
            work = costs.join_work(images.images, n, 1, dim, both_ways)
            steps.append(PlannedStep(f"decontaminate/{name}", what, "tables", 8.0 * n / 100, work, images.images))
        what = "nothing: no --evaluation is given"
        if self.evaluations:
            what = f"drops {'whole components' if c.mode == 'component' else 'the matches alone'}"
        return [*steps, PlannedStep("survivors", what, "3 tables", 8.0 * n, Work(), n)]

    def _clustering(self, dim: int) -> PlannedStep:
        n, k = self.pool.images, self.config.cluster.kmeans
        work, items = Work(), n
        for shape in self.levels:
            work += costs.level_work(
                shape.num_rows, items, shape.num_clusters, shape.num_groups, shape.num_resamplings, dim,
                k.num_iterations,
            )  # fmt: skip
            items = shape.num_clusters
        levels = " / ".join(
            f"{shape.num_clusters:,}" + (f" (in {shape.num_groups:,} groups)" if shape.num_groups > 1 else "")
            for shape in self.levels
        )
        size = n * (4 + 2 * dim + costs.SKETCH_AND_GID_BYTES)
        size += 4.0 * dim * sum(shape.num_clusters for shape in self.levels)
        first = self.levels[0].num_rows
        what = f"{levels} clusters of the distinct images; {k.num_iterations} iterations over {first:,}"
        return PlannedStep("cluster", what, f"{3 * len(self.levels)} arrays, vectors", size, work, n)

    def _shards(self) -> PlannedStep:
        c = self.config.shard
        as_is = [self.seeds[name] for name, (seed, _) in self.run.inputs.seeds.items() if seed.include_as_is]
        images = self.num_kept + sum(s.images for s in as_is)
        size = sum(s.images * (s.image_bytes + costs.TAR_OVERHEAD_BYTES) for s in as_is)
        size += self.num_kept * (self.pool.image_bytes + costs.TAR_OVERHEAD_BYTES)
        tars = max(-(-images // c.max_images), -(-int(size) // int(c.max_mb * 1e6)), 1)
        one, many = ("tar", "tars") if c.format == "webdataset" else ("Parquet file", "Parquet files")
        what = (
            f"original bytes of at most {images:,} images, shuffled; up to {c.max_images:,} or {c.max_mb:g} MB a {one}"
        )
        return PlannedStep(
            "shards", what, f"{tars:,} {many}", size, Work(core_s=size / costs.SHARD_BYTES_PER_S), images
        )


# --- what is done already --------------------------------------------------------------------------------------------


def _states(run: Run, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What is done already, by step, and what keeps us from telling."""
    notes = [note for spec in run.config.embed.encoders() if (note := _missing_weights(spec))]
    if notes:  # the keys of the steps hold the weights' hash
        at_hand = {name for name in names if run.folder.exists(f"{name}/{MANIFEST_NAME}")}
        return {name: "done or to do" if name in at_hand else "to do" for name in names}, notes
    states, manifests = {}, {}
    for step in plan_steps(run):
        before = {name.partition(":")[0] for name in (*step.inputs, *step.finishing)}
        manifest = finished(run, step, manifests) if before <= manifests.keys() else None
        if manifest is not None:
            manifests[step.name] = manifest
        states[step.name] = "done" if manifest is not None else _progress(run.folder / step.name, step)
    return states, notes


def _progress(folder: Folder, step: Step) -> str:
    if step.listing is None or not folder.exists():
        return "to do"
    done = {name for name in folder.names() if name.startswith("done/")}
    count = sum(f"done/part-{part}.json" in done for part in step.listing)
    return f"to do, {count:,} of {len(step.listing):,} parts at hand" if count else "to do"


def _missing_weights(spec: str) -> str | None:
    """Why the run could not load this encoder as things are; None if its weights are here. Downloads nothing."""
    kind, name, path = parse_spec(spec)
    if kind == "descriptors":
        return None
    if path:
        return None if os.path.exists(path) else f"encoder {spec}: {path} does not exist; the run will stop there."
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    config = timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        return f"encoder {spec}: timm has no weights for it on the hub; the run will stop there."
    files = [file for file in (config.hf_hub_filename, "model.safetensors") if file]
    if any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files):
        return None
    return (
        f"encoder {spec}: its weights are not in the cache ({constants.HF_HUB_CACHE}); the run will fetch them from "
        "the hub, or stop where there is no network."
    )


# --- words and tables ------------------------------------------------------------------------------------------------


def _reads(plan: Plan) -> Table:
    table = _table("Reads", "set", ">parts", ">bytes", ">images", ">mean image", "first part ... last part")
    estimates = [plan.pool, *plan.seeds.values(), *plan.evaluations.values()]
    for step, images in zip(plan.run.inputs.listings(), estimates, strict=True):
        urls = list(dict.fromkeys([images.parts[0].url, images.parts[-1].url]))
        table.add_row(
            set_label(step),
            f"{len(images.parts):,}",
            _size(images.bytes),
            f"{'' if images.is_exact else 'about '}{images.images:,}",
            f"{_size(images.image_bytes)}, {images.megapixels:.2f} MP",
            " ... ".join(urls),
        )
    return table


def _left_out(run: Run) -> list[str]:
    """What the listings left out, by set."""
    return [f"{set_label(step)}: {note}" for step, listing in run.inputs.listings().items() for note in listing.notes()]


def _does(steps: Sequence[PlannedStep], states: dict[str, str]) -> Table:
    table = _table("Does and writes", "step", "state", "what", "files", ">bytes")
    for step in steps:
        table.add_row(step.name, states[step.name], step.what, step.files, _size(step.bytes))
    return table


def _takes(steps: Sequence[PlannedStep], plan: Plan) -> Table:
    table = _table(
        "Takes", "step", ">images", ">operations", ">one core", f">{plan.workers} cores", ">one A100, published"
    )
    for step in [*steps, PlannedStep("all", "", "", 0, sum((s.work for s in steps), Work()), plan.pool.images)]:
        if step.work.core_s:
            table.add_row(
                step.name,
                f"{step.images:,}",
                _flop(step.work.flop),
                _long(step.work.core_s),
                _long(step.work.core_s / plan.workers),
                _long(step.work.gpu_s) if step.work.gpu_s else "",
            )
    return table


def _totals(run: Run, plan: Plan, todo: Sequence[PlannedStep]) -> list[str]:
    c = run.config
    disk = sum(step.bytes for step in todo)
    lines = [f"disk: {_size(disk)} in {run.folder.url}{_free(run.folder)}"]
    if not run.folder.is_local:
        local = sum(step.bytes for step in todo if step.name in ("cells", "cluster"))
        lines.append(f"disk: {_size(local)} of that in {run.local('')}, which every worker must see")
    weights = 4 * sum(cost.parameters for cost in plan.encoder_costs.values())
    per_part = plan.pool.images / len(plan.pool.parts) * sum(2 * cost.dim for cost in plan.encoder_costs.values())
    # One process clusters the levels that are not split; tasks do the others.
    whole = [shape.num_rows for shape in plan.levels if shape.num_groups == 1 and len(plan.levels) > 1]
    training = max(whole, default=0) * plan.encoder_costs[c.embed.encoders()[0]].dim * 6
    driver = plan.pool.images * costs.DRIVER_BYTES + training
    lines.append(
        f"memory: {c.execution.memory_gb:g} GB a worker at most (execution.memory_gb), {_size(weights + per_part)} "
        f"more in each that embeds; about {_size(driver)} in the driver"
    )
    lines.append(
        "counts marked `about` are scaled from the heads of two parts; every image is taken to pass every filter; "
        "times are for the rates in curation/planning/costs.py, with input and output at full speed"
    )
    return lines


def _free(folder: Folder) -> str:
    if not folder.is_local:
        return ""
    path = Path(folder.path()).absolute()
    while not path.exists():
        path = path.parent
    return f", where {_size(shutil.disk_usage(path).free)} are free"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, width=_WIDTH)
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name[0] == ">" else "left", overflow="fold")
    return table


def _encoder(spec: str, view: View, cost: EncoderCost) -> str:
    size = f"{view.width} x {view.height} px -> {cost.dim}-d"
    if not cost.is_torch:
        return f"{spec} ({size})"
    return f"{spec} ({size}, {cost.parameters / 1e6:,.0f} M parameters, {_flop(cost.flop)} an image)"


def _filters(filters: Sequence[Any]) -> str:
    return "rejects by " + ", ".join(str(f.get("kind", f)) for f in filters) if filters else "nothing"


def _rule(rule: RetrievalRule, drawn: int) -> str:
    if rule.mode == "sample":
        return f"the {rule.k} nearest of each seed image, collisions: {rule.collisions}; at most {drawn:,}"
    if rule.mode == "cluster":
        cluster = f"each cluster with {rule.min_hits} seed images or more"
        return f"up to {rule.images_per_cluster:,} from {cluster}; at most {drawn:,}"
    return "nothing: the set is only included as it is"


def _most_drawn(rule: RetrievalRule, num_seeds: int) -> int:
    return {"sample": rule.k * num_seeds, "cluster": rule.max_images, "none": 0}[rule.mode]


def _numbers(values: Sequence[int]) -> str:
    return " / ".join(f"{value:,}" for value in values)


def _size(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def _flop(value: float) -> str:
    return _scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")) if value else ""


def _scaled(value: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} {units[-1]}"


def _long(seconds: float) -> str:
    return duration(seconds) if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"
