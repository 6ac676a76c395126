"""Small-data quality: k-NN accuracy of ours, of lightly's DINOv2, and of ours with one component taken out.

    python -m benchmarks.quality --config cifar --shards 'train/*.tar' --train T.tar --val V.tar --out DIR --seed 0
    python -m benchmarks.quality ... --peer lightly
    python -m benchmarks.quality ... --variant no_koleo [key=value ...]
    python -m benchmarks.quality --summarise DIR

Each run trains on the same images in the same order, for equal steps, batch and model, and leaves
DIR/<variant>-<seed>/result.json; a run that has one is not repeated. The figure is the k-NN accuracy (k = 20,
temperature 0.07) of the EMA teacher's CLS token, the same code for all. `key=value` goes on top of a variant.
lightly's recipe, and what it takes from the config, is in benchmarks/lightly_dinov2.py; it has one phase, so it trains
for all steps as the first phase says. It runs in float32, as its example does, whatever `precision` ours has.
"""

import argparse
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pretrain.config import TrainConfig, load_train_config, total_steps
from pretrain.data.loader import build_loader
from pretrain.downstream.backbone import ImageSettings, load_backbone
from pretrain.downstream.evals.baselines import Pixels, as_they_are, random_like
from pretrain.downstream.evals.frozen import Frozen, Tokens
from pretrain.downstream.evals.pooled import knn
from pretrain.downstream.evals.sets import LabelledSet
from pretrain.models.vision_transformer import Features
from pretrain.phase import fresh_network
from pretrain.stopping import stop_signals
from pretrain.train import FINISHED, train

K = [20, 10, 100, 200]  # the first is the figure
NO_HIGH_RESOLUTION = "no_high_resolution"
ABLATIONS: dict[str, list[str]] = {
    "full": [],
    "softmax": ["loss.centering=softmax"],
    "no_koleo": ["loss.koleo_weight=0"],
    "tied_heads": ["heads.tied=true"],
    "no_local_crops": ["crops.num_local_crops=0"],
    "no_ibot": ["loss.ibot_weight=0", "masks.probability=0"],
    NO_HIGH_RESOLUTION: [],
}
"""Variants of ours, as overrides."""
BASELINES = ("random", "pixels")
LIGHTLY = ("lightly", "lightly_example")
"""With our model, heads and first weights; and with the example's own choice of these."""
VARIANTS = (*ABLATIONS, *LIGHTLY, *BASELINES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summarise", type=Path, metavar="DIR", help="print the table of the runs in DIR and stop")
    parser.add_argument("--config")
    parser.add_argument("--shards", action="append", default=[])
    parser.add_argument("--train", help="labelled tars that vote")
    parser.add_argument("--val", help="labelled tars to classify")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=("seedbed", "lightly"), default="seedbed")
    parser.add_argument("--variant", choices=VARIANTS, help="default: full, or lightly with --peer lightly")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    asked = parser.parse_intermixed_args()
    if asked.summarise is not None:
        print(summary(asked.summarise))
        return
    if None in (asked.config, asked.train, asked.val, asked.out):
        parser.error("a run needs --config, --train, --val and --out.")
    variant = asked.variant or ("lightly" if asked.peer == "lightly" else "full")
    settings = [f"seed={asked.seed}", f"evaluation.train={asked.train}", f"evaluation.val={asked.val}"]
    try:
        overrides = [*ABLATIONS.get(variant, []), *settings, *asked.overrides]
        config = load_train_config(asked.config, overrides, asked.shards)
        result = measured(variant, config, asked.out / f"{variant}-{asked.seed}")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps({name: result[name] for name in ("variant", "seed", "steps", "accuracy", "by_k", "train_s")}))


