"""Train a backbone on shards: torchrun -m pretrain.train --config NAME --shards PATH --out RUN [key=value ...]

One process needs no torchrun: python -m pretrain.train ... Stop it at any moment, the same command continues, with the
same losses to the last bit on the same ranks. SIGTERM, SIGUSR1 and SIGUSR2 end it after a checkpoint (exit status 75).

A run folder holds checkpoints/step-*, metrics.jsonl, evaluation/, config.yaml; in the end teacher/ and report.html.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import yaml
from torch import nn

from configs.loader import config_names
from configs.messages import named_folder, os_sentence, sentence
from pretrain import plan
from pretrain.checkpoint import Checkpoints, NotWritten, read_manifest, teacher_state, write_teacher
from pretrain.config import GROUP, TrainConfig, load_train_config, total_steps
from pretrain.data.loader import Loader, build_loader, read_tables, worker_failure
from pretrain.data.photometric import IMAGENET_MEAN, IMAGENET_STD
from pretrain.distributed import collectives
from pretrain.distributed.fsdp import full_tensors, plain_module
from pretrain.phase import Phase, fresh_network, start_phase, start_position
from pretrain.watch.alarms import AlarmWatch
from pretrain.watch.evaluation import check_evaluation, run_evaluation
from pretrain.watch.flops import measured_peak_flops, peak_flops
from pretrain.watch.lines import append_line, drop_after, read_lines
from pretrain.watch.metrics import EVALUATIONS, Metrics
from pretrain.watch.progress import TrainProgress
from pretrain.watch.report.page import write_report
from pretrain.weights import TEACHER_CONFIG, describe_teacher, load_network

FINISHED, FAILED, WRONG_INPUT, NOT_FINITE, STOPPED = 0, 1, 2, 3, 75
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")
"""how torch says it on a processor, in a plain RuntimeError"""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
log = logging.getLogger("pretrain")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0: finished, 75: stopped as asked, can continue; 2: a wrong input; 3: a value was not finite; 1: the
    machine failed it (disk, memory, a worker, another rank), and the same command continues."""
    asked = _parser().parse_intermixed_args(arguments)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        config = load_train_config(asked.config, asked.overrides, asked.shards)
        if asked.dry_run:
            print(plan.describe(config, int(os.environ.get("WORLD_SIZE", "1"))))
            return FINISHED
        if asked.out is None:
            raise ValueError("--out RUN is missing: the folder for checkpoints, metrics and the trained teacher.")
        if asked.out.exists() and not asked.out.is_dir():
            raise ValueError(f"--out {asked.out} is a file; name a folder, or one that does not exist yet.")
        with quiet_threads():
            return train(config, asked.out)
    except ValueError as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return WRONG_INPUT
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_FINITE
    except (OSError, RuntimeError, MemoryError) as error:
        if not (said := failure(error)):
            raise
        print(f"error: {said}", file=sys.stderr)
        return FAILED


def failure(error: BaseException) -> str:
    """One sentence for what the machine or the user's input did to a run; empty for a mistake of ours."""
    if isinstance(error, OSError):
        return os_sentence(error)
    if isinstance(error, OUT_OF_MEMORY) or any(text in str(error) for text in _NO_MEMORY):
        return (
            "memory has run out: raise execution.accumulation_steps, set execution.activation_checkpointing=true, or "
            f"lower global_batch_size. ({str(error).splitlines()[0] if str(error) else 'no more is known'})"
        )
    if isinstance(error, NotWritten | ValueError):
        return sentence(error)
    if isinstance(error, RuntimeError):
        return worker_failure(error) or collectives.lost_rank(error)
    return ""


def train(config: TrainConfig, out: Path) -> int:
    """Run every phase from where the run folder stands; see `main` for what is returned.

    Raises:
        ValueError: settings, shards or checkpoints that do not fit, before any time is lost.
        FloatingPointError: a value was not finite; the message names the step and the term.
    """
    device = collectives.start(config.execution.device)
    try:
        if config.execution.threads and device.type == "cpu":
            torch.set_num_threads(config.execution.threads)
        config.check(collectives.world_size())
        with stop_signals() as asked_to_stop:
            return Run(config, out, device, asked_to_stop).go()
    finally:
        collectives.stop()


