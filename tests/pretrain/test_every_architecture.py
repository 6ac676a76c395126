"""Every published architecture at its real width, both ways through the libraries that have it: equal to 1e-5.

Widths, heads, patches and position tables are the published ones, every parameter is random; depth is cut where two
cores would take minutes, for blocks do not differ. Ours goes to them as an export, which they load by themselves; what
they save comes back through `load_backbone`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.downstream.backbone import Backbone, ImageSettings, complete_settings, load_backbone
from pretrain.downstream.export.folder import write_checked
from pretrain.models.architectures import ARCHITECTURES
from pretrain.models.vision_transformer import VisionTransformer
from tests.pretrain.randomised import randomise

PUBLISHED = [name for name in ARCHITECTURES if not name.endswith(("mini", "tiny"))]
DEPTHS = {"dinov3_vit7b16": 1} | dict.fromkeys(("dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16"), 12)
"""blocks that are computed; of the others two"""
NOT_IN_TIMM = ("dinov3_vitl16plus",)
TRAINING = {"rope_rescale", "drop_path", "untied_local_norm", "ffn_ratio", "ffn_align", "layerscale", "position_grid"}
"""settings that act in training alone, or are said in another way: the parameters' shapes tell"""
GRIDS = ((4, 4), (3, 7), (2, 5))
Run = Callable[[Tensor], Tensor]


def made(name: str, **changes: Any) -> Backbone:
    """The architecture with random weights, ready for a crop of 4 x 4 patches."""
    settings = complete_settings(name, {"depth": DEPTHS.get(name, 2)} | changes)
    with torch.device("meta"):
        model = VisionTransformer(**settings)
    model.to_empty(device="cpu").requires_grad_(False).eval()
    randomise(model)
    return Backbone(model, ImageSettings(px=4 * settings["patch_size"]), name, settings, "made here", {})


def assert_equal(ours: Run, theirs: Run, patch: int, table: int = 0) -> None:
    """At the size of the crop that is checked, at two that are not square, and at that of a table."""
    for number, (rows, columns) in enumerate([*GRIDS, *[(table, table)] * bool(table)]):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(2 - number % 2, 3, rows * patch, columns * patch, generator=generator)
        with torch.inference_mode():
            found, expected = ours(images), theirs(images)
        scale = expected.square().mean().sqrt()
        assert 0.3 < scale < 3
        assert (found - expected).abs().max() / scale <= 1e-5, (rows, columns)


def of_ours(backbone: Backbone) -> Run:
    def run(images: Tensor) -> Tensor:
        features = backbone.features(images)
        return torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)

    return run


def of_transformers(model: Any) -> Run:
    return lambda images: model.eval()(pixel_values=images).last_hidden_state


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_both_ways(name: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    backbone = made(name)
    write_checked(backbone, {}, tmp_path / "ours", "huggingface")
    theirs = AutoModel.from_pretrained(tmp_path / "ours")
    kind = {"dinov2": "Dinov2Model", "dinov2_reg": "Dinov2WithRegistersModel"}
    assert type(theirs).__name__ == kind.get(
        f"dinov2{'_reg' * ('_reg' in name)}" if "dinov2" in name else "", "DINOv3ViTModel"
    )
    table = 37 if name.startswith("dinov2_vits") else 0  # 518 px: of one size, for the time that it takes
    assert_equal(of_ours(backbone), of_transformers(theirs), backbone.model.patch_size, table)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_backbone(tmp_path / "theirs", position_offset=0)
    ignored = TRAINING | (set() if backbone.settings["qkv_bias"] else {"mask_key_bias"})
    settings = {key: value for key, value in again.settings.items() if key not in ignored}
    assert settings == {key: backbone.settings[key] for key in settings}
    assert_equal(of_ours(again), of_transformers(theirs), backbone.model.patch_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in NOT_IN_TIMM])
def test_timm_both_ways(name: str, tmp_path: Path) -> None:
    """By timm's own entry of that name, with nothing but the file, and the depth that is cut."""
    import timm

    table = {"position_antialias": True} if ARCHITECTURES[name]["position"] == "learned" else {}
    backbone = made(name, **table)
    write_checked(backbone, {}, tmp_path / "ours", "timm")
    size = name.removeprefix("dinov2_vit").removeprefix("dinov3_vit")
    words = {"s": "small", "b": "base", "l": "large", "g": "giant", "h": "huge", "7": "7b"}
    entry = f"vit_{words[size[0]]}{'_plus' * ('plus' in name)}_patch{backbone.model.patch_size}"
    if "dinov2" in name:
        entry += f"{'_reg4' * ('_reg' in name)}_dinov2"
    else:
        entry += "_dinov3" + "_qkvb" * ("7b" not in name)
    model = timm.create_model(
        entry,
        checkpoint_path=str(tmp_path / "ours" / "model.safetensors"),
        depth=backbone.depth,
        dynamic_img_size=True,
    ).eval()
    assert_equal(of_ours(backbone), model.forward_features, backbone.model.patch_size)
    timm.models.save_for_hf(model, tmp_path / "theirs", model_args={"depth": backbone.depth, "dynamic_img_size": True})
    again = load_backbone(tmp_path / "theirs")
    assert_equal(of_ours(again), model.forward_features, backbone.model.patch_size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_timm_has_an_entry_for_every_published_one(name: str) -> None:
    """With its depth, without weights: the entry's numbers are the architecture's, so that the file alone is enough."""
    import timm

    from pretrain.downstream.export.timm import timm_entry

    settings = complete_settings(name, {"position_antialias": True} if "dinov2" in name else {})
    entry, arguments = timm_entry(settings)
    is_there = name not in NOT_IN_TIMM
    assert arguments.keys() <= {"dynamic_img_size", "global_pool"} or not is_there
    with torch.device("meta"):
        theirs = timm.create_model(entry, **arguments)
        ours = VisionTransformer(**settings)
    assert len(theirs.blocks) == settings["depth"]
    assert theirs.blocks[0].attn.num_heads == settings["num_heads"]
    numbers = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    without = ours.mask_token.numel()  # of training
    without += sum(p.numel() for p in ours.local_cls_norm.parameters()) if ours.local_cls_norm else 0
    without += settings["depth"] * settings["embed_dim"] if settings["mask_key_bias"] and settings["qkv_bias"] else 0
    without += settings["embed_dim"] if "_reg" in name else 0  # the position of CLS is in CLS
    assert numbers[0] - without == numbers[1]
