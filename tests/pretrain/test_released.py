"""Checkpoints as they were released: their names, wrappers, chunks and buffers; and what must be refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain.models.architectures import build
from pretrain.models.layers.position import patch_positions, resize_pos_embed
from pretrain.models.released import load_released
from pretrain.models.vision_transformer import VisionTransformer
from tests.pretrain.randomised import randomise


def model_and_state(name: str, **changes: Any) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """A fresh model, and the state of another one with every parameter random."""
    other = build(name, depth=4, **changes)
    randomise(other, seed=7)
    return build(name, depth=4, **changes), {key: value.clone() for key, value in other.state_dict().items()}


def assert_loaded(model: VisionTransformer, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_names_are_the_released_ones() -> None:
    """Written out from the published files, not from our modules."""
    block = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"]
    block += ["ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma"]
    common = ["cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    cases = {
        "dinov2_vits14": (["pos_embed"], ["fc1", "fc2"]),
        "dinov2_vitg14_reg": (["pos_embed", "register_tokens"], ["w12", "w3"]),
        "dinov3_vits16": (["storage_tokens"], ["fc1", "fc2"]),
        "dinov3_vith16plus": (["storage_tokens"], ["w1", "w2", "w3"]),
    }
    for name, (tokens, mlp) in cases.items():
        inside = block + [f"mlp.{layer}.{part}" for layer in mlp for part in ("weight", "bias")]
        expected = {*common, *tokens, *(f"blocks.{i}.{key}" for i in range(2) for key in inside)}
        assert set(build(name, depth=2, device="meta").state_dict()) == expected
    seven = set(build("dinov3_vit7b16", depth=1, device="meta").state_dict())
    assert "local_cls_norm.weight" in seven
    assert "blocks.0.attn.qkv.bias" not in seven
    shapes = {key: tuple(value.shape) for key, value in build("dinov2_vits14", device="meta").state_dict().items()}
    assert (shapes["cls_token"], shapes["mask_token"], shapes["pos_embed"]) == ((1, 1, 384), (1, 384), (1, 1370, 384))


def test_dinov3_buffers_are_checked_and_left_out(tmp_path: Path) -> None:
    model, state = model_and_state("dinov3_tiny")
    bias_mask = torch.cat([torch.ones(192), torch.zeros(192), torch.ones(192)])
    # As published: base ** (2 i / (D / 2)) for heads of 64, stored in bfloat16.
    released = {**state, "rope_embed.periods": (100 ** (2 * torch.arange(16) / 32)).bfloat16()}
    released |= {f"blocks.{i}.attn.qkv.bias_mask": bias_mask.clone() for i in range(4)}
    save_file(released, tmp_path / "model.safetensors")
    load_released(model, load_file(tmp_path / "model.safetensors"))
    assert_loaded(model, state)
    with pytest.raises(ValueError, match=r"RoPE periods .* rope_base"):
        load_released(model, {**released, "rope_embed.periods": torch.arange(16) + 1.0})
    with pytest.raises(ValueError, match="more than the key bias"):
        load_released(model, {**released, "blocks.0.attn.qkv.bias_mask": torch.zeros(576)})


def test_a_dinov2_training_checkpoint_loads(tmp_path: Path) -> None:
    """`teacher` around it, `backbone.` before the names, blocks in chunks of two, heads beside."""
    model, state = model_and_state("dinov2_tiny")
    chunked = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // 2))
        chunked["backbone." + ".".join(parts)] = value
    chunked["dino_head.mlp.0.weight"] = torch.zeros(2, 2)
    assert "backbone.blocks.1.3.norm1.weight" in chunked
    torch.save({"teacher": chunked}, tmp_path / "teacher_checkpoint.pth")
    load_released(model, torch.load(tmp_path / "teacher_checkpoint.pth", weights_only=True))
    assert_loaded(model, state)


def test_another_architecture_is_refused_with_its_differences() -> None:
    model, state = model_and_state("dinov2_tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for wrong, message in (
        ({**state, "head.weight": torch.zeros(1)}, "unknown head.weight"),
        ({k: v for k, v in state.items() if k != "norm.bias"}, "missing norm.bias"),
        ({**state, "cls_token": torch.zeros(1, 1, 8)}, r"cls_token is \(1, 1, 8\), here \(1, 1, 192\)"),
        ({**state, "pos_embed": torch.zeros(1, 17, 192)}, r"pos_embed is \(1, 17, 192\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_released(model, wrong)
    assert_loaded(model, before)
    with pytest.raises(ValueError, match="position=learned"):
        load_released(model, {**state, "rope_embed.periods": torch.ones(16)})


@pytest.mark.parametrize("antialias", [False, True])
def test_a_resized_table_computes_what_the_old_one_interpolated(antialias: bool) -> None:
    old, _ = model_and_state("dinov2_tiny", position_antialias=antialias)
    randomise(old)
    new = build("dinov2_tiny", depth=4, position_grid=5, position_antialias=antialias)
    load_released(new, old.state_dict(), resize_position=True)
    image = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(new.eval()([image])[0].patches, old.eval()([image])[0].patches)


def test_positions_by_size_and_by_offset() -> None:
    table = torch.randn(1, 1 + 36, 8, generator=torch.Generator().manual_seed(0))
    cls, same = patch_positions(table, (6, 6), antialias=True)
    assert torch.equal(torch.cat([cls, same], 1), table)
    square = table[:, 1:].view(1, 6, 6, 8).permute(0, 3, 1, 2)
    # The first release of DINOv2: scale factors of (size + 0.1) / side.
    expected = F.interpolate(square, scale_factor=(4.1 / 6, 9.1 / 6), mode="bicubic")
    _, ours = patch_positions(table, (4, 9), antialias=False, offset=0.1)
    torch.testing.assert_close(ours, expected.flatten(2).transpose(1, 2))
    _, by_size = patch_positions(table, (4, 9), antialias=False)
    assert (ours - by_size).abs().max() > 0.01
    assert resize_pos_embed(table.bfloat16(), 4, antialias=True).dtype == torch.bfloat16
    assert resize_pos_embed(table, 4, antialias=True).shape == (1, 17, 8)
