"""What a run costs: operations, bytes and seconds, from numbers of images and the settings. Pure arithmetic.

Rates are of one core (AMD EPYC with AVX-512), measured by `python -m benchmarks.rates` on 21 November 2026 but where
the comment says otherwise; they are good to a factor of two on other machines. Operations count a multiply-add as two.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.encoders.encoder import View
from curation.encoders.load import load_encoder, parse_spec
from curation.ops.retrieval import SAMPLED_QUERIES

# Reading, hashing and decoding one JPEG: 2.9 ms at 500 x 375, 0.75 ms at 128 x 96; resizing to a view costs the same
# for each pixel of the view.
DECODE_S = 0.5e-3
DECODE_S_PER_MEGAPIXEL = 12e-3
DESCRIPTOR_IMAGES_PER_S = 1_700.0  # descriptors-likeness; 2,700 for copies
EMBED_FLOPS = 268e9  # ViT-S/14 in bfloat16; 104e9 in float32, on processors without bfloat16
KMEANS_FLOPS = 115e9  # curation.ops.nearest.assign, 4,096 centroids, 384-d
# curation.ops.neighbours.near_rows, 256-d: 2.6e9 in further cells (27 November 2026), and what a row costs beside them.
SKETCHES_PER_S = 2.0e9
JOIN_ROW_S = 14e-6
HASHES_PER_S = 0.3e9  # near perceptual hashes, of which 6.2e-3 N^2 are compared bit by bit
RETRIEVE_FLOPS = 74e9  # curation.ops.join.nearest, 256-d, 250 rows a cell
SHARD_BYTES_PER_S = 800e6  # sha256 and tar in memory; a disk or a network is usually slower
# By `python -m benchmarks.scale index` at 1 to 30 million rows, 27 November 2026: seconds of all tasks for a row.
FILTER_S, HEADS_S, GROUPS_S, SURVIVORS_S, DECIDE_S = 0.7e-6, 2.8e-6, 1.8e-6, 0.3e-6, 2.0e-6
UNION_S = 0.1e-6  # of the driver: heads and forests into union-find, labels out (0.02 without files)
SHARD_PLAN_S, SHARD_PLAN_DRIVER_S = 7e-6, 1e-6  # for a kept row, of a pool of which a quarter is kept: same
# Vectors into files of cells (curation.stages.grouped), sketches for the most part: 5.3, 13 and 26 us a row of 128, 512
# and 1024 dimensions, of all tasks (27 November 2026); for a row and a dimension.
GROUPED_S = 26e-9
SUMS_BYTES_PER_S = 1e9  # of k-means over tasks, merged by the driver
# Reckoned from what the step reads and writes (Parquet with zstd: 0.3 and 0.5 us a row), not measured.
BALANCE_S, REPORT_S = 1e-6, 2e-6
RANKED_S = 0.5e-6  # of a neighbour of a seed image
# Published, not measured here: 45% of the peak of one A100; k-means at 50%, the join's products at 40%.
A100_PEAK = 312e12
A100_EMBED_FLOPS = 140e12
A100_KMEANS_FLOPS = 156e12
A100_JOIN_FLOPS = 125e12

# Bytes of one row.
INDEX_BYTES = 200.0  # index/*.parquet, zstd; 137 with short keys and metadata (9,400 images)
SKETCH_AND_GID_BYTES = 72.0
EDGE_BYTES = 4.0  # zstd; edges and forest, at one edge for every five rows
DEDUP_BYTES = 21.0  # representative, component, similarity, step
DECISION_BYTES = 30.0  # zstd; 15 with short keys
TAR_OVERHEAD_BYTES = 3072.0  # two headers, padding, the .json
# Read and written by the tasks of a step, exchanges included, as counted by the benchmark.
FILTER_BYTES = 98.0
HEADS_READ, HEADS_WRITTEN, GROUPS_READ, GROUPS_WRITTEN = 210.0, 108.0, 210.0, 83.0

# Memory. A process of Python, Ray, Arrow and numba; the driver holds a parent and a flag for each image, no column.
PROCESS_BYTES, DRIVER_PROCESS_BYTES = 0.4e9, 0.6e9
RANGE_BYTES = 60.0  # of a row of a range while its task works on it
INDEX_ROW_BYTES = 700.0  # of a row of the index, unpacked, a million at a time
BUCKET_COPIES = 4  # of an exchange's bucket, an eighth of execution.memory_gb, while it is sorted and grouped

PLANNED_SHARE = 0.03  # of the pool that a query meets for recall 0.99: 2.4 to 3.3%, whatever the number of cells
EXACT_ROWS = 2**14  # pools below this are compared pair by pair
CERTIFY_QUERIES, CERTIFY_ROUNDS = 1024, 2
CERTIFY_SKETCHED = 32_768  # further queries, by sketches: 23,000 on 200,000 hard vectors; at most 65,536


@dataclass(frozen=True)
class EncoderCost:
    """One encoder: operations for an image, parameters, width of a row."""

    flop: float
    parameters: float
    dim: int
    is_torch: bool = True
    has_mirror: bool = False
    """whether signs turn a row into that of the flipped image, so that the join asks both ways"""


@dataclass(frozen=True)
class Work:
    """What a step takes: operations, seconds of one core, and A100-seconds where GPUs would do some of it."""

    flop: float = 0.0
    core_s: float = 0.0
    gpu_s: float = 0.0
    movable_s: float = 0.0
    """of core_s, what a core need not do where GPUs take gpu_s"""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flop + other.flop,
            self.core_s + other.core_s,
            self.gpu_s + other.gpu_s,
            self.movable_s + other.movable_s,
        )


def on_either(flop: float, core_s: float, gpu_flops: float) -> Work:
    """Products that a core does in core_s, or an A100 at gpu_flops a second."""
    return Work(flop, core_s, flop / gpu_flops, core_s)


def encoder_cost(spec: str, view: View) -> EncoderCost:
    """Counted on a model without weights (torch's meta device), so nothing is downloaded or allocated."""
    kind, name, path = parse_spec(spec)
    if kind == "descriptors":
        encoder = load_encoder(spec)  # nothing to load
        return EncoderCost(0.0, 0.0, encoder.dim, is_torch=False, has_mirror=encoder.mirror is not None)
    if kind == "sscd":  # ResNet-50, GeM, a 512-d head: 4.1 G multiply-adds at 224 px
        return EncoderCost(8.2e9 * view.height * view.width / 224**2, 24.6e6, 512)
    if kind == "timm":
        return _timm_cost(name, view)
    return _hf_cost(Path(path), view)


def decode_work(num_images: float, megapixels: float, views: list[View]) -> Work:
    """Read, hash, decode and resize images of `megapixels` each."""
    resized = sum((v.resize_short_px or v.width) * (v.resize_short_px or v.height) for v in views) / 1e6
    return Work(core_s=num_images * (DECODE_S + DECODE_S_PER_MEGAPIXEL * (megapixels + resized)))


def encode_work(num_images: float, cost: EncoderCost) -> Work:
    if not cost.is_torch:
        return Work(core_s=num_images / DESCRIPTOR_IMAGES_PER_S)
    flop = num_images * cost.flop
    return on_either(flop, flop / EMBED_FLOPS, A100_EMBED_FLOPS)


def product_work(rows: float, columns: float, dim: int) -> Work:
    """All inner products of rows and columns."""
    flop = 2.0 * rows * columns * dim
    return on_either(flop, flop / KMEANS_FLOPS, A100_KMEANS_FLOPS)


def kmeans_work(num_training: float, num_clusters: float, dim: int, num_iterations: int) -> Work:
    """2 N K D an iteration; the first two fifths look at a quarter of the rows where there are enough."""
    iterations = num_iterations * (0.7 if num_training >= 32 * num_clusters else 1.0)
    return product_work(num_training * iterations, num_clusters, dim)


def level_work(
    num_rows: float, num_items: float, num_clusters: int, num_groups: int, rounds: int, dim: int, num_iterations: int
) -> Work:
    """One level of a hierarchy: k-means of num_rows of its items, each resampling trains on half and assigns all.

    Where it is split, k-means makes the groups, every item finds its own, and each group does the same by itself.
    """
    each = num_clusters / num_groups
    total = kmeans_work(num_rows, each, dim, num_iterations) + product_work(num_items, each, dim)
    for _ in range(rounds):
        total += kmeans_work(num_rows / 2, each, dim, num_iterations) + product_work(num_rows, each, dim)
    if num_groups > 1:
        coarse = min(num_rows, 256.0 * num_groups)
        total += kmeans_work(coarse, num_groups, dim, num_iterations) + product_work(num_items, num_groups, dim)
    return total


def join_work(
    num_queries: float, num_rows: float, num_cells: int, dim: int, both_ways: bool, share: float = PLANNED_SHARE
) -> Work:
    """Each query meets a share of the rows: by sketches, on a GPU by products, or all rows exactly where they are few.

    f N^2 for a pool with itself: the share for a stated recall does not depend on the number of cells.
    """
    ways = 2 if both_ways else 1
    if num_rows <= EXACT_ROWS:
        flop = ways * 2.0 * num_queries * num_rows * dim
        return on_either(flop, flop / RETRIEVE_FLOPS, A100_JOIN_FLOPS)
    compared = ways * num_queries * num_rows * min(1.0, max(share, 1 / num_cells))
    total = on_either(2.0 * compared * dim, compared / SKETCHES_PER_S, A100_JOIN_FLOPS)
    total += Work(core_s=ways * num_queries * JOIN_ROW_S)
    return total + (product_work(ways * num_queries, num_cells, dim) if share < 1 else Work())


def run_share(rows_a_run: float, num_rows: float, num_cells: int) -> float:
    """Of the cells, those that a run of the join reads: what its own cells probe, taken as independent of each other.

    Rows of one cell probe different cells, so each counts twice.
    """
    cells_a_run = max(rows_a_run / num_rows * num_cells, 1.0)
    return 1 - (1 - min(PLANNED_SHARE, 1.0)) ** (2 * cells_a_run)


def certify_work(num_rows: float, dim: int, both_ways: bool = False) -> Work:
    """The first sample by brute force, the others by sketches of a wide radius."""
    if num_rows <= EXACT_ROWS:
        return Work()
    ways = 2 if both_ways else 1
    flop = ways * 2.0 * dim * CERTIFY_QUERIES * num_rows
    sketched = ways * min(CERTIFY_SKETCHED, num_rows) * num_rows
    first = on_either(flop, flop / RETRIEVE_FLOPS, A100_JOIN_FLOPS)
    return first + on_either(2.0 * dim * sketched, sketched / SKETCHES_PER_S, A100_JOIN_FLOPS)


def perceptual_work(num_queries: float, num_rows: float) -> Work:
    """Near hashes, each query with each row: 6.2e-3 N^2 comparisons for all pairs of N."""
    return Work(core_s=2 * 6.2e-3 * num_queries * num_rows / HASHES_PER_S)


def retrieve_work(num_seeds: float, num_rows: float, num_clusters: int, dim: int) -> Work:
    """A sample of the seeds meets the whole pool, the others the clusters that the sample shows to be needed."""
    sampled = min(num_seeds, SAMPLED_QUERIES)
    others = num_seeds - sampled
    flop = 2.0 * dim * num_rows * (sampled + PLANNED_SHARE * others)
    return on_either(flop, flop / RETRIEVE_FLOPS, A100_JOIN_FLOPS) + product_work(others, num_clusters, dim)


def grouping_work(num_rows: float, dim: int) -> Work:
    """Vectors into files of cells, by tasks."""
    return Work(core_s=num_rows * dim * GROUPED_S)


def grouping_requests(num_rows: float, num_chunks: float, dim: int) -> float:
    """Of that exchange: see curation.stages.grouped, whose sizes these are."""
    items = min(num_chunks, max(64.0, num_rows * 2 * dim / 2**30))
    return exchange_requests(items, -(-num_rows * (2 * dim + SKETCH_AND_GID_BYTES) // 2**27)) + 2 * num_chunks


def merging_s(num_clusters: float, dim: int, num_iterations: int, num_files: int = 64) -> float:
    """Seconds of the driver to add up what the tasks of each iteration of k-means found, float64."""
    return num_iterations * num_files * num_clusters * dim * 8 / SUMS_BYTES_PER_S


def driver_bytes(num_images: float) -> float:
    """Of the step that finds components: union-find's parents, int32 where they suffice, and a flag each."""
    return num_images * ((4 if num_images < 2**32 - 1 else 8) + 1)


def exchange_requests(num_maps: float, num_buckets: float) -> float:
    """Of curation.engine.exchange: two files a map task, a range of each for each bucket, a file a bucket."""
    return num_maps * (num_buckets + 3) + num_buckets


def _timm_cost(name: str, view: View) -> EncoderCost:
    import timm
    import torch

    size = {"img_size": view.height} if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False) else {}
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0, **size).eval()
    return _counted(model, view)


def _hf_cost(folder: Path, view: View) -> EncoderCost:
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModel.from_config(config).eval()
    return _counted(model, view)


def _counted(model: Any, view: View) -> EncoderCost:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        out = model(torch.zeros(1, 3, view.height, view.width, device="meta"))
    rows = out if isinstance(out, torch.Tensor) else out.last_hidden_state[:, 0]
    parameters = sum(p.numel() for p in model.parameters())
    return EncoderCost(float(counter.get_total_flops()), float(parameters), rows.shape[-1])
