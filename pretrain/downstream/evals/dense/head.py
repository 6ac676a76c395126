"""One linear layer on frozen patch features, trained on whole pictures: what segmentation and depth share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.ranges import SEEDS, check_ranges
from pretrain.distributed import collectives
from pretrain.downstream.evals.dense.pairs import Pair, as_images, over_pictures, pairs
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.labelled import LeftOut, about_images
from pretrain.downstream.evals.pooled.linear import batch_orders
from pretrain.downstream.pixels import find_sets
from pretrain.models.vision_transformer import Features

UPSAMPLE = 4
"""scores are learned at this many times the grid of patches; judged at the size of the map"""


@dataclass(frozen=True, eq=False)
class Seen:
    """What is kept of a picture: its patch features (float16, on the processor) and its map."""

    key: str
    patches: Tensor
    """[h, w, D]"""
    cls: Tensor
    """[D]; [0] where the head does not see it"""
    truth: np.ndarray
    """[H, W], at the size of the set; of a training picture [4 h, 4 w]"""

    @property
    def width(self) -> int:
        """Of what the head sees of a patch."""
        return self.patches.shape[2] + len(self.cls)


class LinearHead(nn.Module):
    """Batch normalisation, then one linear layer, on each patch."""

    def __init__(self, width: int, outputs: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, outputs)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Pictures of one size together, [B, h, w, D] each -> scores [B, C, h, w] each."""
        rows = self.linear(self.norm(torch.cat([one.flatten(0, 2) for one in groups])))
        parts = rows.split([one.shape[:3].numel() for one in groups])
        return [part.unflatten(0, one.shape[:3]).permute(0, 3, 1, 2) for part, one in zip(parts, groups, strict=True)]


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, h, w] -> [B, C, H, W], bilinear."""
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """How pictures are shown to the backbone, and what is kept of them."""

    member: str
    """`seg` or `depth`: which map"""
    short_px: int
    """shorter side"""
    memory_gb: float
    """of the features of all pictures of a set"""
    with_cls: bool
    """the head sees CLS beside every patch"""
    prepared: Callable[[str, np.ndarray], np.ndarray]
    """key and map [H, W] as it lies in the set -> what is learned and judged by; ValueError where that is none"""


def views(
    frozen: Frozen, pattern: str, maps: str, config: ViewConfig, for_training: bool
) -> tuple[list[Seen], LeftOut]:
    """The pictures of a set, as the head sees them; for training each with its mirror image.

    Raises:
        ValueError: pictures that cannot be used, or that take more memory than `memory_gb`.
    """
    taken = 0

    def work(pair: Pair, features: Callable[[Tensor], Features]) -> list[Seen]:
        nonlocal taken
        images = as_images(pair.picture)
        found = features(torch.cat([images, images.flip(3)]) if for_training else images)
        kept = found.patches.unflatten(1, found.grid).to("cpu", torch.float16)
        cls = found.cls.to("cpu", torch.float16)[:, : None if config.with_cls else 0]
        taken += kept.numel() * 2
        # Known from the first picture on; every rank keeps the pictures of all.
        most = max(taken * collectives.world_size(), kept.numel() * 2 * pictures)
        if most > config.memory_gb * 1e9:
            raise ValueError(
                f"the features of {pattern!r}, about {pictures:,} pictures, take about {most / 1e9:,.2g} GB, more than "
                f"memory_gb={config.memory_gb:g}: give more, a smaller px, or fewer pictures."
            )
        assert pair.truth is not None, "pairs without a map are left out"
        truth = config.prepared(pair.key, pair.truth)
        if not for_training:
            return [Seen(pair.key, kept[0], cls[0], truth)]
        small = nearest(truth, (UPSAMPLE * kept.shape[1], UPSAMPLE * kept.shape[2]))
        return [Seen(pair.key, kept[0], cls[0], small), Seen(pair.key, kept[1], cls[1], small[:, ::-1])]

    pictures = sum(about_images(part) for part in find_sets(pattern))
    patch = frozen.tokens.patch_size

    def reading(left_out: LeftOut, rank: int, num_ranks: int) -> Iterator[Pair]:
        return pairs(pattern, maps, config.member, config.short_px, patch, left_out, rank=rank, num_ranks=num_ranks)

    found, left_out = over_pictures(frozen, f"{config.member} features", pattern, reading, work)
    return [one for several in found for one in several], left_out


def seen_together(those: Sequence[Seen], device: torch.device) -> Tensor:
    """What the head sees of pictures of one size, float32 [B, h, w, D], CLS beside every patch where it is kept."""
    patches = torch.stack([one.patches for one in those])
    cls = torch.stack([one.cls for one in those])[:, None, None].expand(*patches.shape[:3], -1)
    return torch.cat([patches, cls], dim=3).to(device, torch.float32)


def nearest(map_: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] -> [h, w]: the pixel at the middle of each of the new ones."""
    rows, columns = (((np.arange(n) + 0.5) * old / n).astype(np.int64) for n, old in zip(size, map_.shape, strict=True))
    return map_[rows[:, None], columns]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """How the layer is trained: AdamW with a one-cycle rate, warm-up over 3.75% of the steps and then a cosine, as
    published."""

    epochs: int
    """through the training pictures"""
    least_steps: int = 1000
    batch_size: int = 16
    """pictures a step"""
    rate: float = 1e-3
    """highest"""
    weight_decay: float
    memory_gb: float = 16.0
    """of the features of one set, in GB: beyond it, an error"""
    seed: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()  # as the command line has it
        counts = ("epochs", "least_steps", "batch_size")
        check_ranges(name, self, **dict.fromkeys(counts, "[1, inf)"), seed=SEEDS)
        check_ranges(name, self, rate="(0, inf)", weight_decay="[0, inf)", memory_gb="(0, inf)")

    def num_steps(self, pictures: int) -> int:
        return max(self.least_steps, -(-self.epochs * pictures // self.batch_size))


def train_head(
    frozen: Frozen,
    head: LinearHead,
    seen: Sequence[Seen],
    loss: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
    config: HeadConfig,
    label: str,
) -> int:
    """Train the head on the device of the backbone, and leave it in eval mode; returns the steps that it took.

    Args:
        seen: each picture and its mirror image.
        loss: scores [B, C, 4 h, 4 w] and maps [B, 4 h, 4 w] of a batch, pictures of one size together -> a mean.
        label: shown beside the progress.
    """
    device, steps = frozen.device, config.num_steps(len(seen) // 2)
    head.to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.rate, weight_decay=config.weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.rate, total_steps=steps, pct_start=0.0375, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(config.seed)
    with frozen.progress(label, steps, "steps") as progress:
        for numbers in batch_orders(len(seen), config.batch_size, steps, generator):
            by_size: dict[torch.Size, list[Seen]] = {}
            for one in (seen[n] for n in numbers.tolist()):
                by_size.setdefault(one.patches.shape, []).append(one)
            groups = list(by_size.values())
            scores = head([seen_together(those, device) for those in groups])
            maps = [torch.from_numpy(np.stack([one.truth for one in those])).to(device) for those in groups]
            sized = [resized(one, (m.shape[1], m.shape[2])) for one, m in zip(scores, maps, strict=True)]
            optimizer.zero_grad()
            loss(sized, maps).backward()
            optimizer.step()
            cycle.step()
            progress.advance(1)
    head.eval()
    return steps


@torch.no_grad()
def judged(head: LinearHead, one: Seen, device: torch.device, size: tuple[int, int]) -> Tensor:
    """Scores [C, H, W] of a picture at a size."""
    (scores,) = head([seen_together([one], device)])
    return resized(scores, size)[0]
