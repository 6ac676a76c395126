"""Every numeric setting has a range, and what lies outside is one sentence that names it."""

import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Union, get_args, get_origin, get_type_hints

import pytest

from pretrain.checks import check_numbers
from pretrain.config import TrainConfig, load_train_config
from pretrain.data.crops import CropSizes
from pretrain.data.loader import DatasetConfig
from pretrain.optim.schedules import STEP_COUNTS

# What each setting accepts of WRONG, by its key: whatever is not named here accepts none of them.
WRONG = ["-1", "0", "nan", "inf", "-inf", "word"]
ZERO = [
    "seed",
    "execution.shard_ranks",
    "model.num_registers",
    "model.layerscale",
    "model.rope_shift",
    "model.drop_path",
    "loss.dino_weight",
    "loss.dino_local_weight",
    "loss.dino_local_ramp_steps",
    "loss.coding_rate_weight",
    "loss.ibot_weight",
    "loss.koleo_weight",
    "loss.koleo_group_size",
    "loss.center_momentum",
    "gram.weight",
    "gram.ramp_steps",
    "gram.refresh_every_steps",
    "gram.max_refreshes",
    "data.homogeneous_share",
    "data.shuffle_shards",
    "crops.gram_px",
    "crops.num_local_crops",
    "crops.flip_probability",
    "crops.jitter_probability",
    "crops.brightness",
    "crops.contrast",
    "crops.saturation",
    "crops.hue",
    "crops.gray_probability",
    "crops.local_blur_probability",
    "crops.edits",
    "masks.probability",
    "optim.min_lr",
    "optim.warmup_steps",
    "optim.weight_decay",
    "optim.weight_decay_end",
    "optim.beta1",
    "optim.beta2",
    "optim.clip_norm",
    "optim.freeze_last_layer_steps",
    "optim.freeze_backbone_steps",
    "optim.teacher_momentum",
    "optim.teacher_momentum_end",
    "optim.teacher_temperature_warmup_steps",
    "checkpoint.keep_every_steps",
    "evaluation.every_steps",
    "evaluation.resize_px",
    "evaluation.max_train_images",
    "evaluation.max_val_images",
    "evaluation.pca_images",
    "watch.peak_tflops",
    "execution.threads",
    "execution.loader.num_workers",
    "execution.loader.timeout_s",
    "model.position_offset",
    "optim.max_skipped_steps",
]
# Each element of a list is tried in the first place, beside a sound second one.
LISTS = {
    "crops.global_scale": "0.5",
    "crops.local_scale": "0.5",
    "crops.aspect": "2",
    "crops.blur_sigma": "2",
    "crops.global_blur_probability": "0.5",
    "crops.global_solarize_probability": "0.5",
    "masks.ratio": "0.5",
    "evaluation.k": "5",
}
ZERO_IN_LISTS = ["crops.global_blur_probability", "crops.global_solarize_probability", "masks.ratio"]


