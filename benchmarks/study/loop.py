"""The loop of what learns without this project's trainer: steps, figures, the curve, and going on after a kill."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.study.record import differing
from curation.engine.progress import StageProgress
from pretrain.config import TrainConfig
from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.downstream.evals.baselines import random_like
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.optim.schedules import values_at
from pretrain.stopping import Stopped, StopRequest
from pretrain.watch.evaluation import run_evaluation
from pretrain.watch.lines import read_lines
from pretrain.watch.metrics import EVALUATIONS, Metrics

CHECKPOINT = "learner.pt"
B = TypeVar("B", contravariant=True)
_CPU = torch.device("cpu")


class Learner(Protocol[B]):
    """Networks and an optimizer."""

    def step(self, batch: B, step: int) -> Mapping[str, Tensor | float]:
        """One optimizer step, after `step` others; what there is to watch."""
        ...

    def backbone(self) -> VisionTransformer:
        """What is judged, in eval mode."""
        ...

    def state(self) -> dict[str, Any]:
        """All that a later step depends on: tensors and numbers."""
        ...

    def load(self, state: dict[str, Any]) -> None: ...


class Loop(Generic[B]):
    """All steps of a run in one phase; OUT has metrics and evaluations as the trainer writes them.

    Args:
        config: of one phase (`run.one_phase`): its steps, checkpoints, watching and evaluation.
        out: a folder of its own.

    Raises:
        ValueError: a checkpoint there is of other settings.
    """

    def __init__(self, learner: Learner[B], config: TrainConfig, out: Path, stop: StopRequest) -> None:
        self.learner, self.config, self.out, self.stop = learner, config, out, stop
        out.mkdir(parents=True, exist_ok=True)
        self.step = 0
        if (out / CHECKPOINT).exists():
            saved = torch.load(out / CHECKPOINT, weights_only=True)
            if different := differing(saved["config"], asdict(config)):
                raise ValueError(f"{out} was begun with another {different[0]}: remove it, and run this again.")
            learner.load(saved["learner"])
            self.step = saved["step"]

    def go(self, batches: Callable[[int], Iterable[B]]) -> None:
        """Every step that is left.

        Args:
            batches: the first step -> a batch for it and each later one.

        Raises:
            Stopped: as asked, after a checkpoint.
        """
        config, last = self.config, self.config.steps
        # A run that is over opens nothing: its lines stay as they are.
        if self.step == last and self._is_evaluated():
            return
        self.metrics = Metrics(self.out, config.watch, _CPU, start_step=self.step)
        with closing(self.metrics), StageProgress("learning", last - self.step, "steps") as progress:
            self._evaluate()
            left = iter(batches(self.step))
            while self.step < last:
                with self.metrics.waiting():
                    batch = next(left)
                self.metrics.update(self.learner.step(batch, self.step), config.global_batch_size)
                self.step += 1
                progress.advance(1)
                if self.metrics.is_due(self.step) or self.step == last:
                    seen = self.step * config.global_batch_size
                    rate = values_at(config.optim, self.step - 1, last, config.global_batch_size).lr
                    self.metrics.flush(self.step, {"phase": "pretrain", "images": seen, "lr": rate})
                if self.stop or self.step == last or self.step % config.checkpoint.every_steps == 0:
                    self._save()
                self._evaluate()
                if self.stop and self.step < last:
                    raise Stopped

    def _save(self) -> None:
        saved = {"learner": self.learner.state(), "step": self.step, "config": asdict(self.config)}
        torch.save(saved, self.out / f"{CHECKPOINT}.partial")
        (self.out / f"{CHECKPOINT}.partial").replace(self.out / CHECKPOINT)

    def _is_evaluated(self) -> bool:
        """Whether this step owes no point to the curve."""
        if not self.config.evaluation.is_due(self.step, self.config.steps):
            return True
        return any(line.get("step") == self.step for line in read_lines(self.out / EVALUATIONS))

    def _evaluate(self) -> None:
        """As the trainer does, by the same code."""
        if self._is_evaluated():
            return
        backbone = self.learner.backbone()
        with self.metrics.untimed():
            figures = run_evaluation(
                backbone,
                lambda: random_like(backbone),
                self.config.evaluation,
                self.out,
                self.step,
                IMAGENET_MEAN,
                IMAGENET_STD,
                _CPU,
                lambda: bool(self.stop),
            )
        self.metrics.evaluation(self.step, figures)
