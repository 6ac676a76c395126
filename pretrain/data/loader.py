"""Batches for one rank, step by step: order -> bytes -> crops -> masks. Any number of workers gives the same bytes.

A worker makes whole batches: `Steps[step]` is a pure function of the settings and the step, so resuming is starting at
another step, and nothing of the loader goes into a checkpoint.
"""

import gc
import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from configs.ranges import check_ranges
from pretrain.data.collate import Batch, Skipped, collate
from pretrain.data.crops import NUM_GLOBAL_CROPS, Crops, CropsConfig, CropSizes, empty_crops, multi_crop, step_sizes
from pretrain.data.decode import Damaged, ImageLimits, open_image
from pretrain.data.masks import MaskConfig, step_masks
from pretrain.data.order import Mixture, SampleOrder
from pretrain.data.randomness import Stream, generator
from pretrain.data.shards import ImageTable, ShardReader, read_table
from pretrain.stopping import ignore_stop_signals

MAX_REDRAWS = 100
ODD = ("dark_16_bit",)  # notes of the reader that say that an image is of little use
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One curated dataset."""

    shards: str
    """a folder of images, tars or Parquet files, a glob or {0000..0009} braces of them, a .txt list of paths, or a run
    folder of curation; local or a URL"""
    weight: float = 1.0
    """share of the heterogeneous batches, relative to the other datasets; 0 only for the homogeneous one"""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from, and how datasets are mixed."""

    datasets: dict[str, DatasetConfig] = field(default_factory=dict)
    """by name"""
    homogeneous: str = ""
    """the dataset that some batches are made of alone (DINOv3: ImageNet-1k); empty for none"""
    homogeneous_share: float = 0.0
    """share of steps with such a batch (DINOv3: 0.1), exact in every hundred steps"""
    shuffle_shards: int = 64
    """shards whose images are mixed with each other within an epoch; 0 for all (8 bytes an image in each worker)"""
    limits: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        check_ranges("data", self, homogeneous_share="[0, 1]", shuffle_shards="[0, inf)")
        for name, dataset in self.datasets.items():
            if not dataset.shards.strip():
                raise ValueError(f"data.datasets.{name}.shards (--data) is empty: name images, tars or Parquet.")
            check_ranges(f"data.datasets.{name}", dataset, weight="[0, inf)")
        if self.homogeneous and self.datasets and self.homogeneous not in self.datasets:
            raise ValueError(
                f"data.homogeneous={self.homogeneous!r} is none of data.datasets: {', '.join(self.datasets)}."
            )
        if bool(self.homogeneous) != (self.homogeneous_share > 0):
            raise ValueError("data.homogeneous and data.homogeneous_share: give both or neither.")
        if self.datasets and self.homogeneous_share < 1 and not sum(d.weight for d in self.datasets.values()) > 0:
            raise ValueError("data.datasets: the weights are all 0.")
        for name, dataset in self.datasets.items():
            if dataset.weight == 0 and name != self.homogeneous:
                raise ValueError(f"data.datasets.{name}.weight=0 never draws from it: leave it out.")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made; none of it changes them."""

    num_workers: int = 2
    """processes on each rank that decode and crop; 0: in the training process itself"""
    prefetch: int = 2
    """batches that each worker makes ahead, in shared memory (/dev/shm)"""
    timeout_s: float = 600.0
    """to wait for a batch before giving up; 0 for ever"""

    def __post_init__(self) -> None:
        ranges = {"num_workers": "[0, inf)", "prefetch": "[1, inf)", "timeout_s": "[0, inf)"}
        check_ranges("execution.loader", self, **ranges)


class Steps(Dataset[Batch]):
    """step -> this rank's batch of that step."""

    def __init__(
        self,
        tables: dict[str, ImageTable],
        order: SampleOrder,
        crops: CropsConfig,
        masks: MaskConfig,
        limits: ImageLimits,
        patch_size: int,
        images: range,
    ) -> None:
        self.names = list(tables)
        self.readers = [ShardReader(table) for table in tables.values()]
        self.order, self.crops, self.masks, self.limits = order, crops, masks, limits
        self.patch_size, self.images = patch_size, images

    def __getitem__(self, step: int) -> Batch:
        # Hundreds of small resizes: threads cost more than they bring. Worker processes have one anyway.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._batch(step)
        finally:
            torch.set_num_threads(threads)

    def _batch(self, step: int) -> Batch:
        seed, phase = self.order.seed, self.order.phase
        datasets, rows = self.order.batch(step)
        sizes = step_sizes(self.crops, seed, phase, step)
        skipped: list[Skipped] = []
        odd: list[Skipped] = []
        pixels = empty_crops(self.crops, sizes, len(self.images))
        crops = [
            self._crops(step, position, int(datasets[position]), int(rows[position]), sizes, skipped, odd, out)
            for position, *out in zip(self.images, *(room.unbind(1) for room in pixels), strict=True)
        ]
        positions = np.array(self.images)
        return collate(
            crops,
            step=step,
            sizes=sizes,
            masks=self._masks(step, positions, sizes) if self.masks.probability > 0 else None,
            positions=torch.from_numpy(positions),
            datasets=torch.from_numpy(datasets[positions]),
            skipped=skipped,
            odd=odd,
            pixels=pixels,
        )

    def _crops(
        self,
        step: int,
        position: int,
        dataset: int,
        row: int,
        sizes: CropSizes,
        skipped: list[Skipped],
        odd: list[Skipped],
        out: Sequence[torch.Tensor],
    ) -> Crops:
        """Crops of the image at a position, or of the first sound one that is drawn instead."""
        reader, reason = self.readers[dataset], ""
        for attempt in range(1 + MAX_REDRAWS):
            if attempt:
                row = self.order.redraw(step, position, dataset, attempt)
            rng = generator(self.order.seed, self.order.phase, Stream.CROPS, step, position, attempt)
            try:
                image = open_image(reader.read(row), self.limits)
                crops = multi_crop(image, self.crops, rng, sizes, out)
                odd += [Skipped(self.names[dataset], reader.name(row), note) for note in image.notes if note in ODD]
                return crops
            except Damaged as damage:
                reason = damage.reason
                skipped.append(Skipped(self.names[dataset], reader.name(row), reason))
        raise ValueError(
            f"data.datasets.{self.names[dataset]}: {1 + MAX_REDRAWS} images drawn one after another are all damaged "
            f"(the last: {skipped[-1].image}, {reason}); look at the shards, or take the dataset out."
        )

    def _masks(self, step: int, positions: np.ndarray, sizes: CropSizes) -> torch.Tensor:
        """bool [V, B, N]"""
        side = sizes.global_px // self.patch_size
        order = self.order
        return torch.from_numpy(
            step_masks(
                self.masks,
                (side, side),
                positions,
                order.batch_size,
                NUM_GLOBAL_CROPS,
                order.seed,
                order.phase,
                step,
            )
        )


