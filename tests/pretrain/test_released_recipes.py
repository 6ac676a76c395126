"""Every config and phase against the released recipe that it claims, key by key; and where it differs on purpose.

`released.csv` holds what was read in the public files, a line each: facebookresearch/dinov2 at b8931f7 and
facebookresearch/dinov3 at 6876159. A training file counts over the defaults of its repository.
"""

import csv
import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from configs.loader import config_names, find_config
from pretrain.config import GROUP, TrainConfig, load_train_config
from pretrain.models.architectures import architecture
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.optim.schedules import scaled_lr
from pretrain.resume import flat

TABLE = Path(__file__).with_name("released.csv")
# Recipes of our own, whose opening comments say what was measured.
OWN = {"cifar", "demo", "vits16_one_gpu", "vitl16_eight_gpus"}
# What a recipe does not say: how a run is computed, watched and fed.
NOT_OF_A_RECIPE = (
    *("seed", "precision", "phases", "init_from", "distill_from", "execution", "checkpoint", "evaluation", "watch"),
    *("data", "optim.freeze_backbone_steps", "optim.max_skipped_steps", "model.attention", "model.in_channels"),
)


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


def _same(values: Mapping[str, Any], why: str) -> dict[str, tuple[Any, str]]:
    return {key: (value, why) for key, value in values.items()}


EXACT = _same({"masks.exact": True}, "as many masked patches on every rank")
OFFSET = _same({"model.position_offset": 0.0}, "transformers and timm resize positions so")
REGISTERS = _same(
    {"model.num_registers": 4, "model.position_antialias": True, "model.position_offset": 0.0},
    "dinov2/configs/eval/vitl14_reg4_pretrain.yaml",
)
SIZES = {
    "small": {"model.embed_dim": 384, "model.depth": 12, "model.num_heads": 6},
    "base": {"model.embed_dim": 768, "model.depth": 12, "model.num_heads": 12},
}
SMALL, BASE = (_same(SIZES[size], "another size of the family") for size in ("small", "base"))
MLP = _same({"model.ffn": ("mlp", 4.0)}, "as the distilled models of this size")
# arXiv:2304.07193, App. B.2: 518 px, 10,000 steps, schedules as before but shorter; the rate is unpublished.
HIGH = _same(
    {
        "steps": 10_000,
        "model.position_grid": 37,
        "crops.sizes": [(518, 98, 0, 1.0)],
        "optim.peak_lr": 2e-5 * math.sqrt(3),
        "optim.warmup_steps": 1000,
        "optim.freeze_last_layer_steps": 0,
        "optim.teacher_temperature_warmup_steps": 500,
    },
    "a stage without a released file",
)
# The 7B's phases at a quarter of its steps, half of its batch and four times its rate.
SMALLER = _same(
    {
        "global_batch_size": 2048,
        "model.ffn": ("mlp", 4.0),
        "model.qkv_bias": True,
        "model.untied_local_norm": False,
        **{f"heads.{head}.num_prototypes": 65_536 for head in ("dino", "ibot")},
        **{f"heads.{head}.hidden_dim": 2048 for head in ("dino", "ibot")},
        **{f"heads.{head}.bottleneck_dim": 256 for head in ("dino", "ibot")},
    },
    "a small budget",
)
SMALLER_PRETRAIN = SMALLER | _same(
    {
        "steps": 250_000,
        "optim.peak_lr": 8e-4 * math.sqrt(2),
        "optim.warmup_steps": 12_500,
        "optim.teacher_temperature_warmup_steps": 12_500,
        "optim.freeze_last_layer_steps": 625,
    },
    "a small budget",
)
SMALLER_GRAM = SMALLER | _same(
    {
        "steps": 50_000,
        "optim.peak_lr": 4.8e-4 * math.sqrt(2),
        "loss.dino_local_ramp_steps": 250,
        "gram.ramp_steps": 250,
        "gram.refresh_every_steps": 2500,
        "gram.teacher": "step-50000",
    },
    "a small budget",
)
SMALLER_HIGH = SMALLER | _same(
    {"steps": 7500, "global_batch_size": 1024, "optim.peak_lr": 2e-4, "optim.warmup_steps": 2500}, "a small budget"
)
PRETRAIN_7B = "dinov3/configs/train/dinov3_vit7b16_pretrain.yaml"
GRAM_7B = "dinov3/configs/train/dinov3_vit7b16_gram_anchor.yaml"
HIGH_7B = "dinov3/configs/train/dinov3_vit7b16_high_res_adapt.yaml"
SHORT, LONG, GIANT = (f"dinov2/configs/train/{name}.yaml" for name in ("vitl16_short", "vitl14", "vitg14"))
LARGE = _same({"model.embed_dim": 1024, "model.depth": 24, "model.num_heads": 16}, "another size of the family")


