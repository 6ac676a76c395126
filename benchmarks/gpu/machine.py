"""Section A: what is here, and the two ceilings of everything else: memory bandwidth and matrix products."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from functools import partial

import psutil
import torch

from benchmarks.gpu.measure import Setting, milliseconds, peak
from benchmarks.gpu.table import Absent, Figures, Part

NEEDED = {
    "training": ("omegaconf", "yaml", "simplejpeg", "braceexpand", "numba", "safetensors", "psutil", "PIL"),
    "curation": ("faiss", "numba", "scipy", "pyarrow", "fsspec", "rich", "ray", "pdqhash", "cv2", "webdataset"),
    "encoders": ("timm", "torchvision", "transformers"),
    "optional": ("xformers", "triton", "tensorboard", "submitit"),
}
"""Modules by who imports them."""
VERSIONS = ("torch", "torchvision", "timm", "transformers", "triton", "xformers", "numpy", "faiss-gpu", "faiss-cpu")


def machine(at: Setting) -> Iterator[Part]:
    yield "versions", lambda: versions(at)
    yield "packages missing", packages
    yield "copy", lambda: copy(at)
    rows, square = at.sizes.product_rows, at.sizes.square
    # tokens x width of ViT-L: queries, keys and values; projection; the two of the feed-forward; prototypes
    shapes = [(rows, 1024, 3072), (rows, 1024, 1024), (rows, 1024, 4096), (rows, 4096, 1024), (4096, 256, 65_536)]
    for n, k, m in [*(shapes if at.on_gpu else [(rows, 64, 256)]), (square, square, square)]:
        yield f"{n} x {k} x {m}, bfloat16", partial(product, at, n, k, m)
        yield f"{n} x {k} x {m}, fp8", partial(product_fp8, at, n, k, m)


def versions(at: Setting) -> Figures:
    found: dict[str, object] = {"python": platform.python_version(), "cores": os.cpu_count()}
    found["memory_gib"] = psutil.virtual_memory().total / 2**30
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if at.on_gpu:
        device = torch.cuda.get_device_properties(at.device)
        found |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": torch.cuda.nccl.version(),
        }
        found |= {"capability": f"{device.major}.{device.minor}", "multiprocessors": device.multi_processor_count}
        found |= {"gpu_memory_gib": device.total_memory / 2**30, "l2_mib": device.L2_cache_size / 2**20}
        found |= {"fp32_matmul": torch.get_float32_matmul_precision(), "cudnn_tf32": torch.backends.cudnn.allow_tf32}
    found["peak_tflops"] = peak(at.device)[0] / 1e12
    return found


def packages() -> Figures:
    return {
        who: ", ".join(name for name in names if importlib.util.find_spec(name) is None) or "none"
        for who, names in NEEDED.items()
    }


def copy(at: Setting) -> Figures:
    """One device-to-device copy, its bytes counted as read and as written."""
    source = torch.randint(0, 256, (at.sizes.copied_bytes,), dtype=torch.uint8, device=at.device)
    target = torch.empty_like(source)
    found = milliseconds(lambda: target.copy_(source), at)
    return {**found, "tb_per_s": 2 * len(source) / found["ms"] / 1e9}


def product(at: Setting, n: int, k: int, m: int) -> Figures:
    a, b = (torch.randn(shape, device=at.device).bfloat16() for shape in ((n, k), (k, m)))
    return rate(milliseconds(lambda: a @ b, at, budget_s=0.3), at, n, k, m)


def product_fp8(at: Setting, n: int, k: int, m: int) -> Figures:
    """One scale for each matrix, result in bfloat16: the best that fp8 linear layers could reach."""
    if not at.on_gpu or torch.cuda.get_device_capability(at.device) < (8, 9):
        raise Absent("no fp8 matrix units here")
    a = torch.randn(n, k, device=at.device).to(torch.float8_e4m3fn)
    b = torch.randn(m, k, device=at.device).to(torch.float8_e4m3fn).T  # column-major, as the kernel takes it
    one = torch.ones((), device=at.device)

    def multiply() -> object:
        scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
        return scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return rate(milliseconds(multiply, at, budget_s=0.3), at, n, k, m)


def rate(found: dict[str, float], at: Setting, n: int, k: int, m: int) -> Figures:
    flops = 2 * n * k * m / found["ms"] * 1000
    return {**found, "tflops": flops / 1e12, "of_bfloat16_peak": flops / peak(at.device)[0]}
