"""--dry-run: what a run would read, do and write, and what it would cost. Nothing is started, written or downloaded."""

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from curation.encoders.load import parse_spec
from curation.engine.folder import Folder
from curation.engine.manifest import MANIFEST_NAME
from curation.pipeline import finished
from curation.planning import costs
from curation.planning.costs import Work
from curation.planning.estimates import SetEstimate
from curation.planning.machines import Cluster
from curation.planning.numbers import PlannedStep
from curation.planning.steps import Plan
from curation.planning.words import flop, size, time_words
from curation.reading.filters import Pixels
from curation.state import Run, set_label
from curation.steps import Step, plan_steps

_WIDTH = 120


def describe(run: Run, cluster: Cluster | None = None, described: Mapping[str, SetEstimate] | None = None) -> str:
    """The plan as text, 120 columns wide.

    Counts are those of the pool as if every image passed every filter, so they are upper bounds. Time is reckoned
    with the rates of curation/planning/costs.py.

    Args:
        cluster, described: see Plan; with sets that are described, nothing is taken to be done.

    Raises:
        ValueError: an encoder's name is unknown.
        OSError: a part cannot be opened.
    """
    plan = Plan(run, cluster, described)
    steps = plan.steps()
    states, notes = _states(run, [step.name for step in steps], bool(described))
    todo = [step for step in steps if states[step.name] != "done"]
    lines = io.StringIO()
    console = Console(file=lines, width=_WIDTH, no_color=True, highlight=False)
    console.print(_reads(plan), _does(steps, states))
    console.print(_takes(todo, plan) if todo else "Everything is done: the run would read the manifests and stop.\n")
    if run.earlier is not None:
        notes.append(
            f"--extend {run.earlier.folder.url}: the costs are those of a whole run. Only new parts are "
            "embedded, and only new images look for cells, pairs and clusters."
        )
    for line in [*_left_out(run), *_totals(run, plan, todo), *plan.notes(), *notes]:
        console.print(line, soft_wrap=True)
    return lines.getvalue().rstrip()


# --- what is done already --------------------------------------------------------------------------------------------


def _states(run: Run, names: Sequence[str], is_described: bool) -> tuple[dict[str, str], list[str]]:
    """What is done already, by step, and what keeps us from telling."""
    notes = [note for spec in run.config.embed.encoders() if (note := _missing_weights(spec))]
    notes += [note for rule in run.filters if isinstance(rule, Pixels) and (note := _missing_filter(rule))]
    if is_described:
        return dict.fromkeys(names, "to do"), notes
    if notes:  # the keys of the steps hold the hash of weights
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


def _missing_filter(rule: Pixels) -> str | None:
    """Why the run could not ask this filter as things are; None if what it needs is here."""
    try:
        rule.settings()
        rule.view()
    except ValueError as error:
        return f"{error} The run will stop there."
    return None


# --- words and tables ------------------------------------------------------------------------------------------------


def _reads(plan: Plan) -> Table:
    table = _table("Reads", "set", ">parts", ">bytes", ">images", ">mean image", "first part ... last part")
    for step, images in plan.estimates.items():
        table.add_row(
            set_label(step),
            f"{images.num_parts:,}",
            size(images.bytes),
            f"{'' if images.is_exact else 'about '}{images.images:,}",
            f"{size(images.image_bytes)}, {images.megapixels:.2f} MP",
            " ... ".join(images.urls),
        )
    return table


def _left_out(run: Run) -> list[str]:
    """What the listings left out, by set."""
    return [f"{set_label(step)}: {note}" for step, listing in run.inputs.listings().items() for note in listing.notes()]


def _does(steps: Sequence[PlannedStep], states: dict[str, str]) -> Table:
    table = _table("Does and writes", "step", "state", "what", "files", ">bytes")
    for step in steps:
        table.add_row(step.name, states[step.name], step.what, step.files, size(step.bytes))
    return table


def _takes(steps: Sequence[PlannedStep], plan: Plan) -> Table:
    cluster = plan.cluster
    table = _table(
        f"Takes, on {cluster.told()}", "step", ">time", ">driver alone", ">FLOP", ">core time",
        ">GPU time", ">requests", ">read", ">written", ">driver memory", ">task memory",
    )  # fmt: skip
    table.padding, table.columns[0].no_wrap = (0, 1, 0, 0), True  # or eleven columns do not fit
    for step in steps:
        driver, task = costs.DRIVER_PROCESS_BYTES + step.driver_bytes, costs.PROCESS_BYTES + step.task_bytes
        table.add_row(step.name, *_taken([step], cluster), size(driver), size(task))
    peaks = (max(getattr(step, name) for step in steps) for name in ("driver_bytes", "task_bytes"))
    processes = (costs.DRIVER_PROCESS_BYTES, costs.PROCESS_BYTES)
    table.add_row("all", *_taken(steps, cluster), *(size(sum(pair)) for pair in zip(peaks, processes, strict=True)))
    return table


def _taken(steps: Sequence[PlannedStep], cluster: Cluster) -> list[str]:
    work = sum((step.work for step in steps), Work())
    driver_s, gpu_s = sum(step.driver_s for step in steps), cluster.gpu_s(work)
    requests, read, written = (sum(getattr(s, name) for s in steps) for name in ("requests", "read", "written"))
    return [
        time_words(sum(step.seconds(cluster) for step in steps)),
        time_words(driver_s),
        flop(work.flop).removesuffix("FLOP"),
        time_words(cluster.core_s(work)),
        time_words(gpu_s),
        f"{requests:,.0f}" if requests < 1e5 else f"{requests / 1e6:,.3g} M",
        size(read),
        size(written),
    ]


def _totals(run: Run, plan: Plan, todo: Sequence[PlannedStep]) -> list[str]:
    disk = sum(step.bytes for step in todo)
    lines = [f"disk: {size(disk)} in {run.folder.url}{_free(run.folder)}"]
    lines += [
        f"memory: a task may use execution.memory_gb={run.config.execution.memory_gb:g} GB; where that is more, the "
        "join reads less",
        "time: of what a step has least of (cores, or tasks for them; GPUs; network; store), and what the driver does "
        "alone",
        "core time, GPU time: of all tasks together; of GPUs as published, of cores as curation/planning/costs.py says",
        "counts marked `about` are scaled from the heads of two parts; every image is taken to pass every filter",
    ]
    return lines


def _free(folder: Folder) -> str:
    if not folder.is_local:
        return ""
    path = Path(folder.path()).absolute()
    while not path.exists():
        path = path.parent
    return f", where {size(shutil.disk_usage(path).free)} are free"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, width=_WIDTH)
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name[0] == ">" else "left", overflow="fold")
    return table