class Run:
    """One process's part of a training run: the phases in order, and what watches them."""

    def __init__(self, config: TrainConfig, out: Path, device: torch.device, asked_to_stop: list[int]) -> None:
        self.config, self.out, self.device, self.asked_to_stop = config, out, device, asked_to_stop
        self.phases = {name: config.phase(name) for name in config.phase_names}
        self.is_first = collectives.rank() == 0
        # What is wrong with the shards or the run folder is found before a model is built.
        self.tables = read_tables(config.data)
        self.loaders = [self._loader(index) for index in range(len(self.phases))]
        self.checkpoints = Checkpoints(out / "checkpoints", config.checkpoint)
        self.position = start_position(config, self.loaders[0].fingerprints(), self.checkpoints)
        if self.position.global_step == 0:  # later a set that went missing costs its figures, and no more
            collectives.from_rank_zero(partial(check_evaluation, config.evaluation))
        if self.is_first:
            out.mkdir(parents=True, exist_ok=True)
            drop_after(out / "skipped.jsonl", self.position.global_step)
            (out / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        self.peak = config.watch.peak_tflops * 1e12 or peak_flops(device)
        if not self.peak:  # a CPU: what a matrix product reaches here, now
            self.peak = measured_peak_flops(device, getattr(torch, config.precision))
        self.metrics = Metrics(
            out if self.is_first else None,
            config.watch,
            device,
            collectives.mean_over_ranks,
            start_step=self.position.global_step,
            peak_flops=self.peak * collectives.world_size(),
            run_config=asdict(config),
        )
        self.progress = TrainProgress(total_steps(config), self.position.global_step, shown=self.is_first)

    def go(self) -> int:
        with self.progress:
            self._evaluate_missed()
            while self.position.phase < len(self.phases):
                phase = start_phase(self.config, self.position, self.checkpoints, self.device)
                if self.position.global_step == 0:
                    self._evaluate(phase.config, phase.teacher)
                if not self._run_phase(phase):
                    return STOPPED
                self.position = self.position.next_phase()
            self._finish()
        return FINISHED

    def _run_phase(self, phase: Phase) -> bool:
        """Every step left of a phase; whether it got to the end, for it may be asked to stop."""
        config, name = phase.config, list(self.phases)[self.position.phase]
        log.info("phase %s: step %d of %d", name, self.position.step, config.steps)
        heads = {"dino": config.heads.dino.num_prototypes, "ibot": config.heads.ibot.num_prototypes}
        started = self.position.global_step - self.position.step
        alarms = AlarmWatch(heads, started, config.optim.warmup_steps, config.steps)
        batches = iter(self._loader(self.position.phase, self.position.step))
        while self.position.step < config.steps:
            with self.metrics.waiting():
                batch = next(batches)
            due = self.metrics.is_due(self.position.global_step + 1) or self.position.step + 1 == config.steps
            watched = phase.step(batch, self.position.step, diagnose=due)
            values = phase.values(self.position.step)
            self.position = self.position.next_step()
            step = self.position.global_step
            watched["skipped"] = float(len(batch.skipped))
            self.metrics.update(watched, config.global_batch_size, phase.flops(batch.sizes) * config.global_batch_size)
            self.progress.skipped(image.reason for image in batch.skipped)
            for image in batch.skipped:
                append_line(self.out / "skipped.jsonl", {"step": step, **asdict(image)})
            if due:
                facts = {"phase": name, "images": step * config.global_batch_size, **asdict(values)}
                line = self.metrics.flush(step, facts)
                self.progress.metrics(line)
                for alarm in alarms.look(line):
                    self.metrics.alarm(step, alarm.name, alarm.message)
                    self.progress.message(f"alarm at step {step}: {alarm.message}")
            self.progress.advance(step, name)
            stop = collectives.any_over_ranks(bool(self.asked_to_stop))
            if stop or step % self.config.checkpoint.every_steps == 0 or self.position.step == config.steps:
                self._save(phase)  # first: no evaluation may cost it
            if self.config.evaluation.is_due(step, total_steps(self.config)):
                self._evaluate(phase.config, phase.teacher)
            if stop and self.position.step < config.steps:
                self.checkpoints.wait()
                self.progress.message(f"stopped as asked at step {step}; the same command continues.")
                return False
        self.checkpoints.wait()
        return True

    def _loader(self, phase: int, start_step: int = 0) -> Loader:
        config = list(self.phases.values())[phase]
        return build_loader(
            config.data,
            config.crops,
            config.masks,
            patch_size=config.patch_size,
            seed=config.seed,
            phase=phase,
            start_step=start_step,
            num_steps=config.steps - start_step,
            global_batch_size=config.global_batch_size,
            rank=collectives.rank(),
            world_size=collectives.world_size(),
            execution=config.execution.loader,
            tables=self.tables,
        )

    def _save(self, phase: Phase) -> None:
        phase.finite.check(wait=True)
        meta = {
            "position": asdict(self.position),
            "phase": list(self.phases)[self.position.phase],
            "config": asdict(self.config),
            "data": self.loaders[0].fingerprints(),
            "teacher": self._description(phase),
        }
        self.checkpoints.save(phase.state(), self.position.global_step, meta)

    def _description(self, phase: Phase) -> dict:
        name = list(self.phases)[self.position.phase]
        offset = plain_module(phase.teacher).get_submodule("backbone").position_offset
        return describe_teacher(phase.config, {"step": self.position.global_step, "phase": name}, float(offset))

    def _evaluate_missed(self) -> None:
        """The evaluation that a run was killed in, after its checkpoint."""
        step, latest = self.position.global_step, self.checkpoints.latest()
        lines = collectives.from_rank_zero(lambda: read_lines(self.out / EVALUATIONS))
        missed = self.config.evaluation.is_due(step, total_steps(self.config)) and step not in {
            line["step"] for line in lines
        }
        if latest is not None and missed:
            config = self.phases[read_manifest(latest)["meta"]["phase"]]
            network = fresh_network(config)
            load_network(network, latest, keep_offset=config.model.position_offset is not None)
            self._evaluate(config, network)

    def _evaluate(self, config: TrainConfig, network: nn.Module) -> None:
        """k-NN and pictures of the teacher as it is, on the first rank; the others wait.

        It changes nothing in the training, so once that goes on, a failure is written down and no more.
        """
        if not self.config.evaluation.every_steps:
            return
        with self.metrics.untimed():
            teacher = fresh_network(config)
            teacher.load_state_dict(dict(full_tensors(network)))
            teacher.backbone.position_offset = plain_module(network).get_submodule("backbone").position_offset
            step, backbone = self.position.global_step, teacher.backbone.eval().to(self.device)

            def evaluate() -> dict[str, float] | str:
                try:
                    return run_evaluation(backbone, self.config.evaluation, self.out, step, IMAGENET_MEAN, IMAGENET_STD)
                except Exception as error:
                    if step == 0:
                        raise
                    log.debug("evaluation at step %d", step, exc_info=True)
                    if isinstance(error, OUT_OF_MEMORY):
                        return "memory has run out: lower evaluation.batch_size."
                    return failure(error) or f"{type(error).__name__}: {error}"

            figures = collectives.from_rank_zero(evaluate)
        if isinstance(figures, str):
            message = f"the evaluation failed, and training goes on: {figures}"
            self.metrics.evaluation(step, {"failed": figures})
            self.metrics.alarm(step, "evaluation_failed", message)
            self.progress.message(f"alarm at step {step}: {message}")
        else:
            self.metrics.evaluation(step, figures)
            self.progress.evaluation(figures)

    def _finish(self) -> None:
        """The teacher's own folder and the report, from the last checkpoint: a run killed just after it lacks them."""
        self.metrics.close()
        last, teacher, report = self.checkpoints.latest(), self.out / "teacher", self.out / "report.html"
        assert last is not None, "every phase ends with a checkpoint"
        if self.is_first and not (report.exists() and (teacher / TEACHER_CONFIG).exists()):
            write_teacher(teacher, teacher_state(last), read_manifest(last)["meta"]["teacher"])
            write_report(self.out)
            self.progress.message(f"the teacher: {teacher}; the report: {report}")


@contextmanager
def quiet_threads() -> Iterator[None]:
    """No traceback for an OSError in a thread of a library (TensorBoard's writer, torch's sharing of memory).

    What it means reaches the training itself: the next write, or the next batch, fails.
    """
    former = threading.excepthook

    def hook(met: threading.ExceptHookArgs) -> None:
        if not issubclass(met.exc_type, OSError | EOFError):
            former(met)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = former


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills with the signals that ask this process to save and end."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    former = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pretrain.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, help=f"a YAML file, or one of {', '.join(config_names(GROUP))}")
    parser.add_argument(
        "--shards", action="append", default=[], help="tars, or a folder that curation wrote; repeatable"
    )
    parser.add_argument("--out", type=named_folder, help="the run folder")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=1000 optim.base_lr=0.002")
    return parser


if __name__ == "__main__":
    sys.exit(main())
