"""lightly's examples as an experiment takes them (benchmarks/study/loop.py)."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.peers.lightly_dino import LightlyDino
from benchmarks.peers.lightly_dinov2 import LightlyDinov2, draw_masks
from benchmarks.peers.lightly_vit import OurEncoder, Views, seed_globals
from pretrain.config import TrainConfig
from pretrain.data.loader import read_tables
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.phase import phase_loader
from pretrain.stopping import ignore_stop_signals

_MASKS = 1  # what is drawn beside the views of a step
KINDS = {"lightly_dino": LightlyDino, "lightly_dinov2": LightlyDinov2}


class LightlyLearner:
    """A peer of a kind, on our backbone, and the batches that it takes."""

    def __init__(self, config: TrainConfig, kind: str) -> None:
        self.config, self.peer = config, KINDS[kind](config)
        self.state, self.load = self.peer.state, self.peer.load

    def batches(self, start: int) -> Iterable[list[Tensor]]:
        """2 + L views [B, 3, H, W] for this step and all later ones, of our images in our order."""
        loader = phase_loader(self.config, 0, start, read_tables(self.config.data))
        execution = self.config.execution.loader
        return DataLoader(
            Views(self.config, loader.steps),
            batch_size=None,
            sampler=loader.numbers,
            num_workers=execution.num_workers,
            prefetch_factor=execution.prefetch if execution.num_workers else None,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),
        )

    def step(self, batch: list[Tensor], step: int) -> dict[str, Tensor | float]:
        seed_globals(self.config.seed, step, _MASKS)  # and stochastic depth
        return {"loss": self.peer.step(batch, draw_masks(self.config, 2 * len(batch[0])), step)}

    def backbone(self) -> VisionTransformer:
        encoder = self.peer.teacher["backbone"]
        assert isinstance(encoder, OurEncoder)
        return encoder.vit.eval()
