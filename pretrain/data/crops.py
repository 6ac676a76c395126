"""An image on disk -> its global, local and Gram crops, uint8, with the parameters of their colours.

    crops = multi_crop(open_image(Path("photo.jpg").read_bytes()), CropsConfig(), np.random.default_rng(0))

gives `crops.global_crops` [2, 3, 224, 224], `crops.local_crops` [8, 3, 96, 96] and, for each crop, what
`photometric` (photometric.py) is to do to its colours on the training device. Boxes are drawn first, so the image is
decoded no larger than its crops need; each crop is one antialiased resize. DINOv2 and DINOv3 multi-crop:
arXiv:2304.07193, arXiv:2508.10104; boxes as torchvision's RandomResizedCrop draws them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.ranges import check_choice, check_ranges
from pretrain.data.decode import EncodedImage
from pretrain.data.edits import EDITS, edit
from pretrain.data.photometric import Photometric
from pretrain.data.randomness import Stream, generator

NUM_GLOBAL_CROPS = 2
_BOX_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True)
class CropSizes:
    """Sides of the square crops of one step, in pixels, and how likely a step has them."""

    global_px: int = 224
    local_px: int = 96
    gram_px: int = 0
    """of the Gram teacher's view of the global crops, undistorted; 0 for none"""
    probability: float = 1.0
    """relative to the other sizes"""


@dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Multi-crop as published for DINOv2; every probability and range."""

    global_px: int = 224
    """side of the two global crops; also gram_px and local_px: unless `sizes` is given"""
    local_px: int = 96
    gram_px: int = 0
    """0: no Gram crops"""
    sizes: list[CropSizes] = field(default_factory=list)
    """several sizes, of which each step draws one for all ranks; empty: the three above"""
    drop_local_remainder: bool = False
    """true: of a local crop that is no multiple of the patch the network leaves out what is over at the right and the
    bottom, as DINOv3's 168 px become 10 x 10 patches of 16; false: such a side is refused"""
    num_local_crops: int = 8
    global_scale: list[float] = field(default_factory=lambda: [0.32, 1.0])
    """least and most area of a crop, as a share of the image"""
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.32])
    aspect: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """least and most width / height of a crop before its resize"""
    interpolation: str = "bicubic"
    """bicubic or bilinear, both antialiased"""
    flip_probability: float = 0.5
    """of a left-right mirror; DINOv3's 7B recipe has 0"""
    jitter_probability: float = 0.8
    brightness: float = 0.4
    """a factor within 1 +- this; so for contrast and saturation"""
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """a shift within +- this, of the whole circle"""
    gray_probability: float = 0.2
    blur: str = "as_released"
    """as_released: the probabilities below are those of NOT blurring, as the released code has it (dinov3#286) and the
    released models were trained; as_intended: those of blurring, as the papers say"""
    global_blur_probability: list[float] = field(default_factory=lambda: [1.0, 0.1])
    """of the first and the second global crop"""
    local_blur_probability: float = 0.5
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """pixels of the crop"""
    global_solarize_probability: list[float] = field(default_factory=lambda: [0.0, 0.2])
    """values from 128 on are inverted"""
    edits: int = 0
    """most edits of a global crop, such as copies show (pretrain.data.edits), on top of cut, mirror and colours: each
    crop has from 0 to this many; for a backbone that is to find copies"""

    def __post_init__(self) -> None:
        check_choice("crops.blur", self.blur, ("as_released", "as_intended"))
        check_choice("crops.interpolation", self.interpolation, ("bicubic", "bilinear"))
        of_the_two = ("global_blur_probability", "global_solarize_probability")
        intervals = ("global_scale", "local_scale", "aspect", "blur_sigma")
        one = ("flip_probability", "jitter_probability", "gray_probability", "local_blur_probability")
        ranges = dict.fromkeys((*one, *of_the_two, "brightness", "contrast", "saturation"), "[0, 1]")
        ranges |= dict.fromkeys(("global_scale", "local_scale"), "(0, 1]")
        ranges |= dict.fromkeys(("aspect", "blur_sigma"), "(0, inf)")
        sides = {"global_px": "[1, inf)", "local_px": "[1, inf)", "gram_px": "[0, inf)"}
        others = {"hue": "[0, 0.5]", "num_local_crops": "[0, inf)", "edits": f"[0, {len(EDITS)}]"}
        check_ranges("crops", self, **ranges | sides | others)
        for number, sizes in enumerate(self.sizes):
            check_ranges(f"crops.sizes.{number}", sizes, **sides | {"probability": "[0, inf)"})
        for name in of_the_two:
            if len(getattr(self, name)) != NUM_GLOBAL_CROPS:
                raise ValueError(
                    f"crops.{name}={getattr(self, name)} needs one value for each of the two global crops."
                )
        for name in intervals:
            values = getattr(self, name)
            if len(values) != 2 or values[0] > values[1]:
                raise ValueError(f"crops.{name}={values} must be [least, most], the smaller number first.")
        if not sum(sizes.probability for sizes in self.all_sizes()) > 0:
            raise ValueError("crops.sizes: the probabilities are all 0.")
        if len({sizes.gram_px > 0 for sizes in self.all_sizes()}) > 1:
            raise ValueError("crops.sizes: either all have a gram_px or none has.")

    def all_sizes(self) -> list[CropSizes]:
        own = CropSizes(global_px=self.global_px, local_px=self.local_px, gram_px=self.gram_px)
        return list(self.sizes) or [own]

    def blur_probabilities(self) -> np.ndarray:
        """How likely each crop really is blurred, the two global ones first. float64 [V + L]"""
        stated = np.array([*self.global_blur_probability, *[self.local_blur_probability] * self.num_local_crops])
        return 1 - stated if self.blur == "as_released" else stated


