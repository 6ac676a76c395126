"""A run that extends another by a tenth, beside a whole run of as many images: filter to cluster, without pictures.

The index is that of `index`, vectors are the hard case of benchmarks/dedup.py; of the new ones, one in fifty is a near
copy of an earlier one. What the earlier run kept is a tenth of what stood for a group there.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.dedup import PLANT_EVERY, blocks, unit
from benchmarks.scale.index import write_index
from benchmarks.scale.measure import Meter
from curation.config import CurationConfig
from curation.engine.earlier import Earlier
from curation.engine.folder import Folder
from curation.engine.manifest import File, Manifest
from curation.engine.ranges import range_file
from curation.engine.workers import ExecutionConfig, start_ray
from curation.ops.randomness import hash_uint64
from curation.pipeline import _execute
from curation.reading.listing import Listing
from curation.stages.cluster import ClusterConfig
from curation.stages.embed import EmbedConfig
from curation.stages.groups import read_groups
from curation.stages.join import Joined
from curation.stages.survivors import Survivors
from curation.state import Inputs, Run
from curation.steps import STAGES, plan_steps

_PART_ROWS = 100_000
_UNTIL = "cluster"
_ANCHORS = 64  # of a block: rows that new ones are copies of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the earlier run; a multiple of 100,000")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--images-per-cluster", type=int, default=1000)
    parser.add_argument("--memory-gb", type=float, default=2.0, help="execution.memory_gb")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", help="where temporary files go: about 7 kB a row")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.rows % _PART_ROWS:
        raise ValueError(f"--rows {arguments.rows} must be a multiple of {_PART_ROWS:,}.")
    rows, all_rows = arguments.rows, arguments.rows + arguments.rows // 10
    config = CurationConfig(
        embed=EmbedConfig(encoder="descriptors-likeness"),
        cluster=ClusterConfig(levels=[max(rows // arguments.images_per_cluster, 1)]),
        execution=ExecutionConfig(workers=arguments.workers, memory_gb=arguments.memory_gb, device="cpu"),
    )
    start_ray(config.execution)
    scratch = tempfile.mkdtemp(dir=arguments.folder)
    try:
        root = Folder(scratch)
        write_index(root / "pool", all_rows, config.execution)
        files = _write_vectors(root / "pool", rows, all_rows, arguments.dim)
        first, of_first = _run(root, "first", config, files, rows)
        earlier = _finished(first, rows)
        whole, of_whole = _run(root, "whole", config, files, all_rows)
        extended, of_extended = _run(root, "extended", config, files, all_rows, earlier)
        figures = extended.manifests["join"].figures
        sums = {
            name: {key: meter[key] for key in ("seconds", "processor_seconds")}
            for name, meter in (("first", of_first), ("whole", of_whole), ("extended", of_extended))
        }
        return {
            "rows": rows, "all_rows": all_rows, "dim": arguments.dim,
            **sums,
            "share_of_seconds": of_extended["seconds"] / of_whole["seconds"],
            "share_of_processor_seconds": of_extended["processor_seconds"] / of_whole["processor_seconds"],
            "driver_gb": of_extended["driver_gb"], "task_gb": of_extended["task_gb"],
            **_decisions(first, extended, rows),
            "recall": figures["recall"], "lower_bound": figures["lower_bound"], "certificate": figures,
            "whole_certificate": whole.manifests["join"].figures,
            "new_images": figures.get("new_images"),
            "pairs_of_the_whole_run_found": _found(whole, extended, rows),
            "steps": {name: {"whole": of_whole["steps"][name], "extended": step}
                      for name, step in of_extended["steps"].items()},
        }  # fmt: skip
    finally:
        shutil.rmtree(scratch)


def _write_vectors(folder: Folder, rows: int, all_rows: int, dim: int) -> list[File]:
    """Vectors of all parts; the files of the whole set, index first."""
    rng, encoder = np.random.default_rng(7), "descriptors-likeness"
    files = [folder.described(name) for name in folder.names()]
    files = [replace(f, rows=min(_PART_ROWS, all_rows - i * _PART_ROWS)) for i, f in enumerate(files)]
    held, number = np.empty((0, dim), np.float16), 0
    for block in _blocks(rows, all_rows, dim, rng):
        held = np.concatenate([held, block])
        while len(held) >= _PART_ROWS or (number * _PART_ROWS + len(held) == all_rows and len(held)):
            files.append(folder.write_array(f"{encoder}/part-{number:06d}.npy", held[:_PART_ROWS]))
            held, number = held[_PART_ROWS:], number + 1
    return files


def _blocks(rows: int, all_rows: int, dim: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    anchors: list[np.ndarray] = []
    at = 0
    for block in blocks(all_rows, dim, 0):
        new = np.arange(max(rows - at, 0), len(block))
        if not len(new):
            anchors.append(block[2 : 2 + _ANCHORS].astype(np.float32))
        else:
            block = block.copy()
            copies = new[PLANT_EVERY // 2 :: PLANT_EVERY]
            old = np.concatenate(anchors)
            of = unit(old[rng.integers(0, len(old), len(copies))])
            cosine = rng.uniform(0.6, 0.99, (len(copies), 1)).astype(np.float32)
            away = rng.standard_normal((len(copies), dim), np.float32)
            away = unit(away - (away * of).sum(axis=1, keepdims=True) * of)
            block[copies] = unit(cosine * of + np.sqrt(1 - cosine**2) * away).astype(np.float16)
        at += len(block)
        yield block


def _run(
    root: Folder, name: str, config: CurationConfig, files: list[File], rows: int, earlier: Earlier | None = None
) -> tuple[Run, dict[str, Any]]:
    """The steps from filter to cluster, measured, of the first rows of the set."""
    out = Run(root / name, config, Inputs(Listing(()), {}, {}), earlier=earlier)
    num_parts = -(-rows // _PART_ROWS)
    own = [file for file in files if int(file.path.rsplit("-", 1)[1].split(".")[0]) < num_parts]
    for file in own:
        (out.folder / "embed/pool").take(file.path, root / "pool")
    settings = _settings(out)
    out.manifests["embed/pool"] = Manifest(
        stage="embed", version=0, key="", settings=settings, inputs={}, files=own, counts={"images": rows}
    )
    steps = plan_steps(out)
    meter = Meter()
    print(f"{name}: {rows:,} images")
    for step in steps[1:]:
        if STAGES.index(step.stage) > STAGES.index(_UNTIL):
            break
        with meter.step(step.name):
            _execute(out, step, steps)
    return out, meter.figures()


def _settings(run: Run) -> dict[str, Any]:
    """Settings of the embed step, as a run of them has in its manifest."""
    alone = replace(run, earlier=None, manifests={"embed/pool": _NO_IMAGES})
    return json.loads(json.dumps(plan_steps(alone)[0].settings))


_NO_IMAGES = Manifest(stage="embed", version=0, key="", settings={}, inputs={}, files=[])


def _finished(run: Run, rows: int) -> Earlier:
    """The run as one that another can extend, with decisions of its own."""
    survivors, files = Survivors(run.folder / "survivors"), []
    for number in range(len(run.ranges)):
        start, stop = run.ranges.bounds(number)
        representative, gids = survivors.representative(number), np.arange(start, stop)
        status = np.where(representative == gids, "not_retrieved", "duplicate").astype("U13")
        status[(representative == gids) & (hash_uint64(3, gids) % np.uint64(10) == 0)] = "kept"
        files.append(run.folder.write_table(range_file("decisions", number), pa.table({"status": status})))
    done = dict.fromkeys(("shards", "report", "decide"), _NO_IMAGES)
    done["decide"] = replace(_NO_IMAGES, settings={"range_rows": run.config.range_rows})
    done["report"] = replace(_NO_IMAGES, files=files)
    return Earlier(run.folder, 1, rows, {**run.manifests, **done})


def _decisions(first: Run, extended: Run, rows: int) -> dict[str, int]:
    """Earlier images with another representative, and those of them in whose component no new image is."""
    changed = unexplained = 0
    for number in range(len(first.ranges)):
        start, stop = first.ranges.bounds(number)
        columns = ["representative", "component"]
        was = read_groups(first.folder / "dedup", number, columns)
        now = read_groups(extended.folder / "dedup", number, columns).slice(0, stop - start)
        representative = [table["representative"].fill_null(-1).to_numpy() for table in (was, now)]
        differs = np.flatnonzero(representative[0] != representative[1])
        changed += len(differs)
        if len(differs):
            components = [
                read_groups(extended.folder / "dedup", n, ["component"])["component"].fill_null(-1).to_numpy()
                for n in range(len(extended.ranges))
            ]
            of_new = np.unique(np.concatenate(components)[rows:])
            unexplained += int((~np.isin(now["component"].fill_null(-1).to_numpy()[differs], of_new)).sum())
    return {"changed_decisions": changed, "changed_without_a_new_image": unexplained}


def _found(whole: Run, extended: Run, rows: int) -> float:
    """Of the pairs at the threshold that the whole run found and that have a new end, the share that it found too."""
    sets = []
    for one in (whole, extended):
        joined = Joined(one.folder / "join")
        tables = [joined.edges(piece, one.config.dedup.similarity_threshold) for piece in joined.pieces()]
        a, b = (np.concatenate([table[end].to_numpy() for table in tables]) for end in ("a", "b"))
        sets.append(np.unique((a * np.int64(1 << 31) + b)[b >= rows]))
    return float(np.isin(*sets).mean()) if len(sets[0]) else 1.0
