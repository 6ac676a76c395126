"""Run an experiment, and keep a record of each run: python -m benchmarks.experiment NAME

    python -m benchmarks.experiment cifar                                  every variant with seeds 0, 1, 2
    python -m benchmarks.experiment cifar --variant recipe --seed 1        one run
    python -m benchmarks.experiment cifar --dry-run                        what is there, and what would be run

benchmarks/experiments/NAME.yaml says what is compared. A run that has its record in benchmarks/records/NAME is not made
again; one that was stopped or killed goes on. Commands side by side share the runs out: each leaves alone what another
has begun. `python -m benchmarks.tables` then writes the tables. benchmarks/README.md has the rest.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.clock import machine, spent, timed
from benchmarks.study.description import Described, read_experiment
from benchmarks.study.record import OWN, is_recorded, write_record
from benchmarks.study.run import Places, Run, build_run, images_seen
from benchmarks.study.variants import TRAINER, UNLEARNED, Learnt, learn
from configs.messages import answered, named_folder
from curation.engine.lock import Folder, hold
from pretrain.config import total_steps
from pretrain.downstream.evals.compared import check_sets, frozen_of, run_task
from pretrain.stopping import Stopped, StopRequest, stop_signals
from pretrain.train import NOT_FINITE, STOPPED
from pretrain.watch.lines import read_lines
from pretrain.watch.metrics import EVALUATIONS, METRICS

SEEDS = [0, 1, 2]
WORK = Path("runs/experiments")
_KEPT = ("eval", "metric", "set", "value", "standard_error", "figures", "images", "chosen", "seconds", "source")
log = logging.getLogger("benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0: every run asked for is recorded, or another command has it; 75: stopped, the same command continues;
    2: a wrong input; 3: a training's values were not finite, and the others are recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="a name of benchmarks/experiments, or a YAML file")
    parser.add_argument("--variant", nargs="+", default=[], help="default: all")
    parser.add_argument("--seed", nargs="+", type=int, default=SEEDS, help="default: 0 1 2")
    parser.add_argument("--data", type=named_folder, help="the folder of images (default: $SEEDBED_DATA)")
    parser.add_argument("--work", type=named_folder, default=WORK, help=f"for run folders (default: {WORK})")
    parser.add_argument("--dry-run", action="store_true", help="say what is recorded, and what would be run")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return answered(lambda: _main(asked), "the same command continues")


def _main(asked: argparse.Namespace) -> int:
    described = read_experiment(asked.experiment)
    runs = _runs(described, asked)  # all are looked at before one is made
    if asked.dry_run:
        print(described.experiment.question)
        for run in runs:
            print(f"{run}: {_standing(run)}")
        return 0
    status = 0
    with stop_signals() as stop:
        for run in runs:
            try:
                _make(run, stop)
            except Stopped:
                print("stopped as asked; the same command continues.", file=sys.stderr)
                return STOPPED
            except FloatingPointError as error:  # is itself an answer, and the other runs have theirs to give
                print(f"error: {run}: {error}", file=sys.stderr)
                status = NOT_FINITE
    return status


def _runs(described: Described, asked: argparse.Namespace) -> list[Run]:
    """In the order of seeds, so that every variant has one before any has two."""
    known = described.experiment.variants
    if unknown := [name for name in asked.variant if name not in known]:
        raise ValueError(f"--variant {unknown[0]} is none of {', '.join(known)}.")
    data = asked.data or os.environ.get("SEEDBED_DATA")
    if not data:
        raise ValueError("give --data FOLDER, the folder of images, or name it in SEEDBED_DATA.")
    places = Places(Path(data).absolute(), asked.work.absolute())
    pairs = [(seed, name) for name in asked.variant or known for seed in described.seeds_of(name, asked.seed)]
    return [build_run(described, name, seed, places) for seed, name in sorted(pairs, key=lambda pair: pair[0])]


def _standing(run: Run) -> str:
    if is_recorded(run.record):
        different = run.differing()
        return "recorded" + (f", with other settings: {', '.join(different)}" if different else "")
    if run.variant.kind in UNLEARNED:
        return "would be evaluated"
    lines = read_lines(run.folder / TRAINER / METRICS)
    done = f" from step {lines[-1]['step']:,}" if lines else ""
    steps, seen = total_steps(run.config), images_seen(run.config)
    return f"would be trained{done}: {steps:,} steps, {seen:,} images"


def _make(run: Run, stop: StopRequest) -> None:
    if is_recorded(run.record):
        log.info("%s: recorded", run)
        if different := run.differing():
            log.warning(
                "%s: the record is of other settings (%s): remove %s to make it anew", run, different, run.record
            )
        return
    with ExitStack() as until_done:
        try:
            held = hold(Folder(str(run.folder)), on_lost=lambda: stop.received.append(signal.SIGTERM))
            lock = until_done.enter_context(held)
        except ValueError as error:
            log.info("%s: left to another command: %s", run, error)
            return
        log.info("%s", run)
        check_sets(list(run.tasks.values()))
        if run.config.execution.threads:
            torch.set_num_threads(run.config.execution.threads)
        with timed(run.folder):
            learnt = learn(run, stop)
        results = _judged(run, learnt, stop)
        lock.check()
        _record(run, learnt, results)


def _judged(run: Run, learnt: Learnt, stop: StopRequest) -> dict[str, Any]:
    tasks, size = list(run.tasks.values()), run.config.evaluation.batch_size
    frozen = frozen_of(learnt.evaluated, tasks, torch.device("cpu"), size, bfloat16=False)
    frozen.left = lambda: bool(stop)
    found: dict[str, Any] = {}
    for name, task in run.tasks.items():
        found[name] = {key: value for key, value in run_task(task, frozen, run.name).items() if key in _KEPT}
        found[name]["px"] = task.data.px or frozen.image.px
        log.info("%s: %s %.4f", run, name, found[name]["value"])
    if learnt.own is not None:
        result = learnt.own(frozen).as_json()
        found[OWN] = {"metric": "accuracy"} | {key: value for key, value in result.items() if key in _KEPT}
    return found


def _record(run: Run, learnt: Learnt, results: dict[str, Any]) -> None:
    out = run.folder / TRAINER
    metrics = read_lines(out / METRICS)
    cost = spent(run.folder)
    cost["minutes"]["training"] = sum(line["seconds"] for line in metrics) / 60
    facts = {
        "experiment": run.described.name,
        "variant": run.name,
        "kind": run.variant.kind,
        "seed": run.seed,
        "command": run.command,
        **cost,
        "machine": machine(),
        "images_seen": 0 if run.variant.kind in UNLEARNED else images_seen(run.config),
        "backbone_parameters": sum(p.numel() for p in learnt.evaluated.model.parameters()),
    }
    points = [_point(run, line) for line in read_lines(out / EVALUATIONS) if "failed" not in line]
    write_record(run.record, facts, results, run.config_text(), metrics, points)
    log.info("%s: recorded in %s", run, run.record)


def _point(run: Run, line: dict[str, Any]) -> dict[str, Any]:
    """A point of the curve; `knn_pixels` and `knn_random`, its floors, are variants of their own."""
    curve = run.described.experiment.curve.evaluation
    judge = run.described.experiment.evaluations[curve].eval
    by_k = {f"k={name.partition('/')[2]}": value for name, value in line.items() if name.startswith(f"{judge}/")}
    seen = images_seen(run.config, line["step"])
    return {"step": line["step"], "images": seen, "evaluation": curve, "value": line[judge], **by_k}


if __name__ == "__main__":
    sys.exit(main())
