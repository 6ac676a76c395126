"""What a figure is worth: raw pixels, colour histograms, and a backbone of the same form that never learned.

They answer as a backbone does, so that every evaluation takes them by name: `pixels`, `colours`, `untrained:BACKBONE`.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.downstream.backbone import ImageSettings
from pretrain.models.vision_transformer import Features, VisionTransformer

PATCH_PX = 16
_THUMBNAIL, _CELL = 16, 4  # sides of an image's and of a patch's thumbnail, in pixels
_BINS, _PATCH_BINS = 6, 8


class Pixels(nn.Module):
    """CLS: a 16 x 16 thumbnail, centred per image, so that cosine is correlation; patches: 4 x 4 thumbnails."""

    patch_size = PATCH_PX
    depth = 1
    embed_dim = 3 * _THUMBNAIL**2

    def forward(self, crops: Sequence[Tensor]) -> list[Features]:
        """Images [B, 3, H, W], from 0 to 1 -> CLS [B, 768], patches [B, h * w, 48]."""
        return [_features(images, pixel_features(images), _patch_pixels(images)) for images in crops]


class Colours(nn.Module):
    """CLS: a histogram of 6 x 6 x 6 colours, square roots, so that cosine is the Bhattacharyya coefficient; patches:
    histograms of 8 steps a channel."""

    patch_size = PATCH_PX
    depth = 1
    embed_dim = _BINS**3

    def forward(self, crops: Sequence[Tensor]) -> list[Features]:
        """Images [B, 3, H, W], from 0 to 1 -> CLS [B, 216], patches [B, h * w, 24]."""
        return [_features(images, _histograms(images), _patch_histograms(images)) for images in crops]


def as_they_are(px: int) -> ImageSettings:
    """Pixel values from 0 to 1, not centred: what baselines are shown."""
    return ImageSettings((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), px)


BASELINES: dict[str, type[Pixels] | type[Colours]] = {"pixels": Pixels, "colours": Colours}


def pixel_features(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 768]: 16 x 16 thumbnails, centred per image."""
    small = F.interpolate(images.float(), size=(_THUMBNAIL, _THUMBNAIL), mode="bilinear", antialias=True)
    flat = small.flatten(1)
    return flat - flat.mean(dim=1, keepdim=True)


def _histograms(images: Tensor) -> Tensor:
    steps = (images * _BINS).long().clamp(0, _BINS - 1).flatten(2)
    codes = (steps[:, 0] * _BINS + steps[:, 1]) * _BINS + steps[:, 2]
    counts = images.new_zeros(len(images), _BINS**3).scatter_add_(1, codes, torch.ones_like(codes, dtype=images.dtype))
    return (counts / codes.shape[1]).sqrt()


def _patch_pixels(images: Tensor) -> Tensor:
    height, width = (side // PATCH_PX * _CELL for side in images.shape[-2:])
    small = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    return F.pixel_unshuffle(small, _CELL).flatten(2).transpose(1, 2)


def _patch_histograms(images: Tensor) -> Tensor:
    steps = (images * _PATCH_BINS).to(torch.uint8).clamp(max=_PATCH_BINS - 1)
    shares = [F.avg_pool2d((steps == number).to(images.dtype), PATCH_PX) for number in range(_PATCH_BINS)]
    return torch.stack(shares, dim=2).flatten(1, 2).sqrt().flatten(2).transpose(1, 2)


def _features(images: Tensor, cls: Tensor, patches: Tensor) -> Features:
    grid = images.shape[2] // PATCH_PX, images.shape[3] // PATCH_PX
    return Features(cls, cls.new_zeros(len(cls), 0, cls.shape[1]), patches, grid)


def random_like(backbone: VisionTransformer, seed: int = 0) -> VisionTransformer:
    """A backbone of the same form with freshly drawn weights: what its features are worth without training.

    Layer scales are 1, not their first value of 1e-5, at which the CLS token is the same for every image and the
    figure is chance: 0.24 against 0.10 on CIFAR-10. The stronger floor is the honest one.
    """
    fresh = copy.deepcopy(backbone).cpu().float()
    fresh.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0)
    return fresh.to(next(backbone.parameters()).device).eval()
