"""Logistic regression on frozen features, with all training images or a few of each class.

`logistic`: L-BFGS on unit-norm CLS tokens; the strength of the L2 penalty is chosen on a tenth of the training images
among powers of ten from -6 to 5, as DINOv2 does on its smaller sets (arXiv:2304.07193, section 7.1, and its released
code: 45 steps there), then all of them are learned from. `fewshot`: so many images of each class and one strength, over
several draws, as MSN compares few labels (arXiv:2204.07141, section 5). The regression is scikit-learn's.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.nn.functional as F

from configs.ranges import SEEDS, check_ranges
from pretrain.downstream.evals.errors import of_share
from pretrain.downstream.evals.frozen import Frozen, Pooled, numbered
from pretrain.downstream.evals.pooled.linear import HELD_OUT
from pretrain.downstream.evals.result import Result, both_halves, counted
from pretrain.downstream.evals.sets import LabelledSet

_POWERS = (-6.0, 5.0)
_MAX_ITERATIONS = 1000


@dataclass(frozen=True, kw_only=True)
class LogisticConfig:
    """How the penalty is chosen."""

    num_strengths: int = 12
    """inverse strengths C that are tried, evenly spaced powers of ten"""
    seed: int = 0
    """of the tenth that chooses"""

    def __post_init__(self) -> None:
        check_ranges("logistic", self, num_strengths="[1, 1000]", seed=SEEDS)


@dataclass(frozen=True, kw_only=True)
class FewShotConfig:
    """How few, and how often."""

    shots: list[int] = field(default_factory=lambda: [5, 1, 2, 10])
    """images of each class; each gives a figure, and the first is the headline"""
    draws: int = 10
    """of other images"""
    strength: float = 10.0
    """C, the inverse strength of the penalty on unit-norm features"""
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges("fewshot", self, shots="[1, inf)", draws="[2, inf)", strength="(0, inf)", seed=SEEDS)
        if not self.shots:
            raise ValueError("fewshot.shots=[] must be one or more numbers of images.")


def classifier() -> Any:
    """scikit-learn's softmax regression by L-BFGS, to be fitted; a second fit goes on from the first.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ValueError(f"this evaluation needs scikit-learn ({error}); install seedbed[use].") from None
    return LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)


def fit(model: Any, features: np.ndarray, labels: np.ndarray, strength: float) -> Any:
    """Fit it to features [N, D] and labels int64 [N] with this inverse strength of the penalty, C."""
    from sklearn.exceptions import ConvergenceWarning

    # At the weakest penalties L-BFGS may end at its limit; where it stood is what the choice compares.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.set_params(C=strength).fit(features, labels)


def _unit(pooled: Pooled) -> np.ndarray:
    return F.normalize(pooled.last, dim=1).cpu().numpy()


def run(frozen: Frozen, data: LabelledSet, config: LogisticConfig) -> Result:
    """Accuracy with all training images."""
    halves = both_halves(frozen, data)
    train, val, labels, truth = _arrays(halves)
    mixed = np.random.default_rng(config.seed).permutation(len(labels))
    held, taught = np.split(mixed, [max(round(HELD_OUT * len(labels)), 1)])
    strengths = 10 ** np.linspace(*_POWERS, config.num_strengths)
    on_held, model = [], classifier()
    with frozen.progress("logistic", len(strengths) + 1, "fits") as progress:
        for strength in strengths:  # from the strongest penalty on, each from where the last one ended
            fit(model, train[taught], labels[taught], strength)
            on_held.append(np.mean(model.predict(train[held]) == labels[held]))
            progress.advance(1)
        best = float(strengths[int(np.argmax(on_held))])
        model = fit(classifier(), train, labels, best)
        progress.advance(1)
    value = float(np.mean(model.predict(val) == truth))
    return Result(value, of_share(value, len(truth)), {}, chosen={"C": best}, **counted(halves))


def run_few(frozen: Frozen, data: LabelledSet, config: FewShotConfig) -> Result:
    """Accuracy with a few images of each class: the mean over draws; its error holds that of the draws, too."""
    halves = both_halves(frozen, data)
    train, val, labels, truth = _arrays(halves)
    least = int(np.bincount(labels).min())
    if max(config.shots) > least:
        raise ValueError(
            f"fewshot.shots={config.shots} asks for {max(config.shots)} images of each class, and one class has "
            f"{least}: lower it."
        )
    generator, accuracies = np.random.default_rng(config.seed), {}
    with frozen.progress("fewshot", len(config.shots) * config.draws, "fits") as progress:
        for shots in config.shots:
            accuracies[shots] = []
            for _ in range(config.draws):
                chosen = drawn(labels, shots, generator)
                model = fit(classifier(), train[chosen], labels[chosen], config.strength)
                accuracies[shots].append(np.mean(model.predict(val) == truth))
                progress.advance(1)
    means = {shots: float(np.mean(found)) for shots, found in accuracies.items()}
    first = config.shots[0]
    spread = np.std(accuracies[first], ddof=1) / np.sqrt(config.draws)
    error = float(np.hypot(spread, of_share(means[first], len(truth))))
    return Result(means[first], error, {f"{n} of each class": mean for n, mean in means.items()}, **counted(halves))


def drawn(labels: np.ndarray, shots: int, generator: np.random.Generator) -> np.ndarray:
    """Numbers of `shots` images of each class, int64."""
    return np.concatenate(
        [generator.choice(np.flatnonzero(labels == name), shots, replace=False) for name in np.unique(labels)]
    )


def _arrays(halves: dict[str, Pooled]) -> Sequence[np.ndarray]:
    train, val = halves["train"], halves["val"]
    classes = sorted(set(train.labels))
    if len(classes) < 2:
        raise ValueError(f"all images of the training set have the label {classes[0]!r}: there is nothing to learn.")
    return _unit(train), _unit(val), numbered(train.labels, classes), numbered(val.labels, classes)
