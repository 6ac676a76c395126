"""The rates that `--dry-run` reckons with (curation/planning/costs.py), measured on one core of this machine.

    python -m benchmarks.rates                      everything on generated data, about a minute
    python -m benchmarks.rates --tar POOL.tar       and read + decode on one of your own shards

Processor seconds, summed over threads, so that a busy machine changes little. Prints one line for each rate.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from curation.encoders.load import encoder_view, load_encoder
from curation.encoders.weights import DESCRIPTOR_NAMES
from curation.ops.cells import cells_from_arrays
from curation.ops.join import nearest
from curation.ops.nearest import assign
from curation.ops.neighbours import self_pairs
from curation.reading.listing import find_parts
from curation.reading.pictures.images import ImageLimits
from curation.reading.sources import read_samples
from curation.stages.decode import DecodeJob, prepare_samples
from curation.writing.tars import ShardBuilder

SPECS = ("descriptors", "vit_small_patch14_dinov2.lvd142m")
LIMITS = ImageLimits()


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The least processor time of some repeats, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def jpeg_tar(path: Path, size: tuple[int, int], count: int) -> Path:
    """A WebDataset tar of smooth pictures with some noise: about 70 kB each at 500 x 375."""
    rng = np.random.default_rng(0)
    builder = ShardBuilder()
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(image, np.int16) + rng.normal(0, 8, (size[1], size[0], 1)).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        builder.add(f"{number:06d}", [("jpg", buffer.getvalue()), ("json", b"{}")])
    path.write_bytes(builder.finish())
    return path


def read_and_decode(label: str, tar: Path) -> None:
    part = find_parts([str(tar)])[0]
    samples = list(read_samples(part, LIMITS.max_file_bytes))
    read_s = seconds(lambda: sum(1 for _ in read_samples(part, LIMITS.max_file_bytes)))
    print(f"{label}: tar read {len(samples) / read_s:,.0f} images/s, {part.size / read_s / 1e6:,.0f} MB/s")
    for specs in (SPECS[:1], SPECS[1:]):
        job = DecodeJob(tuple({encoder_view(spec) for spec in specs}), LIMITS, (), 64)
        rows = [prepared.row for prepared in prepare_samples(samples, part, job)]
        decode_s = seconds(lambda job=job: list(prepare_samples(samples, part, job)), repeats=2)
        megapixels = sum(row["width"] * row["height"] for row in rows) / 1e6
        print(
            f"{label}: decode + hashes + view of {'+'.join(specs)}: {len(rows) / decode_s:,.0f} images/s "
            f"({decode_s / len(rows) * 1e3:.2f} ms of {megapixels / len(rows):.3f} megapixels)"
        )


def unit_rows(num_rows: int, dim: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((num_rows, dim), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def vectors() -> None:
    for spec in DESCRIPTOR_NAMES:
        encoder = load_encoder(spec)
        shape = (256, encoder.view.height, encoder.view.width, 3)
        views = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        embed_s = seconds(lambda encoder=encoder, views=views: encoder.embed(views))
        print(f"{spec}: {len(views) / embed_s:,.0f} images/s")

    rows, centroids = unit_rows(40_000, 384, 1), unit_rows(4096, 384, 2)
    products = 2.0 * len(rows) * len(centroids) * 384
    print(f"k-means: {products / seconds(lambda: assign(rows, centroids, num_threads=1)) / 1e9:,.1f} GFLOP/s")

    rows, centroids = unit_rows(200_000, 256, 3), unit_rows(800, 256, 4)
    cells = cells_from_arrays(rows, np.arange(len(rows)), assign(rows, centroids)[0], centroids)
    nprobe, queries = 128, 20_000
    compared = queries * nprobe * len(rows) / len(centroids)
    join_s = seconds(lambda: self_pairs(cells, 0, queries, 0.6, nprobe, 88))
    print(f"join: {compared / join_s / 1e6:,.0f} million sketches/s, all included")
    found_s = seconds(lambda: nearest(rows[:2000], cells, 4, 64, num_threads=1), repeats=2)
    print(f"retrieve: {2.0 * 2000 * 64 * len(rows) / len(centroids) * 256 / found_s / 1e9:,.1f} GFLOP/s")


def torch_model() -> None:
    import timm
    import torch

    from curation.planning.costs import encoder_cost

    torch.set_num_threads(1)
    model = timm.create_model(SPECS[1], pretrained=False, num_classes=0, img_size=224).eval()
    images = torch.zeros(8, 3, 224, 224)
    flop = encoder_cost(SPECS[1], encoder_view(SPECS[1])).flop
    for bfloat16 in (False, True):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            model_s = seconds(lambda: model(images), repeats=2)
        name = "bfloat16" if bfloat16 else "float32"
        print(f"{SPECS[1]}, {name}: {8 / model_s:,.1f} images/s, {8 * flop / model_s / 1e9:,.0f} GFLOP/s")


def shards(tar: Path) -> None:
    samples = list(read_samples(find_parts([str(tar)])[0], LIMITS.max_file_bytes))

    def build() -> None:
        builder = ShardBuilder()
        for sample in samples:
            builder.add(sample.key, [("jpg", sample.content or b""), ("json", b"{}" * 600)])
        (tar.parent / "shard.tar").write_bytes(builder.finish())

    build_s = seconds(build)
    print(f"shard write: {len(samples) / build_s:,.0f} images/s, {tar.stat().st_size / build_s / 1e6:,.0f} MB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tar", type=Path, action="append", default=[])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tar = jpeg_tar(Path(folder) / "500x375.tar", (500, 375), 200)
        read_and_decode("500x375", tar)
        read_and_decode("128x96", jpeg_tar(Path(folder) / "128x96.tar", (128, 96), 400))
        for own in options.tar:
            read_and_decode(own.name, own)
        shards(tar)
    vectors()
    torch_model()


if __name__ == "__main__":
    main()
