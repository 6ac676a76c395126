"""A training of seconds for the tests: its settings, the command line, and what a run folder holds."""

import json
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pretrain.train import main

TINY = {
    "global_batch_size": 8,
    "steps": 6,
    "precision": "float32",
    "model": {"architecture": "dinov2_tiny", "depth": 2, "position_px": 32, "layerscale": 0.5},
    "heads": {name: {"num_prototypes": 48, "hidden_dim": 32, "bottleneck_dim": 16} for name in ("dino", "ibot")},
    "crops": {"global_px": 32, "local_px": 16, "num_local_crops": 2},
    "optim": {
        "base_lr": 0.002,
        "lr_rule": "none",
        "warmup_steps": 1,
        "freeze_last_layer_steps": 1,
        "teacher_momentum": 0.9,
        "teacher_temperature_warmup_steps": 1,
    },
    "checkpoint": {"every_steps": 2},
    "watch": {"every_steps": 1},
    "execution": {"threads": 1, "loader": {"num_workers": 0}},
}
HIGH_RESOLUTION = {"steps": 2, "model": {"position_px": 48}, "crops": {"global_px": 48, "local_px": 24}}


def run(config: Path, shards: Path | None, out: Path, *overrides: str) -> int:
    threads = torch.get_num_threads()
    images = ["--shards", str(shards)] if shards else []
    try:
        return main(["--config", str(config), *images, "--out", str(out), *overrides])
    finally:
        torch.set_num_threads(threads)


def losses(out: Path) -> dict[int, float]:
    """Step -> loss; each step once."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return {line["step"]: line["loss"] for line in lines}


def same_teacher(a: Path, b: Path) -> bool:
    left, right = (load_file(out / "teacher" / "teacher.safetensors") for out in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def wait_for_step(out: Path, step: int, process: subprocess.Popen, limit_s: float = 90) -> None:
    """Until metrics.jsonl has that step, or the run is over."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and process.poll() is None:
        path = out / "metrics.jsonl"
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        time.sleep(0.005)
    assert process.poll() is not None, f"step {step} was not reached in {limit_s} s"
