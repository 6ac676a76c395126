"""Sections B, F and G: whole training steps, `pretrain.phase.Phase.step`, on one batch that lies ready."""

import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.measure import Setting, memory, peak
from benchmarks.gpu.table import Absent, Figures, Part
from benchmarks.train_step import STEP, fixed_batch, our_phase
from pretrain.config import TrainConfig, load_train_config
from pretrain.data.collate import Batch
from pretrain.data.prefetch import transferred
from pretrain.phase import Phase

LARGE, BASE, SMALL = "dinov2_vitl16_short", "dinov2_vitb16_short", "dinov2_vits16_short"
# Two heads and Sinkhorn-Knopp, as in the full recipes; KoLeo over whatever images a step has.
_FULL_RECIPE = ("heads.tied=false", "loss.centering=sinkhorn", "loss.koleo_group_size=0")
TOP_KERNELS = 40


def step_config(at: Setting, name: str, images: int, *settings: str) -> TrainConfig:
    """A published config at the sizes of this device, in bfloat16, one process."""
    own = [*_FULL_RECIPE, *at.sizes.models, f"global_batch_size={images}", "execution.compile=false", *settings]
    return load_train_config(name, own, [])


def ready(config: TrainConfig, at: Setting) -> tuple[Phase, Batch]:
    """A phase on the device, and a batch for it."""
    return our_phase(config, at.device), ready_batch(config, at)


def ready_batch(config: TrainConfig, at: Setting) -> Batch:
    """A batch in the memory that the loader would have it in."""
    batch = fixed_batch(config, most_pictures=16)
    return batch.pin_memory() if at.on_gpu else batch


def eager_large(at: Setting) -> Iterator[Part]:
    config = step_config(at, LARGE, at.sizes.large_images[0])
    phase, batch = ready(config, at)
    yield f"ViT-L, {len(batch)} images", lambda: timed_steps(phase, batch, at, share=0.4)
    yield "kernels of one step", lambda: kernels(phase, batch, at)
    yield "transfers", lambda: transfers(phase, batch, at)


def compiled_large(at: Setting) -> Iterator[Part]:
    """One phase, whose batch grows: building ViT-L takes the processor several seconds."""
    # The reasons, in log.txt.
    torch._logging.set_logs(recompiles=True, graph_breaks=True)  # pyright: ignore[reportPrivateImportUsage]
    first, *others = at.sizes.large_images
    phase, batch = ready(step_config(at, LARGE, first, "execution.compile=true"), at)
    yield f"ViT-L, {first} images, compiled", partial(compiled_steps, phase, batch, at, share=0.25)
    yield "kernels of one compiled step", partial(kernels, phase, batch, at)
    for images in others:
        larger = ready_batch(step_config(at, LARGE, images), at)
        yield f"ViT-L, {images} images, compiled", partial(compiled_steps, phase, larger, at, share=0.3)
    del phase
    yield f"ViT-L, {first} images, compiled, 8-bit products", partial(eight_bit_steps, at, first)


def eight_bit_steps(at: Setting, images: int) -> dict[str, Any]:
    """`compiled_steps` with `model.fp8`."""
    if not at.on_gpu:
        raise Absent("the tiny model has no layer that is wide enough")
    phase, batch = ready(step_config(at, LARGE, images, "execution.compile=true", "model.fp8=true"), at)
    return compiled_steps(phase, batch, at, share=0.5)


def transfers(phase: Phase, batch: Batch, at: Setting) -> Figures:
    """Steps of a batch in page-locked memory: copied as part of the step, and beside the one before, as in training."""
    count = 5 if at.on_gpu else 1
    figures = {}
    for name, batches in (
        ("within_ms", itertools.repeat(batch)),
        ("beside_ms", transferred(itertools.repeat(batch), at.device)),
    ):
        start = time.perf_counter()
        for each in itertools.islice(batches, count):
            phase.step(each, STEP, diagnose=False)
        at.synchronize()
        figures[name] = 1000 * (time.perf_counter() - start) / count
    return figures


def smaller(at: Setting) -> Iterator[Part]:
    models = (("ViT-S", SMALL, at.sizes.small_images), ("ViT-B", BASE, at.sizes.base_images))
    for model, name, images in models:
        config = step_config(at, name, images)
        yield f"{model}, {images} images", lambda config=config: timed_steps(*ready(config, at), at, share=0.15)
    for model, name, images in models:
        config = step_config(at, name, images, "execution.compile=true")
        yield (
            f"{model}, {images} images, compiled",
            lambda config=config: compiled_steps(*ready(config, at), at, share=0.2),
        )


def timed_steps(phase: Phase, batch: Batch, at: Setting, share: float) -> dict[str, Any]:
    """Mean time of a step within a share of the section's time, and what it is of the device's peak."""
    start = time.perf_counter()
    step(phase, batch, at)
    first_s = time.perf_counter() - start
    one_s = min(step(phase, batch, at) for _ in range(2))
    count = int(min(max(share * at.left_s() / one_s, 2), at.sizes.timed_steps))
    start = time.perf_counter()
    for _ in range(count):
        phase.step(batch, STEP, diagnose=False)
    at.synchronize()
    step_s = (time.perf_counter() - start) / count
    flops = phase.flops(batch.sizes) * len(batch)
    highest, source = peak(at.device)
    return {
        "step_ms": 1000 * step_s,
        "images_per_s": len(batch) / step_s,
        "tflops": flops / step_s / 1e12,
        "mfu": flops / step_s / highest,
        "peak_tflops": highest / 1e12,
        "peak_from": source,
        **memory(at),
        "first_step_s": first_s,
        "steps": count,
    }


def step(phase: Phase, batch: Batch, at: Setting) -> float:
    """Seconds of one step, to its end on the device."""
    start = time.perf_counter()
    phase.step(batch, STEP, diagnose=False)
    at.synchronize()
    return time.perf_counter() - start


def compiled_steps(phase: Phase, batch: Batch, at: Setting, share: float) -> dict[str, Any]:
    """`timed_steps` with compiled blocks, and what compiling them came to."""
    before = compilations()
    figures = timed_steps(phase, batch, at, share)
    return figures | {name: count - before[name] for name, count in compilations().items()}


def compilations() -> dict[str, int]:
    """Graphs compiled in this process so far (more than one for a kind of block is a recompilation), and breaks."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def kernels(phase: Phase, batch: Batch, at: Setting) -> list[Figures]:
    """The kernels (on a processor: operators) that a step spends most in, and how long the device had nothing to do."""
    step_ms = 1000 * min(step(phase, batch, at) for _ in range(3))  # without the profiler, which slows the host down
    activity = ProfilerActivity.CUDA if at.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as trace:
        step(phase, batch, at)
    found: dict[str, list[float]] = {}
    spans = []
    for event in trace.events() or []:
        if getattr(event, "is_user_annotation", False) or (event.device_type == DeviceType.CPU) == at.on_gpu:
            continue
        spans.append((event.time_range.start, event.time_range.end))
        own = spans[-1][1] - spans[-1][0] if at.on_gpu else event.self_cpu_time_total
        found.setdefault(event.name, []).append(own)
    busy_ms = covered(spans) / 1000
    top = sorted(found.items(), key=lambda item: -sum(item[1]))[:TOP_KERNELS]
    whole = {
        "launches": len(spans),
        "busy_ms": busy_ms,
        "step_ms": step_ms,
        "idle_share": max(1 - busy_ms / step_ms, 0.0) if at.on_gpu else None,
    }
    rows = [{"kernel": name[:160], "ms": sum(us) / 1000, "launched": len(us)} for name, us in top]
    return [whole, *rows]


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return total
