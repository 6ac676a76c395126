"""Bytes that a step holds, counted from its operations: on a processor, or of tensors on a GPU that is not there."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import TrainConfig
from pretrain.data.collate import Batch
from pretrain.data.crops import CropSizes
from pretrain.data.masks import step_masks
from pretrain.data.photometric import Photometric


class LiveBytes(TorchDispatchMode):
    """Counts the memory of every tensor that an operation makes, from then until it is freed.

    Args:
        device: whose tensors.
        counted: says of an operation's result whether it is counted; all are by default.
    """

    def __init__(self, device: str, counted: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self.device, self.counted = device, counted or (lambda _: True)
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        for tensor in self._tensors((args, kwargs)):  # what was there before is not ours
            self._is_new(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in self._tensors(result):
            if self._is_new(tensor) and self.counted(tensor):
                storage = tensor.untyped_storage()
                weakref.finalize(storage, self._free, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return result

    def _tensors(self, tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device.type == self.device]

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = self._seen.get(storage._cdata)
        if known is not None and known() is storage:
            return False
        self._seen[storage._cdata] = weakref.ref(storage)
        return True

    def _free(self, size: int) -> None:
        self.now -= size


def random_batch(config: TrainConfig, sizes: CropSizes, num_images: int) -> Batch:
    """A step of one rank, as the loader makes it, of noise."""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)

    def crops(number: int, px: int) -> tuple[Tensor, Photometric]:
        shape = (number, num_images)
        pixels = torch.randint(0, 256, (*shape, px, px, 3), dtype=torch.uint8, generator=generator)
        colours = Photometric(
            factors=torch.rand(*shape, 4, generator=generator) * 0.4 + 0.8,
            order=torch.from_numpy(np.tile(rng.permutation(4).astype(np.uint8), (*shape, 1))),
            gray=torch.rand(shape, generator=generator) < 0.2,
            sigma=torch.rand(shape, generator=generator) * 2,
            solarize=torch.rand(shape, generator=generator) < 0.1,
        )
        return pixels.permute(0, 1, 4, 2, 3), colours

    side = sizes.global_px // config.patch_size
    masks = step_masks(config.masks, (side, side), np.arange(num_images), num_images, 2, 0, 0, 0)
    (global_crops, global_colours), (local_crops, local_colours) = (
        crops(number, px) for number, px in ((2, sizes.global_px), (config.crops.num_local_crops, sizes.local_px))
    )
    return Batch(
        step=0,
        sizes=sizes,
        global_crops=global_crops,
        local_crops=local_crops,
        gram_crops=crops(2, sizes.gram_px)[0] if sizes.gram_px else None,
        global_photometric=global_colours,
        local_photometric=local_colours,
        masks=torch.from_numpy(masks),
        positions=torch.arange(num_images),
        datasets=torch.zeros(num_images, dtype=torch.int64),
    )
