"""The dry run's figures: closed forms, a measured step, and every config that is shipped."""

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.loader import config_names
from pretrain import plan
from pretrain.config import GROUP, TrainConfig, load_train_config
from pretrain.data.crops import CropSizes
from pretrain.data.loader import DataConfig, DatasetConfig
from tests.conftest import picture_tar

SHORT = ("optim.warmup_steps=1", "optim.freeze_last_layer_steps=1", "optim.teacher_temperature_warmup_steps=1")
ACCUMULATE = "execution.accumulation_steps=4"


def config(*overrides: str) -> TrainConfig:
    return load_train_config("dinov2_vitl16_short", list(overrides), [])


def only(asked: TrainConfig, world_size: int = 1) -> plan.PhasePlan:
    (planned,) = plan.plan_phases(asked, world_size)
    return planned


@pytest.mark.parametrize("name", config_names(GROUP))
def test_every_config_has_a_plan(name: str, tmp_path: Path) -> None:
    # Labelled sets and pictures that commands make are not there yet, and a plan says so.
    asked = ["evaluation.every_steps=0"]
    for dataset in load_train_config(name, [], []).data.datasets:
        picture_tar(tmp_path / f"{dataset}.tar", range(128))  # a batch
        asked.append(f"data.datasets.{dataset}.shards={tmp_path / dataset}.tar")
    text = plan.describe(load_train_config(name, asked, []), 8)
    assert "in all" in text
    assert max(map(len, text.splitlines()[:-10])) <= 120


def test_flops_are_those_of_the_published_recipe() -> None:
    """ViT-L/16, 2 x 224 + 8 x 96: 1.15 TFLOP an image; 125,000 steps in 14 h on 32 H100 are 183 TFLOP/s each."""
    planned = only(config("model.drop_path=0.3"), 32)
    assert planned.flops_per_image == pytest.approx(1.15e12, rel=0.03)
    h100 = next(rate for rate in plan.RATES if rate.device == "H100")
    assert planned.flops / (32 * h100.flops_per_s) == pytest.approx(14 * 3600, rel=0.05)


def test_crop_sizes_are_averaged() -> None:
    cost = plan.step_cost(planned := config(), *(_network(planned),) * 2)
    small, large = CropSizes(global_px=224, local_px=96), CropSizes(global_px=448, local_px=96, probability=3)
    alone = [plan.flops_per_image(cost, [size]) for size in (small, large)]
    assert plan.flops_per_image(cost, [small, large]) == pytest.approx((alone[0] + 3 * alone[1]) / 4)


def test_memory_of_weights_and_optimizer() -> None:
    network = _network(config())
    parameters = sum(p.numel() for p in network.parameters())
    memory = only(config(), 8).memory
    assert memory["weights"] + memory["gradients"] + memory["AdamW"] + memory["EMA teacher"] == 20 * parameters
    assert only(config(), 8).start_bytes == 16 * parameters
    sharded = only(config("execution.parallel=fsdp"), 8)
    assert (sharded.mode, sharded.memory["AdamW"], sharded.start_bytes) == ("fsdp", parameters, 2 * parameters)
    hybrid = only(config("execution.parallel=hybrid", "execution.shard_ranks=4"), 8)
    assert hybrid.memory["AdamW"] == 2 * parameters


def test_the_mode_follows_size_and_ranks() -> None:
    assert [only(config(), n).mode for n in (1, 8)] == ["single", "ddp"]
    assert (
        only(config("model.architecture=dinov2_vitg14", "crops.local_px=98", "model.patch_size=14"), 8).mode == "fsdp"
    )


def test_teacher_logits_are_crops_and_masked_patches_times_prototypes() -> None:
    """Spec figure: 64 images of ViT-L/16 have 128 global crops and about 3,760 masked patches."""
    asked = config("heads.dino.num_prototypes=1000", "heads.ibot.num_prototypes=1000")
    memory = only(asked, 32).memory
    assert memory["teacher answers"] == pytest.approx(2 * 1000 * (128 + 3763), rel=0.01)
    accumulating = config(*(f"heads.{head}.num_prototypes=1000" for head in ("dino", "ibot")), ACCUMULATE)
    assert only(accumulating, 8).memory["teacher answers"] == 4 * memory["teacher answers"]  # of the step
    assert only(accumulating, 8).memory["crops"] == memory["crops"]  # of a micro-batch


def test_epochs_of_a_mixture() -> None:
    data = DataConfig(
        datasets={"a": DatasetConfig(shards="a", weight=3), "b": DatasetConfig(shards="b", weight=1)},
        homogeneous="b",
        homogeneous_share=0.1,
    )
    seen = plan.epochs(data, 1000, {"a": 100, "b": 50})
    assert seen == pytest.approx({"a": 0.9 * 0.75 * 10, "b": (0.9 * 0.25 + 0.1) * 20})


def test_described_with_a_dataset(tmp_path: Path) -> None:
    picture_tar(tmp_path / "shards" / "a.tar", range(10))
    asked = load_train_config(
        "dinov2_vitl16_short",
        ["global_batch_size=4", "steps=5", "loss.koleo_group_size=0", *SHORT],
        [str(tmp_path / "shards")],
    )
    text = plan.describe(asked)
    assert "shards 2" in text  # 20 images drawn of 10
    assert "65,536 prototypes" in text


def test_mistakes_are_found_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="not a multiple of the patch size 16; the nearest that are"):
        plan.describe(config("crops.local_px=98"))
    with pytest.raises(ValueError, match="does not split over 7 ranks"):
        plan.describe(config(), 7)


def _network(asked: TrainConfig) -> Any:
    with torch.device("meta"):
        return plan.build_network(asked)
