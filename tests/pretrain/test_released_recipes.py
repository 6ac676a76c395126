"""Every config and phase against the released recipe that it claims, key by key; and where it differs on purpose."""

import inspect
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from configs.loader import config_names, find_config
from pretrain.checks import check_numbers
from pretrain.config import GROUP, TrainConfig, load_train_config, micro_batch_size
from pretrain.models.architectures import architecture
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.optim.schedules import scaled_lr
from pretrain.resume import flat
from tests.pretrain.released import Facts, Recipe, released, table

# Recipes of our own, whose opening comments say what was measured.
OWN = {"cifar", "copies", "demo", "vits16_one_gpu", "vitl16_eight_gpus"}
# What a recipe does not say: how a run is computed, watched and fed.
NOT_OF_A_RECIPE = (
    *("seed", "precision", "phases", "init_from", "distill_from", "execution", "checkpoint", "evaluation", "watch"),
    *(
        "data",
        "optim.freeze_backbone_steps",
        "optim.max_skipped_steps",
        "model.attention",
        "model.fp8",
        "model.in_channels",
    ),
)


def _same(values: dict[str, Any], why: str) -> dict[str, tuple[Any, str]]:
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
    idle += ["loss.coding_rate_weight", "loss.coding_rate_eps"]  # no released file of these has the objective
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


@cache
def load(name: str) -> TrainConfig:
    return load_train_config(name, [], [])


def test_every_config_and_phase_is_held_against_a_file_or_is_our_own() -> None:
    phases = {(name, phase) for name in config_names(GROUP) for phase in load(name).phase_names}
    assert {pair for pair in phases if pair[0] not in OWN} == RECIPES.keys()
    assert {name for name, _ in phases} >= OWN


@pytest.mark.parametrize(("name", "phase"), RECIPES)
def test_a_phase_equals_its_released_file_but_for_what_is_meant(name: str, phase: str) -> None:
    recipe = RECIPES[name, phase]
    config = load(name)
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


@pytest.mark.parametrize("name", sorted({name for name, _ in RECIPES}))
def test_a_run_on_the_released_number_of_gpus_has_their_batches(name: str) -> None:
    config, checked = load(name), set()
    for (other, phase), recipe in RECIPES.items():
        gpus = Facts(recipe).command("gpus") or 48  # the distilled student's
        if other == name and "global_batch_size" not in recipe.differs:
            group = config.phase(phase).loss.koleo_group_size
            assert micro_batch_size(config.phase(phase), gpus) in (group, group // 2)  # two GPUs share a group
            checked.add(gpus)
    for gpus in checked | {1, 8}:
        check_numbers(config, gpus)


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
    ours = resolved(load(f"dinov2_vit{size}14").phase("pretrain"))
    asked = {"num_register_tokens": "num_registers", "interpolate_antialias": "position_antialias"}
    for theirs, name in (asked | {"interpolate_offset": "position_offset"}).items():
        assert ours[f"model.{name}"] == table()[file, f"student.{theirs}"]
        Facts.read.add((file, f"student.{theirs}"))


def test_every_line_of_the_table_is_asked() -> None:
    for recipe in RECIPES.values():
        released(recipe)
    asked = Facts.read | {key for key in table() if "/eval/" in key[0]}
    assert sorted(table().keys() - asked) == []
