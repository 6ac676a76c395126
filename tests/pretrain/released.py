"""What the released recipes say, in this repository's names: `released.csv` as settings of a phase.

The table has a line for a key: facebookresearch/dinov2 at b8931f7 and facebookresearch/dinov3 at 6876159. A training
file counts over the defaults of its repository; what no file says is read in the code that the line names.
"""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import yaml

TABLE = Path(__file__).with_name("released.csv")


@dataclass(frozen=True)
class Recipe:
    """A phase's released file, and what is meant to be otherwise here: key -> (value, why)."""

    file: str
    differs: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    begins: int = 0
    """iteration of the released run at which this phase starts"""

    @property
    def repository(self) -> str:
        return self.file.partition("/")[0]


@cache
def table() -> dict[tuple[str, str], Any]:
    """(file, key) -> value."""
    with TABLE.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["repository"] for row in rows} == {"facebookresearch/dinov2", "facebookresearch/dinov3"}
    prefix = {"README.md", "issues/311"}
    named = [(f"{row['repository'][17:]}/{row['file']}" if row["file"] in prefix else row["file"], row) for row in rows]
    found = {(file, row["key"]): _value(row["value"]) for file, row in named}
    assert len(found) == len(rows)
    return found


def _value(text: str) -> Any:
    try:
        return float(text) if "e-" in text else yaml.safe_load(text)
    except ValueError:
        return text


class Facts:
    """What a file says, over its repository's defaults and its code; `read` collects what was asked."""

    read: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, recipe: Recipe) -> None:
        self.name = Path(recipe.file).stem
        readme = [f"{recipe.repository}/README.md", f"{recipe.repository}/issues/311"]
        code = {file for file, _ in table() if file.startswith(f"{recipe.repository}/") and "/configs/" not in file}
        self.files = [recipe.file, f"{recipe.repository}/configs/ssl_default_config.yaml", *sorted(code - set(readme))]
        self.readme = readme

    def get(self, key: str, default: Any = None) -> Any:
        for file in self.files:
            if (file, key) in table():
                self.read.add((file, key))
                return table()[file, key]
        return default

    def __getitem__(self, key: str) -> Any:
        value = self.get(key, ...)
        assert value is not ..., f"{self.name}: no line for {key}"
        return value

    def command(self, key: str) -> Any:
        """What the README's command for this file sets."""
        for file in self.readme:
            if (file, f"{self.name}.{key}") in table():
                self.read.add((file, f"{self.name}.{key}"))
                return table()[file, f"{self.name}.{key}"]
        return None


def released(recipe: Recipe) -> dict[str, Any]:
    """The released file in this repository's names."""
    facts, begins = Facts(recipe), recipe.begins
    v2 = recipe.repository == "dinov2"
    length = facts["train.OFFICIAL_EPOCH_LENGTH"]
    distilled = facts.get("distillation.enabled", False)
    if distilled:  # the smallest of its students; rates are counted for a floor of its batch on each GPU
        first, last = facts["multidistillation.students.vits_mlp4_4.ranks_range"]
        batch = facts["multidistillation.global_batch_size"]
        own, gpus = batch // (last - first), facts["multidistillation.students.vitl_mlp4_1.ranks_range"][1]
        rated = batch // gpus * gpus
    else:
        own, gpus = facts["train.batch_size_per_gpu"], facts.command("gpus")
        batch = rated = own * gpus
    return {
        "steps": facts["optim.epochs"] * length - begins,
        "global_batch_size": batch,
        "reset_optimizer": not begins,
        "start_from": "teacher" if facts.command("student.resume_from_teacher_chkpt") else "student",
        **_released_model(facts, v2),
        **_released_heads(facts, v2),
        **_released_losses(facts, v2, own, begins, length),
        **_released_crops(facts, v2),
        **_released_schedules(facts, v2, begins, length, rated),
    }


