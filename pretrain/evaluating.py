"""The teacher as evaluations use it: where it lies, sharded or not, every rank calling it in step with the others."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.config import TrainConfig
from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.distributed import collectives
from pretrain.distributed.fsdp import Placement, initialise, place, plain_module
from pretrain.models.initial import Initial
from pretrain.models.vision_transformer import Features
from pretrain.network_weights import load_network
from pretrain.student_teacher import Network, build_network
from pretrain.watch.evaluation import run_evaluation


@dataclass(frozen=True)
class Answering:
    """The backbone inside a wrapped network, called as a plain one is; through the network's forward, where FSDP is.

    In the precision of training, and never compiled: an evaluation's sizes would be compiled for once each.
    """

    network: nn.Module
    placement: Placement

    @property
    def patch_size(self) -> int:
        return int(plain_module(self.network).get_submodule("backbone").patch_size)

    def __call__(self, crops: Sequence[Tensor]) -> list[Features]:
        eager = torch.compiler.set_stance("force_eager") if self.placement.compile_blocks else nullcontext()
        with torch.no_grad(), self.placement.autocast(), eager:
            return self.network(lambda network: network.backbone(crops))


def evaluate_teacher(
    teacher: Answering, config: TrainConfig, folder: Path, step: int, left: Callable[[], bool]
) -> dict[str, float]:
    """The evaluation that the config asks for; every rank calls it, and all get the figures.

    Args:
        folder: of the run.
        left: whether this rank is asked to stop.

    Raises:
        Stopped: a rank was asked to stop.
        ValueError: sets that cannot be read or compared.
    """
    return run_evaluation(
        teacher,
        lambda: untrained(config, teacher.placement),
        config.evaluation,
        folder,
        step,
        IMAGENET_MEAN,
        IMAGENET_STD,
        teacher.placement.device,
        left,
    )


def saved_teacher(config: TrainConfig, checkpoint: Path, device: torch.device) -> Answering:
    """The teacher of a checkpoint, beside no student: each rank reads the rows that it holds."""
    network, placement = _lone(config, device)
    own_offset = config.model.position_offset is not None
    collectives.together(lambda: load_network(network, checkpoint, keep_offset=own_offset))
    return Answering(network, placement)


def untrained(config: TrainConfig, placement: Placement) -> Answering:
    """A network of the same form with freshly drawn weights, and layer scales of 1 (`evals.baselines.random_like`)."""
    with torch.device("meta"):
        network = build_network(config)
    placement = Placement(placement.mode, placement.precision, placement.device, placement.mesh)
    placement.frozen(network)
    ones = {name: Initial("constant", 1.0) for name in network.initials() if name.endswith("gamma")}
    initialise(network, network.initials() | ones, seed=0)
    return Answering(network, placement)


def _lone(config: TrainConfig, device: torch.device) -> tuple[Network, Placement]:
    with torch.device("meta"):
        network = build_network(config)
    execution, size = config.execution, sum(p.numel() for p in network.parameters())
    placement = place(execution.parallel, config.precision, device, execution.shard_ranks, size)
    placement.frozen(network)
    return network, placement
