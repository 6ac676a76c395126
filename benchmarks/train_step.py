"""A training step on the processor, ours against lightly's and lightly-train's: time, peak memory, where ours goes.

    python -m benchmarks.train_step                                  all tables (about 20 minutes on two cores)
    python -m benchmarks.train_step --prototypes 65536 --batch 4 --precision float32 --rounds 7
    python -m benchmarks.train_step --drop-path 0.3 --architecture dinov3_vits16 --only seedbed

ViT-S/16, 2 x 224 + 8 x 96 px, separate heads, one fixed batch: forwards of teacher and student, losses, backward,
clip, AdamW, EMA. Ours also distorts the colours of its uint8 crops inside the step; the others get theirs ready-made.
Contenders take turns, so a noisy neighbour hits all alike; median and least of `--rounds` after two warm-ups, and
processor seconds over all threads, which a busy machine moves least (best with --threads 1).
lightly runs as in benchmarks/peers/lightly_dinov2.py. lightly-train (AGPL: it is run, and nothing of it is here) takes
part where it is installed: put it into an environment of its own that sees this one's packages, and start from there.
It takes the same sizes, separate heads and Sinkhorn-Knopp; its Trainer is left out, whose part it is to call these
steps.
"""

import argparse
import copy
import ctypes
import importlib.util
import io
import multiprocessing
import os
import random
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import pretrain.phase
from pretrain.config import TrainConfig
from pretrain.data.collate import Batch, collate, prepare
from pretrain.data.crops import multi_crop
from pretrain.data.decode import ImageLimits, open_image
from pretrain.data.masks import step_masks
from pretrain.phase import Phase, fresh_network
from pretrain.settings import HeadConfig, HeadsConfig, ModelConfig

WARM_UPS = 2
STEP = 20_000  # of 125,000: past the warm-up and the freeze of the prototypes
PUBLIC_DINOV3 = {(4, 65_536): 2.85, (4, 4_096): 2.23}
"""Seconds of the public DINOv3 step (ViT-S/16, float32) on two such cores, as measured when this was planned."""
CONTENDERS = ("seedbed", "lightly", "lightly-train")
Step = Callable[[], object]


def train_config(asked: argparse.Namespace, prototypes: int, batch: int, precision: str) -> TrainConfig:
    head = HeadConfig(num_prototypes=prototypes)
    learned = asked.architecture.startswith("dinov2")
    model = ModelConfig(
        architecture=asked.architecture,
        patch_size=16,
        position_px=224 if learned else None,
        drop_path=asked.drop_path,
    )
    return TrainConfig(
        global_batch_size=batch, precision=precision, model=model, heads=HeadsConfig(dino=head, ibot=head)
    )


