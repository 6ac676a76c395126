"""Every kind of variant: from the settings of a run to the backbone that is judged."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.study.loop import Loop
from benchmarks.study.run import Run, one_phase
from benchmarks.study.supervised import LabelledLoader, Supervised, read_all_labels
from pretrain.config import TrainConfig
from pretrain.downstream.backbone import ImageSettings, load_backbone
from pretrain.downstream.evals.baselines import Pixels, as_they_are, random_like
from pretrain.downstream.evals.compared import Evaluated
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.result import Result
from pretrain.downstream.evals.sets import LabelledSet
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.phase import fresh_network
from pretrain.stopping import Stopped, StopRequest
from pretrain.train import FINISHED, train

TRAINER = "run"
"""the trainer's run folder, in that of the run: it wants one of its own"""


@dataclass(frozen=True)
class Learnt:
    """What is judged, and how it answers by itself where it has learned from labels."""

    evaluated: Evaluated
    own: Callable[[Frozen], Result] | None = None


def learn(run: Run, stop: StopRequest) -> Learnt:
    """Train, or go on where a killed command was.

    Raises:
        Stopped: a signal asked for it; the same command continues.
    """
    return _KINDS[run.variant.kind](run, stop)


def image_of(config: TrainConfig) -> ImageSettings:
    """What a backbone of this run expects: as the trainer describes its teacher."""
    last = config.phase(config.phase_names[-1])
    return ImageSettings(px=max(size.global_px for size in last.crops.all_sizes()))


def _trained(run: Run, stop: StopRequest) -> Learnt:
    out = run.folder / TRAINER
    if train(run.config, out, stop) != FINISHED:
        raise Stopped
    loaded = load_backbone(out / "teacher")
    assert isinstance(loaded.model, VisionTransformer)
    return Learnt(Evaluated(run.name, loaded.model, loaded.image))


def _supervised(run: Run, stop: StopRequest) -> Learnt:
    config, data = one_phase(run.config), run.sets[run.variant.labels]
    if not isinstance(data, LabelledSet):
        raise ValueError(f"variants.{run.name}.labels={run.variant.labels} is no labelled set.")
    loader = LabelledLoader(config, read_all_labels(data))
    learner = Supervised(config, len(loader.classes))
    Loop(learner, config, run.folder / TRAINER, stop).go(loader.batches)
    evaluated = Evaluated(run.name, learner.backbone(), image_of(config))
    return Learnt(evaluated, lambda frozen: learner.accuracy(frozen, data, loader.classes))


def _lightly(run: Run, stop: StopRequest) -> Learnt:
    # Peers are no dependencies: only who asks for one needs it.
    from benchmarks.peers.learner import LightlyLearner

    config = one_phase(run.config)
    learner = LightlyLearner(config, run.variant.kind)
    Loop(learner, config, run.folder / TRAINER, stop).go(learner.batches)
    return Learnt(Evaluated(run.name, learner.backbone(), image_of(config)))


def _untrained(run: Run, stop: StopRequest) -> Learnt:
    last = run.config.phase(run.config.phase_names[-1])
    model = random_like(fresh_network(last).backbone, run.seed)
    return Learnt(Evaluated(run.name, model, image_of(run.config)))


def _pixels(run: Run, stop: StopRequest) -> Learnt:
    return Learnt(Evaluated(run.name, Pixels(), as_they_are(image_of(run.config).px)))


_KINDS: dict[str, Callable[[Run, StopRequest], Learnt]] = {
    "trained": _trained,
    "supervised": _supervised,
    "lightly_dino": _lightly,
    "lightly_dinov2": _lightly,
    "untrained": _untrained,
    "pixels": _pixels,
}
UNLEARNED = ("untrained", "pixels")
