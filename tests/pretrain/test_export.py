"""Exports load with transformers alone and give our features; whatever does not is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pretrain.downstream.backbone import Backbone, ImageSettings, complete_settings, load_backbone, load_heads
from pretrain.downstream.export.__main__ import main
from pretrain.downstream.export.folder import export, write_checked
from pretrain.downstream.export.huggingface import model_config
from pretrain.downstream.export.parity import check_folder, grids
from pretrain.models.architectures import build
from pretrain.models.huggingface import backbone_state, huggingface_state
from tests.conftest import picture

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2-mlp-14": ("dinov2_vits14", {"position_grid": 4}),
    "dinov2-swiglu-8": ("dinov2_vitg14", {"position_grid": 4, "patch_size": 8}),
    "dinov2-registers-14": ("dinov2_vits14_reg", {"position_grid": 4}),
    "dinov2-registers-swiglu-16": ("dinov2_vitg14_reg", {"position_grid": 3, "patch_size": 16}),
    "dinov2-antialias-without-registers-4": ("dinov2_tiny", {"patch_size": 4, "position_antialias": True}),
    "dinov2-masked-key-bias-8": ("dinov2_tiny", {"mask_key_bias": True}),
    "dinov2-without-layerscale-8": ("dinov2_tiny", {"layerscale": 0.0}),
    "dinov3-mlp-16": ("dinov3_vits16", {}),
    "dinov3-swiglu-16": ("dinov3_vits16plus", {}),
    "dinov3-without-registers-8": ("dinov3_tiny", {"num_registers": 0}),
    "dinov3-7b-16": ("dinov3_vit7b16", {}),
    "dinov3-key-bias-4": ("dinov3_tiny", {"mask_key_bias": False, "patch_size": 4}),
    "rope-in-dinov2-8": ("dinov2_tiny", {"position": "rope", "num_registers": 2, "ffn": "swiglu"}),
    "table-in-dinov3-8": (
        "dinov3_tiny",
        {"position": "learned", "position_grid": 5, "ffn": "swiglu", "position_antialias": True},
    ),
}


def random_backbone(architecture: str, px: int = 0, seed: int = 0, **changes: Any) -> Backbone:
    """Every parameter drawn at random: at its start, layer scale hides whatever the blocks do."""
    settings = complete_settings(architecture, SMALL | changes)
    generator = torch.Generator().manual_seed(seed)
    model = build(architecture, **SMALL | changes).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.5 if "norm" in name else 0.2))
    image = ImageSettings(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), px=px or 4 * settings["patch_size"])
    known = {"step": 7, "phase": "pretrain", "heads": {}, "config": {"seed": 3}}
    return Backbone(model, image, architecture, settings, "memory", known)


def random_heads() -> dict[str, torch.Tensor]:
    return {"dino_head.mlp.0.weight": torch.randn(5, 48), "ibot_head.last_layer.weight": torch.randn(7, 4)}


def teacher_folder(folder: Path, backbone: Backbone) -> Path:
    write_checked(backbone, random_heads(), folder, "safetensors")
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_transformers(name: str, tmp_path: Path) -> None:
    architecture, changes = FAMILIES[name]
    backbone = random_backbone(architecture, **changes)
    compared = write_checked(backbone, random_heads(), tmp_path / "out", "huggingface")
    assert len(compared) == 6
    again = load_backbone(tmp_path / "out")
    images = torch.randn(2, 3, 5 * again.model.patch_size, 3 * again.model.patch_size)
    for ours, theirs in zip(backbone.model([images]), again.model([images]), strict=True):
        torch.testing.assert_close(theirs.patches, ours.patches, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.cls, ours.cls, rtol=0, atol=1e-5)
    assert again.image == backbone.image
    assert again.description["step"] == 7
    for key, value in load_heads(tmp_path / "out").items():
        assert torch.equal(value, load_file(tmp_path / "out" / "heads.safetensors")[key])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_classes_and_their_settings() -> None:
    def config(name: str) -> dict[str, Any]:
        return model_config(random_backbone(FAMILIES[name][0], **FAMILIES[name][1]))

    assert config("dinov2-mlp-14")["architectures"] == ["Dinov2Model"]
    assert config("dinov2-mlp-14")["image_size"] == 56
    assert config("dinov2-registers-14")["num_register_tokens"] == 4
    assert config("dinov2-antialias-without-registers-4")["model_type"] == "dinov2_with_registers"
    assert config("dinov3-7b-16")["query_bias"] is False
    assert config("dinov3-swiglu-16")["intermediate_size"] == 192  # 6 x 48 x 2/3
    assert config("dinov3-key-bias-4")["key_bias"] is True


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("dinov2_tiny", {"position_offset": 0.1}, "position_offset=0:"),
        ("dinov2_tiny", {"num_registers": 4}, "position_antialias=true"),
        ("dinov2_tiny", {"ffn_ratio": 2.5}, "no integer mlp_ratio"),
        ("dinov3_tiny", {"rope_min_period": 1.0, "rope_max_period": 50.0}, "rope_min_period=1.0"),
        ("dinov3_tiny", {"rope_normalise": "max"}, "rope_normalise=max"),
    ],
)
def test_what_transformers_cannot_compute_is_refused(
    architecture: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_checked(random_backbone(architecture, **changes), {}, tmp_path / "out", "huggingface")
    assert list(tmp_path.iterdir()) == []


def test_interpolation_can_be_changed_so_that_a_class_exists(tmp_path: Path) -> None:
    folder = teacher_folder(tmp_path / "teacher", random_backbone("dinov2_tiny", num_registers=4))
    export(folder, tmp_path / "out", "huggingface", position_antialias=True)
    assert load_backbone(tmp_path / "out").settings["position_antialias"] is True


def tamper(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    state[name] = state[name] + 1e-2 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("architecture", "tensor"),
    [
        ("dinov2_tiny", "embeddings.position_embeddings"),
        ("dinov2_tiny", "encoder.layer.1.attention.attention.value.bias"),
        ("dinov3_tiny", "embeddings.register_tokens"),
        ("dinov3_tiny", "layer.1.layer_scale2.lambda1"),
        ("dinov3_tiny", "norm.bias"),
    ],
)
def test_a_changed_tensor_is_refused_with_the_figures(architecture: str, tensor: str, tmp_path: Path) -> None:
    backbone = random_backbone(architecture)
    write_checked(backbone, {}, tmp_path / "out", "huggingface")
    check_folder(tmp_path / "out", backbone)
    tamper(tmp_path / "out", tensor)
    with pytest.raises(ValueError, match=r"by more than 1e-05: random 2 x 32 x 32 px: CLS and registers \d"):
        check_folder(tmp_path / "out", backbone)


@pytest.mark.parametrize("change", ["missing", "unexpected", "not a number", "mean"])
def test_other_damage_is_refused(change: str, tmp_path: Path) -> None:
    backbone = random_backbone("dinov3_tiny")
    out = tmp_path / "out"
    write_checked(backbone, {}, out, "huggingface")
    state = load_file(out / "model.safetensors")
    if change == "missing":
        del state["layer.0.mlp.up_proj.bias"]
    elif change == "unexpected":
        state["layer.0.extra"] = torch.ones(1)
    elif change == "not a number":
        state["norm.bias"][3] = torch.nan
    else:
        config = json.loads((out / "preprocessor_config.json").read_text())
        (out / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0.5, 0.5, 0.5]}))
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    expected = {"missing": "missing keys", "unexpected": "unexpected keys", "not a number": "nan", "mean": "processed"}
    with pytest.raises(ValueError, match=expected[change]):
        check_folder(out, backbone)


@pytest.mark.parametrize("architecture", ["dinov2_tiny", "dinov3_tiny"])
def test_nothing_is_left_of_an_export_that_differs(architecture: str, tmp_path: Path) -> None:
    """A model that does something its settings do not say: the check, not the writer, must notice."""
    backbone = random_backbone(architecture)
    backbone.model.blocks[1].norm2.eps = 0.1
    with pytest.raises(ValueError, match="differ from ours"):
        write_checked(backbone, random_heads(), tmp_path / "out", "huggingface")
    assert list(tmp_path.iterdir()) == []


def test_names_go_both_ways_without_loss() -> None:
    for architecture, changes in FAMILIES.values():
        backbone = random_backbone(architecture, **changes)
        s, model_type = backbone.settings, model_config(backbone)["model_type"]
        state = backbone.model.state_dict()
        there = huggingface_state(state, model_type)
        back = backbone_state(there, model_type, family=s["family"], gated=s["ffn"] == "swiglu")
        kept = {name for name in state if not name.startswith("local_cls_norm")}  # of training only
        assert back.keys() == kept
        assert all(torch.equal(back[name], state[name]) for name in kept)


def test_checked_sizes_are_square_and_not_smaller_and_larger() -> None:
    sizes = grids(224, 14)
    assert (2, 16, 16) in sizes
    assert any(h != w for _, h, w in sizes)
    assert min(h * w for _, h, w in sizes) < 16 * 16 < max(h * w for _, h, w in sizes)
    assert grids(8, 8)[0] == (2, 2, 2)  # a crop of one patch still gives sizes to compare


def test_curation_embeds_with_an_export(tmp_path: Path) -> None:
    """The loop closes: the folder is an encoder of curation, and its rows are our CLS tokens."""
    from curation.encoders.load import load_encoder

    for architecture in ("dinov2_tiny", "dinov2_vits14_reg", "dinov3_tiny"):
        changes = {"position_grid": 4} if "dinov2" in architecture else {}
        backbone = random_backbone(architecture, **changes)
        write_checked(backbone, {}, tmp_path / architecture, "huggingface")
        encoder = load_encoder(f"hf:{tmp_path / architecture}", device="cpu", precision="float32")
        assert (encoder.view.height, encoder.view.width) == (backbone.image.px,) * 2
        assert encoder.view.resize_short_px == backbone.image.resize_px
        views = np.stack([encoder.view(picture(seed)) for seed in range(3)])
        cls = backbone.features(backbone.image.normalise(torch.from_numpy(views).permute(0, 3, 1, 2))).cls
        expected = torch.nn.functional.normalize(cls, dim=-1).numpy()
        np.testing.assert_allclose(encoder.embed(views), expected, rtol=0, atol=1e-6)


def test_the_processor_resizes_as_curation_does(tmp_path: Path) -> None:
    """Two resamplers, torchvision's and Pillow's: equal but for rounding, 1 of 255 on average at most."""
    from transformers import AutoImageProcessor

    from curation.encoders.load import encoder_view

    backbone = random_backbone("dinov3_tiny", px=64)
    write_checked(backbone, {}, tmp_path / "out", "huggingface")
    image: Image.Image = picture(5, (200, 130))
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "out")(images=image, return_tensors="pt")["pixel_values"]
    view = encoder_view(f"hf:{tmp_path / 'out'}")(image)
    ours = backbone.image.normalise(torch.from_numpy(view.copy()).permute(2, 0, 1)[None])
    std = torch.tensor(backbone.image.std).view(1, 3, 1, 1)
    assert ((theirs - ours) * std * 255).abs().mean() < 1


def test_safetensors_format_is_a_teacher_folder(tmp_path: Path) -> None:
    backbone = random_backbone("dinov3_tiny", untied_local_norm=True)
    folder = teacher_folder(tmp_path / "teacher", backbone)
    export(folder, tmp_path / "again", "safetensors", heads=True)
    again = load_backbone(tmp_path / "again")
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    assert load_heads(tmp_path / "again").keys() == random_heads().keys()
    assert "heads for further training: dino_head, ibot_head" in (tmp_path / "again" / "README.md").read_text()


HEADS = {"dino": {"num_prototypes": 7}, "ibot": {"num_prototypes": 7}, "tied": False}


@pytest.mark.parametrize("format_", ["huggingface", "safetensors"])
def test_heads_are_written_on_demand(format_: str, tmp_path: Path) -> None:
    backbone = random_backbone("dinov3_tiny")
    backbone = replace(backbone, description=backbone.description | {"heads": HEADS})
    folder = teacher_folder(tmp_path / "teacher", backbone)
    export(folder, tmp_path / "without", format_)
    assert load_heads(tmp_path / "without") == {}
    assert "heads" not in load_backbone(tmp_path / "without").description
    assert "heads for further training" not in (tmp_path / "without" / "README.md").read_text()
    export(folder, tmp_path / "with", format_, heads=True)
    heads, expected = load_heads(tmp_path / "with"), load_heads(folder)
    assert heads.keys() == expected.keys()
    assert all(torch.equal(heads[name], value) for name, value in expected.items())
    assert load_backbone(tmp_path / "with").description["heads"] == HEADS
    with pytest.raises(ValueError, match=r"--heads: .*without has none"):
        export(tmp_path / "without", tmp_path / "again", format_, heads=True)
    with pytest.raises(ValueError, match="timm has no place for them; they go with huggingface or safetensors"):
        export(folder, tmp_path / "again", "timm", heads=True)


def test_float16_is_stated_and_what_it_was_rounded_from_is_checked(tmp_path: Path) -> None:
    backbone = random_backbone("dinov3_tiny")
    compared = write_checked(backbone, random_heads(), tmp_path / "out", "huggingface", "float16")
    assert [line.partition(" px")[0] for line in compared] == [
        f"float16 1 x {s}" for s in ("32 x 32", "16 x 16", "16 x 32")
    ]
    assert all(line in (tmp_path / "out" / "README.md").read_text() for line in compared)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    from transformers import AutoModel

    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.float16
    again = load_backbone(tmp_path / "out").model.state_dict()
    name = "blocks.1.mlp.fc1.weight"
    assert torch.equal(again[name], backbone.model.state_dict()[name].half().float())
    backbone.model.blocks[1].norm2.eps = 0.1
    with pytest.raises(ValueError, match="by more than 1e-05"):
        write_checked(backbone, {}, tmp_path / "other", "huggingface", "float16")


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    backbone = random_backbone("dinov3_tiny")
    backbone.model.get_parameter("blocks.0.mlp.fc2.weight").mul_(1e6)
    with pytest.raises(ValueError, match=r"by more than 0.1: float16 1 x 32 x 32 px: CLS and registers nan"):
        write_checked(backbone, {}, tmp_path / "out", "safetensors", "float16")
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = teacher_folder(tmp_path / "teacher", random_backbone("dinov2_tiny", num_registers=4))
    out = tmp_path / "deep" / "out"
    asked = [str(folder), str(out), "--format", "huggingface", "--licence", "cc-by-4.0", "position_antialias=true"]
    assert main(asked) == 0
    assert "AutoModel.from_pretrained" in (out / "README.md").read_text()
    assert main([str(folder), str(out)]) == 2
    assert "exists; choose a folder that does not" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "b"), "patch_size=7"]) == 2
    assert "patch_size belongs to the weights" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "b"), "--licence", "of our own"]) == 2
    assert "--licence 'of our own' must be one word" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing"), str(tmp_path / "b")]) == 2
    assert "does not exist" in capsys.readouterr().err