@dataclass(frozen=True)
class Crops:
    """What one image becomes, uint8. The parameters have a row for each crop."""

    global_crops: Tensor
    """[V, 3, H, W]"""
    local_crops: Tensor
    """[L, 3, h, w]"""
    gram_crops: Tensor
    """[V, 3, G, G], or [0, 3, 0, 0] for none: the global crops' boxes, never distorted"""
    global_photometric: Photometric
    local_photometric: Photometric


def step_sizes(config: CropsConfig, seed: int, phase: int, step: int) -> CropSizes:
    """The sizes of a step: equal on all ranks."""
    sizes = config.all_sizes()
    weights = np.array([s.probability for s in sizes])
    return sizes[generator(seed, phase, Stream.SIZES, step).choice(len(sizes), p=weights / weights.sum())]


def empty_crops(config: CropsConfig, sizes: CropSizes, num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the global, local and Gram crops of images: uint8 [V, B, 3, H, W] each, channels last in memory."""
    kinds = (
        (NUM_GLOBAL_CROPS, sizes.global_px),
        (config.num_local_crops, sizes.local_px),
        (NUM_GLOBAL_CROPS if sizes.gram_px else 0, sizes.gram_px),
    )
    rooms = [torch.empty(views, num_images, px, px, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3) for views, px in kinds]
    return rooms[0], rooms[1], rooms[2]


def multi_crop(
    image: EncodedImage,
    config: CropsConfig,
    rng: np.random.Generator,
    sizes: CropSizes | None = None,
    out: Sequence[Tensor] = (),
) -> Crops:
    """Draw boxes, mirrors and colours, decode as small as the boxes allow, cut.

    Args:
        sizes: those of the step; by default the first of the config's.
        out: where in a batch the crops go: one image's [V, 3, H, W] of each of `empty_crops`.

    Raises:
        Damaged: the image cannot be decoded.
    """
    sizes = sizes or config.all_sizes()[0]
    num_local = config.num_local_crops
    scales = np.array([config.global_scale] * NUM_GLOBAL_CROPS + [config.local_scale] * num_local)
    boxes = draw_boxes(image.height, image.width, scales, config.aspect, rng)
    flips = (rng.random(len(boxes)) < config.flip_probability).tolist()
    photometric = draw_photometric(config, rng)
    largest_global = max(sizes.global_px, sizes.gram_px)
    sides = np.array([largest_global] * NUM_GLOBAL_CROPS + [sizes.local_px] * num_local)
    pixels = image.decode(scale=min(1.0, float((sides[:, None] / boxes[:, 2:]).max())))
    boxes = _scaled(boxes, pixels.shape[0] / image.height, pixels.shape[1] / image.width)

    out = out or [room[:, 0] for room in empty_crops(config, sizes, num_images=1)]
    for crops, first in zip(out, (0, NUM_GLOBAL_CROPS, 0), strict=True):
        for crop, (top, left, height, width), flip in zip(crops, boxes[first:], flips[first:], strict=False):
            # Channels last, with a batch dimension in front, is what torch's fastest kernel reads and writes.
            region = torch.from_numpy(pixels[top : top + height, left : left + width])[None].permute(0, 3, 1, 2)
            resized = F.interpolate(region, crop.shape[1:], mode=config.interpolation, antialias=True)[0]
            if config.edits and crops is out[0]:
                edited = edit(resized.permute(1, 2, 0).numpy(), config.edits, rng)
                resized = torch.from_numpy(edited).permute(2, 0, 1)
            crop.copy_(resized.flip(-1) if flip else resized)
    global_crops, local_crops, gram_crops = out
    of_global, of_local = photometric[:NUM_GLOBAL_CROPS], photometric[NUM_GLOBAL_CROPS:]
    return Crops(global_crops, local_crops, gram_crops, of_global, of_local)


def draw_boxes(
    height: int, width: int, scales: np.ndarray, aspect: list[float], rng: np.random.Generator
) -> np.ndarray:
    """Boxes int64 [n, 4] (top, left, height, width) in an image of height x width pixels, as RandomResizedCrop's.

    Ten tries of a uniform area and a log-uniform aspect; the first that fits counts, else the largest central box
    within the aspects.

    Args:
        scales: least and most area of each box as a share of the image [n, 2].
        aspect: least and most width / height.
    """
    uniform = rng.random((len(scales), _BOX_ATTEMPTS, 2))
    area = height * width * (scales[:, :1] + uniform[..., 0] * (scales[:, 1:] - scales[:, :1]))
    low, high = np.log(aspect)
    ratio = np.exp(low + uniform[..., 1] * (high - low))
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths >= 1) & (heights >= 1) & (widths <= width) & (heights <= height)
    first = np.argmax(fits, axis=1)
    rows = np.arange(len(scales))
    box_h, box_w = heights[rows, first], widths[rows, first]
    place = rng.random((len(scales), 2))
    top, left = np.floor(place[:, 0] * (height - box_h + 1)), np.floor(place[:, 1] * (width - box_w + 1))
    none = ~fits[rows, first]
    if none.any():
        box_h[none] = min(height, max(round(width / aspect[0]), 1)) if width / height < aspect[0] else height
        box_w[none] = min(width, max(round(height * aspect[1]), 1)) if width / height > aspect[1] else width
        top[none], left[none] = (height - box_h[none]) // 2, (width - box_w[none]) // 2
    return np.stack([top, left, box_h, box_w], axis=1).astype(np.int64)


def draw_photometric(config: CropsConfig, rng: np.random.Generator) -> Photometric:
    """The colour parameters of an image's V + L crops, the global ones first."""
    num_crops = NUM_GLOBAL_CROPS + config.num_local_crops
    uniform = rng.random((num_crops, 8))
    spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    factors = neutral + spread * (2 * uniform[:, :4] - 1)
    factors[uniform[:, 4] >= config.jitter_probability] = neutral
    low, high = config.blur_sigma
    blurred = uniform[:, 6] < config.blur_probabilities()
    sigma = np.where(blurred, low + (high - low) * rng.random(num_crops), 0.0)
    solarize = np.array([*config.global_solarize_probability, *[0.0] * config.num_local_crops])
    return Photometric(
        factors=torch.from_numpy(factors.astype(np.float32)),
        order=torch.from_numpy(np.argsort(rng.random((num_crops, 4)), axis=1).astype(np.uint8)),
        gray=torch.from_numpy(uniform[:, 5] < config.gray_probability),
        sigma=torch.from_numpy(sigma.astype(np.float32)),
        solarize=torch.from_numpy(uniform[:, 7] < solarize),
    )


def _scaled(boxes: np.ndarray, vertical: float, horizontal: float) -> list[list[int]]:
    """Boxes of the full image in one that was decoded smaller; inside it, and of a pixel at least."""
    if vertical == horizontal == 1:
        return boxes.tolist()
    scale = np.array([vertical, horizontal])
    start = np.floor(boxes[:, :2] * scale + 0.5)
    stop = np.maximum(np.floor((boxes[:, :2] + boxes[:, 2:]) * scale + 0.5), start + 1)
    return np.concatenate([start, stop - start], axis=1).astype(np.int64).tolist()
