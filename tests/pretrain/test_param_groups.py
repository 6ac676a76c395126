"""Parameter groups: the published multiplier of every kind of name, and the AdamW that runs them."""

from typing import Any

import pytest
import torch
from torch import nn

from pretrain.models import architectures
from pretrain.models.projection_head import ProjectionHead
from pretrain.optim.param_groups import adamw, apply_schedule, param_groups, step_unless
from pretrain.optim.schedules import OptimConfig, StepValues

DEPTH = 12

# (name, lr multiplier at decay 0.9 and patch multiplier 0.2, wd multiplier, last layer)
PUBLISHED = [
    ("backbone.cls_token", 0.9**13, 1, False),
    ("backbone.mask_token", 0.9**13, 1, False),
    ("backbone.register_tokens", 0.9**13, 1, False),
    ("backbone.storage_tokens", 0.9**13, 1, False),
    ("backbone.pos_embed", 0.9**13, 1, False),
    ("backbone.patch_embed.proj.weight", 0.2 * 0.9**13, 1, False),
    ("backbone.patch_embed.proj.bias", 0.2 * 0.9**13, 0, False),
    ("backbone.blocks.0.attn.qkv.weight", 0.9**12, 1, False),
    ("backbone.blocks.0.attn.qkv.bias", 0.9**12, 0, False),
    ("backbone.blocks.0.norm1.weight", 0.9**12, 0, False),
    ("backbone.blocks.3.ls2.gamma", 0.9**9, 0, False),
    ("backbone.blocks.11.mlp.w12.weight", 0.9, 1, False),
    ("backbone.norm.weight", 1, 0, False),
    ("backbone.local_cls_norm.bias", 1, 0, False),
    ("dino_head.mlp.0.weight", 1, 1, False),
    ("dino_head.mlp.0.bias", 1, 0, False),
    ("dino_head.last_layer.weight_g", 1, 1, True),
    ("ibot_head.last_layer.weight", 1, 1, True),
]


def groups_of(named: list[tuple[str, nn.Parameter]], decay: float = 0.9) -> list[dict[str, Any]]:
    return param_groups(named, DEPTH, decay, 0.2)


def group_with(groups: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [group for group in groups if name in group["names"]]
    return found


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}",
    ],
)
def test_published_multipliers(wrapped: Any) -> None:
    groups = groups_of([(wrapped(name), nn.Parameter(torch.zeros(1))) for name, *_ in PUBLISHED])
    for name, lr, wd, last in PUBLISHED:
        group = group_with(groups, name)
        assert group["lr_multiplier"] == pytest.approx(lr, rel=1e-12), name
        assert (group["wd_multiplier"], group["part"] == "last_layer") == (wd, last), name


@pytest.mark.parametrize("architecture", ["dinov2_vits14_reg", "dinov3_vits16plus"])
def test_every_parameter_of_a_model_is_in_one_group(architecture: str) -> None:
    with torch.device("meta"):
        student = nn.ModuleDict(
            {"backbone": architectures.build(architecture), "dino_head": ProjectionHead(384, 64, 32, 128)}
        )
    student["dino_head"].mlp[0].bias.requires_grad_(False)
    groups = param_groups(student.named_parameters(), DEPTH, 0.9, 0.2)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, p in student.named_parameters() if p.requires_grad)
    assert len({(g["lr_multiplier"], g["wd_multiplier"], g["part"]) for g in groups}) == len(groups)
    # Embeddings, patch embedding and norm by decay or not; twelve blocks by decay or not; heads; last layer; norm.
    assert len(groups) <= 2 * DEPTH + 7
    assert len(param_groups(student.named_parameters(), DEPTH, 1.0, 1.0)) == 5


def three_groups() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    names = ["backbone.blocks.3.mlp.fc1.weight", "dino_head.mlp.0.bias", "dino_head.last_layer.weight"]
    return groups_of([(name, nn.Parameter(torch.randn(4, 3))) for name in names])


VALUES = StepValues(
    lr=1e-2,
    last_layer_lr=0.0,
    backbone_lr=1e-2,
    weight_decay=0.3,
    teacher_momentum=0.9,
    teacher_temperature=0.05,
)


def test_adamw_takes_the_steps_of_the_formula() -> None:
    """Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2, in float64."""
    groups = three_groups()
    optimizer = adamw(groups, OptimConfig(beta1=0.8, beta2=0.95))
    starts = [group["params"][0].detach().double() for group in groups]
    expected = [start.clone() for start in starts]
    m, v = [[torch.zeros(4, 3, dtype=torch.float64) for _ in groups] for _ in range(2)]
    for t in range(1, 6):
        apply_schedule(optimizer, VALUES)
        for i, (lr, wd) in enumerate([(1e-2 * 0.9**9, 0.3), (1e-2, 0.0), (0.0, 0.3)]):
            parameter = groups[i]["params"][0]
            parameter.grad = torch.randn(4, 3)
            g = parameter.grad.double()
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.95 * v[i] + 0.05 * g * g
            adapted = (m[i] / (1 - 0.8**t)) / ((v[i] / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[i] = expected[i] - lr * (adapted + wd * expected[i])
        step_unless(optimizer, torch.tensor(0.0))
    for group, value in zip(groups, expected, strict=True):
        torch.testing.assert_close(group["params"][0].detach().double(), value, rtol=1e-5, atol=1e-6)
    assert torch.equal(groups[2]["params"][0].detach().double(), starts[2]), "a frozen last layer"


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    groups = three_groups()
    optimizer = adamw(groups, OptimConfig())
    apply_schedule(optimizer, VALUES)
    before = [group["params"][0].detach().clone() for group in groups]
    for found in (1.0, 0.0):
        for group in groups:
            group["params"][0].grad = torch.full((4, 3), torch.nan if found else 1.0)
        step_unless(optimizer, torch.tensor(found))
        state = [optimizer.state[group["params"][0]] for group in groups]
        if found:
            assert all(torch.equal(group["params"][0], start) for group, start in zip(groups, before, strict=True))
            assert all(not value.any() for values in state for value in values.values())
    assert [values["step"].item() for values in state] == [1.0] * 3
    assert not torch.equal(groups[0]["params"][0], before[0])