def fixed_batch(config: TrainConfig, most_pictures: int = 1 << 30) -> Batch:
    """Crops of random pictures, as the loader makes them; of `most_pictures` in turns where the batch is larger."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(min(config.global_batch_size, most_pictures)):
        content = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)).save(content, "JPEG")
        images.append(multi_crop(open_image(content.getvalue(), ImageLimits()), config.crops, rng))
    images = [images[i % len(images)] for i in range(config.global_batch_size)]
    size, side = config.global_batch_size, config.crops.global_px // config.patch_size
    masks = step_masks(config.masks, (side, side), np.arange(size), size, 2, 0, 0, 0)
    return collate(
        images,
        step=0,
        sizes=config.crops.all_sizes()[0],
        masks=torch.from_numpy(masks),
        positions=torch.arange(size),
        datasets=torch.zeros(size, dtype=torch.int64),
        skipped=[],
    )


def seedbed(config: TrainConfig) -> Step:
    phase, batch = our_phase(config), fixed_batch(config)
    return lambda: phase.step(batch, STEP, diagnose=False)


def our_phase(config: TrainConfig, device: torch.device | str = "cpu") -> Phase:
    student = fresh_network(config).to(device)
    return Phase(config, 0, student, copy.deepcopy(student))


def views(config: TrainConfig) -> list[torch.Tensor]:
    """The fixed batch as the others take it: 2 + 8 normalised crops [B, 3, H, W]."""
    global_crops, local_crops, _ = prepare(fixed_batch(config), "cpu")
    return [*global_crops.chunk(2), *local_crops.chunk(config.crops.num_local_crops)]


def lightly(config: TrainConfig) -> Step:
    from benchmarks.peers.lightly_dinov2 import LightlyDinov2, draw_masks, timm_encoder

    random.seed(0)
    peer, crops = LightlyDinov2(config, timm_encoder), views(config)
    return lambda: peer.step(crops, draw_masks(config, 2 * len(crops[0])), STEP)


def lightly_train(config: TrainConfig) -> Step:
    os.environ["XFORMERS_DISABLED"] = "1"  # else it insists on kernels that need a GPU
    from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2AdamWViTArgs, DINOv2Args
    from lightly_train._models.dinov2_vit.dinov2_vit import DINOv2ViTModelWrapper
    from lightly_train._models.dinov2_vit.dinov2_vit_package import DINOv2ViTPackage
    from lightly_train._models.embedding_model import EmbeddingModel

    same = {"patch_size": config.patch_size, "drop_path_rate": config.model.drop_path, "img_size": 224}
    same["num_register_tokens"] = 0
    model = DINOv2ViTPackage.get_model("vits14", model_args=same, load_weights=False)
    method = DINOv2(
        DINOv2Args(
            output_dim=config.heads.dino.num_prototypes,
            ibot_separate_head=True,
            center_method="sinkhorn_knopp",
            weight_decay_start=config.optim.weight_decay,
        ),
        DINOv2AdamWViTArgs(),
        EmbeddingModel(DINOv2ViTModelWrapper(model)),
        global_batch_size=config.global_batch_size,
        num_input_channels=3,
    )
    method._trainer = SimpleNamespace(global_step=STEP, estimated_stepping_batches=config.steps, max_epochs=100)
    optimizer = method.configure_optimizers()[0][0]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    batch: Any = {"views": views(config)}

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            loss = method.training_step_impl(batch, 0).loss
        loss.backward()
        method.on_before_optimizer_step(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(method)

    def update_teacher(method: Any) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(method.student_embedding_model, method.teacher_embedding_model, m=0.994)
        update_momentum(method.student_head, method.teacher_head, m=0.994)

    return step


BUILD: dict[str, Callable[[TrainConfig], Step]] = {
    "seedbed": seedbed,
    "lightly": lightly,
    "lightly-train": lightly_train,
}


def take_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds of each contender's steps, `rounds` each after the warm-ups."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(WARM_UPS + rounds):
        for name, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {name: values[WARM_UPS:] for name, values in seconds.items()}


def peak_growth_mib(name: str, config: TrainConfig, threads: int) -> float:
    """Peak resident memory of building a contender and taking three steps, above what the imports need, in MiB."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply_async(measure_growth, (name, config, threads)).get(timeout=600)


def measure_growth(name: str, config: TrainConfig, threads: int) -> float:
    prepare_process(threads)
    BUILD[name](small(config))()  # imports and thread pools
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_kib("VmRSS")
    step = BUILD[name](config)
    for _ in range(3):
        step()
    return (resident_kib("VmHWM") - before) / 1024


def small(config: TrainConfig) -> TrainConfig:
    head = HeadConfig(num_prototypes=64)
    return TrainConfig(
        global_batch_size=2,
        precision=config.precision,
        model=config.model,
        heads=HeadsConfig(dino=head, ibot=head),
    )


