"""Schedules against the arrays that the released code precomputes, written here with NumPy."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pretrain.optim.schedules import LR_RULES, OptimConfig, cosine, linear, scaled_lr, values_at

STEPS = 400
CONFIG = OptimConfig(
    base_lr=1e-3,
    min_lr=1e-6,
    warmup_steps=50,
    freeze_last_layer_steps=20,
    teacher_temperature_warmup_steps=120,
)


def released(base: float, final: float, warmup: int = 0, start: float = 0.0) -> np.ndarray:
    """linspace, then half a cosine over what is left, as in DINO's and DINOv2's schedulers."""
    left = np.arange(STEPS - warmup)
    return np.concatenate(
        [np.linspace(start, base, warmup), final + 0.5 * (base - final) * (1 + np.cos(np.pi * left / len(left)))]
    )


def series(config: OptimConfig, name: str, batch: int = 2048, steps: int = STEPS) -> np.ndarray:
    return np.array([getattr(values_at(config, step, STEPS, batch), name) for step in range(steps)])


def test_equal_to_the_released_schedules() -> None:
    peak = 1e-3 * 2**0.5
    lr = released(peak, 1e-6, warmup=50)
    np.testing.assert_allclose(series(CONFIG, "lr"), lr, rtol=1e-12)
    np.testing.assert_allclose(series(CONFIG, "last_layer_lr"), np.where(np.arange(STEPS) < 20, 0, lr), rtol=1e-12)
    np.testing.assert_allclose(series(CONFIG, "weight_decay"), released(0.04, 0.4), rtol=1e-12)
    np.testing.assert_allclose(series(CONFIG, "teacher_momentum"), released(0.992, 1.0), rtol=1e-12)
    temperature = np.concatenate([np.linspace(0.04, 0.07, 120), np.full(STEPS - 120, 0.07)])
    np.testing.assert_allclose(series(CONFIG, "teacher_temperature"), temperature, rtol=1e-12)


def test_after_the_end_values_stay() -> None:
    beyond = values_at(CONFIG, STEPS, STEPS, 1024)
    assert (beyond.lr, beyond.weight_decay, beyond.teacher_momentum, beyond.teacher_temperature) == (1e-6, 0.4, 1, 0.07)
    assert values_at(CONFIG, 10 * STEPS, STEPS, 1024) == beyond


def test_constant_after_the_warmup() -> None:
    config = replace(CONFIG, schedule="constant", lr_rule="none", weight_decay_end=0.04)
    assert series(config, "lr")[50:].tolist() == [1e-3] * (STEPS - 50)
    assert series(config, "weight_decay").tolist() == pytest.approx([0.04] * STEPS)


def test_cosine_warmup_rises_from_zero_to_the_peak() -> None:
    lr = series(replace(CONFIG, warmup="cosine", schedule="constant", lr_rule="none"), "lr")
    assert lr[0] == 0
    assert lr[25] == pytest.approx(5e-4)
    assert (np.diff(lr[:51]) > 0).all()
    assert lr[50] == 1e-3


def test_no_warmup_starts_at_the_peak() -> None:
    assert values_at(replace(CONFIG, warmup_steps=0, lr_rule="none"), 0, STEPS, 7).lr == 1e-3


@pytest.mark.parametrize(
    ("rule", "base", "batch", "expected"),
    [
        ("sqrt_1024", 4e-3, 2048, 5.657e-3),  # vitl16_short
        ("sqrt_1024", 2e-4, 3072, 3.464e-4),  # vitl14, vitg14
        ("sqrt_1024_x4", 1e-3, 2048, 5.657e-3),  # DINOv3's ImageNet recipe: the same rate
        ("sqrt_1024_x4", 5e-5, 4096, 4e-4),  # 7B
        ("linear_256", 5e-4, 1024, 2e-3),
        ("none", 3e-4, 9, 3e-4),
    ],
)
def test_published_peak_rates(rule: str, base: float, batch: int, expected: float) -> None:
    assert scaled_lr(base, batch, rule) == pytest.approx(expected, rel=1e-3)


def test_ramps_of_no_or_one_step() -> None:
    assert linear(0, 1.0, 2.0, 0) == cosine(0, 1.0, 2.0, 0) == 2.0
    assert linear(0, 1.0, 2.0, 1) == 1.0  # as numpy.linspace
    assert linear(1, 1.0, 2.0, 1) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_rule": "sqrt"}, f"one of {', '.join(LR_RULES)}"),
        ({"schedule": "step"}, "one of cosine, constant"),
        ({"warmup": "exp"}, "one of linear, cosine"),
        ({"base_lr": 0.0}, r"optim\.base_lr=0\.0 must be above 0"),
        ({"warmup_steps": -1}, r"optim\.warmup_steps=-1 must be 0 or more"),
        ({"beta2": 1.0}, r"optim\.beta2=1\.0 must be in \[0, 1\)"),
        ({"teacher_momentum": 1.5}, r"must be in \[0, 1\]"),
        ({"layerwise_decay": 0.0}, r"must be in \(0, 1\]"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change)
