"""One step's images on one rank, as tensors, and what the device makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pretrain.data.crops import Crops, CropSizes
from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.photometric import Photometric, normalize, photometric, to_float

_CACHED_PIXELS = 6 * 224 * 224  # measured: fewer cost calls, more cost memory traffic


@dataclass(frozen=True)
class Skipped:
    """A damaged image, and why another stands in its place; or one that is in the batch, and what is odd of it."""

    dataset: str
    image: str
    """shard:member"""
    reason: str


@dataclass(frozen=True)
class Batch:
    """B images of one rank. Crops are uint8 and undistorted; `prepare` distorts them on the device."""

    step: int
    sizes: CropSizes
    global_crops: Tensor
    """uint8 [V, B, 3, H, W]"""
    local_crops: Tensor
    """uint8 [L, B, 3, h, w]"""
    gram_crops: Tensor | None
    """uint8 [V, B, 3, G, G]"""
    global_photometric: Photometric
    """[V, B] each, on the host"""
    local_photometric: Photometric
    """[L, B] each, on the host"""
    masks: Tensor | None
    """bool [V, B, N], row-major patches of the global crops"""
    positions: Tensor
    """int64 [B]: place in the global batch"""
    datasets: Tensor
    """int64 [B]: number of the dataset, in the config's order"""
    skipped: tuple[Skipped, ...] = ()
    odd: tuple[Skipped, ...] = ()
    """sound images that train for little: dark_16_bit"""

    def __len__(self) -> int:
        return len(self.positions)

    def num_predicted(self, ibot_patches: str) -> int:
        """Patches that iBOT predicts: the masked ones, or with "all" every one of the crops that have a mask."""
        if self.masks is None:
            return 0
        return int((self.masks.any(dim=-1) * self.masks.shape[-1] if ibot_patches == "all" else self.masks).sum())

    def micro_batches(self, count: int) -> list["Batch"]:
        """`count` equal slices over B; what was skipped or odd stays with the first.

        Raises:
            ValueError: B does not split so.
        """
        if count < 1 or len(self) % count:
            raise ValueError(f"a batch of {len(self)} images does not split into {count} equal micro-batches.")
        size = len(self) // count
        slices = [self._slice(slice(i * size, (i + 1) * size)) for i in range(count)]
        return [replace(slices[0], skipped=self.skipped, odd=self.odd), *slices[1:]]

    def only_global(self) -> "Batch":
        """Without local and Gram crops: what a teacher sees."""
        return replace(
            self,
            local_crops=self.local_crops[:0],
            local_photometric=self.local_photometric[:0],
            gram_crops=None,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """Crops and masks to the device, without waiting where memory is pinned. Parameters stay on the host."""
        return self._map_large(lambda tensor: _copied(tensor, torch.device(device)))

    def pin_memory(self) -> "Batch":
        """Into page-locked memory; the data loader calls it."""
        return self._map_large(lambda tensor: tensor.pin_memory())

    def _map_large(self, change) -> "Batch":
        return replace(
            self,
            global_crops=change(self.global_crops),
            local_crops=change(self.local_crops),
            gram_crops=None if self.gram_crops is None else change(self.gram_crops),
            masks=None if self.masks is None else change(self.masks),
        )

    def _slice(self, some: slice) -> "Batch":
        return replace(
            self,
            global_crops=self.global_crops[:, some],
            local_crops=self.local_crops[:, some],
            gram_crops=None if self.gram_crops is None else self.gram_crops[:, some],
            global_photometric=self.global_photometric[:, some],
            local_photometric=self.local_photometric[:, some],
            masks=None if self.masks is None else self.masks[:, some],
            positions=self.positions[some],
            datasets=self.datasets[some],
            skipped=(),
            odd=(),
        )


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """[V, B, ...] on the device, in the same memory format.

    Crop by crop: of a slice over B each is one piece of memory, which a pinned host hands over without a wait.
    """
    if tensor.device == device:
        return tensor
    there = torch.empty_like(tensor, device=device)
    for copy, crops in zip(there, tensor, strict=True):
        copy.copy_(crops, non_blocking=True)
    return there


def collate(
    crops: Sequence[Crops],
    *,
    step: int,
    sizes: CropSizes,
    masks: Tensor | None,
    positions: Tensor,
    datasets: Tensor,
    skipped: Sequence[Skipped],
    odd: Sequence[Skipped] = (),
    pixels: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Batch:
    """B images' crops as one batch, crop-major.

    Args:
        pixels: the `empty_crops` that the crops were cut into; without, they are copied.
    """
    global_crops, local_crops, gram_crops = pixels or (
        torch.stack([image.global_crops for image in crops], dim=1),
        torch.stack([image.local_crops for image in crops], dim=1),
        torch.stack([image.gram_crops for image in crops], dim=1),
    )
    return Batch(
        step=step,
        sizes=sizes,
        global_crops=global_crops,
        local_crops=local_crops,
        gram_crops=gram_crops if sizes.gram_px else None,
        global_photometric=Photometric.stack([image.global_photometric for image in crops], dim=1),
        local_photometric=Photometric.stack([image.local_photometric for image in crops], dim=1),
        masks=masks,
        positions=positions,
        datasets=datasets,
        skipped=tuple(skipped),
        odd=tuple(odd),
    )


def prepare(
    batch: Batch,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Crops that the models take: global [V * B, 3, H, W], local [L * B, 3, h, w], Gram [V * B, 3, G, G] or None.

    Rows are crop-major, v * B + b; colours distorted (not Gram's) and normalised, computed in float32.
    """
    batch = batch.to(device)

    def distorted(crops: Tensor, parameters: Photometric | None) -> Tensor:
        """[V, B, 3, H, W] -> [V * B, 3, H, W]"""
        rows = crops.flatten(0, 1)
        flat = None if parameters is None else parameters.flatten()
        out = torch.empty(rows.shape, dtype=dtype, device=rows.device)
        # A processor's caches hold a few crops; a GPU takes all at once.
        every = max(_CACHED_PIXELS // rows[0, 0].numel(), 1) if rows.device.type == "cpu" and len(rows) else len(rows)
        for start in range(0, len(rows), max(every, 1)):
            some = slice(start, start + every)
            x = to_float(rows[some]) if flat is None else photometric(rows[some], flat[some])
            out[some] = normalize(x, mean, std)
        return out

    return (
        distorted(batch.global_crops, batch.global_photometric),
        distorted(batch.local_crops, batch.local_photometric),
        None if batch.gram_crops is None else distorted(batch.gram_crops, None),
    )
