"""Train a backbone on images: torchrun -m pretrain.train --config NAME --data PATH --out RUN [key=value ...]

One process needs no torchrun: python -m pretrain.train ... Stop it at any moment, the same command continues, with the
same losses on the same ranks (to the last bit on a processor; on a GPU with execution.deterministic=true). Ctrl-C,
SIGTERM, SIGUSR1 and SIGUSR2 end it after a checkpoint (exit status 75); a second Ctrl-C ends it at once.

A run folder holds checkpoints/step-*, metrics.jsonl, evaluation/, config.yaml; in the end teacher/ and report.html.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # While torch is imported there is nothing to save: Ctrl-C ends the process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import gc
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from configs.loader import config_names
from configs.messages import named_folder, sentence
from pretrain import plan
from pretrain.checkpoint import Checkpoints, read_manifest, stored_state, write_teacher
from pretrain.checks import check_numbers, check_run, idle_settings
from pretrain.config import GROUP, TrainConfig, load_train_config, total_steps
from pretrain.data.loader import Loader
from pretrain.data.prefetch import transferred
from pretrain.data.sources import DATA_HELP
from pretrain.distributed import collectives
from pretrain.distributed.fsdp import choose_mode, plain_module
from pretrain.distributed.tensor_files import DamagedFile
from pretrain.evaluating import Answering, evaluate_teacher, saved_teacher
from pretrain.failures import OUT_OF_MEMORY, failure, quiet_threads
from pretrain.garbage import collecting_by_steps
from pretrain.machine import check_shared_memory
from pretrain.machine import notes as machine_notes
from pretrain.network_weights import describe_teacher
from pretrain.numerics import settle_numerics
from pretrain.phase import Phase, phase_loader, start_phase
from pretrain.replay import NonFinite
from pretrain.resume import check_allowed, compare_images, find_standing, write_changes
from pretrain.run_folder import check_run_folder, hold_run_folder, write_config
from pretrain.stopping import SharedStop, Stopped, StopRequest, stop_signals
from pretrain.watch.alarms import Alarm, AlarmWatch
from pretrain.watch.flops import peak_flops
from pretrain.watch.lines import append_line, drop_after, read_lines
from pretrain.watch.metrics import EVALUATIONS, Metrics
from pretrain.watch.progress import TrainProgress
from pretrain.watch.report.page import write_report
from pretrain.weights import TEACHER_CONFIG

FINISHED, FAILED, WRONG_INPUT, NOT_FINITE, STOPPED = 0, 1, 2, 3, 75
log = logging.getLogger("pretrain")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0: finished, 75: stopped as asked, can continue; 2: a wrong input; 3: a value was not finite; 1: the
    machine failed it (disk, memory, a worker, another rank), and the same command continues."""
    asked = _parser().parse_intermixed_args(arguments)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s", stream=sys.stderr)
    with stop_signals() as stop:
        try:
            with stop.leaving_waits("RANK" not in os.environ):
                config = load_train_config(asked.config, asked.overrides, asked.data)
                check_allowed(config, asked.allow_changed)
                for line in idle_settings(config):
                    log.info(line)
                if asked.dry_run:
                    print(plan.describe(config, int(os.environ.get("WORLD_SIZE", "1")), asked.out))
                    return FINISHED
            if asked.out is None:
                raise ValueError("--out RUN is missing: the folder for checkpoints, metrics and the trained teacher.")
            if asked.out.exists() and not asked.out.is_dir():
                raise ValueError(f"--out {asked.out} is a file; name a folder, or one that does not exist yet.")
            with quiet_threads():
                return train(config, asked.out, stop, asked.allow_changed)
        except Stopped:
            print("stopped as asked before a step was done; the same command continues.", file=sys.stderr)
            return STOPPED
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


def train(config: TrainConfig, out: Path, stop: StopRequest, allowed: Sequence[str] = ()) -> int:
    """Run every phase from where the run folder stands; see `main` for what is returned.

    Args:
        allowed: settings that may differ from those of the last checkpoint (`pretrain.resume`).

    Raises:
        ValueError: settings, shards or checkpoints that do not fit, before any time is lost.
        FloatingPointError: too many steps in a row were not finite; the message names the step and the term.
    """
    settle_numerics(config.execution.deterministic)
    device = collectives.start(config.execution.device)
    try:
        if config.execution.threads and device.type == "cpu":
            torch.set_num_threads(config.execution.threads)
        check_numbers(config, collectives.world_size())
        choose_mode(config.execution.parallel, 0)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", collectives.world_size()))
        collectives.from_first_of_machine(lambda: check_shared_memory(config, collectives.world_size(), ranks_here))
        for line in machine_notes(config, collectives.world_size(), ranks_here):
            log.warning(line)
        # A rank that leaves alone would leave the others waiting: with several, the first step is done before stopping.
        is_alone = collectives.world_size() == 1
        with stop.leaving_waits(is_alone):
            run = Run(config, out, device, stop, allowed)
        # Only now may anything be written or cleaned: a command that is refused disturbs no run that goes on there.
        with hold_run_folder(out, on_lost=lambda: stop.received.append(signal.SIGTERM)) as check_lock:
            with stop.leaving_waits(is_alone):
                run.open(check_lock)
            return run.go()
    finally:
        collectives.stop()