def _released_model(facts: Facts, v2: bool) -> dict[str, Any]:
    arch, ffn = facts["student.arch"], facts["student.ffn_layer"]
    if ffn == "mlp":
        network: tuple = ("mlp", 4.0 if v2 else facts["student.ffn_ratio"])
    else:
        network = ("swiglu", 4.0, 8) if v2 else ("swiglu", facts["student.ffn_ratio"], int(ffn.removeprefix("swiglu")))
    model = {name: facts[f"{arch}.{name}"] for name in ("embed_dim", "depth", "num_heads")}
    norm = "layernorm" if v2 else facts["student.norm_layer"]
    model |= {
        "stem": "patches",
        "patch_size": facts["student.patch_size"],
        "drop_path": facts["student.drop_path_rate"],
        "layerscale": facts["student.layerscale"],
        "ffn": network,
        "qkv_bias": facts["student.qkv_bias"],
        "norm_eps": facts[f"{norm}.eps"],
        "num_registers": facts["student.num_register_tokens" if v2 else "student.n_storage_tokens"],
        "mask_key_bias": False if v2 else facts["student.mask_k_bias"],
        "untied_local_norm": False if v2 else facts["student.untie_global_and_local_cls_norm"],
    }
    if v2:
        model |= {
            "position": "learned",
            "position_grid": facts["crops.global_crops_size"] // facts["student.patch_size"],
            "position_antialias": facts["student.interpolate_antialias"],
            "position_offset": facts["student.interpolate_offset"],
        }
    else:
        assert facts["student.pos_embed_type"] in ("rope", "ropenew")
        rope = "student.pos_embed_rope_"
        model |= {"position": "rope", "rope_normalise": facts[f"{rope}normalize_coords"], "rope_noise_per_block": True}
        model |= {f"rope_{name}": facts[f"{rope}{name}"] for name in ("base", "min_period", "max_period")}
        model |= {f"rope_{name}": facts[f"{rope}{name}_coords"] for name in ("shift", "jitter", "rescale")}
    return {f"model.{name}": value for name, value in model.items()}


def _released_heads(facts: Facts, v2: bool) -> dict[str, Any]:
    separate = facts["ibot.separate_head"]
    heads: dict[str, Any] = {"heads.tied": not separate}
    for ours in ("dino", "ibot"):
        theirs = ours if separate else "dino"
        heads |= {
            f"heads.{ours}.num_prototypes": facts[f"{theirs}.head_n_prototypes"],
            f"heads.{ours}.hidden_dim": facts[f"{theirs}.head_hidden_dim"],
            f"heads.{ours}.bottleneck_dim": facts[f"{theirs}.head_bottleneck_dim"],
            f"heads.{ours}.num_layers": facts[f"{theirs}.head_nlayers"],
            f"heads.{ours}.weight_norm": facts["weight_norm"],
        }
        if v2:
            heads[f"heads.{ours}.train_lengths"] = True
    return heads


