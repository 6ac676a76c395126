"""How good backbones are, side by side: python -m pretrain.downstream.evals all BACKBONE... --data sets.yaml

    python -m pretrain.downstream.evals all TRAIN untrained:TRAIN pixels --data sets.yaml --out FOLDER
    python -m pretrain.downstream.evals knn,linear EXPORT --data train=birds/train val=birds/val

The first word names evaluations: `all`, or some of knn, linear, logistic, fewshot (labelled sets), retrieval, copies,
segmentation, depth, discovery. BACKBONE is what `load_backbone` takes, `untrained:` before one for a backbone of the
same form with fresh weights, or the baselines `pixels` and `colours`. `--data` is a file of sets, or one set in words
(pretrain/downstream/evals/sets.py). `EVALUATION.setting=value` changes a protocol, as `linear.epochs=30`.

FOLDER gets a result.json for each (BACKBONE/SET/EVALUATION/) and table.md; what is there already is not done again. The
processes of torchrun share the images out.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.loader import override_config
from configs.messages import answered, named_folder, sentence
from pretrain.distributed import collectives
from pretrain.downstream.evals.compared import (
    Evaluated,
    Task,
    check_names,
    check_out,
    check_sets,
    frozen_of,
    known_result,
    load_evaluated,
    planned,
    result_path,
    run_task,
    table,
    tasks_of,
    write_json,
    write_table,
)
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.protocols import PROTOCOLS
from pretrain.downstream.evals.result import UNKNOWN
from pretrain.downstream.evals.sets import KINDS, ImageSets, read_sets, set_of_words


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.downstream.evals", description="How good backbones are, side by side."
    )
    parser.add_argument("evaluations", help=f"all, or of {', '.join(PROTOCOLS)}, joined by commas")
    parser.add_argument(
        "backbones",
        nargs="+",
        metavar="BACKBONE",
        help="run, checkpoint, teacher, export, released file, hf:OWNER/NAME, timm:NAME; untrained:BACKBONE; pixels; "
        "colours; and EVALUATION.setting=value",
    )
    parser.add_argument("--data", required=True, nargs="+", help="sets.yaml, or train=PATH val=PATH ...")
    parser.add_argument("--out", type=named_folder, help="folder for results and table (default: only shown)")
    parser.add_argument("--px", type=int, help="side of the crop (default: that of each backbone)")
    parser.add_argument("--architecture", default="", help="of a released file, which does not say")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--bfloat16", action="store_true", help="run the backbone in bfloat16")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--dry-run", action="store_true", help="say what would be read and computed")
    asked = parser.parse_intermixed_args(arguments)
    try:
        return answered(lambda: _run(asked), "the same command continues" if asked.out else "nothing was written")
    finally:
        collectives.stop()


def _run(asked: argparse.Namespace) -> int:
    launched = "RANK" in os.environ
    device = collectives.start(asked.device) if launched else collectives.choose_device(asked.device, "--device")
    for name, value in (("--px", asked.px), ("--batch-size", asked.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be 1 or more.")
    names = list(PROTOCOLS) if asked.evaluations == "all" else asked.evaluations.split(",")
    check_names(names)
    overrides = [word for word in (*asked.backbones, *asked.data) if _is_setting(word)]
    backbones, data = ([word for word in words if not _is_setting(word)] for words in (asked.backbones, asked.data))
    if not backbones or not data:
        raise ValueError("name one or more backbones, and --data.")
    tasks = tasks_of(names, _sets(data, names), _settings(names, overrides))
    check_sets(tasks)
    evaluated = load_evaluated(backbones, asked.architecture, asked.px)
    if asked.dry_run:
        if collectives.rank() == 0:
            print("\n".join(planned(tasks, evaluated, device)))
        return 0
    if asked.out is not None:
        collectives.from_rank_zero(lambda: check_out(asked.out))
    results = []
    for one in evaluated:
        results += _evaluate(one, tasks, device, asked)
    if collectives.rank():
        return 0
    failed: dict[tuple[str, str], list[str]] = {}
    for one in results:
        if "failed" in one:
            failed.setdefault((one["set"], one["failed"]), []).append(f"{one['eval']} of {one['backbone']}")
    if sum(map(len, failed.values())) < len(results):
        print(table(results, backbones))
    if asked.out is not None:
        write_table(asked.out)
    for (set_name, reason), those in failed.items():
        print(f"error: {', '.join(those)} on {set_name}: {reason}", file=sys.stderr)
    return 2 if failed else 0


def _evaluate(one: Evaluated, tasks: Sequence[Task], device: Any, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Every task with one backbone; what cannot be evaluated does not keep the others from it."""
    frozen = frozen_of(one, tasks, device, asked.batch_size, asked.bfloat16)
    weights = one.fingerprint() if asked.out is not None else ""
    results = []
    for number, task in enumerate(tasks):
        if number and task.set_name != tasks[number - 1].set_name:
            frozen.forget()
        if frozen.show_progress:
            print(f"{one.name}: {task.evaluation} on {task.set_name}", file=sys.stderr)
        path = None if asked.out is None else result_path(asked.out, one.name, task)
        try:
            result = _known(path, task, frozen, weights)
            if result is None:
                result = run_task(task, frozen, one.name) | {"weights": weights}
                _tell_left_out(result)
                if path is not None and collectives.rank() == 0:
                    write_json(path, result)
        except ValueError as error:
            result = {"eval": task.evaluation, "set": task.set_name, "backbone": one.name, "failed": sentence(error)}
        except torch.OutOfMemoryError:
            raise ValueError(
                f"memory has run out in {task.evaluation} on {task.set_name}: lower --batch-size, or see --dry-run for "
                "what the features of a set take."
            ) from None
        results.append(result)
    one.model.cpu()
    return results


def _known(path: Path | None, task: Task, frozen: Frozen, weights: str) -> dict[str, Any] | None:
    """What an earlier command found; one rank looks, so that all agree."""
    if path is None:
        return None
    return collectives.from_rank_zero(lambda: known_result(path, task, frozen, weights))


def _tell_left_out(result: dict[str, Any]) -> None:
    if collectives.rank():
        return
    for split, those in result["left_out"].items():
        if those["images"]:
            print(f"{split}: {those['images']} images left out: {', '.join(those['first'])}", file=sys.stderr)
    if unknown := result["images"].get(UNKNOWN):
        print(
            f"{unknown:,} images of val are of classes that train has not: wrong whatever the answer", file=sys.stderr
        )


def _is_setting(word: str) -> bool:
    """Also behind --data, which takes all words up to the next option."""
    return "=" in word and word.partition(".")[0] in PROTOCOLS


def _sets(words: Sequence[str], names: Sequence[str]) -> dict[str, ImageSets]:
    if len(words) == 1 and words[0].endswith((".yaml", ".yml")):
        return read_sets(Path(words[0]))
    takes = PROTOCOLS[names[0]].takes
    if any(PROTOCOLS[name].takes is not takes for name in names):
        if names != list(PROTOCOLS):
            raise ValueError("these evaluations take sets of different kinds: give --data a file of sets.")
        takes = KINDS["labelled"]
    kind = next(name for name, known in KINDS.items() if known is takes)
    return {"data": set_of_words(kind, words)}


def _settings(names: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        own = [word.partition(".")[2] for word in overrides if word.partition(".")[0] == name]
        found[name] = override_config(PROTOCOLS[name].settings(), own)
    if unused := [word for word in overrides if word.partition(".")[0] not in names]:
        raise ValueError(f"{unused[0]}: {unused[0].partition('.')[0]} is not among what is evaluated.")
    return found


if __name__ == "__main__":
    collectives.end_process(main())
