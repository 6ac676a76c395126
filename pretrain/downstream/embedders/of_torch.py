"""A backbone that torch runs."""

from pathlib import Path

import numpy as np
import torch

from pretrain.distributed.collectives import choose_device
from pretrain.downstream.backbone import load_backbone
from pretrain.downstream.embedders.embedder import Embedded


class TorchEmbedder:
    """See `load_embedder` and `Embedder`."""

    def __init__(self, path: str | Path, architecture: str, device: str, bfloat16: bool, gpu: int | None) -> None:
        self._device = choose_device(device, "--device")
        if self._device == torch.device("cuda") and gpu is not None:
            self._device = choose_device(f"cuda:{gpu}", "--device")
        self._backbone = load_backbone(path, architecture)
        self._backbone.model.to(self._device)
        self._bfloat16 = bfloat16
        self.source, self.architecture = self._backbone.source, self._backbone.architecture
        self.patch_size, self.embed_dim = self._backbone.model.patch_size, self._backbone.model.embed_dim
        self.px = self._backbone.image.px
        self.runs_on = f"torch {torch.__version__}, {self._device}{', bfloat16' * bfloat16}"

    def __call__(self, images: np.ndarray, with_patches: bool) -> Embedded:
        pixels = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            found = self._backbone.features(self._backbone.image.normalise(pixels), fit="pad")
        # To the processor once, not image by image: each copy waits for the device.
        patches = found.patches.float().cpu().numpy() if with_patches else None
        return Embedded(found.cls.float().cpu().numpy(), patches, found.grid)
