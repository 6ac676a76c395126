"""Several backbones on several sets: evaluated, kept as result.json, and set side by side."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.distributed import collectives
from pretrain.downstream.backbone import Backbone, ImageSettings, load_backbone
from pretrain.downstream.evals.baselines import BASELINES, as_they_are, random_like
from pretrain.downstream.evals.frozen import Frozen
from pretrain.downstream.evals.labelled import about_images
from pretrain.downstream.evals.protocols import PROTOCOLS, Protocol
from pretrain.downstream.evals.sets import KINDS, DepthSet, ImageSets, ObjectSet, SegmentationSet
from pretrain.downstream.pixels import check_px, find_sets
from pretrain.downstream.timm_model import TimmModel
from pretrain.models.vision_transformer import VisionTransformer

UNTRAINED = "untrained:"
_DEFAULT_PX = 224
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Task:
    """One evaluation of one set."""

    evaluation: str
    set_name: str
    data: ImageSets
    settings: Any

    @property
    def protocol(self) -> Protocol:
        return PROTOCOLS[self.evaluation]

    @cached_property
    def images(self) -> str:
        """Hash of the images as they are now: of each part its place, size and version.

        Raises:
            ValueError: images that are not there.
        """
        digest = sha256()
        for part, pattern in patterns_of(self.data).items():
            try:
                digest.update("".join(one.id for one in find_sets(pattern)).encode())
            except ValueError as error:
                raise ValueError(f"{self.set_name}: {part}={pattern}: {error}") from None
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A backbone or baseline that is evaluated, and the name that it was asked for by."""

    name: str
    model: nn.Module
    image: ImageSettings

    def fingerprint(self) -> str:
        """Of its weights: the same name may hold others tomorrow."""
        digest = sha256(self.name.encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_evaluated(names: Sequence[str], architecture: str, px: int | None) -> list[Evaluated]:
    """What `load_backbone` takes, `untrained:` before it, `pixels` or `colours`.

    Args:
        px: side of the crop where a set names none; None: that of each backbone; of baselines, that of the first one.

    Raises:
        ValueError: a name twice, or one that cannot be loaded.
    """
    if twice := next((name for name in names if list(names).count(name) > 1), None):
        raise ValueError(f"{twice} is named twice; name each backbone once.")
    backbones: dict[str, Backbone] = {}
    for name in names:
        if name not in BASELINES:
            backbones[name] = load_backbone(name.removeprefix(UNTRAINED), architecture)
    for name in names if px is not None else ():
        patch = BASELINES[name].patch_size if name in BASELINES else backbones[name].model.patch_size
        check_px(f"--px {px}", px or 0, patch)
    first = next((backbone.image.px for backbone in backbones.values()), _DEFAULT_PX)
    found = []
    for name in names:
        if name in BASELINES:
            found.append(Evaluated(name, BASELINES[name](), as_they_are(px or first)))
            continue
        backbone = backbones[name]
        model, image = backbone.model, backbone.image
        if name.startswith(UNTRAINED):
            if not isinstance(model, VisionTransformer):
                raise ValueError(f"{name}: only a model of pretrain, or a released one, can be drawn anew.")
            model = random_like(model)
        found.append(Evaluated(name, model, replace(image, px=px or image.px)))
    return found


def frozen_of(one: Evaluated, tasks: Sequence[Task], device: torch.device, batch_size: int, bfloat16: bool) -> Frozen:
    """The backbone on its device, giving as many layers as these evaluations ask for and it has."""
    has_layers = isinstance(one.model, VisionTransformer | TimmModel)
    return Frozen(
        tokens=one.model.to(device).eval(),
        image=one.image,
        device=device,
        num_layers=max(task.protocol.num_layers for task in tasks) if has_layers else 1,
        batch_size=batch_size,
        bfloat16=bfloat16,
        show_progress=collectives.rank() == 0,
    )


def run_task(task: Task, frozen: Frozen, name: str) -> dict[str, Any]:
    """One evaluation, as result.json has it."""
    start = time.monotonic()
    found = task.protocol.run(frozen, task.data, task.settings)
    return {
        "eval": task.evaluation,
        "metric": task.protocol.metric,
        "backbone": name,
        "set": task.set_name,
        **found.as_json(),
        "seconds": round(time.monotonic() - start, 1),
        "source": task.protocol.source,
        **asked_of(task, frozen),
    }


def asked_of(task: Task, frozen: Frozen) -> dict[str, Any]:
    """What a result is of, beside the weights: settings, and the images as they are now."""
    return {
        "px": frozen.image.px,
        "bfloat16": frozen.bfloat16,
        "data": asdict(task.data),
        "images of data": task.images,
        "settings": asdict(task.settings),
    }


def result_path(out: Path, name: str, task: Task) -> Path:
    """OUT/BACKBONE/SET/EVALUATION/result.json; the folder of a backbone is the end of its name, and a hash of all."""
    end = _UNSAFE.sub("-", name)[-60:].strip("-.")
    folder = f"{end}-{sha256(name.encode()).hexdigest()[:6]}"
    return out / folder / (_UNSAFE.sub("-", task.set_name).strip(".") or "set") / task.evaluation / "result.json"


def known_result(path: Path, task: Task, frozen: Frozen, weights: str) -> dict[str, Any] | None:
    """What an earlier command found, if it asked for the same; None where there is nothing yet.

    Raises:
        ValueError: the file is of other weights, sets or settings, or cannot be read.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} cannot be read; remove it, or name another --out.") from None
    asked = {"weights": weights, **asked_of(task, frozen)}
    different = [key for key, value in asked.items() if found.get(key) != value]
    if different:
        raise ValueError(f"{path} has a result of other {different[0]}; remove it, or name another --out.")
    return found


def write_json(path: Path, content: Any) -> None:
    """Under a temporary name first: a command that was killed leaves no half file that a later one would believe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


TABLE = "table.md"


def check_out(out: Path) -> None:
    """Raises ValueError: a folder that holds something else than results."""
    others = [] if not out.is_dir() else [path.name for path in out.iterdir()]
    if others and TABLE not in others and not any(out.glob("*/*/*/result.json")):
        raise ValueError(f"--out {out} holds other files, such as {others[0]}; name a folder that does not exist yet.")


def write_table(out: Path) -> None:
    """All results that the folder holds, of earlier commands too, side by side."""
    paths = sorted(out.glob("*/*/*/result.json"), key=lambda path: path.stat().st_mtime_ns)  # as they were evaluated
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    names = list(dict.fromkeys(one["backbone"] for one in results))
    if results:
        (out / TABLE).write_text(table(results, names) + "\n", encoding="utf-8")


def table(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Markdown: a row for each set and evaluation, a column for each backbone; figures with their standard errors."""
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for one in results:
        rows.setdefault((one["set"], one["eval"]), {})[one["backbone"]] = one
    lines = [["set", "evaluation", *shown_names(names)], ["---"] * (2 + len(names))]
    for (set_name, evaluation), found in rows.items():
        high = PROTOCOLS[evaluation].is_better_high
        metric = f"{evaluation}: {PROTOCOLS[evaluation].metric}{'' if high else ' (less is better)'}"
        cells = [_cell(found.get(name)) for name in names]
        lines.append([set_name, metric, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"| {line} |" for line in padded)


def shown_names(names: Sequence[str]) -> list[str]:
    """The ends of paths, as long as they have to be to differ."""
    parts = [name.rstrip("/").split("/") for name in names]
    prefixes = [UNTRAINED if name.startswith(UNTRAINED) else "" for name in names]

    def end(number: int, length: int) -> str:
        kept = "/".join(parts[number][-length:])
        return kept if kept.startswith(prefixes[number]) else prefixes[number] + kept

    for length in range(1, max(map(len, parts)) + 1):
        found = [end(number, length) for number in range(len(names))]
        if len(set(found)) == len(found):
            return found
    return list(names)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if "failed" in found:
        return "failed"
    error = "?" if found["standard_error"] is None else f"{found['standard_error']:.3f}"
    return f"{found['value']:.3f} ± {error}"


def check_sets(tasks: Sequence[Task]) -> None:
    """Raises ValueError: images of a set that are not there."""
    for task in tasks:
        assert task.images


def planned(tasks: Sequence[Task], evaluated: Sequence[Evaluated], device: torch.device) -> list[str]:
    """What would be read and computed, a line each; looks at the first images of each tar.

    Raises:
        ValueError: a set that is not there, or has no image.
    """
    lines, seen = [], set()
    images: dict[str, int] = {}
    dense: dict[str, tuple[str, int]] = {}
    for task in tasks:
        lines.append(f"{task.evaluation} on {task.set_name}: {task.protocol.metric}; {task.protocol.source}")
        for part, pattern in patterns_of(task.data).items():
            if (pattern, part) in seen:
                continue
            seen.add((pattern, part))
            parts = find_sets(pattern)
            images[pattern] = sum(about_images(one) for one in parts)
            if not images[pattern]:
                raise ValueError(f"{pattern!r} holds no image.")
            if isinstance(task.data, SegmentationSet | DepthSet | ObjectSet):
                dense[pattern] = part, images[pattern]
            size = sum(one.size for one in parts) / 1e6
            lines.append(f"  {part}: {pattern}: {len(parts)} parts, {size:,.1f} MB, about {images[pattern]:,} images")
    crops = sum(n for pattern, n in images.items() if pattern not in dense)
    # Whole pictures have twice the side, and those that teach are seen with their mirror images.
    pictures = sum(4 * n * (2 if part == "train" else 1) for part, n in dense.values())
    for one in evaluated:
        seconds = _seconds_an_image(one, device)
        parameters = sum(p.numel() for p in one.model.parameters()) / 1e6
        lines.append(
            f"{one.name}: {parameters:,.1f} M parameters, crop {one.image.px} px, {seconds * 1e3:,.1f} ms an image: "
            f"{(crops + pictures) * seconds:,.0f} s for all of them, then decoding and the heads"
        )
        if largest := max((n for pattern, n in images.items() if pattern not in dense), default=0):
            layers = max(task.protocol.num_layers for task in tasks) + 1
            lines.append(
                f"  features of the largest set: {largest * layers * _width(one) * 4 / 1e9:,.2g} GB on the device"
            )
    return lines


def _width(one: Evaluated) -> int:
    width = one.model.embed_dim
    assert isinstance(width, int)
    return width


def patterns_of(data: ImageSets) -> dict[str, str]:
    """Part of a set -> where its images lie."""
    names = ("train", "val", "queries", "database", "references", "background")
    return {name: pattern for name in names if (pattern := getattr(data, name, ""))}


@torch.inference_mode()
def _seconds_an_image(one: Evaluated, device: torch.device) -> float:
    model, images = one.model.to(device), torch.zeros(8, 3, one.image.px, one.image.px, device=device)
    model([images])
    start = time.perf_counter()
    float(model([images])[0].cls.sum())
    return (time.perf_counter() - start) / len(images)


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError: an evaluation that is not there, or none."""
    if unknown := [name for name in names if name not in PROTOCOLS] or ([""] if not names else []):
        raise ValueError(f"there is no evaluation {unknown[0]!r}; name some of {', '.join(PROTOCOLS)}.")


def tasks_of(names: Sequence[str], sets: Mapping[str, ImageSets], settings: Mapping[str, Any]) -> list[Task]:
    """Every evaluation that is named, on every set that it takes, in the order of the sets.

    Raises:
        ValueError: an evaluation that no set is for.
    """
    kinds = {kind: name for name, kind in KINDS.items()}
    found = [
        Task(evaluation, set_name, data, settings[evaluation])
        for set_name, data in sets.items()
        for evaluation in names
        if isinstance(data, PROTOCOLS[evaluation].takes)
    ]
    without = [name for name in names if name not in {task.evaluation for task in found}]
    if without and len(names) < len(PROTOCOLS):
        kind = kinds[PROTOCOLS[without[0]].takes]
        raise ValueError(f"{without[0]} needs a set of kind {kind}, and there is none among {', '.join(sets)}.")
    return found
