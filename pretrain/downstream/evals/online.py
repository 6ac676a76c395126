"""The evaluation during training; the trainer calls `run` by name (pretrain.watch.evaluation).

One folder an evaluation: `evaluation/step-00001000/` with result.json (k-NN) and pca.png; `evaluation/baselines.json`
holds what raw pixels and an untrained backbone reach on the same sets, computed once; `evaluation/pca.png` the pictures
over time.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.data.decode import Damaged
from pretrain.distributed import collectives
from pretrain.downstream.evals.knn import KnnConfig, backbone_features, evaluate, pixel_features
from pretrain.downstream.evals.labelled import LABELS, eval_crop, samples
from pretrain.downstream.evals.pictures import write_pictures
from pretrain.watch.evaluation import Backbone


def run(
    backbone: Backbone,
    untrained: Callable[[], Backbone],
    config: Mapping[str, Any],
    folder: Path,
    step: int,
    device: torch.device,
    left: Callable[[], bool],
) -> dict[str, float]:
    """Evaluate one backbone. Every rank calls it and takes its share of the images; the first writes the files.

    Args:
        backbone: in eval mode; it may hold collectives, as a sharded one does.
        untrained: makes one of the same form, for the baseline.
        config: the fields of EvaluationConfig, and `mean` and `std` of pixel values from 0 to 1.
        folder: the run folder.
        left: whether this rank is asked to stop.

    Returns:
        `knn` (accuracy at the first k), `knn/<k>`, `pca_explained`; and `knn_pixels`, `knn_random`.

    Raises:
        ValueError: sets that cannot be read or compared; see knn.py.
        Stopped: a rank was asked to stop.
    """
    target = folder / "evaluation" / f"step-{step:08d}"
    figures: dict[str, float] = {}
    if config["train"]:
        names = {field.name for field in fields(KnnConfig)}
        knn = KnnConfig(**{name: value for name, value in config.items() if name in names})
        features = backbone_features(backbone, config["mean"], config["std"], knn.bfloat16)
        result = evaluate(features, knn, device, left)
        collectives.from_rank_zero(lambda: _write(target / "result.json", {"eval": "knn", "step": step, **result}))
        figures["knn"] = result["accuracy"]
        figures |= {f"knn/{k}": value for k, value in result["by_k"].items()}
        figures |= _baselines(untrained, config, knn, folder / "evaluation", device, left)
    if config["pca_images"]:
        images = collectives.from_rank_zero(lambda: first_images(config)).to(device)
        figures["pca_explained"] = write_pictures(
            backbone, images, folder / "evaluation", step, config["mean"], config["std"], config["pca_grid"]
        )
    return figures


def check_sets(config: Mapping[str, Any]) -> None:
    """Look at the first image of each set.

    Raises:
        ValueError: a set without tars or images, or an image without the label that k-NN needs; names the key.
    """
    needs_label = bool(config["train"])
    for key in ("train", "val"):
        if not config[key]:
            continue
        try:
            first = next(samples(config[key], config[f"{key}_labels"], 1), None)
        except (ValueError, OSError) as error:
            raise ValueError(f"evaluation.{key}={config[key]}: {error}") from None
        if first is None:
            raise ValueError(f"evaluation.{key}={config[key]} holds no image.")
        if needs_label and first.label is None:
            raise ValueError(
                f"evaluation.{key}={config[key]}: image {first.key} has no label. {LABELS} Name such a csv by "
                f"evaluation.{key}_labels."
            )


def _baselines(
    untrained: Callable[[], Backbone],
    config: Mapping[str, Any],
    knn: KnnConfig,
    folder: Path,
    device: torch.device,
    left: Callable[[], bool],
) -> dict[str, float]:
    """Accuracy of pixels and of an untrained backbone: computed when these settings are asked for first, then read."""
    path = folder / "baselines.json"
    settings = asdict(knn)
    known = collectives.from_rank_zero(lambda: json.loads(path.read_text()) if path.exists() else [])
    found = next((entry["figures"] for entry in known if entry["settings"] == settings), None)
    if found is None:
        features = backbone_features(untrained(), config["mean"], config["std"], knn.bfloat16)
        found = {
            "knn_pixels": evaluate(pixel_features, knn, device, left)["accuracy"],
            "knn_random": evaluate(features, knn, device, left)["accuracy"],
        }
        collectives.from_rank_zero(lambda: _write(path, [*known, {"settings": settings, "figures": found}]))
    return found


def first_images(config: Mapping[str, Any]) -> Tensor:
    """uint8 [I, 3, px, px]: the first images of the validation set that can be decoded.

    Raises:
        ValueError: none of them can.
    """
    px, resize_px = config["px"], config["resize_px"] or round(config["px"] * 256 / 224)
    images: list[Tensor] = []
    for sample in samples(config["val"]):
        try:
            if sample.content is not None:
                images.append(torch.from_numpy(eval_crop(sample.content, px, resize_px).copy()))
        except Damaged:  # the k-NN on the same set counts and names it
            continue
        if len(images) == config["pca_images"]:
            break
    if not images:
        raise ValueError(f"evaluation.val={config['val']!r} holds no image that can be decoded.")
    return torch.stack(images).permute(0, 3, 1, 2)


def _write(path: Path, content: Any) -> None:
    """Under a temporary name first: a killed run leaves no half file that a later one would believe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
