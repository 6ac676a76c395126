"""The published way to the same crops: Pillow decodes, torchvision transforms each crop by itself, colours on the host.

The measure for crops.py and photometric.py: their statistics must agree with this, and they must be faster.
DINOv2's augmentation, arXiv:2304.07193, put together from torchvision's public transforms.
"""

import io

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from pretrain.data.crops import NUM_GLOBAL_CROPS, CropsConfig, CropSizes
from pretrain.data.imagenet import IMAGENET_MEAN, IMAGENET_STD
from pretrain.data.photometric import BLUR_TAPS


class ReferenceCrops:
    """content of an image file -> normalised float32 crops, global [V, 3, H, W] and local [L, 3, h, w]."""

    def __init__(self, config: CropsConfig, sizes: CropSizes | None = None) -> None:
        sizes = sizes or config.all_sizes()[0]
        blurs = config.blur_probabilities().tolist()
        solarize = [*config.global_solarize_probability, *[0.0] * config.num_local_crops]
        self.transforms = [
            _transform(
                config,
                sizes.global_px if i < NUM_GLOBAL_CROPS else sizes.local_px,
                config.global_scale if i < NUM_GLOBAL_CROPS else config.local_scale,
                blurs[i],
                solarize[i],
            )
            for i in range(NUM_GLOBAL_CROPS + config.num_local_crops)
        ]

    def __call__(self, content: bytes, seed: int) -> tuple[Tensor, Tensor]:
        """torchvision draws from torch's global generator: it is seeded here, and put back after."""
        image = Image.open(io.BytesIO(content)).convert("RGB")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            crops = [transform(image) for transform in self.transforms]
        local = crops[NUM_GLOBAL_CROPS:]
        return torch.stack(crops[:NUM_GLOBAL_CROPS]), torch.stack(local) if local else torch.empty(0)


def _transform(config: CropsConfig, side: int, scale: list[float], blur: float, solarize: float) -> v2.Compose:
    jitter = v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                side,
                (scale[0], scale[1]),
                (config.aspect[0], config.aspect[1]),
                v2.InterpolationMode(config.interpolation),
            ),
            v2.RandomHorizontalFlip(config.flip_probability),
            v2.RandomApply([jitter], p=config.jitter_probability),
            v2.RandomGrayscale(config.gray_probability),
            v2.RandomApply([v2.GaussianBlur(BLUR_TAPS, config.blur_sigma)], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
        ]
    )