class Run:
    """One process's part of a training run: the phases in order, and what watches them.

    Making one only looks at the shards and the run folder; `open` then writes to the folder, which must be locked.
    """

    def __init__(
        self, config: TrainConfig, out: Path, device: torch.device, stop: StopRequest, allowed: Sequence[str] = ()
    ) -> None:
        self.config, self.out, self.device, self.stop, self.allowed = config, out, device, stop, allowed
        self.phases = {name: config.phase(name) for name in config.phase_names}
        self.is_first, self.is_alone = collectives.rank() == 0, collectives.world_size() == 1
        # What is wrong with the shards or the run folder is found before a model is built.
        collectives.from_rank_zero(lambda: check_run_folder(out))
        self.checkpoints = Checkpoints(out / "checkpoints", config.checkpoint)
        self._look()

    def _look(self) -> None:
        """See where the run stands, and that everything fits."""
        standing = find_standing(self.config, self.checkpoints, self.allowed)
        self.position = standing.position
        self.tables = check_run(self.config, collectives.world_size(), self.out, self.position)
        self.loaders = {index: self._loader(index) for index in range(self.position.phase, len(self.phases))}
        self.standing = compare_images(self.config, standing, self.tables, self.allowed)

    def open(self, check_lock: Callable[[], None]) -> None:
        """Begin to write to the run folder, whose lock is held as long as `check_lock` does not raise."""
        config, out, device = self.config, self.out, self.device
        self.check_lock = check_lock
        if self.checkpoints.latest() != self.standing.latest:  # the run that had the lock before has gone on since
            self._look()
        self.checkpoints.clean()
        self.nonfinite = NonFinite(out, self.checkpoints)
        if self.is_first:
            drop_after(out / "skipped.jsonl", self.position.global_step)
            drop_after(out / "odd.jsonl", self.position.global_step)
            write_config(out, yaml.safe_dump(asdict(config), sort_keys=False))
            if self.position.phase < len(self.phases):
                write_changes(out, self.standing)
        # A processor has no data sheet, and what it reaches now depends on who else uses it: the rate stands alone.
        peak = config.watch.peak_tflops * 1e12 or peak_flops(device)
        self.metrics = Metrics(
            out if self.is_first else None,
            config.watch,
            device,
            collectives.mean_over_ranks,
            start_step=self.position.global_step,
            peak_flops=peak * collectives.world_size(),
            run_config=asdict(config),
        )
        self.progress = TrainProgress(total_steps(config), self.position.global_step, shown=self.is_first)

    def go(self) -> int:
        """Returns FINISHED or STOPPED."""
        with self.progress:
            self._evaluate_missed()
            while self.position.phase < len(self.phases):
                with self.stop.leaving_waits(self.is_alone):
                    phase = self._start_phase()
                with collecting_by_steps() as after_step:
                    is_over = self._run_phase(phase, after_step)
                if not is_over:
                    return STOPPED
                del phase
                if self.position.phase + 1 < len(self.phases):
                    gc.collect()  # its networks, before those of the next are made
                self.position = self.position.next_phase()
            self._finish()
        return FINISHED

    def _start_phase(self) -> Phase:
        name = self.config.phase_names[self.position.phase]
        self.standing = replace(self.standing, position=self.position, latest=self.checkpoints.latest())
        log.info("phase %s: step %d of %d", name, self.position.step, self.phases[name].steps)
        collectives.set_timeout(collectives.START_TIMEOUT)  # it may compile, and read weights from a slow disk
        log.info("phase %s draws from %s", name, ", ".join(self.phases[name].data.datasets))
        return start_phase(self.config, self.standing, self.checkpoints, self.device, self.allowed)

    def _run_phase(self, phase: Phase, after_step: Callable[[int], None]) -> bool:
        """Every step left of a phase; whether it got to the end, for it may be asked to stop."""
        shared_stop = SharedStop(self.stop)
        config, name = phase.config, list(self.phases)[self.position.phase]
        heads = {"dino": config.heads.dino.num_prototypes, "ibot": config.heads.ibot.num_prototypes}
        started = self.position.global_step - self.position.step
        phase.finite.first = started + 1
        alarms = AlarmWatch(heads if config.has_prototypes else {}, started, config.optim.warmup_steps, config.steps)
        loader = self._loader(self.position.phase, self.position.step)
        teacher = Answering(phase.teacher, phase.wrapped)
        if self.position.global_step == 0 and self._is_evaluation_owed(config):
            self._evaluate(config, teacher)
        batches, first = iter(loader), self.position.global_step
        if config.execution.accumulation_steps == 1:
            batches = transferred(batches, self.device)
        while self.position.step < config.steps:
            try:
                with self.metrics.waiting(), self.stop.leaving_waits(self.is_alone):
                    batch = next(batches)
            except Stopped:
                return self._stop_before_a_step(phase)
            due = self.metrics.is_due(self.position.global_step + 1) or self.position.step + 1 == config.steps
            with self._not_finite(phase, loader):
                watched = phase.step(batch, self.position.step, diagnose=due)
                if due:
                    phase.finite.check(wait=True)
            values = phase.values(self.position.step)
            self.position = self.position.next_step()
            step = self.position.global_step
            watched["skipped"] = float(len(batch.skipped))
            watched["odd"] = float(len(batch.odd))
            self.metrics.update(watched, config.global_batch_size, phase.flops(batch.sizes) * config.global_batch_size)
            self.progress.skipped(image.reason for image in batch.skipped)
            for image in batch.skipped:
                append_line(self.out / "skipped.jsonl", {"step": step, **asdict(image)})
            for image in batch.odd:
                if not (self.out / "odd.jsonl").exists():
                    self.progress.message(f"{image.dataset}: {image.image} is {image.reason}; all such: odd.jsonl")
                append_line(self.out / "odd.jsonl", {"step": step, **asdict(image)})
            if due:
                facts = {"phase": name, "images": step * config.global_batch_size, **asdict(values)}
                line = self.metrics.flush(step, facts | {"skipped_steps": self.nonfinite.take()})
                self.progress.metrics(line)
                for alarm in alarms.look(line):
                    self._alarm(alarm)
            self.progress.advance(step, name)
            if step == first + 1:
                collectives.set_timeout(collectives.STEP_TIMEOUT)
            after_step(step)
            saves = step % self.config.checkpoint.every_steps == 0 or self.position.step == config.steps
            stop = shared_stop.after(step, now=saves)
            if stop:
                self.check_lock()  # who lost it must not save there
            if stop or saves:
                with self._not_finite(phase, loader):
                    self._save(phase, always=stop)  # first: no evaluation may cost it
            if config.evaluation.is_due(step, total_steps(self.config)):
                self._evaluate(config, teacher, may_leave=self.position.step < config.steps)
            if stop and self.position.step < config.steps:
                return self._stopped()
        self.checkpoints.wait()
        return True

    def _stop_before_a_step(self, phase: Phase) -> bool:
        """Asked to stop while waiting for images: everything done so far is saved."""
        self.check_lock()
        if self.position.step:
            self._save(phase, always=True)
        return self._stopped()

    def _stopped(self) -> bool:
        self.checkpoints.wait()
        self.progress.message(f"stopped as asked at step {self.position.global_step}; the same command continues.")
        return False

    @contextmanager
    def _not_finite(self, phase: Phase, loader: Loader) -> Iterator[None]:
        """Around what finds steps with values that are not finite: they are recorded, said, and may end the run."""
        offset, name = self.position.global_step - self.position.step, self.config.phase_names[phase.index]
        try:
            yield
        except FloatingPointError as error:
            self._record_skipped(phase, loader, offset)
            raise FloatingPointError(self.nonfinite.advice(str(error), self.config, name)) from None
        self._record_skipped(phase, loader, offset)

    def _record_skipped(self, phase: Phase, loader: Loader, offset: int) -> None:
        for skipped in phase.finite.take():
            name, step = self.config.phase_names[phase.index], offset + skipped.step + 1
            path = self.nonfinite.record(step, name, skipped, self.config, loader)
            self._alarm(
                Alarm(
                    "skipped_step",
                    f"Step {step} was skipped, {', '.join(skipped.terms)} not being finite: nothing was learned from "
                    f"it. python -m pretrain.replay {path} repeats it.",
                )
            )

    def _alarm(self, alarm: Alarm) -> None:
        step = self.position.global_step
        self.metrics.alarm(step, alarm.name, alarm.message)
        self.progress.message(f"alarm at step {step}: {alarm.message}")

    def _loader(self, phase: int, start_step: int = 0) -> Loader:
        return phase_loader(self.config, phase, start_step, self.tables[phase])

    def _save(self, phase: Phase, always: bool = False) -> None:
        """A checkpoint; none of weights that are not finite, nor (unless `always`) when the last step was skipped."""
        phase.finite.check(wait=True)
        if phase.finite.in_a_row and not always and self.position.step < phase.config.steps:
            return
        if not phase.has_finite_weights():
            raise FloatingPointError(
                f"the weights are not finite after step {self.position.global_step}, so no checkpoint of them was "
                "written."
            )
        name = list(self.phases)[self.position.phase]
        now = {key: table.fingerprint() for key, table in self.tables[self.position.phase].items()}
        meta = {
            "position": asdict(self.position),
            "phase": name,
            "config": asdict(self.config),
            "data": {**self.standing.images, name: now},
            "distilled": phase.distilled,
            "changes": list(self.standing.changes),
            "teacher": self._description(phase),
        }
        self.standing = replace(self.standing, images=meta["data"])
        self.checkpoints.save(phase.state(), self.position.global_step, meta)

    def _description(self, phase: Phase) -> dict:
        name = list(self.phases)[self.position.phase]
        offset = plain_module(phase.teacher).get_submodule("backbone").position_offset
        return describe_teacher(phase.config, {"step": self.position.global_step, "phase": name}, float(offset))

    def _evaluate_missed(self) -> None:
        """The evaluation that a run was killed in, or stopped instead of, after its checkpoint."""
        latest = self.checkpoints.latest()
        if latest is not None:
            config = self.phases[read_manifest(latest)["meta"]["phase"]]
            if self._is_evaluation_owed(config):
                self._evaluate(config, saved_teacher(config, latest, self.device))

    def _is_evaluation_owed(self, config: TrainConfig) -> bool:
        step = self.position.global_step
        if not config.evaluation.is_due(step, total_steps(self.config)):
            return False
        lines = collectives.from_rank_zero(lambda: read_lines(self.out / EVALUATIONS))
        return all(line.get("step") != step for line in lines)

    def _evaluate(self, config: TrainConfig, teacher: Answering, may_leave: bool = True) -> None:
        """k-NN and pictures of the teacher as it lies, the images shared out over the ranks.

        It changes nothing in the training, so once that goes on, a failure is written down and no more. A stop signal
        ends it where it `may_leave`, and the run evaluates when it goes on.
        """
        step, figures, failed = self.position.global_step, {}, ""
        try:
            with self.metrics.untimed(), self.stop.leaving_waits(may_leave and self.is_alone):
                figures = evaluate_teacher(teacher, config, self.out, step, lambda: may_leave and bool(self.stop))
        except Stopped:
            return
        except Exception as error:
            if step == 0 or (isinstance(error, RuntimeError) and collectives.lost_rank(error)):
                raise
            log.debug("evaluation at step %d", step, exc_info=True)
            failed = failure(error) or f"{type(error).__name__}: {error}"
            if isinstance(error, OUT_OF_MEMORY):
                failed = "memory has run out: lower evaluation.batch_size."
        if failed:
            self.metrics.evaluation(step, {"failed": failed})
            self._alarm(Alarm("evaluation_failed", f"the evaluation failed, and training goes on: {failed}"))
        else:
            self.metrics.evaluation(step, figures)
            self.progress.evaluation(figures)

    def _finish(self) -> None:
        """The teacher's own folder and the report, from the last checkpoint: a run killed just after it lacks them."""
        self.metrics.close()
        last, teacher, report = self.checkpoints.latest(), self.out / "teacher", self.out / "report.html"
        assert last is not None, "every phase ends with a checkpoint"
        if not self.is_first:
            return
        description = read_manifest(last)["meta"]["teacher"]
        if report.exists() and _described_step(teacher) == description["step"]:
            last_phase = list(self.config.phases)[-1:]
            steps = f"phases.{last_phase[0]}.steps" if last_phase else "steps"
            self.progress.message(
                f"this run is finished, {self.position.global_step:,} steps: its teacher is {teacher}, its report "
                f"{report}. For more steps: --allow-changed {steps} {steps}=N."
            )
            return
        try:
            write_teacher(teacher, stored_state(last), description)
        except DamagedFile as error:
            raise ValueError(f"{error} {self.checkpoints.without(last)}") from None
        write_report(self.out)
        self.progress.message(f"the teacher: {teacher}; the report: {report}")


def _described_step(teacher: Path) -> int | None:
    """The step of the teacher that a folder holds."""
    path = teacher / TEACHER_CONFIG
    return json.loads(path.read_text(encoding="utf-8")).get("step") if path.exists() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pretrain.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", required=True, help=f"a YAML file, or one of {', '.join(config_names(GROUP))}")
    parser.add_argument("--data", "--shards", dest="data", action="append", default=[], help=DATA_HELP)
    parser.add_argument("--out", type=named_folder, help="the run folder")
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting or section that may differ from what RUN was trained with so far, such as optim.base_lr, steps "
        "or data; recorded in RUN/changes.jsonl; repeatable",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example steps=1000 optim.base_lr=0.002")
    return parser


if __name__ == "__main__":
    collectives.end_process(main())
