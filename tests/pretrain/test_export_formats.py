"""Exports for timm, ONNX, torch.export and TorchScript: each loaded by its own library alone, at any size."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.distributed.tensor_files import save_tensors
from pretrain.downstream.backbone import Backbone, ImageSettings, complete_settings, load_backbone
from pretrain.downstream.export.folder import export, write_checked
from pretrain.downstream.export.graph import Graph
from pretrain.models.vision_transformer import VisionTransformer
from pretrain.program_files import PROGRAM_FILES
from pretrain.weights import find_weights
from tests.pretrain.randomised import randomise

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4, "position_grid": 4}
LEARNED = {"position_antialias": True, "norm_eps": 1e-6}
ROPE = {"num_registers": 4, "mask_key_bias": True, "norm_eps": 1e-5}
MODELS = {
    "dinov2": ("dinov2_vits14", LEARNED),
    "dinov2 registers": ("dinov2_vits14_reg", LEARNED),
    "dinov2 gated": ("dinov2_vitg14", {**LEARNED, "num_registers": 2}),
    "dinov3": ("dinov3_vits16", ROPE),
    "dinov3 gated": ("dinov3_vits16plus", {**ROPE, "qkv_bias": False}),
    "no registers, no scales": ("dinov3_vits16", {**ROPE, "num_registers": 0, "layerscale": 0.0}),
}
RESIZED = {
    "as released": ("dinov2_vits14", {"position_offset": 0.1}),
    "as transformers": ("dinov2_vits14", {}),
    "antialiased": ("dinov2_vits14_reg", {"position_antialias": True}),
}

SLOWLY = pytest.mark.slow
"""torch's exporters take ten seconds for anything"""
SOME = ["timm", "torchscript", pytest.param("onnx", marks=SLOWLY), pytest.param("torch_export", marks=SLOWLY)]


def backbone(architecture: str, changes: dict) -> Backbone:
    settings = complete_settings(architecture, SMALL | changes)
    model = VisionTransformer(**settings).eval().requires_grad_(False)
    randomise(model)
    px = 4 * settings["patch_size"]
    return Backbone(model, ImageSettings(px=px), architecture, settings, "made here", {})


def images(made: Backbone, rows: int, columns: int, count: int = 2) -> torch.Tensor:
    patch = made.settings["patch_size"]
    return torch.randn(count, 3, rows * patch, columns * patch, generator=torch.Generator().manual_seed(rows))


CONVOLUTIONAL = ("dinov2_vits14", {**LEARNED, "stem": "convolutions", "patch_size": 4})


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["safetensors", "torchscript", "torch_export", "onnx"])
def test_a_convolutional_stem_goes_where_programs_and_ours_go(format_: str, tmp_path: Path) -> None:
    made = backbone(*CONVOLUTIONAL)
    assert write_checked(made, {}, tmp_path / "export", format_)
    back = load_backbone(tmp_path / "export")
    assert torch.allclose(
        back.features(images(made, 3, 5)).patches, made.features(images(made, 3, 5)).patches, atol=1e-5
    )


@pytest.mark.parametrize(("format_", "library"), [("huggingface", "transformers"), ("timm", "timm")])
def test_a_convolutional_stem_is_refused_where_no_class_has_it(format_: str, library: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no class of {library} has a stem of convolutions.*: export it as onnx"):
        write_checked(backbone(*CONVOLUTIONAL), {}, tmp_path / "export", format_)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", MODELS | RESIZED)
def test_the_graph_computes_what_the_model_does(kind: str) -> None:
    made = backbone(*(MODELS | RESIZED)[kind])
    for rows, columns in ((4, 4), (2, 7), (9, 3), (1, 1)):
        ours = made.features(images(made, rows, columns))
        for found, expected in zip(
            Graph(made.model)(images(made, rows, columns)), (ours.cls, ours.registers, ours.patches), strict=True
        ):
            assert torch.allclose(found, expected, atol=1e-5), (rows, columns)


@pytest.mark.parametrize("kind", MODELS)
def test_timm_loads_its_folder(kind: str, tmp_path: Path) -> None:
    import timm

    made = backbone(*MODELS[kind])
    compared = write_checked(made, {}, tmp_path / "export", "timm")
    assert len(compared) == 5
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    ours = made.features(images(made, 3, 5))
    with torch.inference_mode():
        tokens = theirs.forward_features(images(made, 3, 5))
    assert torch.allclose(tokens, torch.cat([ours.cls[:, None], ours.registers, ours.patches], 1), atol=2e-5)


def test_what_timm_computes_otherwise_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="export it with position_antialias=True, as timm runs it"):
        write_checked(backbone("dinov2_vits14", {}), {}, tmp_path / "export", "timm")
    with pytest.raises(ValueError, match="norm_eps=1e-05, and this one has 1e-06"):
        write_checked(backbone("dinov3_vits16", ROPE | {"norm_eps": 1e-6}), {}, tmp_path / "export", "timm")
    assert list(tmp_path.iterdir()) == []