def numeric(schema: type, prefix: str = "") -> Iterator[str]:
    """Keys of all settings that hold a number, or a list of them."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        parts = get_args(hint) if get_origin(hint) in (types.UnionType, Union, list) else (hint,)
        if is_dataclass(hint):
            yield from numeric(hint, f"{key}.")  # type: ignore[arg-type]
        elif {int, float} & set(parts):
            yield key


KEYS = list(numeric(TrainConfig))


def test_the_walk_finds_them_all() -> None:
    assert len(KEYS) > 80
    assert {"steps", "model.depth", "heads.ibot.num_layers", "optim.beta2", "execution.loader.prefetch"} <= set(KEYS)
    assert set(ZERO) | set(LISTS) <= set(KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_a_number_outside_its_range_is_refused_by_name(key: str) -> None:
    for wrong in WRONG:
        value = f"[{wrong},{LISTS[key]}]" if key in LISTS else wrong
        if wrong == "0" and key in (*ZERO, *ZERO_IN_LISTS):
            load(f"{key}={value}")
            continue
        with pytest.raises(ValueError, match=r"(?s)^(?!.*\n)") as error:  # one line
            load(f"{key}={value}")
        assert key in str(error.value), (value, str(error.value))


def load(*overrides: str) -> TrainConfig:
    return load_train_config("demo", ["data.homogeneous=''", *overrides], ["a.tar"])


@pytest.mark.parametrize(
    ("schema", "key", "zero"),
    [(CropSizes, "crops.sizes.1", ["gram_px", "probability"]), (DatasetConfig, "data.datasets.b", ["weight"])],
)
def test_settings_of_lists_and_dicts_are_named_with_their_place(schema: type, key: str, zero: list[str]) -> None:
    for name in numeric(schema):
        for wrong in ("-1", "nan", "inf", *([] if name in zero else ["0"])):
            entry = f"{{shards: x, {name}: {wrong}}}" if schema is DatasetConfig else f"{{{name}: {wrong}}}"
            whole = f"data.datasets={{b: {entry}}}" if schema is DatasetConfig else f"crops.sizes=[{{}}, {entry}]"
            with pytest.raises(ValueError, match=rf"{name}") as error:
                load(whole)
            if wrong in ("-1", "0"):  # NaN and infinity are no int, which the loader says in its words
                assert f"{key}.{name}={wrong}" in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("crops.global_scale=[1.0,0.3]", "smaller number first"),
        ("crops.aspect=[2,0.5]", "smaller number first"),
        ("masks.ratio=[0.5,0.1]", "smaller number first"),
        ("crops.local_scale=[0.1]", r"\[least, most\]"),
        ("crops.global_blur_probability=[0.1]", "each of the two global crops"),
        ("loss.center_momentum=1", r"in \[0, 1\)"),
        ("optim.beta1=1.0", r"in \[0, 1\)"),
        ("optim.teacher_momentum=1.1", r"in \[0, 1\]"),
        ("model.rope_rescale=0.5", "1 or more"),
        ("heads.dino.num_prototypes=1", "2 or more"),
        ("model.ffn=glu", "choose one of mlp, swiglu"),
        ("model.attention=flash", "choose one of sdpa"),
        ("gram.negatives=drop", "choose one of keep"),
        ("execution.device=mps", "choose one of auto, cpu, cuda"),
        ("execution.device=gpu", "choose one of auto, cpu, cuda"),
        ("data.limits.max_pixels=0", "1 or more"),
    ],
)
def test_other_rules(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load(override)
    assert override.partition("=")[0] in str(error.value)


@pytest.mark.parametrize("name", STEP_COUNTS)
@pytest.mark.parametrize("phases", ["{}", "{a: {steps: 300}, b: {steps: 60}}"])
def test_a_warm_up_or_freeze_longer_than_its_phase_is_refused_with_both_numbers(name: str, phases: str) -> None:
    still = [f"optim.{other}=0" for other in STEP_COUNTS]
    asked = [*still, "steps=60", f"phases={phases}"]
    check_numbers(load_train_config("dinov2_vitl16_short", [*asked, f"optim.{name}=60"], []), 1)
    with pytest.raises(ValueError, match=rf"phase \w+: optim\.{name}=61: longer than the phase, steps=60"):
        check_numbers(load_train_config("dinov2_vitl16_short", [*asked, f"optim.{name}=61"], []), 1)


@pytest.mark.parametrize(
    "other", [[], ["loss.ibot_weight=1", "masks.probability=0"], ["loss.ibot_weight=1", "masks.ratio=[0,0]"]]
)
def test_a_loss_without_terms_is_refused(other: list[str]) -> None:
    off = ["loss.dino_weight=0", "loss.ibot_weight=0", "loss.koleo_weight=0"]
    with pytest.raises(ValueError, match="nothing is learned"):
        check_numbers(load(*off, *other), 1)
    check_numbers(load(*off, *other, "loss.koleo_weight=0.1"), 1)


@pytest.mark.parametrize("number", ["1e4", "10000.0", "10_000", "1.0e+4", "+10000", "1_0e3"])
def test_whole_numbers_in_any_spelling(number: str, tmp_path) -> None:
    assert load(f"steps={number}").steps == 10_000
    assert load(f"evaluation.k=[{number}]").evaluation.k == [10_000]
    assert load(f"model.depth={number}").model.depth == 10_000
    assert load(f"phases.high_resolution.steps={number}").phase("high_resolution").steps == 10_000
    (tmp_path / "a.yaml").write_text(f"steps: {number}\n")
    assert load_train_config(str(tmp_path / "a.yaml"), [], []).steps == 10_000


@pytest.mark.parametrize("number", ["1.5", "1e-4", "10000.5", "1e", "0x", "true", "1e400"])
def test_no_other_numbers_are_ints(number: str) -> None:
    with pytest.raises(ValueError, match="steps"):
        load(f"steps={number}")