def _released_losses(facts: Facts, v2: bool, own_images: int, begins: int, length: int) -> dict[str, Any]:
    distributed = not v2 and facts["dino.koleo_loss_distributed"]
    loss = {
        "dino_weight": facts["dino.loss_weight"],
        "dino_local_weight": 1.0,
        "dino_local_ramp_steps": 0,
        "same_crop_pairs": False if v2 else not facts["dino.global_ignore_diagonal"],
        "ibot_weight": facts["ibot.loss_weight"],
        "koleo_weight": facts["dino.koleo_loss_weight"],
        "koleo_crops": "all",
        "objective": "prototypes",
        "ibot_patches": "masked",
        "koleo_group_size": facts["dino.koleo_distributed_loss_group_size"] if distributed else own_images,
        "student_temperature": facts["student_temp"],
        "centering": {"centering": "softmax", "sinkhorn_knopp": "sinkhorn"}[facts["train.centering"]],
    }
    loss |= (
        {"center_momentum": facts["center_momentum"]}
        if loss["centering"] == "softmax"
        else {"sinkhorn_iterations": facts["n_iterations"]}
    )
    if not v2 and facts["dino.reweight_dino_local_loss"]:
        ramp = _ramp(facts, "dino.local_loss_weight_schedule", 1, begins, length)
        loss |= {"dino_local_weight": ramp[0], "dino_local_ramp_steps": ramp[1]}
    gram: dict[str, Any] = {"weight": 0.0}
    if not v2 and facts["gram.use_loss"]:
        assert not facts["gram.ema_teacher"]
        assert facts["gram.img_level"]
        weight, steps = _ramp(facts, "gram.loss_weight_schedule", 0, begins, length)
        refreshes = facts["gram.rep_update"]
        every = facts["gram.update_frequency"] if refreshes else 0
        assert not refreshes or facts["gram.it_first_update"] - begins == every
        negatives = [facts["gram.remove_neg"], facts["gram.remove_only_teacher_neg"]]
        teacher = facts.command("gram.ckpt")
        gram = {
            "weight": weight,
            "ramp_steps": steps,
            "teacher": "ema" if teacher == "TEACHER_FROM_GRAM" else teacher,
            "refresh_every_steps": every,
            **({"max_refreshes": facts["gram.max_updates"]} if refreshes else {}),
            "negatives": "keep" if not any(negatives) else "remove",
        }
    masks = {
        "probability": facts["ibot.mask_sample_probability"],
        "ratio": facts["ibot.mask_ratio_min_max"],
        "min_patches": facts["min_num_patches"],
        "max_share": facts["max_num_patches"],
        "aspect": facts["min_aspect"],
        "exact": facts["completes_the_count"],
    }
    sections = {"loss": loss, "gram": gram, "masks": masks}
    return {f"{section}.{name}": value for section, part in sections.items() for name, value in part.items()}


def _ramp(facts: Facts, key: str, before: float, begins: int, length: int) -> tuple[float, int]:
    """The weight that a schedule comes to within the phase, and the steps of the cosine that leads there."""
    start, peak, end = (facts[f"{key}.{name}"] for name in ("start", "peak", "end"))
    assert facts[f"{key}.warmup_epochs"] * length == begins
    assert start == peak
    if start == end:
        return end, 0
    assert start == before
    return end, facts[f"{key}.cosine_epochs"] * length


def _released_crops(facts: Facts, v2: bool) -> dict[str, Any]:
    gram_px = facts["crops.gram_teacher_crops_size"] if not v2 and facts["gram.use_loss"] else 0
    columns = [facts["crops.global_crops_size"], facts["crops.local_crops_size"], gram_px]
    columns.append(1.0 if v2 else facts["crops.global_local_crop_pairs_ratios"])
    sizes = list(zip(*(c if isinstance(c, list) else [c] for c in columns), strict=True))
    flips = v2 or facts["crops.horizontal_flips"]
    if gram_px:
        assert facts["crops.gram_teacher_no_distortions"]
    crops = {
        "sizes": sizes,
        "drop_local_remainder": any(local % facts["student.patch_size"] for _, local, _, _ in sizes),
        "num_local_crops": facts["crops.local_crops_number"],
        "global_scale": facts["crops.global_crops_scale"],
        "local_scale": facts["crops.local_crops_scale"],
        "aspect": [3 / 4, 4 / 3],  # torchvision's default
        "interpolation": facts["RandomResizedCrop.interpolation"],
        "flip_probability": facts["RandomHorizontalFlip.p"] if flips else 0.0,
        "jitter_probability": facts["ColorJitter.p"],
        **{name: facts[f"ColorJitter.{name}"] for name in ("brightness", "contrast", "saturation", "hue")},
        "gray_probability": facts["RandomGrayscale.p"],
        "blur": "as_released",
        "global_blur_probability": [facts[f"global_transfo{i}.GaussianBlur.p"] for i in (1, 2)],
        "local_blur_probability": facts["local_transfo.GaussianBlur.p"],
        "blur_sigma": [facts["GaussianBlur.radius_min"], facts["GaussianBlur.radius_max"]],
        "global_solarize_probability": [0.0, facts["global_transfo2.RandomSolarize.p"]],
        "edits": 0,  # both codes know colours, mirrors and cuts alone
    }
    return {f"crops.{name}": value for name, value in crops.items()}


