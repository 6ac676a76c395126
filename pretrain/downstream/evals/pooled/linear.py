"""Linear probe: a grid of linear classifiers on frozen features, all trained at once.

Protocol of DINOv2's evaluation (arXiv:2304.07193, section 7.1, and its released code): for each of {1, 4} last layers
x {CLS, CLS + mean of the patches of the last layer} x 13 learning rates a linear layer, trained by SGD with momentum
0.9, a cosine to 0 and no weight decay; rates are for 256 images a step and grow with the batch. Two things differ.
Features are of one centre crop each, computed once: published probes see random crops. And the classifier is chosen on
a tenth of the training images, which no classifier learns from; `best_on_val`, chosen on the very images that are
judged, is what published tables hold.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from configs.ranges import SEEDS, check_ranges
from pretrain.downstream.evals.errors import of_share
from pretrain.downstream.evals.frozen import Frozen, Pooled, numbered
from pretrain.downstream.evals.result import Result, both_halves, counted
from pretrain.downstream.evals.sets import LabelledSet

HELD_OUT = 0.1
_MOMENTUM = 0.9
_ROWS = 512  # classified at once: bounds the logits of all classifiers


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How the classifiers are trained."""

    rates: list[float] = field(
        default_factory=lambda: [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    )
    """learning rates for 256 images a step; one classifier each"""
    epochs: int = 10
    """through the training images: 12,500 steps of 1,024 are ten of ImageNet-1k"""
    least_steps: int = 1000
    """so many also where the epochs are fewer"""
    batch_size: int = 1024
    """images a step, or all of a smaller set"""
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges("linear", self, rates="(0, inf)", seed=SEEDS)
        check_ranges("linear", self, **dict.fromkeys(("epochs", "least_steps", "batch_size"), "[1, inf)"))
        if not self.rates:
            raise ValueError("linear.rates=[] must be one or more learning rates.")


@dataclass(frozen=True)
class Probes:
    """Linear classifiers on one kind of feature, one for each learning rate: weight [R, C, D], bias [R, C]."""

    weight: Tensor
    bias: Tensor

    def answers(self, features: Tensor) -> Tensor:
        """Features [N, D] -> int64 [R, N]: the class that each classifier gives."""

        def of(rows: Tensor) -> Tensor:
            return (torch.einsum("nd,rcd->rnc", rows, self.weight) + self.bias[:, None]).argmax(dim=2)

        return torch.cat([of(rows) for rows in features.split(_ROWS)], dim=1)


def train_probes(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    rates: Sequence[float],
    orders: Sequence[Tensor],
    seed: int,
    stepped: Callable[[], None] = lambda: None,
) -> Probes:
    """Softmax regression by SGD for each rate, all on the same batches.

    Args:
        features: float32 [N, D]. labels: int64 [N].
        rates: of each classifier at the first step; they fall to 0 by a cosine.
        orders: numbers of images, one tensor a step.
        seed: of the first weights, normal with deviation 0.01 as published.
        stepped: called after each step.
    """
    rate = torch.tensor(rates, device=features.device)[:, None, None]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(rates), num_classes, features.shape[1], generator=generator).mul_(0.01).to(features)
    bias = features.new_zeros(len(rates), num_classes)
    speeds = torch.zeros_like(weight), torch.zeros_like(bias)
    for step, chosen in enumerate(orders):
        x = features[chosen]
        error = torch.softmax(torch.einsum("nd,rcd->rnc", x, weight) + bias[:, None], dim=2)
        # The gradient of the mean cross-entropy by the logits, times N.
        error.scatter_add_(2, labels[chosen].expand(len(rates), -1)[..., None], -torch.ones_like(error[..., :1]))
        gradients = torch.einsum("rnc,nd->rcd", error, x) / len(x), error.mean(dim=1)
        now = rate * 0.5 * (1 + np.cos(np.pi * step / len(orders)))
        for parameter, speed, gradient in zip((weight, bias), speeds, gradients, strict=True):
            speed.mul_(_MOMENTUM).add_(gradient)
            parameter.sub_(speed * (now if parameter.ndim == 3 else now[..., 0]))
        stepped()
    return Probes(weight, bias)


def kinds_of(pooled: Pooled) -> dict[str, Callable[[Pooled], Tensor]]:
    """What is probed: name -> its features [N, D] of a set; of one layer and of all that there are, without and with
    the mean. One at a time: together they would take several times the memory of the features.
    """
    layers = pooled.cls.shape[1]
    found: dict[str, Callable[[Pooled], Tensor]] = {
        "CLS": lambda of: of.last,
        "CLS + mean": lambda of: torch.cat([of.last, of.mean], dim=1),
    }
    if layers > 1:
        found[f"CLS of {layers} layers"] = lambda of: of.cls.flatten(1)
        found[f"CLS of {layers} layers + mean"] = lambda of: torch.cat([of.cls.flatten(1), of.mean], dim=1)
    return found


def batch_orders(count: int, batch_size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Numbers of images for each step: every image once before any comes again."""
    size = min(batch_size, count)
    rounds = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])
    return list(order[: steps * size].split(size))


def run(frozen: Frozen, data: LabelledSet, config: LinearConfig) -> Result:
    """Accuracy of the classifier that is best on the held-out tenth of the training images."""
    halves = both_halves(frozen, data)
    train, val = halves["train"], halves["val"]
    classes = sorted(set(train.labels))
    if len(classes) < 2:
        raise ValueError(f"all images of the training set have the label {classes[0]!r}: there is nothing to learn.")
    labels, truth = (torch.from_numpy(numbered(p.labels, classes)).to(frozen.device) for p in (train, val))
    generator = torch.Generator().manual_seed(config.seed)
    mixed = torch.randperm(len(labels), generator=generator).to(frozen.device)
    held, taught = mixed.split(
        [max(round(HELD_OUT * len(labels)), 1), len(labels) - max(round(HELD_OUT * len(labels)), 1)]
    )
    steps = max(config.least_steps, -(-config.epochs * len(taught) // config.batch_size))
    orders = [
        taught[order.to(frozen.device)] for order in batch_orders(len(taught), config.batch_size, steps, generator)
    ]
    rates = [rate * len(orders[0]) / 256 for rate in config.rates]
    on_held, on_val, names = [], [], []
    with frozen.progress("linear", steps * len(kinds_of(train)), "steps") as progress:
        for name, features_of in kinds_of(train).items():
            features = features_of(train)
            probes = train_probes(
                features, labels, len(classes), rates, orders, config.seed, lambda: progress.advance(1)
            )
            on_held.append((probes.answers(features[held]) == labels[held]).float().mean(dim=1))
            on_val.append((probes.answers(features_of(val)) == truth).float().mean(dim=1))
            names.append(name)
    best = int(torch.cat(on_held).argmax())
    accuracies = torch.cat(on_val)
    value, kind, rate = float(accuracies[best]), names[best // len(rates)], config.rates[best % len(rates)]
    found = counted(halves)
    best_by_kind = {f"best on val, {name}": float(each.max()) for name, each in zip(names, on_val, strict=True)}
    return Result(
        value=value,
        standard_error=of_share(value, len(truth)),
        figures={"best_on_val": float(accuracies.max()), **best_by_kind},
        chosen={"features": kind, "rate": rate, "steps": steps},
        **found,
    )
