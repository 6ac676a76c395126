"""The evaluation during training; the trainer calls `run` by name (pretrain.watch.evaluation).

One folder an evaluation: `evaluation/step-00001000/` with result.json (k-NN) and pca.png; `evaluation/baselines.json`
holds what raw pixels and an untrained backbone reach on the same sets, computed once; `evaluation/pca.png` the pictures
over time.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.data.decode import Damaged
from pretrain.downstream.evals.knn import KnnConfig, backbone_features, evaluate, pixel_features, random_like
from pretrain.downstream.evals.labelled import eval_crop, samples
from pretrain.downstream.pca import write_pictures
from pretrain.models.vision_transformer import VisionTransformer


def run(backbone: VisionTransformer, config: Mapping[str, Any], folder: Path, step: int) -> dict[str, float]:
    """Evaluate one backbone.

    Args:
        backbone: in eval mode, whole on this rank.
        config: the fields of EvaluationConfig, and `mean` and `std` of pixel values from 0 to 1.
        folder: the run folder.

    Returns:
        `knn` (accuracy at the first k), `knn/<k>`, `pca_explained`; and `knn_pixels`, `knn_random`.

    Raises:
        ValueError: sets that cannot be read or compared; see knn.py.
    """
    target = folder / "evaluation" / f"step-{step:08d}"
    target.mkdir(parents=True, exist_ok=True)
    device = next(backbone.parameters()).device
    figures: dict[str, float] = {}
    if config["train"]:
        names = {field.name for field in fields(KnnConfig)}
        knn = KnnConfig(**{name: value for name, value in config.items() if name in names})
        features = backbone_features(backbone, config["mean"], config["std"], knn.bfloat16)
        result = evaluate(features, knn, device)
        _write(target / "result.json", {"eval": "knn", "step": step, **result})
        figures["knn"] = result["accuracy"]
        figures |= {f"knn/{k}": value for k, value in result["by_k"].items()}
        figures |= _baselines(backbone, config, knn, folder / "evaluation", device)
    if config["pca_images"]:
        images = first_images(config).to(device)
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
            raise ValueError(f"evaluation.{key}={config[key]}: image {first.key} has no label.")


def _baselines(
    backbone: VisionTransformer, config: Mapping[str, Any], knn: KnnConfig, folder: Path, device: torch.device
) -> dict[str, float]:
    """Accuracy of pixels and of an untrained backbone: computed when these settings are asked for first, then read."""
    path = folder / "baselines.json"
    settings = asdict(knn)
    known = json.loads(path.read_text()) if path.exists() else []
    found = next((entry["figures"] for entry in known if entry["settings"] == settings), None)
    if found is None:
        fresh = random_like(backbone)
        untrained = backbone_features(fresh, config["mean"], config["std"], knn.bfloat16)
        found = {
            "knn_pixels": evaluate(pixel_features, knn, device)["accuracy"],
            "knn_random": evaluate(untrained, knn, device)["accuracy"],
        }
        _write(path, [*known, {"settings": settings, "figures": found}])
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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