@dataclass(frozen=True)
class _Refused:
    """What a worker says instead of a batch: its exception would arrive with a traceback for a message."""

    message: str


class _Answers(Dataset["Batch | _Refused"]):
    """What Steps gives, and what the user is to be told as an answer."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def __getitem__(self, step: int) -> Batch | _Refused:
        try:
            return self.steps[step]
        except ValueError as error:
            return _Refused(str(error))


def worker_failure(error: RuntimeError) -> str:
    """One sentence for an error that torch raises because a loader worker died or is late; empty for any other."""
    text = " ".join(str(error).split())
    if "DataLoader timed out" in text:
        return (
            "no batch came in execution.loader.timeout_s seconds: the shards cannot be read fast enough, or hang; "
            "raise it (0: wait for ever), or look at the disk or network that they lie on."
        )
    if "DataLoader worker" in text:
        memory = "; its shared memory is full" if "bus error" in text.lower() or "shm" in text else ""
        return (
            f"a loader worker was killed from outside{memory}: most often memory has run out. Lower "
            "execution.loader.num_workers or execution.loader.prefetch; the same command continues from the last "
            f"checkpoint. ({text})"
        )
    return ""


def quiet_hook(met: threading.ExceptHookArgs) -> None:
    """No traceback for an OSError in a thread of a library, such as torch's sharing of memory.

    What it means reaches the training itself: the next write, or the next batch, fails.
    """
    if not issubclass(met.exc_type, OSError | EOFError):
        threading.__excepthook__(met)


def _start_worker(number: int) -> None:
    gc.enable()  # training collects by steps, a worker has none
    ignore_stop_signals(number)
    threading.excepthook = quiet_hook
    former = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, OSError | EOFError):  # the thread that shares tensors calls this hook, not the other
            former(kind, error, trace)

    sys.excepthook = hook


class Loader:
    """One batch a step, from start_step on; iterate it once or again. `tables` says what was found."""

    def __init__(self, steps: Steps, tables: dict[str, ImageTable], numbers: range, execution: LoaderConfig) -> None:
        self.steps, self.tables, self.numbers, self.execution = steps, tables, numbers, execution

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Batch]:
        """Raises ValueError: a batch that cannot be made. RuntimeError: a worker died (see `worker_failure`)."""
        workers = self.execution.num_workers
        answers = DataLoader(
            _Answers(self.steps),
            batch_size=None,
            sampler=self.numbers,
            num_workers=workers,
            prefetch_factor=self.execution.prefetch if workers else None,
            timeout=self.execution.timeout_s if workers else 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else it draws a number from the global one
        )
        batches = iter(answers)
        while True:
            try:
                answer = next(batches)
            except StopIteration:
                return
            except (ConnectionError, EOFError) as error:  # its tensors go with it
                raise RuntimeError(f"DataLoader worker exited unexpectedly: {error}") from None
            if isinstance(answer, _Refused):
                raise ValueError(answer.message)
            yield answer

    def fingerprints(self) -> dict[str, str]:
        """What each dataset was, for a checkpoint: equal ones give the same order."""
        return {name: table.fingerprint() for name, table in self.tables.items()}


def build_loader(
    config: DataConfig,
    crops: CropsConfig,
    masks: MaskConfig,
    *,
    patch_size: int,
    seed: int,
    phase: int,
    start_step: int,
    num_steps: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    execution: LoaderConfig,
    tables: dict[str, ImageTable] | None = None,
) -> Loader:
    """Batches of steps start_step .. start_step + num_steps - 1 of a phase, for one rank.

    Rank r has images r * B / ranks onwards of each global batch of B, so ranks together have what one rank would.

    Args:
        tables: those of a former phase's loader, to spare listing the shards again.

    Raises:
        ValueError: no dataset, no shards, an empty dataset, fewer images than a global batch, a batch that does not
            split over the ranks, a crop that the patch does not divide.
    """
    check_sizes(crops, patch_size)
    if global_batch_size < 1 or global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        raise ValueError(
            f"global_batch_size={global_batch_size} does not split over {world_size} ranks; the nearest that do are "
            f"{' and '.join(str(n) for n in (below, below + world_size) if n)}."
        )
    if not config.datasets:
        raise ValueError("data.datasets is empty: give --data PATH, or data.datasets.NAME.shards=PATH.")
    if tables is None:
        tables = read_tables(config)
    for name, table in tables.items():
        if len(table) < global_batch_size:
            raise ValueError(
                f"data.datasets.{name} has {len(table)} images, fewer than global_batch_size={global_batch_size}: "
                "lower the batch, or name more shards."
            )
    names = list(config.datasets)
    mixture = Mixture(
        starts=[tables[name].starts for name in names],
        weights=[config.datasets[name].weight for name in names],
        homogeneous=names.index(config.homogeneous) if config.homogeneous else -1,
        homogeneous_share=config.homogeneous_share,
        shuffle_shards=config.shuffle_shards,
    )
    per_rank = global_batch_size // world_size
    order = SampleOrder(mixture, global_batch_size, seed, phase)
    images = range(rank * per_rank, (rank + 1) * per_rank)
    steps = Steps({name: tables[name] for name in names}, order, crops, masks, config.limits, patch_size, images)
    return Loader(steps, tables, range(start_step, start_step + num_steps), execution)


def read_tables(config: DataConfig) -> dict[str, ImageTable]:
    """What each dataset holds.

    Raises:
        ValueError: a dataset without shards or images, with its name.
    """
    tables = {}
    for name, dataset in config.datasets.items():
        try:
            tables[name] = read_table(dataset.shards, config.limits)
        except Exception as error:
            # Clients of object stores have exceptions of their own, as for credentials that are not there.
            if not isinstance(error, ValueError | OSError) and "://" not in dataset.shards:
                raise
            text = " ".join(str(error).split())
            raise ValueError(f"data.datasets.{name}.shards: {text or type(error).__name__}") from error
        _logger.info("%s: %d images in %d shards", name, len(tables[name]), len(tables[name].shards))
    return tables


def check_sizes(crops: CropsConfig, patch_size: int) -> None:
    """Every side is a multiple of the patch, but for local crops whose remainder is dropped.

    Raises:
        ValueError: one is not; the nearest that are.
    """
    for sizes in crops.all_sizes():
        sides = {"global_px": sizes.global_px, "gram_px": sizes.gram_px}
        if not crops.drop_local_remainder:
            sides["local_px"] = sizes.local_px
        elif sizes.local_px < patch_size:
            raise ValueError(f"crops.local_px={sizes.local_px} is less than a patch of {patch_size}.")
        for name, side in sides.items():
            if side % patch_size:
                below = side // patch_size * patch_size
                near: Sequence[int] = [n for n in (below, below + patch_size) if n]
                raise ValueError(
                    f"crops.{name}={side} is not a multiple of the patch size {patch_size}; the nearest that are: "
                    f"{' and '.join(map(str, near))}."
                )
