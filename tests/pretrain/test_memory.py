"""What a plan says that a step holds, against the tensors of that step: real operations on tensors without memory."""

from contextlib import nullcontext

import pytest

from pretrain import plan
from pretrain.config import load_train_config
from tests.pretrain.fake_device import fake_ranks, step_bytes

CASES = {
    "ViT-S": ("dinov2_vits16_short", 1, 64, ()),
    "ViT-S, four micro-batches": ("dinov2_vits16_short", 1, 64, ("execution.accumulation_steps=4",)),
    "ViT-S, float32": ("dinov2_vits16_short", 1, 16, ("precision=float32",)),
    "ViT-S of DINOv3, no stochastic depth": ("dinov3_vits16", 1, 16, ("model.drop_path=0",)),
    "ViT-L": ("dinov2_vitl16_short", 1, 64, ()),
    "ViT-L, sharded": ("dinov2_vitl16_short", 8, 8, ("execution.parallel=fsdp",)),
    "ViT-L, recomputed": ("dinov2_vitl16_short", 1, 16, ("execution.activation_checkpointing=true",)),
    "ViT-S, no DINO": ("dinov3_vits16", 1, 16, ("loss.dino_weight=0",)),
    "ViT-S, no iBOT": ("dinov3_vits16", 1, 16, ("loss.ibot_weight=0",)),
    "ViT-S, no prototypes": ("dinov2_vits16_short", 1, 16, ("loss.objective=coding_rate", "loss.koleo_weight=0")),
    "ViT-S, convolutions": ("dinov2_vits16_short", 1, 16, ("model.stem=convolutions",)),
    "ViT-S, convolutions, float32": (
        "dinov2_vits16_short",
        1,
        16,
        ("model.stem=convolutions", "precision=float32", "model.depth=2"),
    ),
    "ViT-S, all patches": ("dinov2_vits16_short", 1, 16, ("loss.ibot_patches=all",)),
    "7B of four blocks": ("dinov3_vit7b16", 8, 16, ("model.depth=4", "execution.compile=false")),
}
# A step of ViT-S is a second; a processor needs longer to sort out forty blocks of shards.
QUICK = ("ViT-S, float32",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_the_plan_is_within_a_tenth_of_what_a_step_holds(name: str) -> None:
    config, ranks, images, changes = CASES[name]
    asked = [f"global_batch_size={ranks * images}", "loss.koleo_group_size=0", *changes]
    run = load_train_config(config, asked, [])
    with fake_ranks(ranks) if ranks > 1 else nullcontext():
        before, most = step_bytes(run.phase(run.phase_names[0]), images)
    planned = plan.plan_phases(run, ranks)[0]
    assert planned.start_bytes == pytest.approx(before, rel=0.01)
    assert sum(planned.memory.values()) == pytest.approx(most, rel=0.1)
