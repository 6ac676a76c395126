"""Bytes that a step holds, counted from its operations: on a processor, or of tensors on a GPU that is not there."""

import weakref
from collections.abc import Mapping
from typing import Any, Self
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.config import TrainConfig
from pretrain.data.collate import Batch
from pretrain.data.crops import CropSizes
from pretrain.data.masks import step_masks
from pretrain.data.photometric import Photometric


class LiveBytes(TorchDispatchMode):
    """Counts the memory of every tensor that an operation makes, from then until it is freed.

    Attributes:
        now, most: bytes of what is alive, and the most that ever was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, tuple[weakref.ref, list[int]]] = {}
        """by address: a storage, and its bytes that are counted"""

    def __enter__(self) -> Self:
        whole = torch.UntypedStorage.resize_
        # FSDP frees what it has gathered so, and no operation says it.
        self._resize = patch.object(torch.UntypedStorage, "resize_", lambda x, size: self._resized(x, whole(x, size)))
        self._resize.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resize.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its local tensors comes by here again
        for tensor in tree_leaves((args, kwargs)):
            self._count(tensor, is_ours=False)  # what was there before
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._count(tensor, is_ours=True)
        return result

    def _count(self, tensor: Any, is_ours: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        known = self._known.get(storage._cdata)
        if known is None or known[0]() is not storage:
            counted = [storage.nbytes() if is_ours else 0]
            self._known[storage._cdata] = weakref.ref(storage), counted
            weakref.finalize(storage, self._free, counted)
            self._add(counted[0])

    def _resized(self, storage: torch.UntypedStorage, result: Any) -> Any:
        known = self._known.get(storage._cdata)
        if known is not None and known[0]() is storage:
            self._add(storage.nbytes() - known[1][0])
            known[1][0] = storage.nbytes()
        return result

    def _free(self, counted: list[int]) -> None:
        self.now -= counted[0]

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


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
