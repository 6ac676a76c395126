"""Data loading, one thread: the published pipeline against ours, interleaved in one run.

    python -m benchmarks.loading [--images 32] [--repeats 7]

One image is a 500 x 375 JPEG of quality 95; it becomes 2 x 224 and 8 x 96 pixel crops. The published way: Pillow
decodes, torchvision (v2, on Pillow images) cuts and distorts each crop, floats come out. Ours: a batch of the loader,
from tar to uint8 crops, parameters and masks ("colours on the device"); and the same followed by `prepare` on the
processor, so that the same floats come out ("everything on the processor"). Images are drawn on the spot, or
photographs of SEEDBED_DATA enlarged, where that is set. Processor time is measured, as other jobs may run beside.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pretrain.data.collate import prepare
from pretrain.data.crops import CropsConfig, multi_crop
from pretrain.data.decode import open_image
from pretrain.data.loader import DataConfig, DatasetConfig, LoaderConfig, Steps, build_loader
from pretrain.data.masks import MaskConfig
from pretrain.data.reference import ReferenceCrops

SIZE = (500, 375)
PUBLISHED, DEVICE, PROCESSOR = "published", "ours, colours on the device", "ours, everything on the processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=32, help="of a batch")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        contents, source = images(options.images)
        write_shard(Path(folder) / "images.tar", contents)
        steps = make_steps(folder, options.images)
        rates = compare(paths(steps, contents), options.images, options.repeats)
    print(f"{options.images} images, {SIZE[0]} x {SIZE[1]} JPEG, {source}; one thread, by processor time")
    print(f"{'path':36} {'img/s, median':>14} {'best':>8} {'x published':>12}")
    for name, values in rates.items():
        ratio = statistics.median(a / b for a, b in zip(values, rates[PUBLISHED], strict=True))
        print(f"{name:36} {statistics.median(values):14.1f} {max(values):8.1f} {ratio:12.2f}")


def images(count: int) -> tuple[list[bytes], str]:
    """JPEGs, and a word on where they are from."""
    folder = os.environ.get("SEEDBED_DATA")
    pictures = photographs(Path(folder), count) if folder else [drawn(seed) for seed in range(count)]
    contents = []
    for picture in pictures:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=95)
        contents.append(buffer.getvalue())
    return contents, "photographs enlarged" if folder else "drawn"


def photographs(folder: Path, count: int) -> list[Image.Image]:
    found = []
    with tarfile.open(folder / "seed" / "seed-0000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg") and (file := tar.extractfile(member)):
                found.append(Image.open(file).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC))
            if len(found) == count:
                break
    return found


def drawn(seed: int) -> Image.Image:
    """Noise at four scales, from large patches of colour to grain."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((SIZE[1], SIZE[0], 3))
    for cells, strength in ((4, 1.0), (16, 0.5), (64, 0.25), (250, 0.12)):
        noise = Image.fromarray(rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8))
        pixels += strength * (np.asarray(noise.resize(SIZE, Image.Resampling.BICUBIC), float) - 128)
    return Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))


def write_shard(path: Path, contents: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, content in enumerate(contents):
            info = tarfile.TarInfo(f"{i:05d}.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def make_steps(folder: str, num_images: int) -> Steps:
    return build_loader(
        DataConfig(datasets={"images": DatasetConfig(shards=folder)}),
        CropsConfig(),
        MaskConfig(),
        patch_size=16,
        seed=0,
        phase=0,
        start_step=0,
        num_steps=1,
        global_batch_size=num_images,
        rank=0,
        world_size=1,
        execution=LoaderConfig(num_workers=0),
    ).steps


def paths(steps: Steps, contents: list[bytes]) -> dict[str, Callable[[int], object]]:
    """What to time: functions of the repetition."""
    reference = ReferenceCrops(CropsConfig())
    return {
        PUBLISHED: lambda i: [reference(content, 1000 * i + j) for j, content in enumerate(contents)],
        DEVICE: lambda i: steps[i],
        PROCESSOR: lambda i: prepare(steps[i], "cpu"),
        "  of it: decode": lambda i: [open_image(content).decode() for content in contents],
        "  of it: decode and crops": lambda i: [
            multi_crop(open_image(content), CropsConfig(), np.random.default_rng([i, j]))
            for j, content in enumerate(contents)
        ],
    }


def compare(timed: dict[str, Callable[[int], object]], num_images: int, repeats: int) -> dict[str, list[float]]:
    """Images a second of each path in each repetition; they take turns, so that a busy machine slows all alike."""
    rates: dict[str, list[float]] = {name: [] for name in timed}
    for repetition in range(repeats + 1):
        for name, run in timed.items():
            start = time.process_time()
            run(repetition)
            if repetition:  # the first warms up
                rates[name].append(num_images / (time.process_time() - start))
    return rates


if __name__ == "__main__":
    main()
