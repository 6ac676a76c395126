"""An experiment of seconds: labelled pictures of two colours, every kind of variant, in a folder of its own."""

import io
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.experiment import main
from tests.conftest import write_tar
from tests.pretrain.tiny_train import TINY

HEADS = {"num_prototypes": 48, "hidden_dim": 32, "bottleneck_dim": 16, "train_lengths": False}
SET = {"kind": "labelled", "train": "train/*.tar", "val": "val.tar", "px": 32, "resize_px": 32}
EXPERIMENT = {
    "question": "Does anything happen?",
    "config": "tiny.yaml",
    "data": ["train/*.tar"],
    "sets": {"colours": SET},
    "evaluations": {
        "knn": {"eval": "knn", "set": "colours", "settings": {"k": [3, 1]}},
        "linear": {"eval": "linear", "set": "colours", "settings": {"least_steps": 5, "epochs": 1}},
    },
    "curve": {"evaluation": "knn", "every_images": 24},
    "reference": "recipe",
    "variants": {
        "recipe": {},
        "no_local": {"set": ["crops.num_local_crops=0"]},
        "supervised": {"kind": "supervised", "labels": "colours"},
        "lightly_dino": {"kind": "lightly_dino"},
        "lightly_dinov2": {"kind": "lightly_dinov2"},
        "untrained": {"kind": "untrained"},
        "pixels": {"kind": "pixels"},
    },
    "claims": [{"better": "recipe", "worse": "pixels", "evaluation": "knn"}],
}


def coloured(number: int) -> tuple[str, bytes]:
    """Even numbers are red pictures, odd ones blue."""
    noise = np.random.default_rng(number).integers(0, 160, (8, 8, 3), dtype=np.uint8)
    noise[..., 0 if number % 2 == 0 else 2] += 90
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((40, 40), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return "red" if number % 2 == 0 else "blue", buffer.getvalue()


def labelled_tar(path: Path, numbers: range) -> None:
    members = []
    for number in numbers:
        label, content = coloured(number)
        members += [(f"{number:03d}.png", content), (f"{number:03d}.json", json.dumps({"label": label}).encode())]
    write_tar(path, members)


def write_experiment(folder: Path, **changes: object) -> Path:
    """FOLDER/benchmarks/experiments/tiny.yaml, and images in FOLDER/data; returns the description."""
    path = folder / "benchmarks" / "experiments" / "tiny.yaml"
    path.parent.mkdir(parents=True)
    labelled_tar(folder / "data" / "train" / "a.tar", range(16))
    labelled_tar(folder / "data" / "train" / "b.tar", range(16, 32))
    labelled_tar(folder / "data" / "val.tar", range(100, 120))
    config = TINY | {"heads": {"dino": HEADS, "ibot": HEADS}, "evaluation": {"px": 32, "pca_images": 0}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    path.write_text(yaml.safe_dump(EXPERIMENT | {"config": str(folder / "tiny.yaml")} | changes, sort_keys=False))
    return path


def words(path: Path, *arguments: str) -> list[str]:
    """The command line after `python -m benchmarks.experiment`."""
    folder = path.parents[2]
    return [str(path), "--data", str(folder / "data"), "--work", str(folder / "work"), *arguments]


def run(path: Path, *arguments: str) -> int:
    threads = torch.get_num_threads()
    try:
        return main(words(path, *arguments))
    finally:
        torch.set_num_threads(threads)


def record_of(path: Path, name: str) -> Path:
    return path.parents[1] / "records" / "tiny" / name