def _stages(config: str, size: dict[str, tuple[Any, str]]) -> dict[tuple[str, str], Recipe]:
    return {
        (config, "pretrain"): Recipe(PRETRAIN_7B, SMALLER_PRETRAIN | size),
        (config, "gram"): Recipe(GRAM_7B, SMALLER_GRAM | size, begins=1_000_000),
        (config, "high_resolution"): Recipe(HIGH_7B, SMALLER_HIGH | size),
    }


def _drop(share: float, layerwise: float | None = None) -> dict[str, tuple[Any, str]]:
    others = {} if layerwise is None else {"optim.layerwise_decay": layerwise}
    return _same({"model.drop_path": share} | others, "for this size")


RECIPES: dict[tuple[str, str], Recipe] = {
    ("dinov2_vitl16_short", "pretrain"): Recipe(SHORT, EXACT | OFFSET),
    ("dinov2_vitb16_short", "pretrain"): Recipe(SHORT, EXACT | OFFSET | BASE | _drop(0.2)),
    ("dinov2_vits16_short", "pretrain"): Recipe(SHORT, EXACT | OFFSET | SMALL | _drop(0.1)),
    ("dinov2_vitl14", "pretrain"): Recipe(LONG, EXACT | REGISTERS),
    ("dinov2_vitb14", "pretrain"): Recipe(LONG, EXACT | REGISTERS | BASE | MLP | _drop(0.2)),
    ("dinov2_vits14", "pretrain"): Recipe(LONG, EXACT | REGISTERS | SMALL | MLP | _drop(0.0)),
    ("dinov2_vitg14", "pretrain"): Recipe(GIANT, EXACT | REGISTERS),
    ("dinov2_vitl14", "high_resolution"): Recipe(LONG, EXACT | REGISTERS | HIGH),
    ("dinov2_vitb14", "high_resolution"): Recipe(LONG, EXACT | REGISTERS | BASE | MLP | _drop(0.2) | HIGH),
    ("dinov2_vits14", "high_resolution"): Recipe(LONG, EXACT | REGISTERS | SMALL | MLP | _drop(0.0) | HIGH),
    ("dinov2_vitg14", "high_resolution"): Recipe(GIANT, EXACT | REGISTERS | HIGH),
    ("high_resolution_patch14", "pretrain"): Recipe(
        LONG,
        EXACT
        | REGISTERS
        | HIGH
        | _same(
            {"global_batch_size": 2048, "optim.peak_lr": 2e-5 * math.sqrt(2), "model.ffn": ("mlp", 4.0)},
            "for the released weights of the distilled ViT-L",
        ),
    ),
    ("dinov3_vit7b16", "pretrain"): Recipe(PRETRAIN_7B),
    ("dinov3_vit7b16", "gram"): Recipe(
        GRAM_7B, _same({"gram.teacher": "step-200000"}, "arXiv:2508.10104, Fig. 9b"), begins=1_000_000
    ),
    ("dinov3_vit7b16", "high_resolution"): Recipe(HIGH_7B),
    **_stages("dinov3_vits16", SMALL | _drop(0.0, 0.9)),
    **_stages("dinov3_vitb16", BASE | _drop(0.2, 0.9)),
    **_stages("dinov3_vitl16", LARGE | _drop(0.3)),
    ("dinov3_vitl16_imagenet", "pretrain"): Recipe("dinov3/configs/train/vitl_im1k_lin834.yaml"),
    ("dinov3_vits16_distilled", "pretrain"): Recipe(
        "dinov3/configs/train/dinov3_vitl16_lvd1689m_distilled.yaml",
        SMALL
        | _same({"steps": 1_000_000}, "arXiv:2508.10104 where the file holds a short stage of a trained student")
        | _same({"optim.peak_lr": 2e-4 * math.sqrt(1920 / 1024)}, "the rate of the batch as it is"),
    ),
}


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