def measured(variant: str, config: TrainConfig, out: Path) -> dict[str, Any]:
    """What the run's result.json says, after running it if there is none."""
    path = out / "result.json"
    if path.exists():
        return json.loads(path.read_text())
    if config.execution.threads:
        torch.set_num_threads(config.execution.threads)
    if variant == NO_HIGH_RESOLUTION:
        config = first_phase_only(config)
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    backbone = FEATURES[variant](config, out)
    train_s = time.monotonic() - start
    result = {
        "variant": variant,
        "seed": config.seed,
        "steps": 0 if variant in BASELINES else total_steps(config),
        "train_s": round(train_s, 1),
        **accuracies(backbone, config),
        "config": asdict(config),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def accuracies(backbone: Frozen, config: TrainConfig) -> dict[str, Any]:
    e = config.evaluation
    sets = LabelledSet(train=e.train, val=e.val, px=e.px, resize_px=e.resize_px)
    found = knn.run(backbone, sets, knn.KnnConfig(k=K, temperature=0.07))
    return {"accuracy": found.value, "by_k": {str(k): found.figures[f"k={k}"] for k in K}, "images": found.images}


def frozen(tokens: Tokens, image: ImageSettings | None = None) -> Frozen:
    """The crop is that of the sets."""
    return Frozen(tokens=tokens, image=image or ImageSettings(), device=torch.device("cpu"), batch_size=128)


class Peer:
    """lightly's backbone, which gives a CLS token alone, answering as ours do."""

    patch_size = 1

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        self.features = features

    def __call__(self, crops: Sequence[Tensor]) -> list[Features]:
        found = [self.features(images) for images in crops]
        return [Features(cls, cls[:, None][:, :0], cls[:, None], (1, 1)) for cls in found]


def first_phase_only(config: TrainConfig) -> TrainConfig:
    """All steps of the run in its first phase."""
    first, *others = config.phase_names
    if not others:
        raise ValueError(f"{NO_HIGH_RESOLUTION} needs a config with a second phase, found only {first!r}.")
    return replace(config, phases={first: {**(config.phases.get(first) or {}), "steps": total_steps(config)}})


def train_ours(config: TrainConfig, out: Path) -> Frozen:
    with stop_signals() as stop:
        status = train(config, out, stop)
    if status != FINISHED:
        raise ValueError(f"{out} was stopped; the same command continues.")
    loaded = load_backbone(str(out / "teacher"))
    return frozen(loaded.model.eval(), loaded.image)


def train_lightly(config: TrainConfig, out: Path, *, example: bool = False) -> Frozen:
    from benchmarks.lightly_dinov2 import LightlyDinov2, draw_masks, versions

    print(versions(), file=sys.stderr)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    first = config.phase(config.phase_names[0])
    num_steps = total_steps(config)
    peer = LightlyDinov2(first, example)
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as lines:
        for step, views in enumerate(lightly_batches(first, num_steps)):
            loss = peer.step(views, draw_masks(first, 2 * len(views[0])), step, num_steps)
            print(json.dumps({"step": step + 1, "loss": loss}), file=lines, flush=True)
    return frozen(Peer(peer.features))


def lightly_batches(config: TrainConfig, num_steps: int) -> Iterator[list[Tensor]]:
    """The images of our loader's batches, in its order, through lightly's transform: 2 + L views [B, 3, H, W]."""
    from benchmarks.lightly_dinov2 import transform

    steps = build_loader(
        config.data,
        config.crops,
        config.masks,
        patch_size=config.patch_size,
        seed=config.seed,
        phase=0,
        start_step=0,
        num_steps=num_steps,
        global_batch_size=config.global_batch_size,
        rank=0,
        world_size=1,
        execution=config.execution.loader,
    ).steps
    distort = transform(config)
    for step in range(num_steps):
        datasets, rows = steps.order.batch(step)
        contents = [steps.readers[d].read(row) for d, row in zip(datasets.tolist(), rows.tolist(), strict=True)]
        views = [distort(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]
        yield [torch.stack(crops) for crops in zip(*views, strict=True)]


def untrained(config: TrainConfig, out: Path) -> Frozen:
    return frozen(random_like(fresh_network(config).backbone, config.seed))


FEATURES: dict[str, Callable[[TrainConfig, Path], Frozen]] = {
    **dict.fromkeys(ABLATIONS, train_ours),
    "lightly": train_lightly,
    "lightly_example": lambda config, out: train_lightly(config, out, example=True),
    "random": untrained,
    "pixels": lambda config, out: frozen(Pixels(), as_they_are(0)),
}


def summary(folder: Path) -> str:
    """A row for each variant, in the order of VARIANTS: mean and standard deviation over seeds, all figures in %."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    if not results:
        return f"no result.json in a folder of {folder}."
    by_variant = {name: [r for r in results if r["variant"] == name] for name in VARIANTS}
    full = {r["seed"]: r["accuracy"] for r in by_variant["full"]}
    lines = [
        "| variant | k-NN (k = 20), % | seeds | against full, same seeds | k = 10 | steps | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in by_variant.items():
        if not runs:
            continue
        differences = [100 * (r["accuracy"] - full[r["seed"]]) for r in runs if r["seed"] in full]
        against = f"{statistics.mean(differences):+.1f}" if differences and name != "full" else ""
        steps = "/".join(str(n) for n in sorted({r["steps"] for r in runs}))
        minutes = statistics.mean(r["train_s"] for r in runs) / 60
        figure, at_10 = spread([r["accuracy"] for r in runs]), spread([r["by_k"]["10"] for r in runs])
        lines.append(f"| {name} | {figure} | {len(runs)} | {against} | {at_10} | {steps} | {minutes:.1f} |")
    return "\n".join(lines)


def spread(shares: list[float]) -> str:
    """Mean ± sample standard deviation, in %."""
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean


if __name__ == "__main__":
    main()
