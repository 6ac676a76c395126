"""Colour jitter, grayscale, blur and solarisation on batches, on the training device, from parameters drawn before.

What torchvision's ColorJitter, RandomGrayscale, GaussianBlur (9 taps, as DINOv2 has it) and solarize do to one 8-bit
image at a time, in float and without rounding in between. Which crops an operation touches is known on the host, so
nothing waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.photometric_kernel import distort

BLUR_TAPS = 9
_LUMA = (0.299, 0.587, 0.114)
_SOLARIZE_FROM = 128 / 255
_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # 0 is brightness


@dataclass(frozen=True)
class Photometric:
    """Parameters of the colours of n crops (any leading shape); on the host."""

    factors: Tensor
    """float32 [..., 4]: brightness, contrast, saturation (1: as it is) and hue shift (0), share of the circle"""
    order: Tensor
    """uint8 [..., 4]: which of those four comes first, second, third, last"""
    gray: Tensor
    """bool [...]"""
    sigma: Tensor
    """float32 [...]: of the blur, pixels; 0 for none"""
    solarize: Tensor
    """bool [...]"""

    def tensors(self) -> list[Tensor]:
        return [self.factors, self.order, self.gray, self.sigma, self.solarize]

    def __getitem__(self, index: slice | tuple[slice, ...] | Tensor) -> Self:
        return type(self)(*(tensor[index] for tensor in self.tensors()))

    def flatten(self) -> Self:
        """Leading dimensions to one: [V, B, ...] to rows v * B + b."""
        leading = self.gray.ndim
        return type(self)(*(tensor.flatten(0, leading - 1) for tensor in self.tensors()))

    @classmethod
    def stack(cls, items: list[Self], dim: int) -> Self:
        return cls(*(torch.stack(tensors, dim) for tensors in zip(*(i.tensors() for i in items), strict=True)))


def photometric(crops: Tensor, parameters: Photometric) -> Tensor:
    """Distort the colours of uint8 crops [n, 3, H, W]; float32 in 0..1, same shape, on the crops' device.

    Args:
        parameters: n rows, on the host.
    """
    if crops.device.type == "cpu":
        return _on_processor(crops, parameters)
    return on_device(crops, parameters)


def on_device(crops: Tensor, parameters: Photometric) -> Tensor:
    """`photometric` in torch's operations, all crops at once; on any device."""
    x = _jitter(to_float(crops), parameters)
    x = _on_some(x, parameters.gray, lambda some, _: luma(some).expand_as(some))
    x = _on_some(x, parameters.sigma > 0, lambda some, rows: blur(some, parameters.sigma[rows]))
    return _on_some(x, parameters.solarize, lambda some, _: torch.where(some >= _SOLARIZE_FROM, 1 - some, some))


def to_float(crops: Tensor) -> Tensor:
    """uint8 -> float32 in 0..1."""
    return crops.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def normalize(x: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """(x - mean) / std for each channel of x [n, 3, H, W] in 0..1."""
    scale = torch.tensor(std, dtype=x.dtype)[:, None, None].reciprocal()
    shift = -torch.tensor(mean, dtype=x.dtype)[:, None, None] * scale
    return torch.addcmul(_to(shift, x), x, _to(scale, x))


def luma(x: Tensor) -> Tensor:
    """Brightness as eyes weigh it, ITU-R 601: [n, 3, H, W] -> [n, 1, H, W]."""
    red, green, blue = x.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def blend(x: Tensor, factor: Tensor, to_mean: Tensor, to_gray: Tensor) -> Tensor:
    """factor * x + (1 - factor) * anchor, clipped to 0..1; what brightness, contrast and saturation all are.

    The anchor is black, the image's mean brightness (contrast) or the pixel's own (saturation).

    Args:
        x: [n, 3, H, W] in 0..1.
        factor: float32 [n]; 1 leaves the crop as it is.
        to_mean, to_gray: float32 [n], 0 or 1.
    """
    gray = luma(x)
    mean = gray.mean(dim=(2, 3), keepdim=True)
    rest = _column(1 - factor, x)
    anchor = gray.mul_(rest * _column(to_gray, x)).add_(mean * (rest * _column(to_mean, x)))
    return torch.addcmul(anchor, x, _column(factor, x)).clamp_(0, 1)


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle of x [n, 3, H, W] by shift [n] (share of the circle), value and chroma kept (HSV)."""
    red, green, blue = x.unbind(dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = torch.minimum(torch.minimum(red, green), blue).neg_().add_(value)
    scale = chroma.clamp(min=1e-12).reciprocal_().mul_(1 / 6)
    # Where a channel is the largest, the other two place the hue around that channel's third of the circle.
    hue = torch.where(value == green, (blue - red).mul_(scale).add_(1 / 3), (red - green).mul_(scale).add_(2 / 3))
    hue = torch.where(value == red, (green - blue).mul_(scale), hue)
    hue += _to(shift, x)[:, None, None]
    hue -= hue.floor()
    hue *= 6
    out = torch.empty_like(x)
    missing = (2 - (hue - 3).abs_(), (hue - 2).abs_().sub_(1), (hue - 4).abs_().sub_(1))  # of the chroma
    for channel, share in enumerate(missing):
        torch.addcmul(value, chroma, share.clamp_(0, 1), value=-1, out=out[:, channel])
    return out


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of x [n, 3, H, W] by sigma [n] pixels: nine taps along each axis, edges mirrored."""
    n, channels, height, width = x.shape
    reach = BLUR_TAPS // 2
    taps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    kernel = _to((kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0), x)
    groups = n * channels
    x = F.pad(x, (0, 0, reach, reach), mode="reflect").reshape(1, groups, height + 2 * reach, width)
    x = F.conv2d(x, kernel[:, None, :, None], groups=groups)
    x = F.pad(x, (reach, reach, 0, 0), mode="reflect")
    return F.conv2d(x, kernel[:, None, None, :], groups=groups).reshape(n, channels, height, width)


def _on_processor(crops: Tensor, parameters: Photometric) -> Tensor:
    """`photometric` compiled for a processor, which has caches to keep a crop in but no bandwidth for many passes."""
    out = torch.empty(crops.shape)
    pixels = crops.permute(0, 2, 3, 1).contiguous()
    distort(pixels.numpy(), *(tensor.numpy() for tensor in parameters.tensors()), out.numpy())
    return out


def _jitter(x: Tensor, parameters: Photometric) -> Tensor:
    """The four colour operations in each crop's own order: three blends, and the hue before, between or after them."""
    order = parameters.order.long()
    hue_at = (order == _HUE).int().argmax(dim=1)
    blends = order[order != _HUE].view(-1, 3)
    factors = parameters.factors.gather(1, blends)
    hue = parameters.factors[:, _HUE]
    for turn in range(4):
        x = _on_some(x, (hue_at == turn) & (hue != 0), lambda some, rows: shift_hue(some, hue[rows]))
        if turn < 3 and (factors[:, turn] != 1).any():
            kind = blends[:, turn]
            x = blend(x, factors[:, turn], (kind == _CONTRAST).float(), (kind == _SATURATION).float())
    return x


def _on_some(x: Tensor, chosen: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply operation(crops, rows) to the crops that are chosen (bool [n], on the host), in place."""
    rows = chosen.nonzero()[:, 0]
    if len(rows):
        there = _to(rows, x)
        x.index_copy_(0, there, operation(x.index_select(0, there), rows).contiguous())
    return x


def _column(values: Tensor, x: Tensor) -> Tensor:
    """[n] on the host -> [n, 1, 1, 1] where x is."""
    return _to(values, x)[:, None, None, None]


def _to(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device, non_blocking=True)
