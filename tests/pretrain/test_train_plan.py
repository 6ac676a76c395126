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
from pretrain.models.architectures import build
from tests.conftest import picture_tar

SHORT = ("optim.warmup_steps=1", "optim.freeze_last_layer_steps=1", "optim.teacher_temperature_warmup_steps=1")


def config(*overrides: str) -> TrainConfig:
    return load_train_config("dinov2_vitl16_short", list(overrides), [])


def only(asked: TrainConfig, world_size: int = 1) -> plan.PhasePlan:
    (planned,) = plan.plan_phases(asked, world_size)
    return planned


@pytest.mark.parametrize("name", config_names(GROUP))
def test_every_config_has_a_plan(name: str) -> None:
    # The demo's labelled sets are made by its curation, and a plan says when they are not there.
    text = plan.describe(load_train_config(name, ["evaluation.every_steps=0"], []), 8)
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
    sharded = only(config("execution.parallel=fsdp"), 8).memory
    assert sharded["AdamW"] == parameters
    assert only(config("execution.parallel=fsdp"), 8).mode == "fsdp"


def test_the_mode_follows_size_and_ranks() -> None:
    assert [only(config(), n).mode for n in (1, 8)] == ["single", "ddp"]
    assert (
        only(config("model.architecture=dinov2_vitg14", "crops.local_px=98", "model.patch_size=14"), 8).mode == "fsdp"
    )


def test_teacher_logits_are_crops_and_masked_patches_times_prototypes() -> None:
    """Spec figure: 64 images of ViT-L/16 have 128 global crops and about 3,760 masked patches."""
    asked = config("heads.dino.num_prototypes=1000", "heads.ibot.num_prototypes=1000")
    memory = only(asked, 32).memory
    assert memory["teacher logits"] == pytest.approx(2 * 1000 * (128 + 3763), rel=0.01)


@pytest.mark.parametrize("architecture", ["dinov2_tiny", "dinov3_tiny"])
@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu"}])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_activations_are_close_to_what_autograd_keeps(
    architecture: str, changes: dict[str, Any], precision: str
) -> None:
    """Within 5% of the bytes that a real forward saves; weights and their bfloat16 copies are counted elsewhere."""
    overrides = [f"precision={precision}", f"model.architecture={architecture}", "model.patch_size=8", "steps=1"]
    overrides += ["crops.global_px=64", "crops.local_px=32", "model.drop_path=0.0", "global_batch_size=4"]
    overrides += [f"model.{key}={value}" for key, value in changes.items()] + ["crops.num_local_crops=4"]
    asked = config(*overrides)
    backbone = build(architecture, **asked.model.changes()).train()
    matrices = [p for p in backbone.parameters() if p.ndim == 2]
    shapes = {tuple(p.shape) for p in backbone.parameters()} | {tuple(p.T.shape) for p in matrices}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        crops = [torch.randn(8, 3, 64, 64), torch.randn(16, 3, 32, 32)]
        held.append(backbone(crops, [None, None], [False, True], torch.Generator().manual_seed(0)))
    sizes = CropSizes(global_px=64, local_px=32)
    assert sum(kept.values()) == pytest.approx(plan.activation_bytes(asked, backbone, sizes, 4), rel=0.05)


def test_checkpointing_keeps_one_block_and_the_inputs() -> None:
    sizes, backbone = CropSizes(), _network(config()).backbone
    kept = plan.activation_bytes(config("execution.activation_checkpointing=true"), backbone, sizes, 4)
    assert kept < plan.activation_bytes(config(), backbone, sizes, 4) / 5


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
    small = ["global_batch_size=4", "loss.koleo_group_size=0", "steps=5", *SHORT]
    asked = load_train_config("dinov2_vitl16_short", small, [str(tmp_path / "shards")])
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
