"""The steps in order. Each is a folder closed by a manifest; one whose manifest matches is skipped."""

import json
import logging
import time
from typing import Any

from curation.engine.manifest import MANIFEST_NAME, Manifest, stage_key
from curation.engine.ownership import STARTED, TIMING, clear_stage_folder
from curation.engine.progress import duration
from curation.engine.workers import start_ray
from curation.state import Run
from curation.steps import STAGES, Step, plan_steps

logger = logging.getLogger(__name__)


def run_pipeline(run: Run, until: str = "report", steps: list[Step] | None = None) -> list[tuple[str, float | None]]:
    """Run what is not done yet, up to and including the stage `until`.

    Returns:
        (step, seconds) for each, None for those that were skipped because their manifest matched.

    Raises:
        ValueError: settings or images that leave nothing to go on with; files of others where ours would go.
    """
    times: list[tuple[str, float | None]] = []
    steps = steps if steps is not None else plan_steps(run)
    for step in steps:
        if STAGES.index(step.stage) > STAGES.index(until):
            break
        times.append((step.name, _execute(run, step, steps)))
    return times


def _execute(run: Run, step: Step, steps: list[Step]) -> float | None:
    folder = run.folder / step.name
    manifest = finished(run, step, run.manifests)
    if manifest is not None:
        run.manifests[step.name] = manifest
        return None
    settings, inputs, _, key = _keys(step, run.manifests)
    start_ray(run.config.execution)
    start = time.monotonic()
    _prepare(run, step)
    if step.together is not None:
        # Those of its kind that are to do as well; when their turn comes, their pieces are there.
        others = [s for s in steps if s.together == step.together and s is not step]
        others = [s for s in others if s.name not in run.manifests and finished(run, s, run.manifests) is None]
        for other in others:
            _prepare(run, other)
        step.together(run, [s.name for s in (step, *others)])
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


def _prepare(run: Run, step: Step) -> None:
    """Leave in the step's folder what it may go on from, and nothing else of ours.

    Finished pieces of the same work are kept; those of other settings would be taken for ours, and a step that was
    whole and no longer is cannot be trusted in pieces.
    """
    folder, work_key = run.folder / step.name, _keys(step, run.manifests)[2]
    was_whole = folder.exists(MANIFEST_NAME) and step.listing is None and not step.finishing
    if was_whole or not folder.exists(STARTED) or json.loads(folder.read_bytes(STARTED)) != work_key:
        clear_stage_folder(folder, step.stage)
        folder.write_bytes(STARTED, json.dumps(work_key).encode())


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
    if missing:
        logger.warning("%s: %d of its files are gone (%s); the stage runs again.", step.name, len(missing), missing[0])
        return None
    return manifest


def _keys(step: Step, manifests: dict[str, Manifest]) -> tuple[Any, dict[str, str], str, str]:
    """Settings as JSON, input hashes, the key of the work (which parts may be kept), and the key of the whole step."""
    settings = json.loads(json.dumps(step.settings))
    inputs = {name: _input_hash(name, manifests) for name in step.inputs}
    work_key = stage_key(step.stage, step.version, settings, inputs)
    keyed = settings if step.listing is None else {"settings": settings, "parts": step.listing}
    inputs = inputs | {name: _input_hash(name, manifests) for name in step.finishing}
    return settings, inputs, work_key, stage_key(step.stage, step.version, keyed, inputs)


def _input_hash(name: str, manifests: dict[str, Manifest]) -> str:
    """Of a step: of its manifest. Of `STEP:FILE`: of those files alone, so that it stays while their bytes do."""
    step, _, file = name.partition(":")
    return manifests[step].hash() if not file else manifests[step].hash_of(file)
