"""A pixel filter that asks an image classifier in the folder of a transformers model: NSFW, watermarks, quality."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curation.encoders.encoder import View
from curation.encoders.load import IMAGENET_MEAN, IMAGENET_STD, encoder_view, has_fast_bfloat16, read_transformers
from curation.encoders.weights import file_sha256


class Classifier:
    """Reject the images that a model gives one of its labels with a probability of at least `min_probability`.

    `{kind: pixels, path: curation.encoders.classifier:Classifier, options: {folder: ..., label: nsfw}}`; the contract
    is that of curation/reading/filters.py. The reason is `classified_LABEL`.

    Args:
        device: "cuda" or "cpu"; on one that has bfloat16 natively the model computes in it, as encoders do.
        folder: config.json, preprocessor_config.json and model.safetensors of an image classification model.
        label: one of the labels in its config.json.
        min_probability: in (0, 1], of the softmax over its labels.

    Raises:
        ValueError: the folder lacks a file, the file a tensor, or the model the label.
    """

    def __init__(self, device: str, *, folder: str, label: str, min_probability: float = 0.5) -> None:
        import torch

        self.label, self.min_probability = label, min_probability
        self.index = _labels(folder, label, min_probability).index(label)
        self.device = torch.device(device)
        self.bfloat16 = has_fast_bfloat16(self.device)
        self.model = _load(folder).eval().to(self.device)
        says = json.loads((Path(folder) / "preprocessor_config.json").read_text())
        mean, std = says.get("image_mean", IMAGENET_MEAN), says.get("image_std", IMAGENET_STD)
        self.mean, self.std = (torch.tensor(value, device=self.device).view(1, 3, 1, 1) for value in (mean, std))

    @classmethod
    def view(cls, folder: str, label: str, min_probability: float = 0.5) -> View:
        """Size and resampling of the model's own preprocessor."""
        _labels(folder, label, min_probability)
        return encoder_view(f"hf:{folder}")

    @classmethod
    def fingerprint(cls, folder: str, label: str, min_probability: float = 0.5) -> str:
        """Hex digest of the folder's three files."""
        _labels(folder, label, min_probability)
        names = ("config.json", "preprocessor_config.json", "model.safetensors")
        return hashlib.sha256("".join(file_sha256(str(Path(folder, name))) for name in names).encode()).hexdigest()

    def probabilities(self, views: np.ndarray) -> np.ndarray:
        """uint8 views [B, H, W, 3] to float32 [B]: how probable the label is for each."""
        import torch

        pixels = torch.from_numpy(np.ascontiguousarray(views)).to(self.device).permute(0, 3, 1, 2).float()
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.model(pixel_values=(pixels / 255 - self.mean) / self.std).logits
        return logits.float().softmax(dim=-1)[:, self.index].cpu().numpy()

    def __call__(self, images: np.ndarray, rows: Sequence[dict[str, Any]]) -> list[str | None]:
        reason = f"classified_{self.label}"
        return [reason if value >= self.min_probability else None for value in self.probabilities(images)]


def _labels(folder: str, label: str, min_probability: float) -> list[str]:
    """The model's labels, in the order of its outputs; the options are checked against what lies in the folder."""
    if not 0 < min_probability <= 1:
        raise ValueError(f"filters: min_probability={min_probability!r} must lie in (0, 1].")
    for name in ("preprocessor_config.json", "model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise ValueError(
                f"filters: {folder} has no {name}: it must be the folder of an image classifier; fetch one, "
                f"as by `hf download NAME --local-dir {folder}`."
            )
    try:
        by_index = json.loads((Path(folder) / "config.json").read_text())["id2label"]
        labels = [by_index[str(number)] for number in range(len(by_index))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"filters: {folder}/config.json names no labels (id2label): {error!r}.") from None
    if label not in labels:
        raise ValueError(f"filters: the model in {folder} has no label {label!r}; it has {', '.join(labels)}.")
    return labels


def _load(folder: str) -> Any:
    from transformers import AutoModelForImageClassification

    model, lacking = read_transformers(AutoModelForImageClassification, folder)
    if lacking:
        raise ValueError(f"filters: the weights in {folder} lack {', '.join(lacking[:4])}.")
    return model