def test_torch_export_runs_at_any_size(tmp_path: Path) -> None:
    made = backbone(*RESIZED["as released"])
    write_checked(made, {}, tmp_path / "export", "torch_export")
    program = torch.export.load(tmp_path / "export" / "model.pt2").module()
    ours = made.features(images(made, 2, 7, count=5))
    assert torch.allclose(program(images(made, 2, 7, count=5))[2], ours.patches, atol=1e-5)


def test_torchscript_runs_at_any_size(tmp_path: Path) -> None:
    made = backbone(*MODELS["dinov3"])
    write_checked(made, {}, tmp_path / "export", "torchscript")
    program = torch.jit.load(tmp_path / "export" / "model.ts")
    ours = made.features(images(made, 2, 7, count=5))
    assert torch.allclose(program(images(made, 2, 7, count=5))[2], ours.patches, atol=1e-5)


ALONE = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
found = session.run(None, {"images": numpy.load(sys.argv[2])})
numpy.savez(sys.argv[3], *found)
assert "torch" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dinov2 registers", "dinov3 gated", "as released"])
def test_onnx_runs_without_torch_at_any_size(kind: str, tmp_path: Path) -> None:
    made = backbone(*(MODELS | RESIZED)[kind])
    write_checked(made, {}, tmp_path / "export", "onnx")
    for rows, columns, count in ((4, 4, 1), (7, 2, 3)):
        asked = images(made, rows, columns, count)
        np.save(tmp_path / "images.npy", asked.numpy())
        names = [str(tmp_path / name) for name in ("export/model.onnx", "images.npy", "found.npz")]
        subprocess.run([sys.executable, "-c", ALONE, *names], check=True, timeout=120)
        ours = made.features(asked)
        found = np.load(names[2])
        for name, expected in zip(found.files, (ours.cls, ours.registers, ours.patches), strict=True):
            assert np.allclose(found[name], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("format_", ["huggingface", "safetensors", *SOME])
def test_every_export_comes_back_through_the_door(format_: str, tmp_path: Path) -> None:
    made = backbone(*MODELS["dinov2 registers"])
    write_checked(made, {}, tmp_path / "out", format_)
    again = load_backbone(tmp_path / "out", "dinov2_vits14_reg")
    assert (again.architecture, again.image, again.depth) == (made.architecture, made.image, made.depth)
    assert (again.model.patch_size, again.model.embed_dim, again.model.num_registers) == (14, 48, 4)
    for rows, columns in ((4, 4), (3, 5)):
        ours, theirs = (one.features(images(made, rows, columns)) for one in (made, again))
        assert theirs.grid == ours.grid == (rows, columns)
        for part in ("cls", "registers", "patches"):
            assert torch.allclose(getattr(theirs, part), getattr(ours, part), atol=2e-5), part
    last, _ = again.layers(images(made, 3, 5), [-1, 1])
    assert torch.allclose(last.patches, ours.patches, atol=2e-5)
    with pytest.raises(ValueError, match="holds a dinov2_vits14_reg, not the dinov3_vits16"):
        load_backbone(tmp_path / "out", "dinov3_vits16")
    if format_ in PROGRAM_FILES or format_ == "timm":
        with pytest.raises(ValueError, match="is a folder of timm" if format_ == "timm" else "that runs by itself"):
            find_weights(tmp_path / "out")
        with pytest.raises(ValueError, match="changes do not apply"):
            load_backbone(tmp_path / "out", attention="sdpa")
        with pytest.raises(ValueError, match="cannot be exported again"):
            export(tmp_path / "out", tmp_path / "again", "safetensors")


@pytest.mark.parametrize("format_", ["torchscript", *SOME[2:]])
def test_a_program_is_its_file_too_and_gives_its_last_block_alone(format_: str, tmp_path: Path) -> None:
    made = backbone(*MODELS["dinov3"])
    write_checked(made, {}, tmp_path / "out", format_)
    again = load_backbone(tmp_path / "out" / PROGRAM_FILES[format_])
    several = [images(made, 2, 3)[0], images(made, 4, 2)[0]]
    for ours, theirs in zip(made.features_of_each(several), again.features_of_each(several), strict=True):
        assert torch.allclose(theirs.cls, ours.cls, atol=2e-5)
    for which, norm in ((2, True), ([0], True), (1, False)):
        with pytest.raises(ValueError, match=r"is a program, .* its last block \(1\) only"):
            again.layers(images(made, 2, 2), which, norm=norm)
    (tmp_path / "out" / PROGRAM_FILES[format_]).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be run"):
        load_backbone(tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config.json of ours beside it"):
        load_backbone(tmp_path / "out")


@pytest.mark.parametrize("format_", SOME)
def test_float16_of_each_format_is_stated(format_: str, tmp_path: Path) -> None:
    made = backbone(*MODELS["dinov2 registers"])
    compared = write_checked(made, {}, tmp_path / "out", format_, "float16")
    assert len(compared) == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "parameters, float16;" in card
    assert all(f"- {line}" in card for line in compared)
    largest = max(float(figure) for line in compared for figure in re.findall(r"\d\.\de-\d+", line))
    assert 1e-4 < largest < 2e-2
    file = tmp_path / "out" / PROGRAM_FILES.get(format_, "model.safetensors")
    assert file.stat().st_size < 2.2 * sum(p.numel() for p in made.model.parameters()) + 350_000  # and the graph
    again = load_backbone(tmp_path / "out").features(images(made, 3, 5))
    assert again.patches.dtype == torch.float32
    assert torch.allclose(again.patches, made.features(images(made, 3, 5)).patches, atol=0.05)


def test_the_line_of_the_card_makes_the_model(tmp_path: Path) -> None:
    import timm

    for kind in ("dinov2 registers", "dinov3 gated"):
        made = backbone(*MODELS[kind])
        folder = tmp_path / kind.replace(" ", "-")
        write_checked(made, {}, folder, "timm")
        [line] = re.findall(r"= (timm\.create_model.*checkpoint_path=.*)\.eval\(\)", (folder / "README.md").read_text())
        model = eval(line.replace("FOLDER", str(folder)), {"timm": timm}).eval()
        ours = made.features(images(made, 3, 5))
        with torch.inference_mode():
            assert torch.allclose(model(images(made, 3, 5)), ours.cls, atol=2e-5)


def test_pixels_are_bytes() -> None:
    settings = ImageSettings()
    assert settings.normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)).shape == (1, 3, 2, 2)
    for wrong in (torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="normalise takes uint8 images"):
            settings.normalise(wrong)


def test_a_released_file_goes_through_the_door(tmp_path: Path) -> None:
    made = backbone("dinov2_vits14", {})
    save_tensors(
        dict(VisionTransformer(**complete_settings("dinov2_vits14", {})).state_dict()), tmp_path / "file.safetensors"
    )
    with pytest.raises(ValueError, match="export it with"):
        export(tmp_path / "file.safetensors", tmp_path / "out", "timm", "dinov2_vits14")
    assert load_backbone(tmp_path / "file.safetensors", "dinov2_vits14").architecture == made.architecture
