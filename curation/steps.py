"""Every step of a run, its settings and its inputs; curation.step_work is what each does."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from curation import step_work as work
from curation.account import decisions
from curation.account.report import step as report
from curation.encoders.load import load_encoder
from curation.engine.folder import Folder
from curation.reading.filters import Blocklist, Edit, Pixels
from curation.reading.samples import Part
from curation.stages import (
    balance,
    cells,
    cluster,
    decontaminate,
    dedup,
    embed,
    exclude,
    join,
    retrieve,
    shard,
    survivors,
)
from curation.stages import filter as filter_stage
from curation.stages import heads as heads_stage
from curation.state import Run, Written

STAGES = (
    "embed",
    "exclude",
    "filter",
    "heads",
    "cells",
    "join",
    "dedup",
    "decontaminate",
    "survivors",
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
    """steps whose manifests are in its key; of `STEP:FILE` only the bytes of the files whose names begin so are"""
    work: Callable[[Run, Folder], Written]
    listing: Any = None
    """the source parts, for steps that keep finished parts when others come or go"""
    finishing: tuple[str, ...] = ()
    """inputs, as above, that finished pieces do not depend on: they stay where those alone changed"""
    together: Callable[[Run, Sequence[str]], None] | None = None
    """makes the pieces of several such steps in one pass over the pool, given their names, before `work` of each"""


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
        _check_earlier(run, name, settings)
        return Step(
            name,
            "embed",
            embed.VERSION,
            settings,
            (),
            lambda run, folder: work.embed_images(run, folder, parts, encoders, filters, name),
            listing=sorted(part.id for part in parts),
        )

    # What an earlier release decided counts from the first step that reads every image.
    extends = {"extends": run.earlier.key} if run.earlier is not None else {}
    seeds, evaluations = run.inputs.seeds, run.inputs.evaluations
    steps = [embedding("embed/pool", run.inputs.pool, specs, pixel_filters)]
    steps += [embedding(f"embed/seed-{name}", parts, specs[:1], []) for name, (_, parts) in seeds.items()]
    steps += [embedding(f"embed/evaluation-{name}", parts, specs[-1:], []) for name, parts in evaluations.items()]
    steps += [
        Step(
            f"exclude/{name}", "exclude", exclude.VERSION, {"excludes": other.key, "range_rows": c.range_rows},
            ("embed/pool",),
            lambda run, folder, name=name: (
                *exclude.find_excluded(folder, run.pool, run.ranges, run.excluded[name], c.execution),
                {"run": run.excluded[name].folder.url},
            ),
        )
        for name, other in run.excluded.items()
    ]  # fmt: skip
    excluded = [step.name for step in steps if step.stage == "exclude"]
    steps += [
        Step(
            "filter", "filter", filter_stage.VERSION,
            {
                "filters": c.filters,
                "listed": [f.digest() for f in run.filters if isinstance(f, Blocklist)],
                "range_rows": c.range_rows,
                **extends,
            },
            ("embed/pool", *excluded),
            lambda run, folder: (
                *filter_stage.filter_pool(
                    folder, run.pool, run.filters, run.ranges, c.execution, run.earlier,
                    [run.folder / step for step in excluded],
                ),
                {},
            ),
        ),
        Step("heads", "heads", heads_stage.VERSION, {}, ("filter",), work.find_heads),
        Step(
            "cells", "cells", cells.VERSION, {**asdict(c.cells), **extends}, ("embed/pool", "heads"),
            work.build_cells,
        ),
        Step("join", "join", join.VERSION, work.join_settings(run), ("cells",), work.join_cells),
        Step(
            "dedup", "dedup", dedup.VERSION, asdict(c.dedup), ("embed/pool", "filter", "heads", "join"),
            work.deduplicate,
        ),
        *(
            Step(
                f"decontaminate/{name}", "decontaminate", decontaminate.VERSION,
                {key: value for key, value in asdict(c.decontaminate).items() if key != "mode"},
                ("filter", "cells", f"embed/evaluation-{name}"),
                lambda run, folder, name=name: (*decontaminate.written(work.evaluation(run, name), c.execution), {}),
                together=work.match_evaluations,
            )
            for name in evaluations
        ),
        Step(
            "survivors", "survivors", survivors.VERSION, {"mode": c.decontaminate.mode},
            ("heads", "dedup", *(f"decontaminate/{name}" for name in evaluations)), work.find_survivors,
        ),
        Step(
            "cluster", "cluster", cluster.VERSION, {**asdict(c.cluster), **extends},
            ("embed/pool", "dedup", "survivors:elected"), work.cluster_images,
        ),
    ]  # fmt: skip
    for name, (seed, _) in seeds.items():
        steps.append(
            Step(
                f"retrieve/{name}",
                "retrieve",
                retrieve.VERSION,
                asdict(seed.rule),
                ("cluster", f"embed/seed-{name}"),
                lambda run, folder, name=name: work.retrieve_set(run, folder, name),
                finishing=("survivors:representative",),
                together=work.find_neighbours,
            )
        )
    if c.balance.is_wanted():
        after = ("cluster", "survivors:representative")
        steps.append(Step("balance", "balance", balance.VERSION, asdict(c.balance), after, work.balance_draws))
    choices = tuple(step.name for step in steps if step.stage in ("retrieve", "balance"))
    named = tuple(
        f"embed/{kind}" for kind in ("pool", *(f"seed-{n}" for n in seeds), *(f"evaluation-{n}" for n in evaluations))
    )
    decided = (*named, "filter", "dedup", "survivors", "cluster", *choices)
    steps.append(
        Step(
            "decide",
            "decide",
            decisions.VERSION,
            {"range_rows": c.range_rows, "release": run.release, **extends},
            decided,
            decisions.decide,
        )
    )
    as_is = tuple(f"embed/seed-{name}" for name, (seed, _) in seeds.items() if seed.include_as_is)
    settings = {**asdict(c.shard), "edits": [f.path for f in edits], **extends}
    before = ("embed/pool", "decide:decisions", *as_is)  # not what else was decided upon: a set without leaks
    steps.append(
        Step(
            "shards",
            "shard",
            shard.VERSION,
            settings,
            before,
            lambda run, folder: work.write_shards(run, folder, edits),
        )
    )
    everything = tuple(step.name for step in steps)
    steps.append(Step("report", "report", report.VERSION, {}, everything, report.write_report))
    return steps


def _check_earlier(run: Run, name: str, settings: dict[str, Any]) -> None:
    """A set that the run to be extended has too must be embedded in the same way, or nothing of it could stay."""
    if run.earlier is None or name not in run.earlier.manifests:
        return
    had, wanted = run.earlier.manifests[name].settings, json.loads(json.dumps(settings))
    if differing := sorted(key for key in had.keys() | wanted.keys() if had.get(key) != wanted.get(key)):
        raise ValueError(
            f"--extend {run.earlier.folder.url} has {name} with other settings of `embed` ({', '.join(differing)}): "
            "give those, or start a run of its own."
        )
