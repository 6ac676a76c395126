"""What is compiled: blocks whole, also under DDP, and for static shapes over sizes and phases."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from configs.loader import merge_config
from pretrain import compiling
from pretrain.config import TrainConfig
from pretrain.phase import Phase, fresh_network
from tests.pretrain.live_bytes import random_batch
from tests.pretrain.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own look at a block's input
SIZES = [
    {"global_px": 32 + 16 * (i // 3), "local_px": 16 + 16 * (i % 3), "gram_px": 64 + 32 * (i // 3)} for i in range(6)
]


class Counter:
    """A backend that runs the graphs as they are, and remembers what those of blocks take.

    Heads are compiled once for any number of rows; they are told by their last layer.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.symbolic: list[Any] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if any("last_layer" in node.name for node in graph.graph.nodes):
            return graph.forward
        self.graphs += 1
        sizes = [size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else [x])]
        self.symbolic += [size for size in sizes if isinstance(size, torch.SymInt)]
        return graph.forward


def config(**changes: Any) -> TrainConfig:
    head = {"num_prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}
    asked = {
        "global_batch_size": 4,
        "precision": "float32",
        "model": {"architecture": "dinov3_tiny", "depth": 1, "patch_size": 16, "drop_path": 0.3},
        "heads": {"dino": head, "ibot": head},
        "crops": {"global_px": 32, "local_px": 16, "num_local_crops": 2},
        "optim": {"warmup_steps": 1},
        "execution": {"compile": True},
    }
    return merge_config(merge_config(TrainConfig(), asked, "test"), changes, "test")


def train(asked: TrainConfig) -> Phase:
    """A step of every size."""
    student = fresh_network(asked)
    phase = Phase(asked, 0, student, copy.deepcopy(student))
    if asked.gram.weight:
        phase.start_gram(fresh_network(asked))
    for step, sizes in enumerate(asked.crops.all_sizes()):
        phase.step(random_batch(asked, sizes, 4), step, diagnose=False)
    return phase


@pytest.mark.slow
def test_every_size_of_every_phase_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """More variants than the compiler's limit of eight, and none of them for any size."""
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(compiling, "BACKEND", counter := Counter())
    train(config())
    assert counter.graphs == 2  # student and teacher
    train(config(crops={"sizes": SIZES}, gram={"weight": 1.0}))
    # Of the second phase, whose first size is known: five of the student, one of the teacher, two of the Gram teacher.
    assert counter.graphs == 2 + 5 + 1 + 2
    assert counter.symbolic == []


def wide_block_under_ddp() -> int:
    """Graphs of two steps of a block of 50 MB, twice a bucket of DDP."""
    compiling.BACKEND = counter = Counter()
    asked = config(model={"architecture": "dinov3_vitl16"}, execution={"parallel": "ddp"})
    phase = train(asked)
    assert isinstance(phase.student, nn.parallel.DistributedDataParallel)
    phase.step(random_batch(asked, asked.crops.all_sizes()[0], 4), 1, diagnose=False)  # buckets are made anew by now
    return counter.graphs


@pytest.mark.slow
def test_ddp_leaves_a_block_whole(tmp_path: Path) -> None:
    assert run_ranks(wide_block_under_ddp, tmp_path, num_ranks=1) == [2]
