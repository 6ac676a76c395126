"""What every section needs: the device and its clock, sizes, errors, peaks."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.sizes import FULL, TINY, Sizes
from pretrain import compiling
from pretrain.watch.flops import peak_flops
from pretrain.watch.metrics import machine, memory_mib


@dataclass(frozen=True)
class Setting:
    """Where and how long a section measures."""

    device: torch.device
    sizes: Sizes
    end: float
    """of its time, on the clock of time.perf_counter"""
    work: Path
    """scratch folder of the whole benchmark; its sections share what they make there"""
    images: tuple[str, ...]
    """labelled tars of the user's own; none: pictures are drawn"""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        return machine(self.device)["device"]

    def left_s(self) -> float:
        return self.end - time.perf_counter()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def begin(self) -> None:
        """Before a part: what an earlier one held is given back, and the peak of memory starts anew."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def setting(device: str, seconds: float, work: Path, images: list[str]) -> Setting:
    """The setting of a section that starts now."""
    torch.manual_seed(0)
    if device == "cpu":
        # Blocks are traced, not turned into code: on a processor that takes longer than everything else here.
        torch.set_num_threads(1)  # threads bring nothing at these sizes, and wait for each other on a busy machine
        compiling.BACKEND = "aot_eager"
        return Setting(torch.device("cpu"), TINY, time.perf_counter() + seconds, work, tuple(images))
    torch.cuda.set_device(0)
    return Setting(torch.device("cuda", 0), FULL, time.perf_counter() + seconds, work, tuple(images))


def milliseconds(work: Callable[[], object], at: Setting, budget_s: float = 0.5, most: int = 50) -> dict[str, float]:
    """Median and least time of one call, warmed up: `ms`, `least_ms`, `calls`. By the device's own clock on a GPU."""
    for _ in range(2):
        work()
    at.synchronize()
    times, end = [], time.perf_counter() + min(budget_s if at.on_gpu else budget_s / 10, max(at.left_s(), 0))
    while len(times) < 3 or (len(times) < most and time.perf_counter() < end):
        times.append(_once(work, at))
    return {"ms": statistics.median(times), "least_ms": min(times), "calls": len(times)}


def _once(work: Callable[[], object], at: Setting) -> float:
    if not at.on_gpu:
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def memory(at: Setting) -> dict[str, float]:
    """Most memory that tensors held since the part began; on a processor the process's, now."""
    return {"memory_gib": memory_mib(at.device) / 1024}


def measured_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1536, budget_s: float = 0.5) -> float:
    """The best rate of a square matrix product on this machine, in FLOP/s: a peak where no data sheet gives one.

    On a machine that others use too it is what they leave: for ratios within one run.

    Args:
        size: side of the matrices.
        budget_s: seconds to spend after one product to warm up.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    torch.mm(a, b)
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@functools.cache
def peak(device: torch.device) -> tuple[float, str]:
    """Dense bfloat16 peak in FLOP/s, and where the figure is from."""
    known = peak_flops(device)
    if known:
        return known, "data sheet"
    return measured_peak_flops(device, torch.bfloat16, size=512, budget_s=0.05), "measured"


def relative_error(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference| in the Euclidean norm, in float64; infinite where a value is not finite."""
    found, reference = found.detach().double().cpu(), reference.detach().double().cpu()
    error = ((found - reference).norm() / reference.norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def check(error: float, tolerance: float, **more: Any) -> dict[str, Any]:
    """One line of parity: the error, what it may be, and whether it is."""
    return {**more, "error": error, "tolerance": tolerance, "ok": error <= tolerance}
