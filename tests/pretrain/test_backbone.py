"""One door to a trained backbone, whatever holds it; and one sentence when something else does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pretrain.checkpoint import CheckpointConfig, Checkpoints, write_teacher
from pretrain.downstream.backbone import ImageSettings, load_backbone, load_heads
from pretrain.models.architectures import build
from pretrain.models.projection_head import ProjectionHead
from pretrain.models.vision_transformer import VisionTransformer

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "position_grid": 3}
IMAGE = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "px": 24}


def network(seed: int = 0) -> nn.ModuleDict:
    generator = torch.Generator().manual_seed(seed)
    backbone = build("dinov2_tiny", **SMALL)
    heads = {name: ProjectionHead(24, 8, 4, 6) for name in ("dino_head", "ibot_head")}
    whole = nn.ModuleDict({"backbone": backbone, **heads}).requires_grad_(False)
    for parameter in whole.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return whole


def described(step: int = 5, tied: bool = False) -> dict[str, Any]:
    head = {"hidden_dim": 8, "bottleneck_dim": 4, "num_prototypes": 6}
    heads = {"dino": head, "ibot": head, "tied": tied}
    return {"architecture": "dinov2_tiny", "model": SMALL, "heads": heads, "image": IMAGE, "step": step, "phase": "a"}


def teacher_folder(folder: Path, step: int = 5, seed: int = 0) -> Path:
    write_teacher(folder, network(seed).state_dict(), described(step))
    return folder


def save_checkpoint(folder: Path, step: int, seed: int) -> Path:
    checkpoints = Checkpoints(folder, CheckpointConfig(asynchronous=False))
    state = {"teacher": network(seed), "student": network(seed + 100)}
    checkpoints.save(state, step, {"teacher": described(step)})
    found = checkpoints.latest()
    assert found is not None
    return found


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_teacher_folder(tmp_path: Path) -> None:
    backbone = load_backbone(teacher_folder(tmp_path))
    whole = network()
    assert_same(backbone.model, whole["backbone"])
    assert backbone.image == ImageSettings((0.4, 0.5, 0.6), (0.2, 0.25, 0.3), 24)
    assert (backbone.architecture, backbone.description["step"]) == ("dinov2_tiny", 5)
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert load_heads(tmp_path).keys() == {name for name in whole.state_dict() if not name.startswith("backbone.")}


def test_features_of_uint8_images(tmp_path: Path) -> None:
    backbone = load_backbone(teacher_folder(tmp_path))
    images = torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = backbone.image.normalise(images)
    expected = (images[1, 2].double() / 255 - 0.6) / 0.3
    torch.testing.assert_close(pixels[1, 2].double(), expected, rtol=0, atol=1e-6)
    features = backbone.features(pixels)
    assert (features.cls.shape, features.patches.shape, features.grid) == ((2, 24), (2, 15, 24), (3, 5))


def test_checkpoint_gives_the_teacher_not_the_student(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "checkpoints", 12, seed=3)
    backbone = load_backbone(folder)
    assert_same(backbone.model, network(3)["backbone"])
    heads = load_heads(folder)
    assert torch.equal(heads["ibot_head.last_layer.weight"], network(3).state_dict()["ibot_head.last_layer.weight"])


def test_run_folder_gives_what_has_most_steps(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoints", 3, seed=1)
    newest = save_checkpoint(tmp_path / "checkpoints", 12, seed=2)
    assert load_backbone(tmp_path).source == str(newest)
    teacher_folder(tmp_path / "teacher", step=3, seed=1)  # of a run that was continued since
    assert load_backbone(tmp_path).source == str(newest)
    teacher_folder(tmp_path / "teacher", step=12, seed=2)
    assert load_backbone(tmp_path).source == str(tmp_path / "teacher")


@pytest.mark.parametrize("architecture", ["dinov2_vits14_reg", "dinov3_vits16plus"])
def test_released_file(architecture: str, tmp_path: Path) -> None:
    model = build(architecture)
    torch.save(model.state_dict(), tmp_path / "released.pth")
    backbone = load_backbone(tmp_path / "released.pth", architecture=architecture)
    assert_same(backbone.model, model)
    assert backbone.image.resize_px == 256
    assert load_heads(tmp_path / "released.pth") == {}
    with pytest.raises(ValueError, match=r"released.pth does not say which model it is; give its architecture, one of"):
        load_backbone(tmp_path / "released.pth")
    with pytest.raises(ValueError, match="not of this architecture"):
        load_backbone(tmp_path / "released.pth", architecture="dinov2_tiny")


def test_how_a_model_is_run_may_change_but_not_what_it_is(tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path)
    assert load_backbone(folder, position_antialias=True).model.position_antialias
    assert load_backbone(folder, attention="varlen").model.attention == "varlen"
    with pytest.raises(ValueError, match="depth belongs to the weights"):
        load_backbone(folder, depth=3)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "architecture", "setting", "json", "truncated"])
def test_another_model_is_one_sentence(damage: str, tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path)
    file, state, description = folder / "teacher.safetensors", load_file(folder / "teacher.safetensors"), described()
    if damage == "missing":
        del state["backbone.blocks.1.norm1.weight"]
    elif damage == "extra":
        state["backbone.blocks.2.norm1.weight"] = torch.ones(24)
    elif damage == "shape":
        state["backbone.pos_embed"] = torch.ones(1, 5, 24)
    elif damage == "architecture":
        description["architecture"] = "resnet50"
    elif damage == "setting":
        description["model"] = SMALL | {"wdith": 3}
    save_file(state, file)
    (folder / "config.json").write_text("{" if damage == "json" else json.dumps(description))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    expected = {
        "missing": "missing blocks.1.norm1.weight",
        "extra": "unknown blocks.2.norm1.weight",
        "shape": "pos_embed is",
        "architecture": "'resnet50' is unknown; choose one of dinov2_mini, dinov2_tiny",
        "setting": "'wdith' is not one of",
        "json": "config.json cannot be read as the description",
        "truncated": "cannot be read as safetensors",
    }
    with pytest.raises(ValueError, match=expected[damage]) as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)


def test_what_holds_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no weights"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(ValueError, match="config is not complete"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match=r"holds a dinov2_tiny, not the dinov2_vits14 that was asked for"):
        load_backbone(teacher_folder(tmp_path / "teacher"), architecture="dinov2_vits14")


def test_low_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in network().state_dict().items()}
    write_teacher(tmp_path, state, described())
    model: VisionTransformer = load_backbone(tmp_path).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
