"""A backbone that stays as it is, and its features of whole sets: what every evaluation begins with."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from curation.engine.progress import StageProgress
from pretrain.distributed import collectives
from pretrain.downstream.backbone import ImageSettings
from pretrain.downstream.evals.labelled import Batch, LeftOut, batches
from pretrain.downstream.pixels import find_sets
from pretrain.models.vision_transformer import Features
from pretrain.stopping import Stopped

T = TypeVar("T")


class Tokens(Protocol):
    """What is evaluated: a backbone in eval mode, or what answers as one does, as a sharded teacher."""

    @property
    def patch_size(self) -> int: ...

    def __call__(self, crops: Sequence[Tensor]) -> list[Features]: ...


class Advancing(Protocol):
    """Progress, shown or not."""

    def advance(self, amount: float) -> None: ...


class _Unseen:
    def advance(self, amount: float) -> None:
        pass


@dataclass(frozen=True, eq=False)
class Pooled:
    """Features of a set's images, in the order of their keys.

    cls: float32 [N, L, D], of the last L blocks, the last one last. mean: float32 [N, D], of the last block's patches.
    """

    keys: list[str]
    labels: list[str]
    cls: Tensor
    mean: Tensor
    left_out: LeftOut

    @property
    def last(self) -> Tensor:
        """CLS after the last block, [N, D]."""
        return self.cls[:, -1]


@dataclass(eq=False)
class Frozen:
    """A backbone on its device, how its images are prepared, and how many go through it at once.

    Several ranks that hold one share out the images of a set and go through them in step: the backbone may be sharded.
    """

    tokens: Tokens
    image: ImageSettings
    """how pixels are normalised, and the side of the centre crop where a set names none"""
    device: torch.device
    num_layers: int = 1
    """the last so many blocks give a CLS token each; more than one for what has `layers`"""
    batch_size: int = 64
    bfloat16: bool = False
    show_progress: bool = False
    left: Callable[[], bool] = lambda: False
    """whether this rank is asked to stop"""
    _known: dict[tuple[object, ...], Pooled] = field(default_factory=dict)

    def picture_px(self, asked: int) -> int:
        """Shorter side of a whole picture: as asked, or by default twice the crop."""
        return asked or 2 * self.image.px

    # Not inference mode: what FSDP keeps from one forward to the next must serve training too.
    @torch.no_grad()
    def features(self, images: Tensor) -> Features:
        """Tokens after the last block and the final norm; images: uint8 [B, 3, H, W], on the device."""
        with self._precision():
            return self.tokens([self.image.normalise(images)])[0]

    @torch.no_grad()
    def pool(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """CLS [B, L, D] of the last blocks and the mean [B, D] of the last patches, float32; images as for features."""
        with self._precision():
            if self.num_layers == 1:
                layers = self.tokens([self.image.normalise(images)])
            else:
                depth: int = self.tokens.depth
                wanted = range(max(depth - self.num_layers, 0), depth)
                layers = self.tokens.layers(self.image.normalise(images), wanted)
        return torch.stack([one.cls.float() for one in layers], dim=1), layers[-1].patches.float().mean(dim=1)

    def _precision(self) -> torch.autocast | nullcontext[None]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def share(
        self, pattern: str, labels: str, px: int, resize_px: int, max_images: int = 0, needs_label: bool = True
    ) -> Pooled:
        """Features of this rank's share of a set (of all of it, in one process), and what of the whole set could not
        be used; what was computed before is known.

        Args:
            labels: csv of labels, see `labelled.LABELS`; may be empty.
            px, resize_px: side of the centre crop, and shorter side before it.
            max_images: the first ones only; 0 for all.

        Raises:
            ValueError: no image, or more than MAX_LEFT_OUT of them damaged or without a label that is needed.
            Stopped: a rank was asked to stop.
        """
        asked = (pattern, labels, px, resize_px, max_images, needs_label)
        if asked not in self._known:
            self._known[asked] = self._share(*asked)
        return self._known[asked]

    def _share(self, pattern: str, labels: str, px: int, resize_px: int, max_images: int, needs_label: bool) -> Pooled:
        mine, parts = LeftOut(), []
        reading = batches(
            pattern,
            px,
            resize_px,
            self.batch_size,
            labels,
            max_images,
            left_out=mine,
            rank=collectives.rank(),
            num_ranks=collectives.world_size(),
            needs_label=needs_label,
        )
        keys: list[str] = []
        names: list[str] = []

        def embed(batch: Batch | None) -> None:
            if batch is None:  # another rank needs this one's part of the network
                self.pool(torch.zeros(1, 3, px, px, dtype=torch.uint8, device=self.device))
                return
            parts.append(self.pool(batch.images.to(self.device, non_blocking=True)))
            names.extend(batch.labels)
            keys.extend(batch.keys)

        if not collectives.in_step(self._shown(reading, pattern, mine), embed, self.left):
            raise Stopped
        left_out = LeftOut.of_all(collectives.from_every_rank(mine))
        left_out.check(pattern, labels)

        def joined() -> tuple[Tensor, Tensor]:
            if not parts:
                nothing = torch.empty(0, 1, device=self.device)
                return nothing[None].transpose(0, 1), nothing
            cls, mean = zip(*parts, strict=True)
            return torch.cat(cls), torch.cat(mean)

        cls, mean = collectives.together(joined)
        return _by_key(Pooled(keys, names, cls, mean, left_out))

    def all_of(
        self, pattern: str, labels: str, px: int, resize_px: int, max_images: int = 0, needs_label: bool = True
    ) -> Pooled:
        """The same of the whole set, on every rank, in the order of keys. Raises as `share`."""
        asked = (pattern, labels, px, resize_px, max_images, needs_label)
        mine = self.share(*asked)
        if collectives.world_size() == 1:
            return mine
        if ("all", *asked) not in self._known:
            self._known["all", *asked] = _of_every_rank(mine, self.device)
        return self._known["all", *asked]

    def progress(self, label: str, total: float, unit: str) -> AbstractContextManager[Advancing]:
        """Shown where this process shows progress."""
        return StageProgress(label, total, unit) if self.show_progress else nullcontext(_Unseen())

    def forget(self) -> None:
        """Free the features of sets that were computed."""
        self._known.clear()

    def _shown(self, found: Iterable[T], pattern: str, mine: LeftOut) -> Iterator[T]:
        total = sum(part.size for part in find_sets(pattern)) / collectives.world_size()
        done = 0
        with self.progress("features", total / 1e6, "MB") as progress:
            for one in found:
                yield one
                progress.advance((mine.read_bytes - done) / 1e6)
                done = mine.read_bytes
            progress.advance(max(total - done, 0) / 1e6)


def _of_every_rank(mine: Pooled, device: torch.device) -> Pooled:
    rows = (mine.keys, mine.labels, mine.cls.cpu(), mine.mean.cpu())
    every = [rank for rank in collectives.from_every_rank(rows) if rank[0]]
    keys, labels = ([one for rank in every for one in rank[place]] for place in (0, 1))
    cls, mean = (torch.cat([rank[place] for rank in every]).to(device) for place in (2, 3))
    return _by_key(Pooled(keys, labels, cls, mean, mine.left_out))


def _by_key(found: Pooled) -> Pooled:
    """In the order of keys, so that the order of parts and ranks changes no figure."""
    order = sorted(range(len(found.keys)), key=found.keys.__getitem__)
    if order == list(range(len(order))):
        return found
    keys, labels = ([those[n] for n in order] for those in (found.keys, found.labels))
    return Pooled(keys, labels, found.cls[order], found.mean[order], found.left_out)


def numbered(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """int64 [N]: the place of each label among the classes, -1 of one that is not there."""
    number = {name: n for n, name in enumerate(classes)}
    return np.array([number.get(label, -1) for label in labels], np.int64)