def _released_schedules(facts: Facts, v2: bool, begins: int, length: int, batch: int) -> dict[str, Any]:
    assert facts["optim.scaling_rule"] == "sqrt_wrt_1024"
    scale = (1 if v2 else 4) * math.sqrt(batch / 1024)
    optim = {
        "beta1": facts["optim.adamw_beta1"],
        "beta2": facts["optim.adamw_beta2"],
        "clip_norm": facts["optim.clip_grad"],
        "layerwise_decay": facts["optim.layerwise_decay"],
        "patch_embed_lr_multiplier": facts["optim.patch_embed_lr_mult"],
    }
    if facts.get("schedules.lr.end") is None:
        temperature = [facts[f"teacher.{name}"] for name in ("warmup_teacher_temp", "teacher_temp")]
        temperature_steps = facts["teacher.warmup_teacher_temp_epochs"] * length
        optim |= {
            "peak_lr": facts["optim.base_lr" if v2 else "optim.lr"] * scale,
            "min_lr": facts["optim.min_lr"],
            "warmup": "linear",
            "warmup_steps": facts["optim.warmup_epochs"] * length,
            "schedule": "cosine",
            "weight_decay": facts["optim.weight_decay"],
            "weight_decay_end": facts["optim.weight_decay_end"],
            "freeze_last_layer_steps": facts["optim.freeze_last_layer_epochs"] * length,
            "teacher_momentum": facts["teacher.momentum_teacher"],
            "teacher_momentum_end": facts["teacher.final_momentum_teacher"],
        }
    else:
        rate, decay, momentum, temp = (f"schedules.{n}" for n in ("lr", "weight_decay", "momentum", "teacher_temp"))
        assert facts[f"{decay}.warmup_epochs"] == facts[f"{momentum}.warmup_epochs"] == 0
        assert facts[f"{temp}.peak"] == facts[f"{temp}.end"]
        rise = facts.get(f"{rate}.cosine_epochs", 0)
        warmup_steps = max(facts[f"{rate}.warmup_epochs"] * length - begins, 0)
        assert facts[f"{rate}.start"] == 0
        if rise:  # from nothing along a cosine, then constant
            assert (facts[f"{rate}.peak"], warmup_steps) == (0, 0)
            warmup_steps = rise * length
        else:
            assert facts[f"{rate}.peak"] == facts[f"{rate}.end"]
        temperature = [facts[f"{temp}.start"], facts[f"{temp}.end"]]
        temperature_steps = max(facts[f"{temp}.warmup_epochs"] * length - begins, 0)
        optim |= {
            "peak_lr": facts[f"{rate}.end"] * scale,
            **({"warmup": "cosine" if rise else "linear"} if warmup_steps else {}),
            "warmup_steps": warmup_steps,
            "schedule": "constant",
            "weight_decay": facts[f"{decay}.peak"],
            "weight_decay_end": facts[f"{decay}.end"],
            "freeze_last_layer_steps": max(facts[f"{rate}.freeze_last_layer_epochs"] * length - begins, 0),
            "teacher_momentum": facts[f"{momentum}.peak"],
            "teacher_momentum_end": facts[f"{momentum}.end"],
        }
    optim |= {
        "teacher_temperature": temperature[0] if temperature_steps else temperature[1],
        "teacher_temperature_end": temperature[1],
        "teacher_temperature_warmup_steps": temperature_steps,
    }
    return {f"optim.{name}": value for name, value in optim.items()}
