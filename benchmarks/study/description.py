"""benchmarks/experiments/NAME.yaml: what is compared, on which images, by which figures."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.loader import merge_config, read_yaml
from configs.ranges import check_choice, check_ranges

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
KINDS = ("trained", "supervised", "lightly_dino", "lightly_dinov2", "untrained", "pixels")
WITHOUT_SEED = ("pixels",)
"""kinds that nothing is drawn for: one run stands for every seed"""
WORK = "$WORK"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table."""

    kind: str = "trained"
    """trained (this project's trainer), supervised (the same backbone, with labels), lightly_dino, lightly_dinov2
    (lightly's examples with the same backbone), untrained, pixels"""
    set: list[str] = field(default_factory=list)
    """key=value settings of the trainer, on top of the experiment's"""
    config: str = ""
    """another base config; empty: the experiment's"""
    data: list[str] = field(default_factory=list)
    """other images; empty: the experiment's"""
    labels: str = ""
    """of supervised: the labelled set whose `train` has the labels, and whose `val` it classifies"""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        if (self.kind == "supervised") != bool(self.labels):
            raise ValueError(
                f"kind={self.kind} with labels={self.labels!r}: supervised needs a set there, others have none."
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One figure of every variant."""

    eval: str = "knn"
    """a protocol of pretrain.downstream.evals"""
    set: str = ""
    """a name among the experiment's sets"""
    settings: dict[str, Any] = field(default_factory=dict)
    """of the protocol"""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An evaluation that is also made while training."""

    evaluation: str = ""
    """a name among the experiment's evaluations, of a labelled set; empty: no curve"""
    every_images: int = 0
    """images seen between two points; also at the first and the last step"""

    def __post_init__(self) -> None:
        check_ranges("curve", self, every_images="[0, inf)")
        if bool(self.evaluation) != bool(self.every_images):
            raise ValueError("curve needs both evaluation and every_images, or neither.")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a table says in words below it, or says that it is not shown."""

    better: str = ""
    worse: str = ""
    evaluation: str = ""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A curve that others report, for a column beside ours."""

    source: str = ""
    points: dict[int, float] = field(default_factory=dict)
    """images seen -> share, from 0 to 1"""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Variants that differ in what is asked, trained on the same number of images, and judged alike."""

    question: str = ""
    """one line"""
    config: str = ""
    """a name of configs/pretrain, or a path"""
    set: list[str] = field(default_factory=list)
    """key=value settings of the trainer, of every variant"""
    data: list[str] = field(default_factory=list)
    """images to train on, as `--data` takes them: relative to the folder of data, or to that of work: $WORK/..."""
    sets: dict[str, Any] = field(default_factory=dict)
    """as in pretrain/downstream/evals/sets.py, paths relative as those of `data`"""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """the first is the one that a table without options shows"""
    curve: Curve = field(default_factory=Curve)
    reference: str = ""
    """the variant that a table shows differences to"""
    variants: dict[str, Variant] = field(default_factory=dict)
    """in the order of the table's rows"""
    claims: list[Claim] = field(default_factory=list)
    published: dict[str, Published] = field(default_factory=dict)
    """curves of others, by the heading of their column"""


@dataclass(frozen=True)
class Described:
    """An experiment by its name, and where its records go."""

    name: str
    experiment: Experiment
    path: Path

    @property
    def records(self) -> Path:
        """The folder beside that of the description: benchmarks/records/NAME."""
        return self.path.parent.parent / "records" / self.name

    def seeds_of(self, variant: str, seeds: list[int]) -> list[int]:
        """Those that a variant is run with: one, where nothing is drawn."""
        return [0] if self.experiment.variants[variant].kind in WITHOUT_SEED else seeds


def read_experiment(name_or_path: str, folder: Path = EXPERIMENTS) -> Described:
    """
    Args:
        name_or_path: NAME of folder/NAME.yaml, or a path to a YAML file.

    Raises:
        ValueError: no such experiment, an unknown key, or a name that stands nowhere.
    """
    path = folder / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if path.suffix != ".yaml" or not path.is_file():
        known = ", ".join(sorted(one.stem for one in folder.glob("*.yaml"))) or "none"
        raise ValueError(f"no experiment named {name_or_path!r}: neither a YAML file nor one of {known}.")
    experiment = merge_config(Experiment(), read_yaml(path), str(path))
    try:
        _check(experiment)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Described(path.stem, experiment, path.resolve())


def _check(of: Experiment) -> None:
    if missing := [key for key in ("question", "config", "data", "evaluations", "variants") if not getattr(of, key)]:
        raise ValueError(f"{missing[0]} is missing.")
    asked = [("reference", of.reference, of.variants), ("curve.evaluation", of.curve.evaluation, of.evaluations)]
    asked += [(f"evaluations.{name}.set", one.set, of.sets) for name, one in of.evaluations.items()]
    asked += [(f"variants.{name}.labels", one.labels, of.sets) for name, one in of.variants.items()]
    optional = {"reference", "curve.evaluation", *(f"variants.{name}.labels" for name in of.variants)}
    for number, claim in enumerate(of.claims):
        asked += [(f"claims.{number}.{key}", getattr(claim, key), of.variants) for key in ("better", "worse")]
        asked.append((f"claims.{number}.evaluation", claim.evaluation, of.evaluations))
    for key, name, known in asked:
        if name not in known and not (key in optional and not name):
            raise ValueError(f"{key}={name} names none of {', '.join(known) or 'none'}.")
