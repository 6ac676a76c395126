"""The evaluations during training; the trainer calls `run` by name (pretrain.watch.evaluation).

One folder an evaluation: `evaluation/step-00001000/` with result.json (all that were measured) and pca.png;
`evaluation/baselines.json` holds what raw pixels and an untrained backbone reach at k-NN on the same sets, computed
once; `evaluation/pca.png` the pictures over time.
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
from pretrain.downstream.backbone import ImageSettings
from pretrain.downstream.evals import compared
from pretrain.downstream.evals.baselines import Pixels, as_they_are
from pretrain.downstream.evals.compared import Task, check_names, tasks_of, write_json
from pretrain.downstream.evals.frozen import Frozen, Tokens
from pretrain.downstream.evals.labelled import LABELS, samples
from pretrain.downstream.evals.pictures import write_pictures
from pretrain.downstream.evals.pooled import knn
from pretrain.downstream.evals.protocols import PROTOCOLS
from pretrain.downstream.evals.sets import ImageSets, LabelledSet, read_sets
from pretrain.downstream.pixels import eval_crop, short_side
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
        `knn` (accuracy at the first k), `knn/<k>`, `knn_pixels`, `knn_random`; `<evaluation>` of the others that are
        named, `<set>/<evaluation>` of further sets for one; `pca_explained`.

    Raises:
        ValueError: sets that cannot be read or compared.
        Stopped: a rank was asked to stop.
    """
    target = folder / "evaluation" / f"step-{step:08d}"

    def frozen(tokens: Tokens, image: ImageSettings) -> Frozen:
        return Frozen(
            tokens=tokens,
            image=image,
            device=device,
            batch_size=config["batch_size"],
            bfloat16=config["bfloat16"],
            left=left,
        )

    figures: dict[str, float] = {}
    shown = ImageSettings(tuple(config["mean"]), tuple(config["std"]), config["px"])
    measured, found = frozen(backbone, shown), {}
    for name, task in _tasks(config).items():
        result = task.protocol.run(measured, task.data, task.settings)
        found[name] = {"eval": task.evaluation, "metric": task.protocol.metric, **result.as_json()}
        figures[name] = result.value
        if name == "knn":  # of the set that `train` and `val` name, or the first; floors are of the same images
            by_k = {k: result.figures.get(f"k={k}") for k in task.settings.k}  # none beyond a small training set
            figures |= {f"knn/{k}": value for k, value in by_k.items() if value is not None}
            floors = {
                "knn_pixels": lambda: frozen(Pixels(), as_they_are(config["px"])),
                "knn_random": lambda: frozen(untrained(), shown),
            }
            figures |= _baselines(task, folder / "evaluation", floors)
    if found:
        collectives.from_rank_zero(lambda: write_json(target / "result.json", {"step": step, "evaluations": found}))
    if config["pca_images"] and config["val"]:
        images = collectives.from_rank_zero(lambda: first_images(config)).to(device)
        figures["pca_explained"] = write_pictures(
            backbone, images, folder / "evaluation", step, config["mean"], config["std"], config["pca_grid"]
        )
    return figures


def check_sets(config: Mapping[str, Any]) -> None:
    """Look for the evaluations that are named, their sets, and the first image of each labelled one.

    Raises:
        ValueError: an unknown evaluation, one without a set, a set without images, or an image without the label that
            is needed; names the key.
    """
    for key in ("train", "val"):
        if not config[key]:
            continue
        try:
            first = next(samples(config[key], config[f"{key}_labels"], 1), None)
        except (ValueError, OSError) as error:
            raise ValueError(f"evaluation.{key}={config[key]}: {error}") from None
        if first is None:
            raise ValueError(f"evaluation.{key}={config[key]} holds no image.")
        if config["train"] and first.label is None:
            raise ValueError(
                f"evaluation.{key}={config[key]}: image {first.key} has no label. {LABELS} Name such a csv by "
                f"evaluation.{key}_labels."
            )
    try:
        compared.check_sets(list(_tasks(config).values()))
    except ValueError as error:
        raise ValueError(
            f"evaluation.names={list(config['names'])}, evaluation.sets={config['sets']!r}: {error}"
        ) from None


def _tasks(config: Mapping[str, Any]) -> dict[str, Task]:
    """Name of a figure -> what measures it: `knn`, or `birds/knn` of a further set."""
    sets: dict[str, ImageSets] = {}
    if config["train"]:
        own = {field.name for field in fields(LabelledSet)}
        sets["evaluation"] = LabelledSet(**{name: value for name, value in config.items() if name in own})
    if config["sets"]:
        sets |= read_sets(Path(config["sets"]))
    if not sets:
        return {}
    check_names(config["names"])
    settings = {name: PROTOCOLS[name].settings() for name in config["names"]}
    if "knn" in settings:
        settings["knn"] = knn.KnnConfig(k=list(config["k"]), temperature=config["temperature"])
    found: dict[str, Task] = {}
    for task in tasks_of(config["names"], sets, settings):
        is_only = task.set_name == "evaluation" or task.evaluation not in found
        found[task.evaluation if is_only else f"{task.set_name}/{task.evaluation}"] = task
    return found


def _baselines(task: Task, folder: Path, make: Mapping[str, Callable[[], Frozen]]) -> dict[str, float]:
    """Accuracy of pixels and of an untrained backbone: computed when this is asked for first, then read."""
    path = folder / "baselines.json"
    settings = {**asdict(task.data), **asdict(task.settings)}
    known = collectives.from_rank_zero(lambda: json.loads(path.read_text()) if path.exists() else [])
    found = next((entry["figures"] for entry in known if entry["settings"] == settings), None)
    if found is None:
        found = {name: task.protocol.run(one(), task.data, task.settings).value for name, one in make.items()}
        collectives.from_rank_zero(lambda: write_json(path, [*known, {"settings": settings, "figures": found}]))
    return found


def first_images(config: Mapping[str, Any]) -> Tensor:
    """uint8 [I, 3, px, px]: the first images of the validation set that can be decoded.

    Raises:
        ValueError: none of them can.
    """
    px, resize_px = config["px"], config["resize_px"] or short_side(config["px"])
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
