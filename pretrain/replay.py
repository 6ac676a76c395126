"""Repeat a step that went wrong: python -m pretrain.replay RUN/nonfinite/step-00001234.json, or RUN --step 1234

Training writes that file when it skips a step whose values are not finite; any other step, such as that of an alarm, is
named by its number. From the checkpoint before it, the steps up to the one in question are repeated in this process
(order, crops and noise depend on seed and step alone), then that one is. Its terms are printed, and the images whose
features are not finite. Nothing is written. It is one process, so the networks and their moments must fit one device.
"""

import argparse
import json
import logging
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from configs.loader import merge_config
from pretrain.checkpoint import PREFIX, Checkpoints, read_manifest
from pretrain.checks import check_run
from pretrain.config import LIKE, TrainConfig
from pretrain.data.collate import Batch
from pretrain.data.loader import Loader
from pretrain.distributed import collectives
from pretrain.numerics import settle_numerics
from pretrain.optim.clip import SkippedStep
from pretrain.phase import Phase, phase_loader, start_phase
from pretrain.resume import Position, Standing
from pretrain.watch.lines import read_lines
from pretrain.watch.metrics import SESSIONS

FOLDER = "nonfinite"
log = logging.getLogger("pretrain")


class NonFinite:
    """Records the skipped steps of a run. Every rank calls every method alike; the first one writes.

    Args:
        out: the run folder.
        checkpoints: its checkpoints; the one before the newest skipped step is kept.
    """

    def __init__(self, out: Path, checkpoints: Checkpoints) -> None:
        self.out, self.checkpoints = out, checkpoints
        self._count, self._path = 0, Path()

    def record(self, step: int, phase: str, skipped: SkippedStep, config: TrainConfig, loader: Loader) -> Path:
        """Write what repeats a skipped step: step (of the run, from 1), terms, images, checkpoint to start from."""
        before = self.checkpoints.before(step)
        self.checkpoints.keep = {before.name} if before else set()
        self._count += 1
        self._path = self.out / FOLDER / f"{PREFIX}{step:08d}.json"
        if collectives.rank() == 0:
            datasets, rows = loader.steps.order.batch(skipped.step)
            record = {
                "step": step,
                "phase": phase,
                "phase_step": skipped.step,
                "terms": list(skipped.terms),
                "ranks": collectives.world_size(),
                "checkpoint": before.name if before else None,
                "datasets": loader.steps.names,
                "images": [[int(dataset), int(row)] for dataset, row in zip(datasets, rows, strict=True)],
                "config": asdict(config),
            }
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f"{self._path.name}.tmp")
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
            temporary.replace(self._path)
        return self._path

    def take(self) -> int:
        """Steps skipped since the last call."""
        count, self._count = self._count, 0
        return count

    def advice(self, found: str, config: TrainConfig, phase: str) -> str:
        """What was found, and how to go on."""
        latest = self.checkpoints.latest()
        own = config.phases.get(phase) or {}
        of_phase = LIKE in own or "base_lr" in (own.get("optim") or {})
        key = f"phases.{phase}.optim.base_lr" if of_phase else "optim.base_lr"
        lower = f"{key}={config.phase(phase).optim.base_lr / 2:g}"
        repeat = f" To see what happened: python -m pretrain.replay {self._path}." if self._path.name else ""
        if latest is None:
            return f"{found} There is no checkpoint: start again with {lower}, or a longer optim.warmup_steps.{repeat}"
        return (
            f"{found} To go on from {latest.name}, give the same command with --allow-changed {key} {lower}; if it "
            f"fails again, the cause is older. {self.checkpoints.without(latest)}{repeat}"
        )


