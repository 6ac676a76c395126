"""The sections of the benchmark, and what their parts are made of; imports nothing that takes time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OK, FAILED, ABSENT = "ok", "failed", "absent"
"""How a section ends: measured; something failed; nothing could be measured, for something is not here."""
END = "end"
"""the last line of a section that was not killed and did not die, with its outcome"""

Figures = Mapping[str, Any]
Part = tuple[str, Callable[[], Figures | list[Figures]]]
"""What is measured, and how: one line of results, or several."""


@dataclass(frozen=True)
class Section:
    """One question to the device."""

    seconds: float
    """its share of 465"""
    module: str
    """of benchmarks.gpu"""
    function: str
    """Setting -> parts in order; what they share is made between them"""
    what: str
    torchrun: bool = False
    """started by torchrun, as the only rank"""


SECTIONS = {
    "A": Section(20, "machine", "machine", "versions, copy bandwidth, matrix products"),
    "B": Section(25, "steps", "eager_large", "ViT-L, eager: a training step and where it goes"),
    "C": Section(35, "parity", "parity", "parity with the processor: operations, three whole steps"),
    "D": Section(20, "kernels", "attention", "attention backends: error and time"),
    "E": Section(25, "kernels", "losses", "cross-entropy and Sinkhorn-Knopp alone"),
    "F": Section(80, "steps", "compiled_large", "ViT-L, compiled: steps, recompilations, batches"),
    "G": Section(60, "steps", "smaller", "ViT-S and ViT-B, eager and compiled"),
    "H": Section(40, "ranks", "ranks", "one rank of DDP and FSDP2, and their checkpoints", torchrun=True),
    "I": Section(40, "training", "resumed", "pretrain.train on a tar, stopped and resumed"),
    "J": Section(60, "training", "learning", "a short real training, k-NN before and after"),
    "K": Section(30, "vectors", "vectors", "k-means, join, retrieval and leaks, against the processor"),
    "L": Section(30, "throughput", "throughput", "encoders and the loader, images a second"),
}


class Absent(Exception):
    """A part cannot be measured here, and that is no fault: says what is missing."""
