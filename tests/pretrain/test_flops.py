"""The FLOP model: published figures, torch's own counter on a real model, and the share of a step's parts."""

import time

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.measure import measured_peak_flops
from pretrain.models.architectures import build
from pretrain.watch.flops import (
    BackboneCost,
    StepCost,
    backbone_cost,
    forward_flops,
    matrix_weights,
    peak_flops,
    step_flops,
)

PUBLISHED = {
    # DINOv3's table of models (arXiv:2508.10104): GFLOPs at 256 and 512 px
    "dinov3_vits16": (12, 63),
    "dinov3_vits16plus": (16, 79),
    "dinov3_vitb16": (47, 216),
    "dinov3_vitl16": (163, 721),
    "dinov3_vith16plus": (450, 1903),
    "dinov3_vit7b16": (3550, 14515),
}


def plain_vit(embed_dim: int, depth: int) -> BackboneCost:
    """Patch 16, MLP ratio 4, a CLS token and no registers."""
    return BackboneCost(
        embedding_products=3 * 16 * 16 * embed_dim,
        block_weights=depth * 12 * embed_dim**2,
        depth=depth,
        embed_dim=embed_dim,
        patch_size=16,
        num_prefix_tokens=1,
    )


def published_step(cost: BackboneCost, drop_path: float, head: int = 0) -> StepCost:
    return StepCost(
        student=cost,
        teacher=cost,
        drop_path=drop_path,
        num_global_crops=2,
        num_local_crops=8,
        student_dino_head=head,
        student_ibot_head=head,
        teacher_dino_head=head,
        teacher_ibot_head=head,
        predicted_share=0.15,
    )


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_forward_costs(name: str) -> None:
    with torch.device("meta"):
        cost = backbone_cost(build(name, device="meta"))
    for px, gflops in zip((256, 512), PUBLISHED[name], strict=True):
        # 2.5%: the table is rounded to two digits and its counter is not stated.
        assert forward_flops(cost, px, px) / 1e9 == pytest.approx(gflops, rel=0.025, abs=0.5)


def test_vit_large_at_224() -> None:
    assert forward_flops(plain_vit(1024, 24), 224, 224) / 1e9 == pytest.approx(123, abs=0.5)


@pytest.mark.parametrize(
    ("embed_dim", "depth", "drop_path", "tflop"), [(384, 12, 0.1, 0.11), (768, 12, 0.3, 0.34), (1024, 24, 0.3, 1.15)]
)
def test_training_cost_per_image(embed_dim: int, depth: int, drop_path: float, tflop: float) -> None:
    """Two crops of 224 and eight of 96, heads of 65,536 prototypes."""
    head = embed_dim * 2048 + 2048**2 + 2048 * 256 + 256 * 65_536
    cost = published_step(plain_vit(embed_dim, depth), drop_path, head)
    assert step_flops(cost, 224, 96) / 1e12 == pytest.approx(tflop, abs=0.0065)


@pytest.mark.parametrize("name", ["dinov2_tiny", "dinov3_tiny"])
@pytest.mark.parametrize("size", [(64, 64), (96, 48)])
@pytest.mark.parametrize("changes", [{}, {"ffn": "swiglu", "num_registers": 3}])
def test_forward_equals_torch_counter(name: str, size: tuple[int, int], changes: dict[str, object]) -> None:
    model = build(name, patch_size=8, **changes)
    model.init_weights()
    # The counter does not know the processor's fused attention kernel; it does know plain products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()([torch.zeros(2, 3, *size)])
    # A learned position table is resized by products too, of a thousandth.
    assert counter.get_total_flops() == pytest.approx(2 * forward_flops(backbone_cost(model), *size), rel=1e-3)


def test_backward_costs_twice_the_forward() -> None:
    model = build("dinov2_tiny", patch_size=8)
    model.init_weights()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model([torch.zeros(2, 3, 64, 64)])[0].cls.sum().backward()
    cost = backbone_cost(model)
    pixels = 2 * 2 * 64 * cost.embedding_products  # which need no gradient: one product of the patch embedding less
    assert counter.get_total_flops() == 3 * 2 * forward_flops(cost, 64, 64) - pixels


def test_parts_of_a_step_add_up() -> None:
    cost = plain_vit(384, 12)
    globals_, locals_ = forward_flops(cost, 224, 224), forward_flops(cost, 96, 96)
    assert step_flops(published_step(cost, 0.0), 224, 96) == pytest.approx(8 * globals_ + 24 * locals_)
    without = step_flops(published_step(cost, 0.0), 224, 96)
    with_head = step_flops(published_step(cost, 0.0, head=1000), 224, 96)
    rows = 10 * 3 + 2  # CLS: student x 3, teacher x 1
    masked = 2 * 196 * 0.15 * 4
    assert with_head - without == pytest.approx(2 * 1000 * (rows + masked))


def test_matrix_weights_leave_out_biases_and_norms() -> None:
    assert matrix_weights(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Conv2d(3, 2, 4))) == 15 + 96


def test_peak_of_a_processor_is_measured() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu) == 0
    start = time.perf_counter()
    assert 1e9 < measured_peak_flops(cpu, torch.float32, size=512, budget_s=0.1) < 1e14
    assert time.perf_counter() - start < 5