def replay(record: dict[str, Any], run: Path, device: torch.device) -> list[str]:
    """Repeat the step of a record; lines to print.

    Raises:
        ValueError: the checkpoint or the images are not there any more.
    """
    config = merge_config(TrainConfig(), record["config"], "the record")
    parts = record["ranks"] * config.execution.accumulation_steps
    phase_config = config.phase(record["phase"])
    other_noise = phase_config.loss.koleo_group_size * parts > phase_config.global_batch_size
    if other_noise:
        parts = config.execution.accumulation_steps  # neighbours were sought over several micro-batches
    # The micro-batches of the ranks one after another: their images, and so their noise.
    execution = replace(config.execution, parallel="auto", compile=False, accumulation_steps=parts)
    config = replace(config, execution=execution)
    settle_numerics(config.execution.deterministic)
    index = config.phase_names.index(record["phase"])
    latest = None if record["checkpoint"] is None else run / "checkpoints" / record["checkpoint"]
    position = Position()
    if latest is not None:
        meta = read_manifest(latest)["meta"]
        position = Position(**meta["position"])
        if position.phase < index:
            position = position.next_phase()
    if position.phase != index:
        raise ValueError(f"{latest or 'the start'} is not in phase {record['phase']}: its checkpoints are gone.")
    tables = check_run(config, 1, run, position)[index]
    with TemporaryDirectory() as nowhere:
        checkpoints = Checkpoints(Path(nowhere), config.checkpoint)
        phase = start_phase(config, Standing(position, latest), checkpoints, device)
    phase.finite.max_skipped = sys.maxsize
    loader = phase_loader(config, index, position.step, tables)
    lines = [f"from {latest or 'the start'}, {record['phase_step'] - position.step} step(s) before it are repeated"]
    if other_noise:
        lines.append(
            f"KoLeo's groups of {phase_config.loss.koleo_group_size} images were over ranks: all ranks' images are one "
            "micro-batch here, and stochastic depth and RoPE noise are other draws than theirs."
        )
    for batch in loader:
        watched = phase.step(batch, batch.step, diagnose=False)
        if batch.step == record["phase_step"]:
            lines += [f"{name}: {value.item():g}" for name, value in sorted(watched.items())]
            return [*lines, *_images(phase, batch, loader)]
    raise ValueError(f"step {record['phase_step']} is beyond the phase's {config.phase(record['phase']).steps} steps.")


@torch.no_grad()
def _images(phase: Phase, batch: Batch, loader: Loader) -> list[str]:
    """The images whose global crops give features that are not finite."""
    crops = phase.crops(batch)
    datasets, rows = loader.steps.order.batch(batch.step)
    lines = []
    phase.student.eval()
    for role, network in (("student", phase.student), ("teacher", phase.teacher)):
        with phase.wrapped.autocast():
            (features,) = network(lambda plain: plain.backbone([crops.global_crops]))
        good = features.cls.isfinite().all(dim=1).view(crops.num_global, -1).all(dim=0)
        bad = (~good).nonzero().flatten().tolist()
        lines.append(f"{role}: {len(bad)} of {len(good)} images give features that are not finite")
        lines += [f"  {loader.steps.readers[int(datasets[i])].name(int(rows[i]))}" for i in bad]
    return lines


def record_of(run: Path, step: int) -> dict[str, Any]:
    """What `NonFinite.record` would have written of a step of a run, but its terms and images.

    Raises:
        ValueError: no run there, or a step that it has not done.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{run} is no run folder of pretrain.train: it has no {file.name}.")
    config = merge_config(TrainConfig(), yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
    sessions = [line for line in read_lines(run / SESSIONS) if line["step"] < step]
    ends = list(accumulate(config.phase(name).steps for name in config.phase_names))
    index = bisect_left(ends, step)
    if step < 1 or index == len(ends) or not sessions:
        raise ValueError(f"--step {step}: the run has steps from 1 to {ends[-1]}.")
    before = Checkpoints(run / "checkpoints", config.checkpoint).before(step)
    return {
        "phase": config.phase_names[index],
        "phase_step": step - 1 - (ends[index - 1] if index else 0),
        "ranks": sessions[-1]["ranks"],
        "checkpoint": before.name if before else None,
        "config": asdict(config),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 2 for a wrong input."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.replay", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("record", type=Path, help="RUN/nonfinite/step-*.json, or a run folder with --step")
    parser.add_argument("--step", type=int, help="of the run, from 1: any step since its oldest checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        device = collectives.start(asked.device)
        if asked.step is not None:
            print("\n".join(replay(record_of(asked.record, asked.step), asked.record, device)))
            return 0
        if asked.record.is_dir():
            raise ValueError(f"{asked.record} is a folder: name a file in its {FOLDER}/, or a step with --step.")
        try:
            record = json.loads(asked.record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{asked.record} is not a record of a skipped step: {error}") from None
        print("\n".join(replay(record, asked.record.parent.parent, device)))
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    collectives.end_process(main())
