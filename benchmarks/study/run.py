"""One run of an experiment: a variant with a seed, its settings, and what judges it."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.study.description import WORK, Described, Experiment, Variant
from benchmarks.study.record import differing, read_config
from configs.loader import merge_config
from pretrain.checks import check_numbers
from pretrain.config import TrainConfig, load_train_config
from pretrain.downstream.evals.compared import Task
from pretrain.downstream.evals.protocols import PROTOCOLS
from pretrain.downstream.evals.sets import ImageSets, LabelledSet, read_sets

DATA = "$SEEDBED_DATA"
_OF_A_SET = ("train", "val", "train_labels", "val_labels", "max_train_images", "max_val_images")


@dataclass(frozen=True)
class Places:
    """Where images lie and where run folders go; neither is named in a record."""

    data: Path
    work: Path

    def found(self, pattern: str) -> str:
        """A path pattern of a description, as this machine has it; several joined by commas."""
        parts = [part.strip() for part in pattern.split(",")]
        in_work = f"{WORK}/"
        placed = [
            self.work / part.removeprefix(in_work) if part.startswith(in_work) else self.data / part for part in parts
        ]
        return ",".join(map(str, placed))

    def told(self, text: str) -> str:
        """Text as a record may hold it, without this machine's paths."""
        longest_first = sorted(((str(self.data), DATA), (str(self.work), WORK)), key=lambda pair: -len(pair[0]))
        for folder, name in longest_first:
            text = re.sub(rf"{re.escape(folder)}(?![^/,'\"\s])", lambda _, name=name: name, text)
        return text


@dataclass(frozen=True)
class Run:
    """What one process does: `config` is what it learns by, `tasks` what it is judged by."""

    described: Described
    name: str
    """of the variant"""
    seed: int
    places: Places
    config: TrainConfig
    sets: Mapping[str, ImageSets]
    """those of the experiment, with this machine's paths"""
    tasks: Mapping[str, Task]
    """by the names of the evaluations"""

    def __str__(self) -> str:
        return f"{self.described.name}: {self.name}, seed {self.seed}"

    @property
    def variant(self) -> Variant:
        return self.described.experiment.variants[self.name]

    @property
    def folder(self) -> Path:
        """Of checkpoints and all that is not kept."""
        return self.places.work / self.described.name / f"{self.name}-seed{self.seed}"

    @property
    def record(self) -> Path:
        return self.described.records / f"{self.name}-seed{self.seed}"

    @property
    def command(self) -> str:
        return f"python -m benchmarks.experiment {self.described.name} --variant {self.name} --seed {self.seed}"

    def config_text(self) -> str:
        """The settings, as the trainer writes them, without this machine's paths."""
        return self.places.told(yaml.safe_dump(asdict(self.config), sort_keys=False))

    def differing(self) -> list[str]:
        """Settings of the record that are no longer those of the description; those that one of both lacks are left
        out, for the trainer has learned them since or forgotten them."""
        return differing(read_config(self.record), yaml.safe_load(self.config_text()))


def build_run(described: Described, name: str, seed: int, places: Places) -> Run:
    """
    Raises:
        ValueError: a setting that the trainer or a protocol refuses, or a set of a kind that a protocol does not take.
    """
    experiment = described.experiment
    sets = _placed_sets(experiment, places)
    variant = experiment.variants[name]
    images = [places.found(pattern) for pattern in variant.data or experiment.data]
    try:
        overrides = [*experiment.set, *variant.set, f"seed={seed}"]
        config = load_train_config(variant.config or experiment.config, overrides, images)
        config = merge_config(config, {"evaluation": _curve(experiment, sets, config)}, "curve")
        check_numbers(config, world_size=1)
    except ValueError as error:
        raise ValueError(f"variants.{name}: {error}") from None
    return Run(described, name, seed, places, config, sets, _tasks(experiment, sets))


def _placed_sets(experiment: Experiment, places: Places) -> dict[str, ImageSets]:
    def placed(entry: Any) -> Any:
        if not isinstance(entry, dict):  # which is an error that read_sets words
            return entry
        # All text of a set is paths, but its kind.
        is_path = {key: key != "kind" and isinstance(value, str) and bool(value) for key, value in entry.items()}
        return {key: places.found(value) if is_path[key] else value for key, value in entry.items()}

    with TemporaryDirectory() as folder:
        path = Path(folder) / "sets.yaml"
        content = {name: placed(entry) for name, entry in experiment.sets.items()}
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        try:
            return read_sets(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), "sets")) from None


def _curve(experiment: Experiment, sets: Mapping[str, ImageSets], config: TrainConfig) -> dict[str, Any]:
    """The trainer's evaluation settings, which say what is measured while training."""
    curve = experiment.curve
    if not curve.evaluation:
        return {"every_steps": 0}
    judge = experiment.evaluations[curve.evaluation]
    data = sets[judge.set]
    if not isinstance(data, LabelledSet):
        raise ValueError(f"curve.evaluation={curve.evaluation} needs a labelled set, and {judge.set} is none.")
    every = max(curve.every_images // config.phase(config.phase_names[0]).global_batch_size, 1)
    asked: dict[str, Any] = {"every_steps": every, "names": [judge.eval], "sets": ""}
    asked |= {name: getattr(data, name) for name in _OF_A_SET}
    # A set without a size is seen at that of the trainer.
    asked |= {name: value for name in ("px", "resize_px") if (value := getattr(data, name))}
    return asked | (judge.settings if judge.eval == "knn" else {})


def _tasks(experiment: Experiment, sets: Mapping[str, ImageSets]) -> dict[str, Task]:
    found = {}
    for name, asked in experiment.evaluations.items():
        if asked.eval not in PROTOCOLS:
            raise ValueError(f"evaluations.{name}.eval={asked.eval} is none of {', '.join(PROTOCOLS)}.")
        protocol, data = PROTOCOLS[asked.eval], sets[asked.set]
        if not isinstance(data, protocol.takes):
            raise ValueError(
                f"evaluations.{name}: {asked.eval} takes a {protocol.takes.__name__}, and {asked.set} is a "
                f"{type(data).__name__}."
            )
        settings = merge_config(protocol.settings(), asked.settings, f"evaluations.{name}.settings")
        found[name] = Task(asked.eval, asked.set, data, settings)
    return found


def one_phase(config: TrainConfig) -> TrainConfig:
    """The settings of the longest phase, with steps for all images of the run: for what has no phases."""
    phases = [config.phase(name) for name in config.phase_names]
    longest = max(phases, key=lambda phase: phase.steps * phase.global_batch_size)
    return replace(longest, phases={}, steps=images_seen(config) // longest.global_batch_size)


def images_seen(config: TrainConfig, step: int | None = None) -> int:
    """After so many steps of the run, or all of them."""
    seen = 0
    for name in config.phase_names:
        phase = config.phase(name)
        steps = phase.steps if step is None else min(phase.steps, step)
        seen, step = seen + steps * phase.global_batch_size, None if step is None else step - steps
    return seen