def resolved(config: TrainConfig) -> dict[str, Any]:
    """A phase's settings in the same names: without those that have no effect beside the others."""
    model = {name: p.default for name, p in inspect.signature(VisionTransformer).parameters.items()} | architecture(
        config.model.architecture, **config.model.changes()
    )
    del model["family"]
    ratio, align = model.pop("ffn_ratio"), model.pop("ffn_align")
    model["ffn"] = ("mlp", ratio) if model["ffn"] == "mlp" else ("swiglu", ratio, align)
    other = "rope_" if model["position"] == "learned" else "position_"
    model = {name: value for name, value in model.items() if not name.startswith(other)}
    found = flat(asdict(config))
    found = {key: value for key, value in found.items() if not key.startswith(("model.", "crops.sizes"))}
    found |= {f"model.{name}": value for name, value in model.items()}
    sizes = config.crops.all_sizes()
    found["crops.sizes"] = [
        (s.global_px, s.local_px, s.gram_px if config.gram.weight else 0, s.probability) for s in sizes
    ]
    for key in ("crops.global_px", "crops.local_px", "crops.gram_px", "optim.base_lr", "optim.lr_rule"):
        del found[key]
    optim = config.optim
    found["optim.peak_lr"] = scaled_lr(optim.base_lr, config.global_batch_size, optim.lr_rule)
    idle = [f"loss.{'sinkhorn_iterations' if config.loss.centering == 'softmax' else 'center_momentum'}"]
    idle += [f"heads.{h}.train_lengths" for h in ("dino", "ibot") if not found[f"heads.{h}.weight_norm"]]
    idle += ["optim.min_lr"] if optim.schedule == "constant" else []
    idle += [] if optim.warmup_steps else ["optim.warmup"]
    gram = [key for key in found if key.startswith("gram.") and key != "gram.weight"]
    idle += [] if config.gram.refresh_every_steps else ["gram.max_refreshes"]
    idle += [] if config.gram.weight else gram
    return {
        key: value
        for key, value in found.items()
        if key not in idle and not any(key == name or key.startswith(f"{name}.") for name in NOT_OF_A_RECIPE)
    }


def test_every_config_and_phase_is_held_against_a_file_or_is_our_own() -> None:
    phases = {(name, phase) for name in config_names(GROUP) for phase in load_train_config(name, [], []).phase_names}
    assert {pair for pair in phases if pair[0] not in OWN} == RECIPES.keys()
    assert {name for name, _ in phases} >= OWN


@pytest.mark.parametrize(("name", "phase"), RECIPES)
def test_a_phase_equals_its_released_file_but_for_what_is_meant(name: str, phase: str) -> None:
    recipe = RECIPES[name, phase]
    config = load_train_config(name, [], [])
    ours, theirs = resolved(config.phase(phase)), released(recipe)
    if phase == config.phase_names[0]:
        for key in ("reset_optimizer", "start_from"):
            del ours[key], theirs[key]
    assert ours.keys() - recipe.differs.keys() == theirs.keys() - recipe.differs.keys()
    for key in sorted(ours):
        value = theirs.get(key)
        if key in recipe.differs:
            # A difference that is none any more is to be taken out.
            assert ours[key] == _near(recipe.differs[key][0]), f"{name}, {phase}: {key}"
            assert recipe.differs[key][0] != value, f"{name}, {phase}: {key} does not differ"
        else:
            assert ours[key] == _near(value), f"{name}, {phase}: {key}={ours[key]}, released: {value}"


def _near(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


@pytest.mark.parametrize("name", sorted({name for name, _ in RECIPES}))
def test_a_config_cites_the_files_that_it_equals(name: str) -> None:
    text = find_config(GROUP, name).read_text()
    comment = text[: text.index("\n", text.index("# Expected"))]
    for (config, _), recipe in RECIPES.items():
        if config == name:
            assert f"facebookresearch/{recipe.repository}" in comment
            assert Path(recipe.file).name in comment
    assert "# Cost:" in comment
    assert f"--config {name} " in comment


@pytest.mark.parametrize("size", "sblg")
def test_registers_are_those_of_the_released_models(size: str) -> None:
    file = f"dinov2/configs/eval/vit{size}14_reg4_pretrain.yaml"
    ours = resolved(load_train_config(f"dinov2_vit{size}14", [], []).phase("pretrain"))
    asked = {"num_register_tokens": "num_registers", "interpolate_antialias": "position_antialias"}
    for theirs, name in (asked | {"interpolate_offset": "position_offset"}).items():
        assert ours[f"model.{name}"] == table()[file, f"student.{theirs}"]
        Facts.read.add((file, f"student.{theirs}"))


def test_every_line_of_the_table_is_asked() -> None:
    for recipe in RECIPES.values():
        released(recipe)
    asked = Facts.read | {key for key in table() if "/eval/" in key[0]}
    assert sorted(table().keys() - asked) == []