def resident_kib(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


STAGES = {
    "colours, masks to tensors": (pretrain.phase.Crops, "from_batch"),
    "teacher forward": (pretrain.phase, "teacher_outputs"),
    "centring": (pretrain.phase.Centering, "forward"),
    "student forward, losses": (pretrain.phase, "student_losses"),
    "backward": (torch.Tensor, "backward"),
    "clip": (pretrain.phase, "clip_by_module"),
    "AdamW": (pretrain.phase, "step_unless"),
    "EMA": (pretrain.phase, "update_ema"),
}


@contextmanager
def timed_stages(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up the time spent in each stage of our step."""
    original = {stage: getattr(owner, name) for stage, (owner, name) in STAGES.items()}

    def timed(stage: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original[stage](*args, **kwargs)
            seconds[stage] += time.perf_counter() - start
            return result

        return call

    for stage, (owner, name) in STAGES.items():
        wrapped = timed(stage)
        setattr(owner, name, staticmethod(wrapped) if name == "from_batch" else wrapped)
    try:
        yield
    finally:
        for stage, (owner, name) in STAGES.items():
            setattr(owner, name, staticmethod(original[stage]) if name == "from_batch" else original[stage])


def stage_table(config: TrainConfig, rounds: int) -> None:
    step = seedbed(config)
    step()
    rows: list[dict[str, float]] = []
    totals = []
    for _ in range(rounds):
        seconds: dict[str, float] = defaultdict(float)
        with timed_stages(seconds):
            start = time.perf_counter()
            step()
            totals.append(time.perf_counter() - start)
        rows.append(seconds)
    total = statistics.median(totals)
    print("\n| stage of our step | ms | share |\n| --- | --- | --- |")
    for stage in STAGES:
        ms = 1000 * statistics.median(row[stage] for row in rows)
        print(f"| {stage} | {ms:,.0f} | {ms / total / 10:.0f}% |")
    print(f"| the whole step | {1000 * total:,.0f} | |")


KINDS = (
    ("matrix products", ("mm", "addmm", "bmm", "baddbmm", "mkldnn", "convolution")),
    ("optimizer, EMA, clip", ("fused_adamw", "foreach", "lerp", "linalg_vector_norm")),
    ("norms", ("native_layer_norm",)),
    ("softmax, logsumexp, exp", ("softmax", "log_softmax", "logsumexp", "exp", "log")),
    ("GELU", ("gelu",)),
    ("copies, casts, indexing", ("copy", "cat", "index", "clone", "zero", "fill", "where", "gather", "scatter")),
    ("elementwise", ("add", "sub", "mul", "div", "sum", "clamp", "neg", "mean", "square", "sqrt", "pow", "max")),
)
"""Operators by how their names begin, the first that fits."""


def kind_of(operator: str) -> str:
    name = operator.removeprefix("aten::").lstrip("_")
    if "attention" in name:
        return "attention"
    return next((kind for kind, beginnings in KINDS if name.startswith(beginnings)), "everything else")


def operator_table(config: TrainConfig) -> None:
    step = seedbed(config)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    kinds: dict[str, float] = defaultdict(float)
    operators: dict[str, tuple[float, int]] = {}
    for event in trace.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total
        operators[event.key] = (event.self_cpu_time_total, event.count)
    total = sum(kinds.values())
    print("\n| operators of our step (profiler, self time) | ms | share |\n| --- | --- | --- |")
    for kind, us in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {us / 1000:,.0f} | {us / total:.0%} |")
    top = sorted(operators.items(), key=lambda item: -item[1][0])[:16]
    print("\nlargest: " + ", ".join(f"{name} {us / 1000:,.0f} ms x{count}" for name, (us, count) in top))


def prepare_process(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")


def compare(asked: argparse.Namespace, names: list[str], prototypes: int, batch: int, precision: str) -> None:
    config = train_config(asked, prototypes, batch, precision)
    seconds = take_turns({name: BUILD[name](config) for name in names}, asked.rounds)
    ours = statistics.median(wall for wall, _ in seconds["seedbed"])
    what = f"| {prototypes:,} | {batch} | {precision} |"
    for name, values in seconds.items():
        walls, processor = zip(*values, strict=True)
        median = statistics.median(walls)
        memory = "" if asked.no_memory else f"{peak_growth_mib(name, config, asked.threads):,.0f}"
        print(
            f"{what} {name} | {median:.2f} | {min(walls):.2f} | {statistics.median(processor):.2f} | "
            f"{batch / median:.2f} | {median / ours:.2f} | {memory} |",
            flush=True,
        )
    public = PUBLIC_DINOV3.get((batch, prototypes))
    if public and precision == "float32":
        print(f"{what} DINOv3, earlier | {public:.2f} | | | {batch / public:.2f} | {public / ours:.2f} | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[65_536, 4_096])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--drop-path", type=float, default=0.0)
    parser.add_argument("--architecture", default="dinov2_vits14", help="its patch becomes 16")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-tables", action="store_true", help="leave out where our time goes")
    asked = parser.parse_args()
    prepare_process(asked.threads)
    here = [name for name in CONTENDERS if name == "seedbed" or importlib.util.find_spec(name.replace("-", "_"))]
    names = [name for name in here if not asked.only or name in asked.only]
    packages = ["torch", *[name for name in names if name != "seedbed"]]
    print(", ".join(f"{name} {version(name)}" for name in packages), f"; {asked.threads} threads")
    print("\n| prototypes | batch | precision | step of | median s | least s | CPU s | images/s | x ours | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for batch in asked.batch:
        for prototypes in asked.prototypes:
            for precision in asked.precision:
                compare(asked, names, prototypes, batch, precision)
    if not asked.no_tables:
        for precision in asked.precision:
            config = train_config(asked, asked.prototypes[0], asked.batch[0], precision)
            print(f"\n{asked.prototypes[0]:,} prototypes, batch {asked.batch[0]}, {precision}:")
            stage_table(config, asked.rounds)
            operator_table(config)


if __name__ == "__main__":
    main()
