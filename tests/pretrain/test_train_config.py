"""The command line's config: shards, datasets by name, phases; what is wrong is said with its key."""

import pytest

from pretrain.config import load_train_config


def test_shards_replace_datasets_and_overrides_reach_them() -> None:
    config = load_train_config("cifar", ["data.datasets.0-a.weight=2", "seed=3"], ["x/a.tar", "y/*.tar"])
    assert {name: (d.shards, d.weight) for name, d in config.data.datasets.items()} == {
        "0-a": ("x/a.tar", 2.0),
        "1-shards": ("y/*.tar", 1.0),
    }
    assert config.seed == 3


def test_a_dataset_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.datasets\.zz\.shards"):
        load_train_config("cifar", ["data.datasets.zz.weight=2"], ["a.tar"])


def test_lists_of_sizes_come_from_yaml() -> None:
    config = load_train_config("dinov3_vits16", [], []).phase("high_resolution")
    assert [(s.global_px, s.local_px, s.gram_px) for s in config.crops.all_sizes()][:2] == [
        (512, 112, 768),
        (768, 112, 1152),
    ]


def test_a_phase_is_the_config_with_its_differences() -> None:
    config = load_train_config("demo", ["phases.high_resolution.steps=7"], ["a.tar"])
    assert config.phase_names == ["pretrain", "high_resolution"]
    late = config.phase("high_resolution")
    assert (late.steps, late.crops.global_px, late.model.position_px) == (7, 96, 96)
    assert config.phase("pretrain").steps == 400
    with pytest.raises(ValueError, match=r"phases\.high_resolution: unknown key 'crops\.size'"):
        load_train_config("demo", ["phases.high_resolution.crops.size=1"], ["a.tar"])
    with pytest.raises(ValueError, match="seed cannot differ by phase"):
        load_train_config("demo", ["phases.high_resolution.seed=1"], ["a.tar"])
