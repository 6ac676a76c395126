"""What a run costs: operations, bytes and seconds, from numbers of images and the settings. Pure arithmetic.

Rates are of one core (AMD EPYC with AVX-512), measured by `python -m benchmarks.rates` on 21 November 2026 but where
the comment says otherwise; they are good to a factor of two on other machines. Operations count a multiply-add as two.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.encoders.load import View, load_encoder, parse_spec
from curation.ops.retrieval import SAMPLED_QUERIES

# Reading, hashing and decoding one JPEG: 2.9 ms at 500 x 375, 0.75 ms at 128 x 96; resizing to a view costs the same
# for each pixel of the view.
DECODE_S = 0.5e-3
DECODE_S_PER_MEGAPIXEL = 12e-3
DESCRIPTOR_IMAGES_PER_S = 1_700.0  # descriptors-likeness; 3,800 for descriptors
EMBED_FLOPS = 268e9  # ViT-S/14 in bfloat16; 104e9 in float32, on processors without bfloat16
KMEANS_FLOPS = 115e9  # curation.ops.nearest.assign, 4,096 centroids, 384-d
SKETCHES_PER_S = 2.0e9  # curation.ops.neighbours.near_rows with all that goes with it, 256-d, 250 rows a cell
RETRIEVE_FLOPS = 74e9  # curation.ops.join.nearest, 256-d, 250 rows a cell
SHARD_BYTES_PER_S = 800e6  # sha256 and tar in memory; a disk or a network is usually slower
# Published, not measured here: 45% of the peak of one A100 (312e12); k-means at 50%.
A100_EMBED_FLOPS = 140e12
A100_KMEANS_FLOPS = 156e12

# Bytes of one row.
INDEX_BYTES = 200.0  # index/*.parquet, zstd; 137 with short keys and metadata (9,400 images)
SKETCH_AND_GID_BYTES = 40.0
EDGE_BYTES = 4.0  # zstd; edges and forest, at one edge for every five rows
DEDUP_BYTES = 21.0  # representative, component, similarity, step
DECISION_BYTES = 30.0  # zstd; 15 with short keys
TAR_OVERHEAD_BYTES = 3072.0  # two headers, padding, the .json
# The driver holds some columns of the index for the whole pool: sha256, two perceptual hashes, what sorting them takes.
DRIVER_BYTES = 250.0

PLANNED_NPROBE = 128  # of 4,096 cells: recall 0.99 on a million hard vectors; the run measures its own
PLANNED_SHARE = 0.03  # of the pool that a query meets for recall 0.99: 2.4 to 3.3%, whatever the number of cells
EXACT_ROWS = 2**14  # pools below this are compared pair by pair
CERTIFY_QUERIES = 1024


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
    """What a step takes: operations (or comparisons), seconds of one core, and A100-seconds where a GPU would do it."""

    flop: float = 0.0
    core_s: float = 0.0
    gpu_s: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flop + other.flop, self.core_s + other.core_s, self.gpu_s + other.gpu_s)


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
    return Work(flop, flop / EMBED_FLOPS, flop / A100_EMBED_FLOPS)


def product_work(rows: float, columns: float, dim: int) -> Work:
    """All inner products of rows and columns."""
    flop = 2.0 * rows * columns * dim
    return Work(flop, flop / KMEANS_FLOPS, flop / A100_KMEANS_FLOPS)


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


def join_work(num_queries: float, num_rows: float, num_cells: int, dim: int, both_ways: bool) -> Work:
    """Each query meets the rows of its cells: by sketches, or all rows exactly where they are few."""
    ways = 2 if both_ways else 1
    if num_rows <= EXACT_ROWS:
        flop = ways * 2.0 * num_queries * num_rows * dim
        return Work(flop, flop / RETRIEVE_FLOPS)
    compared = ways * num_queries * num_rows * min(1.0, PLANNED_NPROBE / num_cells)
    return Work(0.0, compared / SKETCHES_PER_S) + product_work(ways * num_queries, num_cells, dim)


def certify_work(num_rows: float, dim: int) -> Work:
    """The first sample by brute force."""
    flop = 2.0 * dim * CERTIFY_QUERIES * num_rows if num_rows > EXACT_ROWS else 0.0
    return Work(flop, flop / RETRIEVE_FLOPS)


def retrieve_work(num_seeds: float, num_rows: float, num_clusters: int, dim: int) -> Work:
    """A sample of the seeds meets the whole pool, the others the clusters that the sample shows to be needed."""
    sampled = min(num_seeds, SAMPLED_QUERIES)
    others = num_seeds - sampled
    flop = 2.0 * dim * num_rows * (sampled + PLANNED_SHARE * others)
    return Work(flop, flop / RETRIEVE_FLOPS) + product_work(others, num_clusters, dim)


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
